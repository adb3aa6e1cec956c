"""The original's commands, word for word, with the paths filled in; its flags and defaults; its files."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import FAMILIES, GOLDEN, ROOT, calls, command, refused_here, run, shell, stub_python
from tiny_models import make_base

PREPROCESS = """python utils/preprocess_dataset.py \\
    --dataset_name /path/to/wikitext \\
    --dataset_config_name wikitext-103-raw-v1 \\
    --tokenizer_path ${TOKENIZER} \\
    --output_dir ${OUTPUT_DIR} \\
    --num_proc 1"""
EVALUATE_BASE = """NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 CUDA_VISIBLE_DEVICES=0 python \\
    -m train_base \\
    --model_name_or_path ${MODEL} \\
    --dataset_name ${DATASET} \\
    --per_device_eval_batch_size 8 \\
    --do_eval \\
    --eval_subset test \\
    --output_dir ${OUTPUT_DIR} \\
    --report_to none"""
EVALUATE_JOINT = """python -m evaluate_joint \\
    --do_test \\
    --model_name_or_path ${MODEL} \\
    --dataset_name ${DATASET} \\
    --dataset_split_name test \\
    --per_device_eval_batch_size 8 \\
    --output_dir ${OUTPUT_DIR} \\
    --knn_temp 1 \\
    --lmbda 0.25 \\
    --knn_generator_path ${KNN_PATH} \\
    --report_to none"""
SAVE_EMBEDDINGS = """accelerate launch \\
    --config_file ${ACCELERATE_CONFIG} \\
    -m train_base \\
    --model_name_or_path ${MODEL_TO_SAVE} \\
    --dataset_name ${DATASET} \\
    --do_eval --eval_subset ${SUBSET} \\
    --per_device_eval_batch_size ${BATCH_SIZE_EVAL} \\
    --output_dir ${OUTPUT_DIR} \\
    --dstore_dir ${DSTORE_DIR} \\
    --save_knnlm_dstore \\
    --report_to none"""
BUILD_INDEX = """python -m knn_utils.build_index \\
    --dstore_path ${DSTORE_PATH} \\
    --num_keys_to_add_at_a_time ${NUM_KEYS_TO_ADD} \\
    --ncentroids ${NCENTROIDS} \\
    --code_size ${CODE_SIZE} \\
    --probe ${PROBE}"""
SEARCH = """accelerate launch \\
    --config_file ${ACCELERATE_CONFIG} \\
    -m knn_utils.saveKNNMulti \\
    --model_path ${MODEL_TO_SAVE} \\
    --dstore_path ${DSTORE_PATH} \\
    --val_path ${VAL_PATH} \\
    --index_path ${INDEX_PATH} \\
    --output_path ${OUTPUT_PATH} \\
    --k ${K} \\
    --knn_temp ${KNN_TEMP} \\
    --probe ${PROBE} \\
    --batch_size ${BATCH_SIZE_KNN} \\
    --ignore_first True \\
    --knn_gpu"""
OFFLINE = "bash train_mlpmem_offline.sh"
ONLINE = "bash train_mlpmem_online.sh"
DEMO = "python -m demo.generation_example"
QA = "bash downstream/eval_qa.sh"


class Chain:
    """A family's run through the original's README, in processes of their own or in this one."""

    def __init__(self, family: str, folder: Path, *, processes: bool) -> None:
        self.family, self.folder, self.processes = family, folder, processes
        self.base = make_base(family, folder / "base", positions=1024)
        text = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
        corpus = folder / "wikitext" / "wikitext-103-raw-v1"
        corpus.mkdir(parents=True)
        for split, lines in (("train", text), ("validation", text[:400]), ("test", text[-400:])):
            (corpus / f"{split}.txt").write_text("".join(lines))
        (folder / "nq.jsonl").write_text('{"question": "zi kimoho ke", "answer": ["mo", "so"]}\n' * 3)

    def shell(self, *words: str, **values: object) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = shell(*words, PATH=path, HF_HUB_OFFLINE=1, **values)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def do(self, text: str, **values: object) -> None:
        """Run a command of the original with its variables and paths filled in."""
        values = {name: str(value) for name, value in values.items()}
        text = text.replace("/path/to/wikitext", str(self.folder / "wikitext"))
        if self.processes:
            return self.shell("bash", "-c", text, **values)
        for name, value in values.items():
            text = text.replace(f"${{{name}}}", value)
        words = shlex.split(text.replace("\\\n", " "))
        start = next(index for index, word in enumerate(words) if word in ("python", "accelerate"))
        words = words[start:]
        if "-m" in words:
            command(*words[words.index("-m") + 1 :])
        else:
            command(words[1].removesuffix(".py").replace("/", "."), *words[2:])

    def script(self, text: str, folder: str, **values: object) -> None:
        """Run a shell script of the original from `folder`; in this process, run the command it would run."""
        if self.processes:
            return self.shell(*text.split(), cwd=ROOT / folder, **values)
        program = stub_python(self.folder / f"stub{len(list(self.folder.iterdir()))}")
        assert shell(*text.split(), cwd=ROOT / folder, PYTHON=program, **values).returncode == 0
        (call,) = calls(program)
        words = call[max(index for index, word in enumerate(call) if word == "-m") + 1 :]
        command(*words)

    def results(self, name: str) -> dict:
        return json.loads((self.folder / name / "results.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_of_the_original_does_its_job(family, tmp_path, capsys, monkeypatch):
    from knn_utils.datastore import Datastore, KNNTargets
    from models import load_memory
    from utils.loading import load_windows

    # Commands share one process here, in which accelerate keeps the first precision.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    chain = Chain(family, tmp_path, processes=family == "llama")
    windows, stores = tmp_path / "dataset" / "wikitext-gpt2", tmp_path / "dstore"
    shared = {"MODEL": chain.base, "DATASET": windows, "MODEL_TO_SAVE": chain.base}
    launch = {"ACCELERATE_CONFIG": ROOT / "accelerate_config" / "1_card.yaml"}

    chain.do(PREPROCESS, TOKENIZER=chain.base, OUTPUT_DIR=windows)
    train = load_windows(windows, "train")
    assert len(train[0]["input_ids"]) == 1024
    assert (windows / "dstore_summary.json").exists()

    chain.do(EVALUATE_BASE, **shared, OUTPUT_DIR=tmp_path / "evaluated")
    base = chain.results("evaluated")
    assert base["tokens"] > 1000 and 1 < base["perplexity"] < 1000

    chain.do(
        SAVE_EMBEDDINGS,
        **shared | launch,
        **{"SUBSET": "train", "BATCH_SIZE_EVAL": 4, "OUTPUT_DIR": tmp_path / "embedded", "DSTORE_DIR": stores},
    )
    dstore = stores / f"dstore_{family}_train_32.arrow"
    rows = Datastore.open(dstore).rows
    assert rows == int(train[-1]["dstore_range"][1])

    search = {"NUM_KEYS_TO_ADD": 5000, "NCENTROIDS": 16, "CODE_SIZE": 8, "PROBE": 4}
    chain.do(BUILD_INDEX, DSTORE_PATH=dstore, **search)
    assert (stores / "train_32.index").exists()

    targets = tmp_path / "targets"
    chain.do(
        SEARCH,
        **shared | launch | {"DSTORE_PATH": dstore, "VAL_PATH": stores / "train_vals.pkl", "PROBE": 4},
        **{"INDEX_PATH": stores / "train_32.index", "OUTPUT_PATH": targets, "K": 16, "KNN_TEMP": 16},
        BATCH_SIZE_KNN=16000,
    )
    assert KNNTargets.open(targets).rows == rows

    training = {"MODEL": chain.base, "DATASET": windows, "KNN_SAVE_PATH": targets, "EPOCHS": 1, "MEMORY_LAYERS": 1}
    training |= {"BATCH_SIZE": 8, "WARMUP_STEPS": 1}
    chain.script(OFFLINE, "scripts", **training, DSTORE_PATH=dstore, OUTPUT_DIR=tmp_path / "offline")
    memory = tmp_path / "offline" / "epoch_1"
    assert load_memory(memory).config.num_hidden_layers == 1
    chain.script(ONLINE, "scripts", **training, OUTPUT_DIR=tmp_path / "online")
    assert load_memory(tmp_path / "online" / "epoch_1" / "knn_generator").config.num_hidden_layers == 1

    chain.do(EVALUATE_JOINT, **shared, OUTPUT_DIR=tmp_path / "joint", KNN_PATH=memory)
    joint = chain.results("joint")
    assert joint["tokens"] == base["tokens"] and (joint["lmbda"], joint["memory_temp"]) == (0.25, 1.0)
    assert joint["base_perplexity"] == pytest.approx(base["perplexity"], rel=1e-4)

    questions = {"MODEL": chain.base, "KNN_PATH": memory, "DATASET": tmp_path / "nq.jsonl"}
    chain.script(QA, ".", **questions, OUTPUT_DIR=tmp_path / "qa")
    chain.script(QA, ".", **questions, OUTPUT_DIR=tmp_path / "qa", USE_NEURAL_KNN=0)
    assert chain.results("qa/nq")["lmbda"] == 0.5 and chain.results("qa/nq-base")["memory"] is None
    assert chain.results("qa/nq")["counts"]["scored"] == 3

    pair = f" --model_name_or_path {chain.base} --knn_generator_path {memory} --prompt 'zi kimoho' --max_new_tokens 3"
    chain.do(DEMO + pair)
    if not chain.processes:
        assert "zi kimoho" in capsys.readouterr().out


# The parser's defaults of the original.
DEFAULTS = {
    "build_index": {
        **{"code_size": 32, "probe": 8, "ncentroids": 4096, "seed": 42, "num_keys_to_add_at_a_time": 1_000_000}
    },
    "saveKNNMulti": {"knn_temp": 1.0, "probe": 32, "batch_size": 32, "ignore_first": False, "threshold": 1e-8},
    "trainers": {
        **{"learning_rate": 5e-5, "num_train_epochs": 3, "num_warmup_steps": 0, "alpha": 0.5, "seed": None},
        **{"base_model_name": "small", "checkpointing_steps": None, "logging_steps": 1},
        **{"dataset_split_name": "train", "report_to": "none"},  # the two that differ by intention
    },
    "evaluate_joint": {"lmbda": [0.25], "memory_temp": [1.0]},
    "eval_qa": {"lmbda": 0.25},
    "preprocess": {"block_size": 1024, "stride": 512, "padding_index": -100},
}

# Flags that must keep working, by command.
KEPT = {
    "preprocess": "--dataset_name --dataset_config_name --tokenizer_path --output_dir --num_proc --block_size --stride "
    "--padding_index",
    "train_base": "--model_name_or_path --config_name --tokenizer_name --from_scratch --dataset_name --eval_subset "
    "--max_train_samples --max_eval_samples --block_size --stride --patience --knn --knn_gpu --save_knnlm_dstore "
    "--dstore_dir --val_file --index_file --lmbda --k --knn_temp --probe --do_train --do_eval --output_dir --report_to "
    "--per_device_eval_batch_size --per_device_train_batch_size --resume_from_checkpoint --bf16 --fp16 "
    "--model_revision --cache_dir",
    "build_index": "--dstore_path --num_keys_to_add_at_a_time --ncentroids --code_size --probe --seed",
    "saveKNNMulti": "--model_path --dstore_path --val_path --index_path --output_path --k --knn_temp --threshold "
    "--probe --batch_size --knn_gpu --ignore_first",
    "trainers": "--model_name_or_path --dataset_name --dataset_split_name --knn_save_path --base_model_name "
    "--output_dir --learning_rate --weight_decay --lr_scheduler_type --num_warmup_steps --num_train_epochs "
    "--max_train_steps --alpha --gradient_accumulation_steps --per_device_train_batch_size "
    "--per_device_eval_batch_size --seed --checkpointing_steps --resume_from_checkpoint --logging_steps "
    "--init_lm_head --with_tracking --report_to --run_name --project_name --config_name",
    "offline": "--knn_dstore_path",
    "evaluate_joint": "--do_test --model_name_or_path --dataset_name --dataset_split_name "
    "--per_device_eval_batch_size --output_dir --knn_temp --lmbda --knn_generator_path --report_to --config_name",
    "eval_qa": "--model_name_or_path --dataset_name --dataset_config_name --eval_subset --use_neural_knn "
    "--knn_generator_path --lmbda --output_dir --do_eval --per_device_eval_batch_size --max_eval_samples "
    "--config_name --cache_dir --model_revision --num_beams",
}


def dataclasses_of(name: str) -> list[type]:
    """The dataclasses that a command's flags come from."""
    from transformers import TrainingArguments

    where = {
        "preprocess": [("utils.preprocess_dataset", "Arguments")],
        "train_base": [("train_base", "StageArguments")],
        "build_index": [("knn_utils.build_index", "BuildArguments")],
        "saveKNNMulti": [("knn_utils.saveKNNMulti", "TargetArguments")],
        "trainers": [("training.arguments", "TrainerArguments")],
        "offline": [("train_mlpmem_offline", "OfflineArguments")],
        "evaluate_joint": [("evaluate_joint", "JointArguments")],
        "eval_qa": [("downstream.eval_qa", "QAArguments"), ("downstream.model", "ModelArguments")],
    }[name]
    types = [getattr(importlib.import_module(module), kind) for module, kind in where]
    return [*types, TrainingArguments] if name == "train_base" else types


@pytest.mark.unit
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_original(name):
    fields = {field.name: field for kind in dataclasses_of(name) for field in dataclasses.fields(kind)}
    for flag, expected in DEFAULTS[name].items():
        field = fields[flag]
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert (float(value) if isinstance(value, str) and flag == "knn_temp" else value) == expected, flag


@pytest.mark.unit
@pytest.mark.parametrize("name", KEPT)
def test_flags_of_the_original_are_accepted(name):
    from utils.cli import make_parser

    known = re.findall(r"--\w+", make_parser(dataclasses_of(name), name).format_help())
    assert [flag for flag in KEPT[name].split() if flag not in known] == []


# All that the original's parsers take and nothing here needs. One with * takes no value.
UNUSED = {
    "train_mlpmem_offline": "dataset_config_name train_file validation_file validation_split_percentage use_slow_tokenizer* "
    "preprocessing_num_workers overwrite_cache* no_keep_linebreaks* push_to_hub* hub_token low_cpu_mem_usage* block_size "
    "from_scratch* generator_type do_test* group_name vocab_size current_epoch",
    "evaluate_joint": "dataset_config_name train_file validation_file validation_split_percentage use_slow_tokenizer* "
    "per_device_train_batch_size learning_rate weight_decay gradient_accumulation_steps lr_scheduler_type num_warmup_steps "
    "preprocessing_num_workers overwrite_cache* no_keep_linebreaks* push_to_hub* hub_token checkpointing_steps "
    "resume_from_checkpoint with_tracking* low_cpu_mem_usage* block_size project_name group_name run_name logging_steps "
    "knn_keytype",
    "train_base": "model_type config_overrides use_fast_tokenizer use_auth_token group_name overwrite_cache "
    "validation_split_percentage keep_linebreaks prompt knn_keytype dstore_file knn_sim_func",
    "downstream.eval_qa": "use_fast_tokenizer use_auth_token source_lang target_lang train_file validation_file test_file "
    "overwrite_cache preprocessing_num_workers max_source_length max_target_length val_max_target_length "
    "pad_to_max_length max_train_samples max_predict_samples ignore_pad_token_for_loss patience",
}


@pytest.mark.unit
@pytest.mark.parametrize("name", UNUSED)
def test_flags_of_the_originals_parsers_without_a_use_are_dropped_in_one_line(name, capsys):
    from utils import unused_flags
    from utils.cli import without

    lists = {"train_mlpmem_offline": "TRAINERS", "downstream.eval_qa": "EVAL_QA"}
    dropped = getattr(unused_flags, lists.get(name, name.upper()))
    flags = [f"--{flag}" for flag in UNUSED[name].split()]
    apart = [word for flag in flags for word in ([flag[:-1]] if flag.endswith("*") else [flag, "value"])]
    joined = [flag[:-1] if flag.endswith("*") else f"{flag}=value" for flag in flags]
    for words in (apart, joined):
        assert without(["--lmbda", "0.5", *words, "--seed", "3"], dropped) == ["--lmbda", "0.5", "--seed", "3"]
        (line,) = capsys.readouterr().out.splitlines()
        assert all(flag.rstrip("*") in line for flag in flags)


def told(capsys) -> list[str]:
    """The flags that lines of the output begin with, sorted."""
    return sorted(line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("--"))


def test_flags_without_a_use_say_so_and_the_command_goes_on(llama_world, tmp_path, capsys):
    world = llama_world
    model = ("--model_name_or_path", world.base, "--dataset_name", world.windows)
    unused = {"--knn_gpu": None, "--patience": 3, "--save_logprob": None, "--block_size": 64, "--stride": 32}
    unused |= {"--max_train_samples": 2, "--k": 8, "--probe": 2, "--lmbda": 0.5, "--dstore_dir": tmp_path / "none"}
    words = [word for pair in unused.items() for word in pair if word is not None]
    scored = ("--do_eval", "--eval_subset", "test", "--max_eval_samples", 1)
    command("train_base", *model, *scored, "--output_dir", tmp_path / "scored", *words)
    assert told(capsys) == sorted(unused)
    assert (tmp_path / "scored" / "results.json").exists()

    command(
        "knn_utils.saveKNNMulti",
        *("--model_path", world.base, "--dstore_path", world.dstore("test"), "--index_path", world.index, "--knn_gpu"),
        *("--val_path", world.dstore("train"), "--output_path", tmp_path / "targets", "--k", 4),
    )
    assert told(capsys) == ["--knn_gpu", "--model_path"]
    assert (tmp_path / "targets").exists()

    flags = world.trainer(tmp_path / "memory", "--knn_dstore_path", world.dstore("train"), "--max_train_steps", 1)
    command("train_mlpmem_offline", *flags, "--report_to", "all", "--run_name", "a", "--project_name", "b")
    assert [flag.split()[0] for flag in told(capsys)] == ["--project_name", "--report_to", "--run_name"]
    memory = tmp_path / "memory" / "epoch_1"
    joint = ("--knn_generator_path", memory, "--max_eval_samples", 1, "--output_dir", tmp_path / "joint")
    command("evaluate_joint", *model, *joint, "--report_to", "all")
    assert told(capsys) == ["--report_to all"]


def test_quantised_bases_are_refused_in_one_line_without_the_library(llama_world, tmp_path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    base = ("--model_name_or_path", llama_world.base, "--dataset_name", llama_world.windows, "--output_dir", tmp_path)
    assert "bitsandbytes" in refused_here("train_base", *base, "--do_eval", "--load_in_4bit")
    online = llama_world.trainer(tmp_path / "memory", "--load_in_8bit")
    assert "bitsandbytes" in refused_here("train_mlpmem_online", *online)


def test_a_base_in_half_precision_spread_by_accelerate_gives_nearly_the_same_perplexity(llama_world, tmp_path):
    world = llama_world
    flags = ("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--eval_subset", "test")
    command("train_base", *flags, "--output_dir", tmp_path / "plain")
    command(
        "train_base", *flags, "--output_dir", tmp_path / "spread", "--torch_dtype", "bfloat16", "--device_map", "auto"
    )
    plain, spread = (
        json.loads((tmp_path / name / "results.json").read_text())["perplexity"] for name in ("plain", "spread")
    )
    assert spread == pytest.approx(plain, rel=0.02)


def test_a_memory_learns_from_the_targets_of_a_larger_teacher(llama_world, tmp_path):
    """The paper's setting: neighbours of GPT-2 XL, a memory for GPT-2 large."""
    world = llama_world
    teacher = make_base("llama", tmp_path / "teacher", hidden=48, layers=3, seed=9)
    scored = ("--dataset_name", world.windows, "--do_eval", "--eval_subset", "train", "--save_knnlm_dstore")
    command(
        "train_base",
        *("--model_name_or_path", teacher, *scored, "--dstore_dir", tmp_path, "--output_dir", tmp_path / "tmp"),
    )
    store = tmp_path / "dstore_llama_train_48.arrow"
    index, targets = tmp_path / "train.index", tmp_path / "targets"
    command("knn_utils.build_index", "--dstore_path", store, "--index_path", index, "--index_factory", "Flat")
    command(
        "knn_utils.saveKNNMulti",
        *("--dstore_path", store, "--index_path", index, "--output_path", targets, "--k", 8, "--ignore_first", "True"),
    )
    flags = world.trainer(tmp_path / "memory", "--knn_dstore_path", world.dstore("train"))
    flags[flags.index("--knn_save_path") + 1] = targets
    command("train_mlpmem_offline", *flags)
    log = json.loads((tmp_path / "memory" / "training.json").read_text())["log"]
    assert all(math.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    # The teacher's datastore is as long and has the same labels, but its hidden states are not the student's.
    flags = world.trainer(tmp_path / "wrong", "--knn_dstore_path", store)
    assert "48" in refused_here("train_mlpmem_offline", *flags)


def test_training_reads_the_files_of_the_original(llama_world, tmp_path):
    """One Arrow stream as datastore, `datasets` windows of another maker, several target shards, a .pkl name."""
    import datasets

    from knn_utils.datastore import Datastore, KNNTargets
    from knn_utils.parts import datastore_batch, targets_batch, write_stream
    from knn_utils.search import load_values

    world = llama_world
    store, found = Datastore.open(world.dstore("train")), KNNTargets.open(world.targets)
    stream = tmp_path / "dstore_llama_train_32.arrow"
    batch = datastore_batch(np.array(store.keys(0, store.rows)), store.vals(0, store.rows))
    write_stream(stream, batch.schema, [batch])
    assert (load_values(tmp_path / "train_vals.pkl") == store.vals()).all()
    shards = tmp_path / "targets"
    shards.mkdir()
    cuts = [0, found.rows // 3, found.rows // 2, found.rows]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        shard = targets_batch(found.read(start, stop))
        names = [name for name in ("id_cnt", "token_id", "prob", "label") if name in shard.schema.names]
        shard = shard.select(names)
        write_stream(shards / f"data-{number:05d}-of-00003.arrow", shard.schema, [shard])
    windows = tmp_path / "windows"
    train = datasets.load_from_disk(str(world.windows))["train"]
    datasets.DatasetDict({"train": train, "validation": train}).save_to_disk(str(windows))
    outputs = []
    for name, where, targets, dstore in (
        ("ours", world.windows, world.targets, world.dstore("train")),
        ("original", windows, shards, stream),
    ):
        flags = world.trainer(tmp_path / name, "--knn_dstore_path", dstore)
        flags[flags.index("--knn_save_path") + 1] = targets
        flags[flags.index("--dataset_name") + 1] = where
        command("train_mlpmem_offline", *flags)
        log = json.loads((tmp_path / name / "training.json").read_text())["log"]
        outputs.append([entry["loss"] for entry in log if "loss" in entry])
    assert outputs[0] == outputs[1]


# Each command's help in one process, on a terminal without Unicode, as `python -m` would call it: while Python looks for the
# module, "-m" stands first.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    sys.argv, printed, status = ["-m", "--help"], io.TextIOWrapper(io.BytesIO(), "ascii"), 0
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    printed.flush()
    heavy = [each for each in ("torch", "datasets", "faiss", "gradio") if each in sys.modules]
    if status or heavy or not printed.buffer.getvalue():
        found[name] = (status, heavy)
print(json.dumps(found))
"""


def test_the_help_of_every_command_is_fast_and_needs_no_unicode():
    paths = [
        path
        for room in ("", "utils", "knn_utils", "training", "downstream", "demo", "models")
        for path in (ROOT / room).glob("*.py")
    ]
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if '__name__ == "__main__"' in path.read_text()
    } - {"demo.pair"}  # which scripts call; it has no flags
    assert {"models.export", "training.gate", "train_base", "knn_utils.build_index"} <= commands
    assert json.loads(run("-c", HELP, *sorted(commands)).stdout) == {}
