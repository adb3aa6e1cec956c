"""The cluster's jobs, with stubs of the scheduler: what is submitted, in which order, and what each job starts."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from harness import ROOT, flags, shell

STAGES = {
    **{"windows": "utils/preprocess_dataset.py", "datastore": "train_base", "index": "knn_utils.build_index"},
    **{"targets": "knn_utils.saveKNNMulti", "train": "train_mlpmem_offline", "evaluate": "evaluate_joint"},
}
TOOLS = {
    "sbatch": """number=$(($(cat "$FAKE/count" 2>/dev/null || echo 100) + 1))
echo "$number" >"$FAKE/count"
printf '%q ' "$number" "$@" >>"$FAKE/submitted"
echo >>"$FAKE/submitted"
env >"$FAKE/environment.$number"
echo "$number;cluster" """,
    "scontrol": "printf 'first\\nsecond\\n'",
    "srun": """echo "$*" >>"$FAKE/steps"
while [[ "$1" == -* ]]; do case "$1" in *=*) shift ;; *) shift 2 ;; esac; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done""",
    "python-stub": """printf '%q ' "$OMP_NUM_THREADS" "$@" >>"$FAKE/started"; echo >>"$FAKE/started" """,
    "nvidia-smi": "",
}


@pytest.fixture
def cluster(tmp_path):
    """Runs a script with stubs of the scheduler's commands; returns what it printed."""
    for name, text in TOOLS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "dstore" / "dstore_gpt2_train_1600.arrow").mkdir(parents=True)

    def run(script: str, *words: str, **environment: str) -> str:
        settings = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE": tmp_path, "LOGS": tmp_path / "logs"}
        settings |= {"MLPMEM_ROOT": ROOT, "PYTHON": tmp_path / "bin" / "python-stub", "DSTORE_DIR": tmp_path / "dstore"}
        done = shell("bash", ROOT / "scripts" / "slurm" / script, *words, cwd=tmp_path, **settings | environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = tmp_path
    return run


def lines(path: Path) -> list[list[str]]:
    return [shlex.split(line) for line in path.read_text().splitlines()]


def test_the_chain_submits_each_stage_after_those_it_needs(cluster):
    cluster("chain.sh", NODES="2", GPUS_PER_NODE="4", PARTITION="gpu", CPU_PARTITION="cpu", TIME="1:00:00")
    jobs = {}
    for number, *words in lines(cluster.folder / "submitted"):
        asked = flags(words[:-2])
        needed = asked.get("--dependency", "afterok:").removeprefix("afterok:")
        jobs[number] = (words[-1], [jobs[each][0] for each in needed.split(":") if each])
        assert words[-2] == "scripts/slurm/job.sh" and asked["--time"] == "1:00:00"
        assert asked["--partition"] == ("cpu" if words[-1] == "windows" else "gpu")
        assert words[-1] == "windows" or asked["--nodes"] == "2"
    assert list(jobs.values()) == [
        *(("windows", []), ("datastore", ["windows"]), ("datastore", ["windows"]), ("index", ["datastore"])),
        *(("targets", ["index"]), ("train", ["targets", "datastore"]), ("evaluate", ["train"])),
    ]
    environments = [(cluster.folder / f"environment.{number}").read_text() for number in jobs]
    stores = [text.split("\nDSTORE_DIR=")[1].splitlines()[0] for text in environments[1:3]]
    assert stores[0] != stores[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_launches_its_stage_on_every_machine(stage, cluster):
    job = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "GPUS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "OMP_NUM_THREADS": "",
    }
    cluster("job.sh", stage, **job)
    started = [words for words in lines(cluster.folder / "started") if "-c" not in words]
    assert all(STAGES[stage] in words for words in started)
    if stage == "windows":
        assert len(started) == 1
        return
    for rank, (threads, *words) in enumerate(started):
        launch = " ".join(words[: words.index("-m", 3)])
        assert f"--num_machines 2 --num_processes 8 --machine_rank {rank} --main_process_ip first" in launch
        assert threads == "8" and "--main_process_port 20007" in launch
    assert len(started) == 2 and "--cpus-per-task 32" in (cluster.folder / "steps").read_text()


@pytest.mark.parametrize(
    ("nodes", "gpus", "steps", "windows"), [(1, 8, "1", "16"), (1, 4, "2", "16"), (2, 2, "2", "16"), (2, 8, "1", "8")]
)
def test_a_step_has_the_papers_128_windows(cluster, nodes, gpus, steps, windows):
    cluster("job.sh", "train", SLURM_JOB_NUM_NODES=str(nodes), GPUS_PER_NODE=str(gpus))
    passed = flags(lines(cluster.folder / "started")[-1])
    assert (passed["--gradient_accumulation_steps"], passed["--per_device_train_batch_size"]) == (steps, windows)
