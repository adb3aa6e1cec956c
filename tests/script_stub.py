"""Shell scripts run with a stand-in for Python that writes down what it was called with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from conftest import ROOT


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
        f"{{ printf '%s\\n' \"$@\"; echo ----; }} >> '{folder}/calls'\n"
        f'for word in "$@"; do [ "$word" != \'{fails}\' ] || exit 7; done\n'
    )
    program.chmod(0o755)
    return program


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
