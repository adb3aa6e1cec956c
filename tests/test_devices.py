"""One forward pass of each stage with tensors that claim to be on a GPU, and the synchronisation of a training step."""

from __future__ import annotations

import contextlib
import json
import threading
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from counted import count_block, count_loss
from devices import NOTED, claimed_devices, put, spread
from tiny_models import HIDDEN, VOCABULARY, byte_tokenizer, some_ids, tiny_base, tiny_memory
from transformers.activations import NewGELUActivation

import evaluate_joint
from downstream.scoring import Encoded, Evaluator
from knn_utils.datastore import TargetRows
from knn_utils.saveEmbedMulti import capture_rows
from knn_utils.scored_rows import gate_rows
from models import MLPMemory
from models.capture import captured_module, logit_scale
from models.gate import LambdaGate
from training.arguments import TrainerArguments
from training.online import OnlineRows
from training.rows import OfflineRows
from training.trainer import MemoryTrainer
from utils.loading import BaseArguments

pytestmark = pytest.mark.unit

IDS = some_ids(batch=3).numpy()  # (windows, time)
WINDOWS = datasets.Dataset.from_dict(
    {"input_ids": IDS, "labels": IDS, "dstore_range": [[11 * row, 11 * row + 11] for row in range(len(IDS))]}
).with_format("numpy")
PLACES = {"one": lambda base: put(base, "cuda:0"), "two": spread}


def embedded(base, memory, gate, folder):
    return [array for rows in capture_rows(base, WINDOWS, 0, 3, 2, -1, True) for array in rows]


def joint(base, memory, gate, folder):
    arguments = evaluate_joint.JointArguments(
        **{"knn_generator_path": "memory", "dataset_name": str(folder / "windows"), "output_dir": str(folder)},
        **{"lmbda": [0.1, 0.5], "per_device_eval_batch_size": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.loading.load_windows", lambda *_: WINDOWS)
        patch.setattr("utils.memories.open_memory_of", lambda *_, **__: memory)
        for name, value in {"open_tokenizer": None, "open_base": base, "base_id": "a base"}.items():
            patch.setattr(BaseArguments, name, lambda *_, value=value, **__: value)
        evaluate_joint.evaluate(arguments)
    found = json.loads((folder / "results.json").read_text())
    return [found["base_perplexity"], *(row["perplexity"] for row in found["grid"])]


def answers(base, memory, gate, folder):
    """Question answering: texts and likelihoods."""
    evaluator = Evaluator(MLPMemory(base, memory), byte_tokenizer(), batch_size=2)
    texts = evaluator.continuations(list(IDS), 5, "\n")
    found = evaluator.likelihoods([Encoded(np.append(row, [7, 8]), len(row)) for row in IDS])
    return [*(ord(letter) for letter in "".join(texts)), *(each.total for each in found)]


def generated(base, memory, gate, folder):
    """`MLPMemory.generate`, greedy and with beams, of prompts of two lengths."""
    model = MLPMemory(base, memory, lmbda=0.4, knn_temp=2.0)
    ids = torch.from_numpy(IDS).to(base.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return [*model.generate(ids, **options).tolist(), *model.generate(ids, num_beams=2, **options).tolist()]


def gated(base, memory, gate, folder):
    """Lambda by token, in generation and in scoring."""
    model = MLPMemory(base, memory, "adaptive", gates=[gate])
    ids = torch.from_numpy(IDS).to(base.get_input_embeddings().weight.device)
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    scored = [rows for _, rows, _ in gate_rows(model, model.gates, WINDOWS, 2, "scored")]
    return [*made.tolist(), *(each.tolist() for rows in scored for each in rows)]


def scored_by_gate(base, memory, gate, folder):
    model = MLPMemory(base, memory, "adaptive", gates=[gate])
    return [rows for _, rows, _ in gate_rows(model, model.gates, WINDOWS, 2, "scored")]


def parts():
    """A base, a memory and a gate with the same random weights each time."""
    torch.manual_seed(3)
    base = tiny_base("llama")
    return base, tiny_memory(base), LambdaGate(HIDDEN, 16, memory_temp=2.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", [embedded, joint, answers, generated, gated])
def test_a_stage_on_gpus_gives_the_numbers_of_the_cpu(stage, place, tmp_path):
    expected = stage(*parts(), tmp_path)
    base, memory, gate = parts()
    with claimed_devices():
        base = PLACES[place](base)
        memory = put(memory, next(captured_module(base).parameters()).device)
        found = stage(base, memory, put(gate, base.get_output_embeddings().weight.device), tmp_path)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def without_files(kind):
    """A source of rows of WINDOWS, one target for each row."""
    source = object.__new__(kind)
    source.windows, source.counts, source.vocabulary = WINDOWS, np.full(len(IDS), 11), VOCABULARY
    source.ends, labels = np.cumsum(source.counts), IDS[:, 1:].reshape(-1).astype(np.int32)
    one = np.ones(len(labels), np.int32)
    columns = one, labels, one.astype(np.float16), labels
    read = lambda start, stop: TargetRows(*(column[start:stop] for column in columns))  # noqa: E731
    source.targets = SimpleNamespace(read=read, path="targets")
    return source


def online_source(base):
    source = without_files(OnlineRows)
    source.base, source.layer_position, source.batch_size, source.round_to_half = base, -1, 2, True
    source.device = base.get_input_embeddings().weight.device
    return source


def offline_source(base):
    source = without_files(OfflineRows)
    keys = np.random.default_rng(0).standard_normal((source.ends[-1], HIDDEN)).astype(np.float16)
    source.datastore = SimpleNamespace(keys=lambda start, stop: keys[start:stop], path="datastore")
    return source


class Alone:
    """An `Accelerator` of one process, without gradients."""

    num_processes, process_index, is_main_process, mixed_precision, distributed_type = 1, 0, True, "no", "NO"
    no_sync = staticmethod(contextlib.nullcontext)
    register_save_state_pre_hook = register_load_state_pre_hook = backward = staticmethod(lambda *_: None)
    prepare = staticmethod(lambda module, optimizer: (module, optimizer))
    reduce = staticmethod(lambda tensor, how: tensor)
    gather = staticmethod(lambda tensor: tensor)

    def __init__(self, device):
        self.device = torch.device(device)

    def clip_grad_norm_(self, parameters, norm):
        return torch.ones((), device=self.device)


def one_step(source, memory):
    """The figures of a step of two batches, each of several micro-batches."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "micro_batch_rows": 5}
    accelerator = Alone(memory.lm_head.weight.device)
    trainer = MemoryTrainer(memory, source, TrainerArguments(seed=0, **settings), {}, accelerator)
    NOTED.clear()
    return trainer.train_step(np.arange(len(IDS)), trainer._inputs())


BATCHES = 2  # of the windows, as these stages read them


@pytest.mark.parametrize("stage", [embedded, joint, scored_by_gate])
def test_a_stage_waits_for_the_gpu_no_more_than_its_base_does(stage, tmp_path):
    base, memory, gate = parts()
    with claimed_devices():
        base, memory, gate = (put(each, "cuda:0") for each in (base, memory, gate))
        logit_scale(base)  # once for each base
        NOTED.clear()
        stage(base, memory, gate, tmp_path)
        # transformers itself looks once in each batch whether texts are packed in it.
        assert len(NOTED.waits) <= BATCHES + 2 * (stage is joint)  # the sums, at begin and end


@pytest.mark.parametrize(("source", "base_batches"), [(offline_source, 0), (online_source, 2)])
def test_a_training_step_waits_once_for_the_gpu(source, base_batches):
    base, memory, _ = parts()
    expected = one_step(source(base), memory)
    base, memory, _ = parts()
    with claimed_devices():
        found = one_step(source(put(base, "cuda:0")), put(memory, "cuda:0"))
        # transformers itself looks once in each of the base's batches whether texts are packed in it.
        assert NOTED.waits[-1] == "tolist" and len(NOTED.waits) <= 1 + base_batches
        # Copies are pinned by the thread that reads ahead.
        assert len(NOTED.threads) >= 2 * 5 and threading.main_thread() not in NOTED.threads
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_moves_few_bytes_under_the_rules_of_cudas_autocast():
    own, unfused = (count_block(4096, 64, gelu) for gelu in (None, NewGELUActivation()))
    assert own.bytes < unfused.bytes / 4 and own.kernels < unfused.kernels / 1.5
    rows, vocabulary = 512, 32768
    loss = count_loss(rows, 64, vocabulary, 16, 1 << 30)
    assert (
        loss.bytes < 4.5 * 2 * rows * vocabulary + 16 * vocabulary * 64
    )  # a few passes over bfloat16 logits, and the head
    assert count_loss(rows, 64, vocabulary, 16, 1 << 20).kernels > 4 * loss.kernels
