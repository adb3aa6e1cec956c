"""Kill the quickstart at random moments, start it again, and compare what it ends with to an undisturbed run.

    python -m benchmarks.kill_quickstart --kills 100 --seed 1

By default with a tiny random base model and a small text, both made by the tests' fixtures, so that a start of the
chain takes about a minute. Each kill hits either everything at once, as a machine that loses power, or only the
Python process that is at work. When a run has come to its end, its table, datastores and kNN targets are compared with
the undisturbed run's, and the next run begins in a new folder, until all kills are spent.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import flag, parse
from utils.errors import InputError, command

ROOT = Path(__file__).resolve().parent.parent
# Settings of scripts/quickstart.sh for a chain of seconds; what the environment sets already stays.
SMALL = {
    "BLOCK_SIZE": "64",
    "DTYPE": "float32",
    "LAYERS": "2",
    "EPOCHS": "2",
    "WINDOWS_PER_STEP": "4",
    "K": "16",
    "INDEX_FACTORY": "IVF8,Flat",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LINES_OF_A_DOCUMENT = 8
NOT_COMPARED = ("seconds", "versions", "model", "memory", "machine", "output")


@dataclass
class KillArguments:
    """How many kills, at which moments, of what."""

    kills: int = flag(100, "kills altogether")
    seed: int = flag(1, "seed of the moments and of what is killed")
    model: str | None = flag(None, "base model; default: a tiny random one")
    text: str | None = flag(None, "text; default: the tests' small one")
    output_dir: str | None = flag(None, "folder of the runs; default: a temporary one")
    longest: float | None = flag(None, "most seconds from a start to its kill; default: a fifth of an undisturbed run")


class Attempt:
    """One start of the quickstart, in a process group of its own."""

    def __init__(self, output: Path, environment: dict[str, str]) -> None:
        self.log = output.with_name(f"{output.name}.log")
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "scripts" / "quickstart.sh")],
                cwd=ROOT,
                env={**environment, "OUTPUT": str(output)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stage(self) -> str:
        """The stage it is in, by what it printed last."""
        lines = self.log.read_bytes()[self.begin :].decode(errors="replace").splitlines()
        stages = [line[1 : line.index("]")] for line in lines if line.startswith("[") and "]" in line]
        return stages[-1] if stages else "start"

    def finished(self, seconds: float) -> bool:
        """Whether it ends within `seconds`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill_all(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        self.process.wait()

    def kill_worker(self, number: int) -> bool:
        """Kill the Python process at work; False where there is none. Then the script stops by itself."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        if not workers:
            return False
        try:
            os.kill(int(workers[-1]), number)
        except ProcessLookupError:
            return False
        self.process.wait()
        return True

    def clear(self) -> None:
        """Wait until nothing of it is left: a worker of a killed one ends a moment later."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGKILL)


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny base model and a text of some hundred documents, from the tests' fixtures."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import GOLDEN, make_base

    base = make_base("llama", folder / "base")
    lines = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
    text = folder / "text.jsonl"
    with open(text, "w", encoding="utf-8") as file:
        for start in range(0, len(lines), LINES_OF_A_DOCUMENT):
            file.write(json.dumps({"text": "".join(lines[start : start + LINES_OF_A_DOCUMENT])}) + "\n")
    return base, text


def table(output: Path) -> dict[str, Any]:
    """What a finished run's results.json says, without times and paths."""

    def compared(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: compared(part) for name, part in value.items() if name not in NOT_COMPARED}

    return compared(json.loads((output / "results.json").read_text()))


def rows_of(output: Path) -> dict[str, tuple[int, list[bytes]]]:
    """For each datastore and the kNN targets: the number of rows, and each row's digest."""
    import hashlib

    import numpy as np

    from knn_utils.datastore import Datastore, KNNTargets

    found = {}
    for path in sorted((output / "work" / "dstore").glob("dstore_*.arrow")):
        store = Datastore.open(path, verify=True)
        keys, values = store.keys(), store.vals()
        digests = [
            hashlib.sha1(key.tobytes() + value.tobytes()).digest() for key, value in zip(keys, values, strict=True)
        ]
        found[path.name] = store.rows, digests
    targets = KNNTargets.open(output / "work" / "targets", verify=True)
    rows = targets.read(0, targets.rows)
    ends = np.cumsum(rows.id_cnt)
    digests = []
    for row, (count, end) in enumerate(zip(rows.id_cnt, ends, strict=True)):
        entries = slice(int(end - count), int(end))
        content = rows.token_id[entries].tobytes() + rows.prob[entries].tobytes() + rows.label[row].tobytes()
        digests.append(hashlib.sha1(content).digest())
    found["targets"] = targets.rows, digests
    return found


def compare(expected: Path, found: Path) -> tuple[int, int, list[str]]:
    """(rows lost, rows doubled or wrong, differences of the tables) of a run against the undisturbed one."""
    lost = doubled = 0
    before, after = rows_of(expected), rows_of(found)
    differences = [f"{name}: only in one of them" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        (rows, digests), (rows_now, digests_now) = before[name], after[name]
        lost += max(rows - rows_now, 0)
        doubled += max(rows_now - rows, 0)
        wrong = sum(one != other for one, other in zip(digests, digests_now, strict=False))
        if wrong:
            differences.append(f"{name}: {wrong} of {rows} rows differ")
    one, other = table(expected), table(found)
    differences += [
        f"{name}: {one.get(name)} undisturbed, {other.get(name)} now"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
    return lost, doubled, differences


def environment_of(arguments: KillArguments, folder: Path) -> dict[str, str]:
    model, text = arguments.model, arguments.text
    if model is None or text is None:
        made = make_inputs(folder)
        model, text = model or str(made[0]), text or str(made[1])
    prefix = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    return {**SMALL, **os.environ, **prefix, "MODEL": model, "TEXT": text}


@command
def main() -> None:
    (arguments,) = parse(KillArguments, description=__doc__.split("\n")[0])
    if arguments.kills < 1:
        raise InputError(f"--kills {arguments.kills}: expected 1 or more")
    folder = Path(arguments.output_dir or tempfile.mkdtemp(prefix="kill-quickstart-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment, chance = environment_of(arguments, folder), random.Random(arguments.seed)
    print(f"seed {arguments.seed}, {arguments.kills} kills, runs in {folder}", flush=True)

    undisturbed = folder / "undisturbed"
    started = time.monotonic()
    attempt = Attempt(undisturbed, environment)
    if attempt.process.wait() != 0:
        raise InputError(f"the undisturbed run failed; see {attempt.log}")
    seconds = time.monotonic() - started
    longest = arguments.longest or seconds / 5
    print(f"undisturbed: {seconds:.0f} s; kills come up to {longest:.1f} s after a start", flush=True)

    kills = run = lost = doubled = failures = 0
    while kills < arguments.kills:
        run += 1
        output = folder / f"run-{run}"
        while True:
            attempt = Attempt(output, environment)
            moment = chance.uniform(0, longest)
            everything, number = chance.random() < 0.5, chance.choice([signal.SIGKILL, signal.SIGTERM])
            if attempt.finished(moment if kills < arguments.kills else 3600):
                break
            stage = attempt.stage()
            if everything:
                attempt.kill_all(number)
            elif not attempt.kill_worker(number):
                # Between two stages nothing of Python's runs: this start goes on to its next moment.
                attempt.kill_all(number)
                everything = True
            attempt.clear()
            kills += 1
            what = "everything" if everything else "the worker"
            print(f"kill {kills}: run {run}, {moment:.2f} s, {number.name} of {what} in [{stage}]", flush=True)
        if attempt.process.returncode != 0:
            failures += 1
            print(f"run {run}: a restart ended with status {attempt.process.returncode}; see {attempt.log}", flush=True)
            continue
        missing, extra, differences = compare(undisturbed, output)
        lost, doubled, failures = lost + missing, doubled + extra, failures + bool(differences)
        print(f"run {run}: finished, {'; '.join(differences) if differences else 'equal to the undisturbed run'}")
    print(
        f"{kills} kills in {run} runs: {lost} rows lost, {doubled} rows doubled, {failures} runs that differ or failed"
    )
    if lost or doubled or failures:
        raise InputError(f"not every run ended as the undisturbed one; the runs are in {folder}")


if __name__ == "__main__":
    main()
