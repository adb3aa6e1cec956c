"""A first run on a GPU is no leap: every stage once, tiny, on CUDA. `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from conftest import World
from harness import ROOT, command, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.fixture(scope="module")
def gpu_world(tmp_path_factory):
    """Windows, datastores (through the base on the GPU), index and targets of a tiny Llama."""
    return World("llama", tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def own_precision():
    """Each test may ask for a precision of its own, though accelerate keeps a process's first one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def result(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def base_flags(world, split="test"):
    return [*("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--eval_subset", split)]


@pytest.fixture(scope="module")
def memory(gpu_world, tmp_path_factory):
    """A memory trained offline on the GPU."""
    output = tmp_path_factory.mktemp("gpu_memory")
    command("train_mlpmem_offline", *gpu_world.trainer(output, "--knn_dstore_path", gpu_world.dstore("train")))
    return output / "epoch_1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_base_perplexity_is_that_of_the_cpu(gpu_world, tmp_path, monkeypatch, dtype):
    command("train_base", *base_flags(gpu_world), "--output_dir", tmp_path / "gpu", "--torch_dtype", dtype)
    monkeypatch.setattr("utils.loading.default_device", lambda: torch.device("cpu"))
    command("train_base", *base_flags(gpu_world), "--output_dir", tmp_path / "cpu")
    exact = 1e-3 if dtype == "float32" else 0.02
    assert result(tmp_path / "gpu")["perplexity"] == pytest.approx(result(tmp_path / "cpu")["perplexity"], rel=exact)


def test_fine_tuning_in_half_precision(gpu_world, tmp_path):
    flags = [*base_flags(gpu_world, "validation"), "--do_train", "--output_dir", tmp_path, "--learning_rate", 5e-3]
    command("train_base", *flags, "--from_scratch", "--num_train_epochs", 3, "--bf16", "--patience", 2)
    assert json.loads((tmp_path / "finetune.json").read_text())["complete"]
    assert math.isfinite(result(tmp_path)["perplexity"])


def test_datastore_holds_what_the_cpu_would_write(gpu_world, tmp_path, monkeypatch):
    import numpy as np

    from knn_utils.datastore import Datastore

    monkeypatch.setattr("utils.loading.default_device", lambda: torch.device("cpu"))
    flags = (*base_flags(gpu_world), "--save_knnlm_dstore", "--dstore_dir", tmp_path, "--output_dir", tmp_path / "tmp")
    command("train_base", *flags)
    here, there = Datastore.open(gpu_world.dstore("test")), Datastore.open(tmp_path / gpu_world.dstore("test").name)
    assert (here.vals() == there.vals()).all()
    assert np.allclose(here.keys(0, here.rows), there.keys(0, there.rows), atol=2e-2)


def test_index_and_search_go_on_with_knn_gpu_whatever_faiss_this_is(gpu_world, tmp_path):
    import numpy as np

    from knn_utils.datastore import KNNTargets

    store, index, targets = gpu_world.dstore("train"), tmp_path / "gpu.index", tmp_path / "targets"
    command(
        "knn_utils.build_index",
        *("--dstore_path", store, "--index_path", index, "--index_factory", "Flat", "--knn_gpu"),
    )
    command(
        "knn_utils.saveKNNMulti",
        *("--dstore_path", store, "--index_path", index, "--output_path", targets, "--k", 16, "--knn_temp", 4),
        *("--ignore_first", "True", "--knn_gpu", "--batch_size", 256),
    )
    mine, cpu = KNNTargets.open(targets), KNNTargets.open(gpu_world.targets)
    assert mine.rows == cpu.rows
    # Ties may fall either way; nearly all rows have the same number of entries.
    assert np.mean(mine.read(0, mine.rows).id_cnt == cpu.read(0, cpu.rows).id_cnt) > 0.95


def test_the_papers_kind_of_index_is_built_and_searched_on_the_gpu(tmp_path, capsys):
    import faiss
    import numpy as np
    from knn_files import random_rows, write_datastore

    from knn_utils.search import KNNSearcher, has_gpu

    if not faiss.get_num_gpus() or not has_gpu():
        pytest.skip("this FAISS has no code for this card")
    keys, values = random_rows(20_000, dim=128)
    store, index = write_datastore(tmp_path / "dstore", keys, values, part_rows=20_000), tmp_path / "train.index"
    sizes = ("--ncentroids", 64, "--code_size", 64)
    command("knn_utils.build_index", "--dstore_path", store, "--index_path", index, *sizes, "--knn_gpu")
    assert "the CPU does" not in capsys.readouterr().out
    assert "IVF64,PQ64" in str(json.loads(index.with_name("train.index.json").read_text()))
    searchers = [KNNSearcher(index, probe=64, gpu=gpu) for gpu in (True, False)]
    assert searchers[0].on_gpu
    gpu, cpu = (searcher.search(keys[:500], 16)[1] for searcher in searchers)
    assert np.mean(gpu[:, 0] == np.arange(500)) > 0.9  # a row's nearest is itself
    assert np.mean([len(np.intersect1d(*rows)) / 16 for rows in zip(gpu, cpu, strict=True)]) > 0.8


def test_a_base_that_accelerate_places_is_scored_embedded_and_trained_with(gpu_world, memory, tmp_path):
    import numpy as np

    from knn_utils.datastore import Datastore

    placed, joint = ("--device_map", "auto"), ("--knn_generator_path", memory, "--lmbda", 0.25)
    split = ("--model_name_or_path", gpu_world.base, "--dataset_name", gpu_world.windows)
    for name, more in (("one", ()), ("auto", placed)):
        command("train_base", *base_flags(gpu_world), "--output_dir", tmp_path / f"base_{name}", *more)
        command("evaluate_joint", *split, *joint, "--output_dir", tmp_path / f"joint_{name}", *more)
    for kind in ("base", "joint"):
        found, expected = (result(tmp_path / f"{kind}_{name}")["perplexity"] for name in ("auto", "one"))
        assert found == pytest.approx(expected, rel=1e-4)
    flags = (*base_flags(gpu_world), "--save_knnlm_dstore", "--dstore_dir", tmp_path, "--output_dir", tmp_path / "tmp")
    command("train_base", *flags, *placed)
    here, there = Datastore.open(gpu_world.dstore("test")), Datastore.open(tmp_path / gpu_world.dstore("test").name)
    assert np.allclose(here.keys(0, here.rows), there.keys(0, there.rows), atol=1e-2)
    command("train_mlpmem_online", *gpu_world.trainer(tmp_path / "online", *placed, "--max_train_steps", 2))
    assert all(map(math.isfinite, losses(tmp_path / "online")))


def losses(output) -> list[float]:
    log = json.loads((output / "training.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def offline(world, output, precision, *more):
    """Flags of three epochs of offline training."""
    flags = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--learning_rate", 5e-3, *more)
    flags[flags.index("--mixed_precision") + 1] = precision
    flags[flags.index("--num_train_epochs") + 1] = 3
    return flags


@pytest.fixture(scope="module")
def float32_losses(gpu_world, tmp_path_factory):
    output = tmp_path_factory.mktemp("float32")
    command("train_mlpmem_offline", *offline(gpu_world, output, "no"))
    return losses(output)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_lowers_the_loss_as_in_float32(gpu_world, float32_losses, tmp_path, precision):
    command("train_mlpmem_offline", *offline(gpu_world, tmp_path, precision))
    found = losses(tmp_path)
    assert sum(found[-3:]) < sum(found[:3]) and sum(float32_losses[-3:]) < sum(float32_losses[:3])
    assert found == pytest.approx(float32_losses, rel=0.05)


def test_steps_with_the_rows_that_fit_stay_within_the_card(gpu_world, tmp_path, monkeypatch):
    monkeypatch.setattr("training.trainer.GPU_RESERVE", 64 << 20)
    monkeypatch.setattr("training.trainer.GPU_ROWS", 1 << 20)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (512 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        command("train_mlpmem_offline", *offline(gpu_world, tmp_path, "bf16", "--max_train_steps", 2))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.max_memory_allocated() <= room and all(map(math.isfinite, losses(tmp_path)))


def test_compiled_blocks_give_the_losses_of_the_others(gpu_world, float32_losses, tmp_path):
    command("train_mlpmem_offline", *offline(gpu_world, tmp_path, "no", "--compile"))
    assert losses(tmp_path) == pytest.approx(float32_losses, rel=1e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_step_waits_for_the_gpu_once(gpu_world, tmp_path, monkeypatch, precision):
    from training.trainer import MemoryTrainer

    step, waits = MemoryTrainer.train_step, []

    def watched(trainer, windows, reads):
        reads = iter([next(reads) for _ in trainer.loads(windows, 0)])  # copies for the background are not its own
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return step(trainer, windows, reads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append([str(each.filename) for each in caught if "synchronizing" in str(each.message)])

    monkeypatch.setattr(MemoryTrainer, "train_step", watched)
    pieces = ("--micro_batch_rows", 100, "--max_train_steps", 4, "--validation_split_name", "none")
    command("train_mlpmem_offline", *offline(gpu_world, tmp_path, precision, *pieces))
    assert len(waits) == 4 and all(len(each) <= 1 for each in waits[1:]), waits


def test_online_training_gives_the_losses_of_offline_training(gpu_world, tmp_path):
    command(
        "train_mlpmem_offline",
        *gpu_world.trainer(tmp_path / "offline", "--knn_dstore_path", gpu_world.dstore("train")),
    )
    command("train_mlpmem_online", *gpu_world.trainer(tmp_path / "online", "--round_hidden_states"))
    assert losses(tmp_path / "offline") == pytest.approx(losses(tmp_path / "online"), abs=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("config", "precision", "near"), [("8_card", "no", 0.01), ("llama_7B", "bf16", 0.05)])
def test_two_gpus_train_as_one(gpu_world, float32_losses, tmp_path, config, precision, near):
    flags = offline(gpu_world, tmp_path, precision)
    flags[flags.index("--per_device_train_batch_size") + 1] = 8
    launch = ("--config_file", ROOT / "accelerate_config" / f"{config}.yaml", "--num_processes", 2)
    run("-m", "accelerate.commands.launch", *launch, "--main_process_port", 0, "-m", "train_mlpmem_offline", *flags)
    assert losses(tmp_path) == pytest.approx(float32_losses, rel=near)


def test_joint_evaluation_and_the_knn_lm(gpu_world, memory, tmp_path):
    joint = ("--model_name_or_path", gpu_world.base, "--dataset_name", gpu_world.windows, "--lmbda", 0.1, 0.25)
    command("evaluate_joint", *joint, "--knn_generator_path", memory, "--output_dir", tmp_path / "joint", "--bf16")
    knn = ("--knn", "--val_file", gpu_world.dstore("train"), "--index_file", gpu_world.index, "--k", 16)
    command("train_base", *base_flags(gpu_world), *knn, "--output_dir", tmp_path / "knn")
    assert math.isfinite(result(tmp_path / "joint")["perplexity"])
    assert math.isfinite(result(tmp_path / "knn")["perplexity"])


def test_a_gate_is_trained_and_gives_each_token_its_lambda(gpu_world, memory, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.windows.MOST_SHARED", 1.0)  # this world's validation text is part of its train text
    joint = (
        "--model_name_or_path",
        gpu_world.base,
        "--knn_generator_path",
        memory,
        "--dataset_name",
        gpu_world.windows,
    )
    command("training.gate", *joint, "--known_windows", 8, "--steps", 20)
    command("evaluate_joint", *joint, "--lmbda", "adaptive", "--output_dir", tmp_path / "gpu")
    assert result(tmp_path / "gpu")["lmbda"] == "adaptive"
    monkeypatch.setattr("utils.loading.default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("utils.memories.default_device", lambda: torch.device("cpu"))
    command("evaluate_joint", *joint, "--lmbda", "adaptive", "--output_dir", tmp_path / "cpu")
    assert result(tmp_path / "gpu")["perplexity"] == pytest.approx(result(tmp_path / "cpu")["perplexity"], rel=1e-3)


def test_questions_are_answered_and_text_is_generated(gpu_world, memory, tmp_path):
    (tmp_path / "nq.jsonl").write_text('{"question": "zi kimoho ke", "answer": ["mo"]}\n' * 3)
    model = ("--model_name_or_path", gpu_world.base, "--knn_generator_path", memory)
    command(
        "downstream.eval_qa",
        *(*model, "--use_neural_knn", "--dataset_name", tmp_path / "nq.jsonl", "--output_dir", tmp_path / "qa"),
    )
    assert result(tmp_path / "qa")["counts"]["scored"] == 3
    command("demo.generation_example", *model, "--prompt", "zi kimoho", "--max_new_tokens", 4)


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantised_base_is_scored(gpu_world, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    command("train_base", *base_flags(gpu_world), "--output_dir", tmp_path, bits)
    assert math.isfinite(result(tmp_path)["perplexity"])
