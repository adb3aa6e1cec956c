"""The shell scripts: settings from the environment, the paper's values without them, any folder, failures named."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import venv
from pathlib import Path

import pytest
from harness import ROOT, calls, flags, ran, shell, stub_cards, stub_python

from utils import cli

SCRIPTS = sorted(path for room in ("scripts", "downstream") for path in (ROOT / room).glob("*.sh"))
RUNNABLE = [
    path
    for path in SCRIPTS
    if path.name not in ("common.sh", "stages.sh", "train_memory.sh", "quickstart.sh", "test.sh")
    and path.name not in ("ask.sh", "remember.sh")  # tests/test_documents.py
]
VENV_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
LAUNCHER = "accelerate.commands.launch"

# What each script passes without settings: the values of the original's scripts, and of the paper.
PAPER = {
    "scripts/preprocess_dataset.sh": {"--dataset_config_name": "wikitext-103-raw-v1", "--num_proc": "1"},
    "scripts/evaluate_base.sh": {
        **{"--per_device_eval_batch_size": "8", "--eval_subset": "test", "--output_dir": "tmp/"},
        **{"--do_eval": "", "--report_to": "none"},
    },
    "scripts/evaluate_joint.sh": {
        **{"--do_test": "", "--dataset_split_name": "test", "--knn_temp": "1", "--lmbda": "0.25"},
        **{"--per_device_eval_batch_size": "8", "--knn_generator_path": "Rubin-Wei/MLPMemory-gpt2-large"},
    },
    "scripts/train_mlpmem_offline.sh": {
        **{"--learning_rate": "5e-4", "--num_train_epochs": "50", "--num_warmup_steps": "2000", "--alpha": "0.5"},
        **{"--seed": "42", "--dataset_split_name": "train", "--base_model_name": "large", "--report_to": "none"},
        **{"--checkpointing_steps": "epoch", "--per_device_train_batch_size": "16", "--weight_decay": "0.0"},
        **{"--lr_scheduler_type": "linear"},
    },
    "downstream/eval_qa.sh": {"--lmbda": "0.50", "--use_neural_knn": "", "--do_eval": ""},
}
PAPER["scripts/train_mlpmem_online.sh"] = PAPER["scripts/train_mlpmem_offline.sh"]


def modules(found: list[list[str]]) -> list[str]:
    """The module of each call, behind a launcher too."""
    found = [call[call.index("-m", 2) :] if LAUNCHER in call else call for call in found]
    return [call[1] if call[0] == "-m" else Path(call[0]).stem for call in found]


@pytest.mark.parametrize("script", PAPER)
def test_without_settings_a_script_passes_the_papers_values(script, tmp_path):
    _, found = ran(tmp_path, script)
    passed = flags(found[0])
    assert {name: passed.get(name) for name in PAPER[script]} == PAPER[script]


def test_the_pipeline_hands_each_file_to_the_next_stage(tmp_path):
    stores = tmp_path / "dstore"
    (stores / "dstore_gpt2_train_1600.arrow").mkdir(parents=True)
    _, found = ran(tmp_path / "stub", "scripts/save_pipeline.sh", DSTORE_DIR=stores)
    save, build, search = map(flags, found)
    assert save["--eval_subset"] == "train" and "--save_knnlm_dstore" in save
    assert (build["--ncentroids"], build["--code_size"], build["--probe"]) == ("4096", "64", "32")
    wanted = {"--k": "1024", "--knn_temp": "16", "--probe": "32", "--batch_size": "16000", "--ignore_first": "True"}
    assert wanted.items() <= search.items()
    assert build["--dstore_path"] == search["--dstore_path"] == str(stores / "dstore_gpt2_train_1600.arrow")
    assert search["--index_path"] == build["--index_path"] == str(stores / "train_1600.index")


def test_settings_come_from_the_environment_and_the_command_line(tmp_path):
    settings = {"MODEL": "my model", "KNN_PATH": "memory", "DATASET": "windows", "LAMBDA": "0.1 0.2", "SUBSET": "dev"}
    text, (call,) = ran(tmp_path, "scripts/evaluate_joint.sh", "--max_eval_samples", 5, **settings)
    passed = flags(call)
    assert passed["--model_name_or_path"] == "my model" and passed["--knn_generator_path"] == "memory"
    assert passed["--lmbda"] == "0.1 0.2" and passed["--dataset_split_name"] == "dev"
    assert passed["--max_eval_samples"] == "5" and "my\\ model" in text


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_a_script_runs_from_any_folder_with_flags_that_exist(script, tmp_path, monkeypatch):
    for side in ("teacher", "student", ".", *(f"block{number}" for number in (-1, -6, -12, -20))):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    settings = {"OUTPUT": tmp_path / "out", "DSTORE_DIR": tmp_path / "out" / "work", "TRAIN": "1"}
    if script.name == "serve.sh":  # by itself it asks the quickstart's folder, with a real Python
        settings |= {"MODEL": "a/base", "KNN_PATH": "a/memory"}
    words = ["layer_position"] if script.name == "ablations.sh" else []
    _, found = ran(tmp_path / "stub", script, *words, cwd=tmp_path, **settings)
    assert found
    for call in found:
        check_flags(call, monkeypatch)


def check_flags(call: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a call whose flags the real command does not take."""
    words = call[max(number for number, word in enumerate(call) if word == "-m") + 1 :] if "-m" in call else call
    module = words[0].removesuffix(".py").replace("/", ".")
    if module in ("models.export", "transformers.cli.transformers", "lm_eval", "downstream.report"):  # own parsers
        return

    class ParsedError(Exception):
        pass

    def only_parse(*dataclass_types, description, **options):
        parse(*dataclass_types, description=description, **options)
        raise ParsedError

    parse, main = cli.parse, importlib.import_module(module)
    with monkeypatch.context() as patch:
        for place in (cli, main):
            patch.setattr(place, "parse", only_parse)
        patch.setattr(sys, "argv", [module, *words[1:]])
        with pytest.raises(ParsedError):
            main.main()


def launched(call: list[str]) -> list[str]:
    """The words of a call before the launched module."""
    return call[: call.index("-m", 2)] if LAUNCHER in call else []


@pytest.mark.parametrize(("cards", "steps"), [(0, "1"), (1, "8"), (3, "3"), (4, "2"), (8, "1")])
def test_gpus_are_launched_on_and_a_step_keeps_its_windows(cards, steps, tmp_path):
    machine = stub_cards(tmp_path / "bin", cards) if cards else {}
    _, (call,) = ran(tmp_path, "scripts/train_mlpmem_offline.sh", **machine)
    assert bool(launched(call)) == (cards > 0) and flags(call)["--gradient_accumulation_steps"] == steps
    assert flags(call)["--torch_dtype"] == "auto"


def test_gpus_that_torch_cannot_use_are_an_error_unless_the_cpu_is_meant(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use the GPUs here")
    machine = stub_cards(tmp_path / "bin", 2)
    machine["PATH"] = f"{machine['PATH']}{os.pathsep}{VENV_PATH}"
    done = shell("bash", "scripts/train_mlpmem_offline.sh", **machine, PYTHON=sys.executable)  # a build without CUDA
    assert done.returncode == 2 and "2 GPUs" in done.stderr and "MLPMEM_CPU=1" in done.stderr
    _, (call,) = ran(tmp_path, "scripts/train_mlpmem_offline.sh", **machine, MLPMEM_CPU=1)
    assert not launched(call)


def test_a_configuration_or_a_launcher_can_be_named(tmp_path):
    _, (call,) = ran(tmp_path / "a", "scripts/train_mlpmem_online.sh", ACCELERATE_CONFIG="accelerate_config/cpu.yaml")
    assert launched(call) == ["-m", LAUNCHER, "--config_file", "accelerate_config/cpu.yaml"]
    program = stub_python(tmp_path / "b")
    _, (call,) = ran(tmp_path / "b", "scripts/evaluate_base.sh", LAUNCHER=f"{program} first words")
    assert call[:4] == ["first", "words", "-m", "train_base"]


def test_index_and_search_take_the_gpus_and_a_share_of_the_cores(tmp_path):
    (tmp_path / "dstore_gpt2_train_8.arrow").mkdir()
    program = stub_python(tmp_path / "stub")
    program.write_text(f"{program.read_text()}echo $OMP_NUM_THREADS >> {tmp_path}/threads\n")
    settings = {"DSTORE_DIR": tmp_path, "PYTHON": program, **stub_cards(tmp_path / "bin", 4)}
    for given in ("", "3"):
        done = shell("bash", "scripts/save_pipeline.sh", **settings, OMP_NUM_THREADS=given)
        assert done.returncode == 0, done.stderr
    assert ["--knn_gpu" in call for call in calls(program)] == [False, True, True] * 2
    assert (tmp_path / "threads").read_text().split() == ["16"] * 3 + ["3"] * 3


STUB_PIP = """
import pathlib, sys
text = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text()
held = [f"{name} as tested" for name in ("numpy", "torch") if f"\\n{name}==" in text]
print("asked for", ", ".join([sys.argv[-1], *held]))
if "cpu" in sys.argv[-1]:
    (pathlib.Path(__file__).parent.parent / "faiss.py").write_text("")
"""


def test_an_environment_keeps_its_faiss_and_torch(tmp_path):
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__main__.py").write_text(STUB_PIP)
    active = {"VIRTUAL_ENV": tmp_path / "env", "PATH": f"{tmp_path}/env/bin{os.pathsep}{os.environ['PATH']}"}

    def install(extras: str) -> list[str]:
        done = shell("bash", "-c", f". scripts/common.sh; install '{extras}'", **active)
        assert done.returncode == 0, done.stderr
        return re.findall("^asked for (.*)$", done.stdout, re.MULTILINE)

    bare = [".[cpu,dev], numpy as tested, torch as tested"]
    assert install("dev") == bare and install("dev") == []
    (packages / "torch.py").touch()
    (packages / "faiss.py").write_text("conda = True")
    assert install("dev") == [] and install("") == ["."]
    assert (packages / "faiss.py").read_text() == "conda = True"


def test_the_first_failure_stops_a_script_and_names_its_stage(tmp_path):
    program = stub_python(tmp_path / "stub", fails="knn_utils.build_index")
    (tmp_path / "dstore_gpt2_train_8.arrow").mkdir()
    done = shell("bash", "scripts/save_pipeline.sh", PYTHON=program, DSTORE_DIR=tmp_path)
    assert done.returncode == 7 and len(calls(program)) == 2
    assert "build index" in done.stderr.splitlines()[-1]


def test_a_user_error_ends_a_script_with_the_commands_line(tmp_path):
    done = shell("bash", "scripts/evaluate_base.sh", PATH=VENV_PATH, MODEL=tmp_path, DATASET=tmp_path / "none")
    assert done.returncode == 2
    error, stopped = done.stderr.splitlines()[-2:]
    assert str(tmp_path / "none") in error and "evaluate base" in stopped


def reproduction(tmp_path: Path, **settings: object) -> list[list[str]]:
    """The calls of a run of the table's script with stubbed stages."""
    return ran(tmp_path / "stub", "scripts/reproduce_wikitext103.sh", OUTPUT=tmp_path / "out", **settings)[1]


EVALUATED = ["preprocess_dataset", "train_base", "train_base", "train_base", "evaluate_joint", "downstream.report"]


def test_the_papers_table_takes_published_models_and_continues(tmp_path):
    found = reproduction(tmp_path)
    assert modules(found) == EVALUATED
    assert [flags(call).get("--model_name_or_path") for call in found[1:5]] == [
        *("openai-community/gpt2-large", "Rubin-Wei/gpt2-large-finetuned-wikitext103"),
        *("Clover-Hill/gpt2-xl-finetuned-wikitext103", "Rubin-Wei/gpt2-large-finetuned-wikitext103"),
    ]
    assert flags(found[4])["--knn_generator_path"] == "Rubin-Wei/MLPMemory-gpt2-large"
    assert modules(reproduction(tmp_path)[6:]) == EVALUATED[-1:]
    # A changed setting runs its stage and those after it again.
    assert modules(reproduction(tmp_path, BATCH_SIZE_EVAL=2, NUM_PROC=2)[7:]) == EVALUATED
    assert modules(reproduction(tmp_path, BATCH_SIZE_EVAL=2, NUM_PROC=2, LAMBDA=0.5)[13:]) == EVALUATED[-2:]


def test_the_table_with_training_uses_teacher_and_student(tmp_path):
    for side in ("teacher", "student"):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    found = reproduction(tmp_path, TRAIN=1, XL="xl", LARGE="large", WINDOWS="windows")
    wanted = ["train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti", "train_base", "train_mlpmem_offline"]
    assert modules(found)[3:8] == wanted
    save, _, search, student, train = map(flags, found[3:8])
    assert save["--model_name_or_path"] == "xl" and student["--model_name_or_path"] == "large"
    assert train["--knn_save_path"] == search["--output_path"] and train["--num_train_epochs"] == "50"
    assert "/student/" in train["--knn_dstore_path"]
    assert flags(found[8])["--knn_generator_path"].endswith("memory/epoch_50")


MADE = {
    "alpha": (3, 1, 1, 2),
    "temperature": (3, 1, 2, 2),
    "layer_position": (6, 2, 2, 2),
    "offline_online": (3, 1, 1, 2),
}


@pytest.mark.parametrize("name", MADE)
def test_an_ablation_shares_what_its_setting_does_not_change(name, tmp_path):
    for block in (-1, -6):
        for split in ("train", "validation", "test"):
            (tmp_path / "out" / "work" / f"block{block}" / f"dstore_llama_{split}_8.arrow").mkdir(parents=True)
    settings = {"OUTPUT": tmp_path / "out", "MODEL": "base", "TEXT": "text"}
    values = {"layer_position": ["-1", "-6"], "offline_online": ["offline", "online"]}.get(name, ["0", "0.5"])
    _, found = ran(tmp_path, "scripts/ablations.sh", name, *values, **settings)
    names = modules(found)
    trained = [flags(call) for call, module in zip(found, names, strict=True) if module.startswith("train_mlpmem")]
    counted = [names.count(each) for each in ("train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti")]
    assert (*counted, len(trained)) == MADE[name] and names[-1] == "downstream.report"
    joint = [flags(call) for call, module in zip(found, names, strict=True) if module == "evaluate_joint"]
    assert [each["--dataset_split_name"] for each in joint] == ["validation", "test"] * 2
    assert joint[1]["--choose_on"] == f"{joint[0]['--output_dir']}/results.json" and "--lmbda" not in joint[1]
    _, again = ran(tmp_path, "scripts/ablations.sh", name, *values, **settings)
    assert modules(again[len(found) :]) == ["downstream.report"]


@pytest.mark.unit
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_setting_that_a_script_reads_is_listed_at_its_top(script):
    text = script.read_text()
    if script.name in ("common.sh", "stages.sh", "test.sh", "train_memory.sh"):
        pytest.skip("has no settings of its own")
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    read = set(re.findall(r"\$\{([A-Z_]+):?[-=+]", text)) - {"BASH_SOURCE", "ON_GPU", "LAUNCH"}
    assert sorted(name for name in read if not re.search(rf"\b{name}\b", head)) == []


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=VENV_PATH)
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = shell(program, "-x", *SCRIPTS, *(ROOT / "scripts" / "slurm").glob("*.sh"), PATH=VENV_PATH)
    assert done.returncode == 0, done.stdout
