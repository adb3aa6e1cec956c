"""Commands in processes of their own that start at once: forked from a server that has imported the libraries.

A start of Python with torch takes seconds; these tests start dozens of processes. Each is a process like any other: it
has its own pid, its own files for output, can be killed, and several can form a distributed run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conftest import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch.distributed", "transformers.models.llama.modeling_llama", "accelerate", "datasets"),
        *("matplotlib.figure", "knn_utils.saveKNNMulti", "knn_utils.build_index"),
        *("training.rows", "utils.text_files", "models.mlpLlama", "train_base", "faiss"),
    ]
)
# Calls that change what is on disk for good; a kill before the n-th of them hits each gap between two.
STEPS = ("replace", "rename", "fsync", "unlink", "rmdir")
PATIENCE = 600


class Command:
    """A running command. `log`: its standard output and error."""

    def __init__(
        self,
        log: Path,
        module: str,
        *arguments: object,
        hook: tuple[Callable, ...] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        work = (str(log), module, [str(item) for item in arguments], hook, environment or {})
        self.process = CONTEXT.Process(target=_run, args=work)
        self.process.start()

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"did not end in {PATIENCE} s:\n{self.text()[-3000:]}")
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def done(self) -> str:
        """Wait for its success; returns what it printed."""
        status = self.wait()
        assert status == 0, f"exit {status}\n{self.text()[-4000:]}"
        return self.text()

    def refused(self) -> str:
        """Wait for exit status 2 with one line and no traceback; returns the line."""
        status, text = self.wait(), self.text()
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in text, f"exit {status}\n{text[-4000:]}"
        return lines[0]


def together(
    log: Path, processes: int, module: str, *arguments: object, hooks: dict[int, tuple[Callable, ...]] | None = None
) -> list[Command]:
    """The command as one run of several processes, as a launcher starts them, but without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Command(
            log.with_name(f"{log.name}.{rank}"),
            module,
            *arguments,
            hook=(hooks or {}).get(rank),
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def _run(log: str, module: str, arguments: Sequence[str], hook: tuple | None, environment: dict) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from utils.cli import command

    main = importlib.import_module(module).main
    if hook is not None:
        hook[0](*hook[1:])
    sys.argv = [module, *arguments]
    try:
        command(main)()
    finally:
        if _at_end is not None:
            _at_end()


_at_end: Callable[[], None] | None = None


def _watch(before: Callable[[int, str], None]) -> None:
    """Call `before(n, name)` before the n-th step on disk of this process."""
    seen = 0

    def watched(name: str, step: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal seen
            before(seen, name)
            seen += 1
            return step(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, watched(name, getattr(os, name)))


def note_steps(path: str) -> None:
    """Hook: the names of the steps on disk, in order, go to `path` at the end."""
    global _at_end
    names: list[str] = []
    _watch(lambda _, name: names.append(name))
    _at_end = lambda: Path(path).write_text(" ".join(names))  # noqa: E731


def kill_before(step: int, number: int) -> None:
    """Hook: the process is sent signal `number` before its step on disk number `step`."""

    def before(seen: int, _: str) -> None:
        if seen == step:
            os.kill(os.getpid(), number)
            time.sleep(60)

    _watch(before)


def pause_before(step: int, mark: str) -> None:
    """Hook: before that step the file `mark` appears and the process stands still."""

    def before(seen: int, _: str) -> None:
        if seen == step:
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
            time.sleep(600)

    _watch(before)
