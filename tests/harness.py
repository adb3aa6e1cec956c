"""How tests run things: commands in this process, in one of their own, or forked at once; shell scripts with a stub.

A start of Python with torch takes seconds, and some tests start dozens of processes: `Command` forks them from a server
that has imported the libraries. Each is a process like any other: it has its own pid, its own files for output, can be
killed, and several can form a distributed run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread: tiny tensors gain nothing by more, and a child of a process whose OpenMP threads have run would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = GOLDEN / "preprocess" / "tokenizer"
FAMILIES = ("gpt2", "llama", "mistral")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch.distributed", "transformers.models.llama.modeling_llama", "accelerate", "datasets"),
        *("matplotlib.figure", "knn_utils.saveKNNMulti", "knn_utils.build_index"),
        *("training.trainer", "utils.text_files", "models.mlpLlama", "train_base", "faiss"),
    ]
)
# Calls that change what is on disk for good; a kill before the n-th of them hits each gap between two.
STEPS = ("replace", "rename", "fsync", "unlink", "rmdir")
PATIENCE = 600


def run(*arguments: object, check: bool = True, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python …` in a process of its own. With `check`, a failure shows the process's output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def command(module: str, *arguments: object) -> None:
    """Run a command's `main` in this process, as its command line would."""
    before = sys.argv
    sys.argv = [module, *map(str, arguments)]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before


def refused(*arguments: object, **environment: str) -> str:
    """Run `python …`, expect bad input: exit status 2, one line on stderr, no traceback. Returns the line."""
    done = run(*arguments, check=False, **environment)
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def refused_here(module: str, *arguments: object) -> str:
    """Like `refused`, in this process: the text of the InputError that `main` raises."""
    from utils.errors import InputError

    with pytest.raises(InputError) as caught:
        command(module, *arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


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
    log: Path,
    processes: int,
    module: str,
    *arguments: object,
    hooks: dict[int, tuple[Callable, ...]] | None = None,
    environment: dict[str, str] | None = None,
) -> list[Command]:
    """The command as one run of several processes, as a launcher starts them, but without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
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


def shell(*words: object, cwd: Path = ROOT, **environment: object) -> subprocess.CompletedProcess:
    """Run a shell command with `environment` added; settings of the caller's that scripts read are left out."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "HF_HUB_OFFLINE") if name in os.environ}
    kept |= {"VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", "none"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=kept | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def stub_python(folder: Path, *, fails: str = "no command") -> Path:
    """A program that appends its arguments, one a line, to `calls` beside it; exits with 7 where one is `fails`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python-stub"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *device_count*) nvidia-smi | wc -l; exit ;; *torch_dtype=sys*) echo float32; exit ;; esac\n'
        f"{{ printf '%s\\n' \"$@\"; echo ----; }} >> '{folder}/calls'\n"
        f'for word in "$@"; do [ "$word" != \'{fails}\' ] || exit 7; done\n'
    )
    program.chmod(0o755)
    return program


def stub_cards(folder: Path, cards: int) -> dict[str, str]:
    """The PATH of a machine of 64 cores whose `nvidia-smi` lists so many GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"nvidia-smi": "\n".join(["echo GPU"] * cards), "nproc": "echo 64"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(program: Path) -> list[list[str]]:
    """The argument lists of each call of the stub, in order."""
    path = program.parent / "calls"
    if not path.exists():
        return []
    return [call.splitlines() for call in path.read_text().split("----\n") if call]


def flags(call: list[str]) -> dict[str, str]:
    """{flag: its values in one string} of a call; a launcher before `-m command` is left out."""
    begin = max(index for index, word in enumerate(call) if word == "-m") if "-m" in call else 0
    found: dict[str, str] = {}
    name = ""
    for word in call[begin:]:
        if word.startswith("--"):
            name = word
            found[name] = ""
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found


def ran(folder: Path, script: object, *words: object, cwd: Path = ROOT, **environment: object) -> tuple[str, list]:
    """(what a script printed, the stub's calls) of a run that succeeds; running again in `folder` adds to the calls."""
    program = stub_python(folder)
    done = shell("bash", script, *words, cwd=cwd, PYTHON=program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, calls(program)
