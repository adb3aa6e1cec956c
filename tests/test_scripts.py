"""The shell scripts: settings from the environment, the paper's values without them, any folder, failures named."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import venv
from pathlib import Path

import pytest
from harness import ROOT, calls, command, flags, ran, shell, stub_cards, stub_python
from tiny_models import make_base, tiny_memory
from transformers import AutoModelForCausalLM

from utils import cli

SCRIPTS = sorted(path for room in ("scripts", "scripts/ablations", "downstream") for path in (ROOT / room).glob("*.sh"))
VENV_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# What each script passes where nothing is set: the values of the original's scripts, and of the paper.
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
    "downstream/eval_qa.sh": {"--lmbda": "0.50", "--knn_temp": "1", "--use_neural_knn": "", "--do_eval": ""},
}
PAPER["scripts/train_mlpmem_online.sh"] = PAPER["scripts/train_mlpmem_offline.sh"]


def printed(text: str) -> list[str]:
    """The commands that a script said it would run."""
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("script", PAPER)
def test_without_settings_a_script_passes_the_values_of_the_paper(script, tmp_path):
    text, (call,) = ran(tmp_path, script)
    found = flags(call)
    assert {name: found.get(name) for name in PAPER[script]} == PAPER[script]
    (line,) = printed(text)
    assert line.split()[0] == str(tmp_path / "python-stub") and line.split()[-1] == call[-1]


def test_the_pipeline_passes_the_values_of_the_paper_and_hands_each_file_to_the_next_stage(tmp_path):
    stores = tmp_path / "dstore"
    (stores / "dstore_gpt2_train_1600.arrow").mkdir(parents=True)
    text, found = ran(tmp_path / "stub", "scripts/save_pipeline.sh", DSTORE_DIR=stores)
    save, build, search = map(flags, found)
    assert save["--eval_subset"] == "train" and "--save_knnlm_dstore" in save
    assert (build["--ncentroids"], build["--code_size"], build["--probe"]) == ("4096", "64", "32")
    wanted = {"--k": "1024", "--knn_temp": "16", "--probe": "32", "--batch_size": "16000", "--ignore_first": "True"}
    assert wanted.items() <= search.items()
    assert build["--dstore_path"] == search["--dstore_path"] == str(stores / "dstore_gpt2_train_1600.arrow")
    assert search["--index_path"] == str(stores / "train_1600.index")
    assert len(printed(text)) == 3


def test_settings_come_from_the_environment_and_further_flags_from_the_command_line(tmp_path):
    settings = {"MODEL": "my model", "KNN_PATH": "memory", "DATASET": "windows", "LAMBDA": "0.1 0.2", "SUBSET": "dev"}
    text, (call,) = ran(tmp_path, "scripts/evaluate_joint.sh", "--max_eval_samples", 5, **settings)
    found = flags(call)
    assert found["--model_name_or_path"] == "my model" and found["--knn_generator_path"] == "memory"
    assert found["--lmbda"] == "0.1 0.2" and found["--dataset_split_name"] == "dev"
    assert found["--max_eval_samples"] == "5"
    assert "my\\ model" in printed(text)[0]


# The quickstart and the tests' script make an environment first; common.sh is a part of the others.
RUNNABLE = [path for path in SCRIPTS if path.name not in ("common.sh", "quickstart.sh", "test.sh")]


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_scripts_run_from_any_folder_print_what_they_run_and_give_flags_that_there_are(script, tmp_path, monkeypatch):
    for side in ("teacher", "student", ".", *(f"block{number}" for number in (-1, -6, -12, -20))):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    settings = {"OUTPUT": tmp_path / "out", "DSTORE_DIR": tmp_path / "out" / "work"}
    settings |= {"WEB_TEXT": "web.txt", "WIKI_TEXT": "wiki.txt"}
    if script.name == "serve.sh":  # by itself it asks the quickstart's folder, with a real Python
        settings |= {"MODEL": "a/base", "KNN_PATH": "a/memory"}
    found = []
    for name, word, folder in (("mine", script.name, script.parent), ("other", script, tmp_path)):
        text, called = ran(tmp_path / name, word, cwd=folder, **settings)
        found.append(called)
        for marks in (tmp_path / "out").rglob("done"):
            shutil.rmtree(marks)
        # A command of a script that another one calls is printed by both.
        assert len(printed(text)) >= len(called) > 0
    assert [len(call) for call in found[0]] == [len(call) for call in found[1]]
    assert flags(found[0][0]) == flags(found[1][0])
    for call in found[0]:
        check_flags(call, monkeypatch)


def check_flags(call: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a call whose flags the real command does not take."""
    words = call[max(number for number, word in enumerate(call) if word == "-m") + 1 :] if "-m" in call else call
    module = words[0].removesuffix(".py").replace("/", ".")
    if module in ("models.export", "transformers.cli.transformers", "lm_eval"):  # have parsers of their own
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


def gpu_page() -> str:
    """The commands of the README's page for GPUs."""
    page = (ROOT / "README.md").read_text().split("## Your first hour on a GPU\n")[1]
    return page.split("```bash\n")[1].split("```")[0]


@pytest.mark.parametrize(("cards", "line"), [(1, ""), (8, "ACCELERATE_CONFIG"), (8, "")])
def test_the_scripts_of_the_page_for_gpus_run_one_after_the_other_on_what_the_one_before_wrote(
    cards, line, tmp_path, monkeypatch
):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for room in ("scripts", "accelerate_config"):
        shutil.copytree(ROOT / room, tmp_path / room)
    for store in ("wikitext-gpt2/dstore_gpt2_train_1600.arrow", "wikitext-gpt2-large/dstore_gpt2_train_1280.arrow"):
        (tmp_path / "dstore" / store).mkdir(parents=True)
    _, one_card, eight_cards, *_ = gpu_page().split("\n\n")
    first = eight_cards.splitlines()[1] if line else ""
    assert line in first
    program, machine = stub_python(tmp_path / "stub"), stub_cards(tmp_path / "bin", *["9.0"] * cards)
    done = shell("bash", "-ec", f"{first}\n{one_card}", cwd=tmp_path, PYTHON=program, **machine)
    assert done.returncode == 0, done.stderr
    found = calls(program)
    assert modules(
        [call[call.index("-m", 2) :] if "accelerate.commands.launch" in call else call for call in found]
    ) == [
        *("preprocess_dataset", "train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti"),
        *("train_base", "train_mlpmem_offline", "evaluate_joint"),
    ]
    _, teacher, index, search, student, train, joint = map(flags, found)
    assert teacher["--dataset_name"] == student["--dataset_name"] == train["--dataset_name"]
    assert index["--dstore_path"] == search["--dstore_path"] and index["--index_path"] == search["--index_path"]
    assert train["--knn_save_path"] == search["--output_path"]
    assert Path(train["--knn_dstore_path"]).parent == Path(student["--dstore_dir"])
    assert student["--model_name_or_path"] == train["--model_name_or_path"] == joint["--model_name_or_path"]
    assert Path(joint["--knn_generator_path"]) == Path(train["--output_dir"]) / f"epoch_{train['--num_train_epochs']}"
    monkeypatch.chdir(tmp_path)
    for call in found:
        check_flags(call, monkeypatch)
        if "accelerate.commands.launch" in call:
            launched = _validate_launch_command(launch_command_parser().parse_args(call[2:]))[0]
            training = launched.training_script == "train_mlpmem_offline"
            assert launched.num_processes == (cards if training or line else 1)


def test_several_processes_are_launched_where_a_configuration_is_named(tmp_path):
    config = {"ACCELERATE_CONFIG": "accelerate_config/cpu.yaml"}
    _, (call,) = ran(tmp_path, "scripts/train_mlpmem_offline.sh", **config)
    assert call[:5] == ["-m", "accelerate.commands.launch", "--config_file", "accelerate_config/cpu.yaml", "-m"]


@pytest.mark.parametrize(
    ("cards", "accumulation", "told"),
    [(8, "1", None), (4, "2", "adds up 2 batches"), (1, "8", "adds up 8 batches"), (3, "1", "takes 3 batches")],
)
def test_one_process_runs_on_each_card_and_a_step_keeps_its_windows(cards, accumulation, told, tmp_path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    text, (call,) = ran(tmp_path, "scripts/train_mlpmem_offline.sh", **stub_cards(tmp_path / "bin", *["9.0"] * cards))
    launched = _validate_launch_command(launch_command_parser().parse_args(call[2:]))[0]
    assert launched.num_processes == cards and launched.training_script == "train_mlpmem_offline"
    assert flags(call)["--gradient_accumulation_steps"] == accumulation
    assert ("asks for 8 GPUs" in text) == (cards < 8) and (told is None or told in text)


def test_only_cards_that_a_command_may_see_are_counted_and_what_is_set_stays(tmp_path):
    machine = stub_cards(tmp_path / "bin", *["9.0"] * 8)
    script = "scripts/train_mlpmem_online.sh"
    settings = {"CUDA_VISIBLE_DEVICES": "2,5", "GRADIENT_ACCUMULATION_STEPS": "3"}
    _, (call,) = ran(tmp_path / "two", script, **machine, **settings)
    assert call[4:6] == ["--num_processes", "2"] and flags(call)["--gradient_accumulation_steps"] == "3"
    for config, steps, windows in (("cpu", "1", "16"), ("multi_node", "1", "8"), ("1_card", "8", "16")):
        settings = {"ACCELERATE_CONFIG": f"accelerate_config/{config}.yaml", "CUDA_VISIBLE_DEVICES": "0"}
        _, (call,) = ran(tmp_path / config, script, **machine, **settings)
        assert "--num_processes" not in call and flags(call)["--gradient_accumulation_steps"] == steps
        assert flags(call)["--per_device_train_batch_size"] == windows


@pytest.mark.parametrize(
    ("capabilities", "settings", "dtype"),
    [
        *((("8.0", "9.0"), {}, "bfloat16"), (("12.0",), {}, "bfloat16"), (("9.0", "7.5"), {}, "float32")),
        *((("9.0",), {"TORCH_DTYPE": "float16"}, "float16"), ((), {}, None)),
    ],
)
def test_bases_are_in_bfloat16_on_cards_that_have_it(capabilities, settings, dtype, tmp_path):
    (tmp_path / "dstore_gpt2_train_8.arrow").mkdir()
    for side in ("teacher", "student"):
        (tmp_path / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    settings = settings | {"DSTORE_DIR": tmp_path, "OUTPUT": tmp_path, "TRAIN": 1}
    settings |= stub_cards(tmp_path / "bin", *capabilities)
    scripts = ("evaluate_base", "evaluate_joint", "save_pipeline", "train_mlpmem_online", "reproduce_wikitext103")
    found = [call for script in scripts for call in ran(tmp_path / script, f"scripts/{script}.sh", **settings)[1]]
    loading = ("train_base", "evaluate_joint", "train_mlpmem_offline", "train_mlpmem_online")
    passed = [flags(call).get("--torch_dtype") for call in found if set(loading) & set(call)]
    assert passed == [dtype] * 11


def test_index_and_search_take_the_gpu_and_each_process_its_share_of_the_cores(tmp_path):
    (tmp_path / "dstore_gpt2_train_8.arrow").mkdir()
    program = stub_python(tmp_path / "stub")
    program.write_text(f"{program.read_text()}echo ${{OMP_NUM_THREADS:-all}} >> {tmp_path}/threads\n")
    machine = stub_cards(tmp_path / "bin", *["9.0"] * 4)
    settings = {"ACCELERATE_CONFIG": "accelerate_config/8_card.yaml", "DSTORE_DIR": tmp_path, "PYTHON": program}
    for given in ("", "3"):
        done = shell("bash", "scripts/save_pipeline.sh", **machine, **settings, OMP_NUM_THREADS=given)
        assert done.returncode == 0, done.stderr
    assert ["--knn_gpu" in call for call in calls(program)] == [False, True, True] * 2
    assert (tmp_path / "threads").read_text().split() == ["16", "all", "16", "3", "3", "3"]


STAND_IN_PIP = """
import pathlib, sys
text = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text()
held = [f"{name} as tested" for name in ("numpy", "torch") if f"\\n{name}==" in text]
print("asked for", ", ".join([sys.argv[-1], *held]))
if "cpu" in sys.argv[-1]:
    (pathlib.Path(__file__).parent.parent / "faiss.py").write_text("")
"""


def test_an_environment_keeps_its_faiss_whichever_is_installed_first(tmp_path):
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__main__.py").write_text(STAND_IN_PIP)
    active = {"VIRTUAL_ENV": tmp_path / "env", "PATH": f"{tmp_path}/env/bin{os.pathsep}{os.environ['PATH']}"}

    def install(extras: str) -> list[str]:
        done = shell("bash", "-c", f". scripts/common.sh; install '{extras}'", **active)
        assert done.returncode == 0, done.stderr
        return re.findall("^asked for (.*)$", done.stdout, re.MULTILINE)

    faiss = packages / "faiss.py"
    bare = [".[cpu,dev], numpy as tested, torch as tested"]
    assert install("dev") == bare and install("dev") == []
    faiss.write_text("raise ImportError('libcublas')")
    assert install("dev") == bare
    # conda's, put there afterwards
    (packages / "torch.py").touch()
    faiss.write_text("conda = True")
    assert install("dev") == [] and install("") == ["."]
    # and first
    (stamp,) = (tmp_path / "env").glob(".mlpmemory*")
    stamp.unlink()
    assert install("dev") == [".[dev]"] and install("") == ["."]
    assert faiss.read_text() == "conda = True"


def test_the_first_failure_stops_a_script_with_the_name_of_its_stage(tmp_path):
    program = stub_python(tmp_path / "stub", fails="knn_utils.build_index")
    (tmp_path / "dstore_gpt2_train_8.arrow").mkdir()
    done = shell("bash", "scripts/save_pipeline.sh", PYTHON=program, DSTORE_DIR=tmp_path)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1] == "stopped in stage: build index (exit status 7)"
    assert len(calls(program)) == 2


def test_bad_settings_end_a_script_with_the_line_of_the_command(tmp_path):
    done = shell("bash", "scripts/evaluate_base.sh", PATH=VENV_PATH, MODEL=tmp_path, DATASET=tmp_path / "none")
    assert done.returncode == 2
    error, stopped = done.stderr.splitlines()[-2:]
    assert error.startswith("error: --dataset_name") and str(tmp_path / "none") in error
    assert stopped == "stopped in stage: evaluate base (exit status 2)"


def reproduction(tmp_path: Path, **settings: object) -> tuple[str, list[list[str]]]:
    """A run of the table's script with stubbed stages: (what it printed, the stub's calls)."""
    return ran(tmp_path / "stub", "scripts/reproduce_wikitext103.sh", OUTPUT=tmp_path / "out", **settings)


def modules(found: list[list[str]]) -> list[str]:
    return [call[1] if call[0] == "-m" else Path(call[0]).stem for call in found]


def test_the_table_of_the_paper_takes_the_published_models_and_continues_where_it_stopped(tmp_path):
    _, found = reproduction(tmp_path)
    assert modules(found) == [
        *("preprocess_dataset", "train_base", "train_base", "train_base"),
        *("evaluate_joint", "downstream.reproduction"),
    ]
    names = [flags(call).get("--model_name_or_path") for call in found[1:5]]
    assert names == [
        *("openai-community/gpt2-large", "Rubin-Wei/gpt2-large-finetuned-wikitext103"),
        *("Clover-Hill/gpt2-xl-finetuned-wikitext103", "Rubin-Wei/gpt2-large-finetuned-wikitext103"),
    ]
    joint = flags(found[4])
    assert (joint["--lmbda"], joint["--knn_temp"]) == ("0.25", "1")
    assert joint["--knn_generator_path"] == "Rubin-Wei/MLPMemory-gpt2-large"
    again, found = reproduction(tmp_path)
    assert modules(found[6:]) == ["downstream.reproduction"] and "done before" in again


def test_a_changed_setting_runs_its_stage_and_those_after_it_again(tmp_path):
    reproduction(tmp_path)
    _, found = reproduction(tmp_path, BATCH_SIZE_EVAL=2, NUM_PROC=2)
    assert modules(found[6:]) == modules(found[:6])
    _, found = reproduction(tmp_path, BATCH_SIZE_EVAL=2, NUM_PROC=2, LAMBDA=0.5)
    assert modules(found[12:]) == ["evaluate_joint", "downstream.reproduction"]


def test_the_table_with_training_takes_the_teacher_for_the_targets_and_the_student_for_the_rest(tmp_path):
    for side in ("teacher", "student"):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    _, found = reproduction(tmp_path, TRAIN=1, XL="xl", LARGE="large", WINDOWS="windows")
    wanted = ["train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti", "train_base", "train_mlpmem_offline"]
    assert modules(found)[:2] == ["knn_utils.preflight"] * 2 and modules(found)[5:10] == wanted
    assert not any("per_second" in word for call in found for word in call)  # one set of assumed rates, preflight's
    save, _, search, student, train = (flags(call) for call in found[5:10])
    assert save["--model_name_or_path"] == "xl" and student["--model_name_or_path"] == "large"
    assert train["--knn_save_path"] == search["--output_path"]
    assert "/student/" in train["--knn_dstore_path"] and train["--num_train_epochs"] == "50"
    assert flags(found[10])["--knn_generator_path"].endswith("memory/epoch_50")


def test_the_training_of_the_paper_takes_all_cards_and_its_128_windows_a_step(tmp_path):
    for side in ("teacher", "student"):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    _, found = reproduction(tmp_path, TRAIN=1, **stub_cards(tmp_path / "bin", *["9.0"] * 4))
    configs = [call[call.index("--config_file") + 1] if "--config_file" in call else "" for call in found]
    (train,) = (call for call in found if "train_mlpmem_offline" in call)
    assert train[:6][-1] == "4" and flags(train)["--gradient_accumulation_steps"] == "2"
    assert sorted({Path(config).stem for config in configs}) == ["", "1_card", "8_card"]


def test_the_estimate_comes_before_anything_runs_and_asks_for_nothing(tmp_path):
    done = shell("bash", "scripts/reproduce_wikitext103.sh", PATH=VENV_PATH, TRAIN=1, PLAN_ONLY=1, OUTPUT=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    stages = [row.split("|")[1].strip() for row in rows]
    assert stages == ["stage", "---", "windows", "datastore", "index", "kNN targets", "memory", "all"] * 2
    assert all(re.search(r"\d", row) for row in rows[2:8]) and "50 epochs" in rows[6]
    assert re.search(r"free disk: \d", done.stdout) and len(printed(done.stdout)) == 2


def test_the_table_stands_measured_beside_published(tmp_path):
    base, output = make_base("gpt2", tmp_path / "base"), tmp_path / "out"
    tiny_memory(AutoModelForCausalLM.from_pretrained(base), 2).save_pretrained(tmp_path / "memory")

    def write(measured: dict[str, float]) -> None:
        for stage, value in measured.items():
            (output / "work" / stage).mkdir(parents=True)
            result = {"perplexity": value, "tokens": 100, "model": str(base), "memory": None}
            (output / "work" / stage / "results.json").write_text(
                json.dumps(result | {"lmbda": "adaptive", "knn_temp": 1})
            )

    measured = {"large_vanilla": 30.0, "large_finetuned": 20.0, "xl_finetuned": 19.0, "large_memory": 17.5}
    write(measured)
    names = [word for flag in ("vanilla", "large", "xl") for word in (f"--{flag}", base)]
    facts = [*names, "--memory", tmp_path / "memory", "--output_dir", output]
    command("downstream.reproduction", *facts)
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert rows[0]["parameters"].endswith("M") and " + " in rows[-1]["parameters"]
    assert [row["published"] for row in rows] == [15.80, 10.42, 10.16, 9.58]
    assert [row["measured"] for row in rows] == list(measured.values())
    text = (output / "table.md").read_text()
    assert "| 9.58 | 17.50 |" in text and text.count("\n| GPT2") == 4
    assert "memory at lambda adaptive, temperature 1" in text
    write({"small_vanilla": 90.0, "small_finetuned": 40.0})
    command("downstream.reproduction", *facts, "--small_vanilla", base, "--small", base)
    lines = (output / "table.md").read_text().splitlines()
    assert [line.split("|")[3:5] for line in lines[2:4]] == [[" – ", " 90.00 "], [" – ", " 40.00 "]]


def test_the_stand_ins_train_from_scratch_then_continue_then_make_the_table(tmp_path):
    for side in ("teacher", "student"):
        (tmp_path / "out" / "work" / side / "dstore_gpt2_train_8.arrow").mkdir(parents=True)
    texts = {"WEB_TEXT": "web.txt", "WIKI_TEXT": "wiki.txt"}
    _, found = ran(tmp_path / "stub", "scripts/standins.sh", OUTPUT=tmp_path / "out", **texts)
    trained = [flags(call) for call in found if "--do_train" in call]
    sizes = ("small", "large", "xl")
    assert ["--from_scratch" in call for call in trained] == [True, False] * 3
    starts = [Path(call["--model_name_or_path"]).name for call in trained]
    assert starts == [name for size in sizes for name in (size, f"{size}-vanilla")]
    assert modules(found)[-1] == "downstream.reproduction"
    table = flags(found[-1])
    assert table["--standins"] == "1" and table["--small"].endswith("small-finetuned")


@pytest.mark.unit
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_setting_that_a_script_reads_is_listed_at_its_top(script):
    text = script.read_text()
    if script.name in ("common.sh", "test.sh"):
        pytest.skip("has no settings")
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    read = set(re.findall(r"\$\{([A-Z_]+):?[-=]", text))
    assert sorted(name for name in read if not re.search(rf"\b{name}\b", head)) == []


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck", path=VENV_PATH)
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = shell(program, "-x", *SCRIPTS, PATH=VENV_PATH)
    assert done.returncode == 0, done.stdout
