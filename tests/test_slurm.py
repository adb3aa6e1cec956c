"""The cluster's jobs, with stand-ins for the scheduler: what is submitted, in which order, and what each job starts."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from harness import ROOT, shell

JOBS = ("windows", "datastore", "index", "targets", "train", "evaluate")
SBATCH = """#!/bin/bash
number=$(($(cat "$FAKE/count" 2>/dev/null || echo 100) + 1))
echo "$number" >"$FAKE/count"
printf '%q ' "$number" "$@" >>"$FAKE/submitted"
echo >>"$FAKE/submitted"
env >"$FAKE/environment.$number"
echo "$number;cluster"
"""
SCONTROL = """#!/bin/bash
printf 'first\\nsecond\\n'
"""
SRUN = """#!/bin/bash
echo "$*" >>"$FAKE/steps"
while [[ "$1" == -* ]]; do case "$1" in *=*) shift ;; *) shift 2 ;; esac; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done
"""


@pytest.fixture
def cluster(tmp_path):
    """Runs a script with stand-ins of the scheduler's commands; returns what it printed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(script: str, **environment: str) -> str:
        settings = {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE": tmp_path, "LOGS": tmp_path / "logs"}
        done = shell(
            "bash", ROOT / "scripts" / "slurm" / script, cwd=tmp_path, MLPMEM_ROOT=ROOT, **settings | environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = tmp_path
    return run


def submitted(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "submitted").read_text().splitlines()]


def test_the_chain_submits_each_stage_after_those_it_needs(cluster):
    machine = {"GPUS_PER_NODE": "4", "CPUS_PER_GPU": "12", "MEMORY_PER_GPU": "20", "NUM_PROC": "6"}
    cluster("chain.sh", PARTITION="gpu", CPU_PARTITION="cpu", ACCOUNT="us", NODES="4", **machine)
    jobs = submitted(cluster.folder)
    stages = [Path(job[-1]).stem for job in jobs]
    assert stages == ["windows", "datastore", "datastore", "index", "targets", "train", "evaluate"]
    needs = [job[job.index("--dependency") + 1] if "--dependency" in job else "" for job in jobs]
    number = {place: job[0] for place, job in enumerate(jobs)}
    after = [(), (0,), (0,), (1,), (3,), (4, 2), (5,)]
    assert needs == ["afterok:" + ":".join(number[one] for one in those) if those else "" for those in after]
    for stage, job in zip(stages, jobs, strict=True):
        asked = dict(pairwise(job))
        names = ("--gpus-per-node", "--cpus-per-task", "--mem")
        wanted = [None, "6", None] if stage == "windows" else ["4", "48", "80G"]
        assert [asked.get(name) for name in names] == wanted
        assert job[job.index("--partition") + 1] == ("cpu" if stage == "windows" else "gpu")


def test_the_jobs_of_a_chain_hand_files_on(cluster):
    cluster("chain.sh", MODEL="student", MODEL_TO_SAVE="teacher", EPOCHS="3")
    jobs = submitted(cluster.folder)
    settings = []
    for job in jobs:
        lines = (cluster.folder / f"environment.{job[0]}").read_text().splitlines()
        settings.append(dict(line.split("=", 1) for line in lines if "=" in line))
    windows, teacher, student, index, targets, train, evaluate = settings
    assert windows["OUTPUT_DIR"] == teacher["DATASET"] == train["DATASET"] != windows["DATASET"]
    assert (teacher["MODEL_TO_SAVE"], student["MODEL_TO_SAVE"]) == ("teacher", "student")
    assert index["DSTORE_PATH"] == targets["DSTORE_PATH"] and index["INDEX_PATH"] == targets["INDEX_PATH"]
    assert index["DSTORE_PATH"].startswith(teacher["DSTORE_DIR"] + "/")
    assert train["STUDENT_DSTORE_PATH"].startswith(student["DSTORE_DIR"] + "/")
    assert targets["OUTPUT_PATH"] == train["KNN_SAVE_PATH"]
    assert evaluate["KNN_PATH"] == train["OUTPUT_DIR"] + "/epoch_3"


@pytest.mark.parametrize("job", JOBS)
def test_a_job_starts_its_stage_on_every_machine_with_flags_that_are_known(cluster, job):
    program = cluster.folder / "python"
    program.write_text('#!/bin/bash\nprintf "%q " "$@" >>"$FAKE/started"\necho >>"$FAKE/started"\n')
    program.chmod(0o755)
    machines = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "GPUS_PER_NODE": "4"}
    cluster(f"{job}.sh", PYTHON=str(program), **machines)
    started = [shlex.split(line) for line in (cluster.folder / "started").read_text().splitlines()]
    if job == "windows":
        assert len(started) == 1 and started[0][0] == "utils/preprocess_dataset.py"
        return
    assert len(started) == 2
    for rank, line in enumerate(started):
        assert line[:2] == ["-m", "accelerate.commands.launch"]
        launch, stage = line[2 : line.index("-m", 2)], line[line.index("-m", 2) + 1 :]
        launched = read_by_accelerate([*launch, "-m", *stage])
        assert (launched.nnodes, launched.nproc_per_node, launched.node_rank) == ("2", "4", rank)
        assert launched.rdzv_backend == "static" and launched.rdzv_endpoint == "first:20007"
        known = known_flags(stage[0])
        assert {word for word in stage[1:] if word.startswith("--")} <= known
        assert ("--knn_gpu" in stage) == (job in ("index", "targets"))
    assert started[0][started[0].index("--machine_rank") + 2 :] == started[1][started[1].index("--machine_rank") + 2 :]


@pytest.mark.parametrize(("given", "threads"), [("", "8"), ("3", "3")])
def test_a_job_hands_cpus_and_memory_on_and_each_process_gets_its_share_of_the_cores(cluster, given, threads):
    program = cluster.folder / "python"
    program.write_text('#!/bin/bash\necho "$OMP_NUM_THREADS" >>"$FAKE/threads"\n')
    program.chmod(0o755)
    job = {"SLURM_CPUS_PER_TASK": "32", "SLURM_MEM_PER_NODE": "81920", "GPUS_PER_NODE": "4", "OMP_NUM_THREADS": given}
    cluster("train.sh", PYTHON=str(program), **job)
    assert "--cpus-per-task 32 --mem 81920 bash" in (cluster.folder / "steps").read_text()
    assert (cluster.folder / "threads").read_text().split() == [threads] * 2


@pytest.mark.parametrize(
    ("nodes", "gpus", "steps", "windows"), [(1, 8, "1", "16"), (1, 4, "2", "16"), (2, 2, "2", "16"), (2, 8, "1", "8")]
)
def test_a_step_has_the_papers_128_windows_on_any_number_of_gpus(cluster, nodes, gpus, steps, windows):
    job = {"SLURM_JOB_NUM_NODES": str(nodes), "GPUS_PER_NODE": str(gpus)}
    cluster("train.sh", PYTHON="true", **job)
    words = (cluster.folder / "steps").read_text().split()
    asked = [
        words[words.index(name) + 1] for name in ("--gradient_accumulation_steps", "--per_device_train_batch_size")
    ]
    assert asked == [steps, windows]


def read_by_accelerate(words: list[str]) -> argparse.Namespace:
    """What accelerate makes of a launch's words, with all that it hands to torchrun."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    prepare_multi_gpu_env(arguments)
    return arguments


def test_a_job_of_one_machine_starts_a_process_for_each_of_its_gpus(cluster):
    program = cluster.folder / "python"
    program.write_text('#!/bin/bash\nprintf "%q " "$@" >>"$FAKE/started"\necho >>"$FAKE/started"\n')
    program.chmod(0o755)
    cluster("train.sh", PYTHON=str(program), SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="7", GPUS_PER_NODE="4")
    first = shlex.split((cluster.folder / "started").read_text().splitlines()[0])
    launched = read_by_accelerate(first[2:])
    assert (launched.num_machines, launched.num_processes, int(launched.nproc_per_node)) == (1, 4, 4)
    assert launched.training_script == "train_mlpmem_offline"


def known_flags(module: str) -> set[str]:
    """The flags that a command defines, by its dataclasses."""
    from transformers import TrainingArguments

    found = [value for value in vars(importlib.import_module(module)).values() if dataclasses.is_dataclass(value)]
    found += [TrainingArguments] if module == "train_base" else []
    return {f"--{field.name}" for one in found for field in dataclasses.fields(one)}


def test_the_root_is_found_where_the_scheduler_runs_a_copy_of_the_script(tmp_path):
    copy = tmp_path / "job_script"
    copy.write_text((ROOT / "scripts" / "slurm" / "windows.sh").read_text())
    done = shell("bash", copy, cwd=tmp_path, SLURM_SUBMIT_DIR=ROOT, PYTHON="echo")
    assert done.returncode == 0 and "utils/preprocess_dataset.py" in done.stdout, done.stderr
