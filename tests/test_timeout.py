"""How long the processes of a run wait for each other."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from datetime import timedelta

import pytest
from harness import ROOT

from utils.cli import longest_wait
from utils.errors import InputError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("words", "expected", "backend"),
    [
        (["train_mlpmem_offline"], None, None),
        (["train_base", "--do_train"], None, None),
        (["evaluate_joint"], timedelta(days=7), "gloo"),
        (["training.gate"], timedelta(days=7), "gloo"),
    ],
)
def test_training_waits_as_torch_does_and_other_stages_for_days_over_gloo(words, expected, backend, monkeypatch):
    groups = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda **options: groups.append(options))
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__")
        assert ended.value.code == 0
        monkeypatch.setenv("MLPMEM_TIMEOUT_MINUTES", "90")
    assert [group["timeout"] for group in groups] == [expected, timedelta(minutes=90)]
    assert {group.get("backend") for group in groups} == {backend} and not any(group["cpu"] for group in groups)


@pytest.mark.parametrize("minutes", ["0", "1.5", "soon"])
def test_a_timeout_that_is_no_number_is_refused(minutes, monkeypatch):
    monkeypatch.setenv("MLPMEM_TIMEOUT_MINUTES", minutes)
    with pytest.raises(InputError, match="MLPMEM_TIMEOUT_MINUTES"):
        longest_wait(training=False)


def test_a_process_that_dies_ends_the_wait_of_the_other():
    code = "import os, sys; from utils.cli import init_group; state = init_group(training=False); state.wait_for_everyone()\n"
    code += "if state.process_index == 1: os._exit(9)\n"
    code += "state.wait_for_everyone()"
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    environment = os.environ | together | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 9 and processes[0].returncode == 1, errors
