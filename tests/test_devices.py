"""Each stage's forward pass on one GPU and on a base spread over two, with tensors that claim to be there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import threading
from types import SimpleNamespace

import datasets
import faiss
import numpy as np
import pytest
import torch
from devices import NOTED, claimed_devices, put, spread
from harness import ROOT
from tiny_models import HIDDEN, VOCABULARY, byte_tokenizer, kept_of_a_row, make_base, some_ids, tiny_base, tiny_memory
from transformers import AutoModelForCausalLM

import evaluate_joint
import train_base
from demo.inspection import inspect_tokens
from demo.pair import Sampling
from demo.streams import side_by_side
from downstream.scoring import Encoded, Evaluator
from knn_utils.adaptive import Buckets
from knn_utils.datastore import TargetRows
from knn_utils.knn_lm import KNNLM
from knn_utils.saveEmbedMulti import capture_rows
from models import MLPMemory
from models.capture import captured_module
from models.gate import LambdaGate
from training.arguments import TrainerArguments
from training.online import OnlineRows
from training.rows import HEAD_BYTES, OfflineRows, rows_at_once
from training.trainer import MemoryTrainer
from utils.cli import command
from utils.errors import InputError
from utils.evaluation import Scorer
from utils.gating import gate_rows
from utils.loading import BaseArguments

pytestmark = pytest.mark.unit

IDS = some_ids(batch=3).numpy()  # (windows, time)
WINDOWS = datasets.Dataset.from_dict(
    {"input_ids": IDS, "labels": IDS, "dstore_range": [[11 * row, 11 * row + 11] for row in range(len(IDS))]}
).with_format("numpy")
PLACES = {
    "one": lambda base: put(base, "cuda:0"),
    "two": spread,
    "two, the head beside the embeddings": lambda base: spread(base, head=0),
}


def embedded(base, folder):
    return [array for rows in capture_rows(base, WINDOWS, 0, 3, 2, -1, False) for array in rows[:2]]


def embedded_and_scored(base, folder):
    return [array for rows in capture_rows(base, WINDOWS, 0, 3, 2, -1, True) for array in rows]


def knn_lm_files(folder):
    keys = np.random.default_rng(0).standard_normal((50, HIDDEN)).astype(np.float32)
    index = faiss.IndexFlatL2(HIDDEN)
    index.add(keys)
    faiss.write_index(index, str(folder / "index"))
    np.save(folder / "values.npy", np.arange(50, dtype=np.int32))


def knn_lm(base, folder):
    knn_lm_files(folder)
    training = SimpleNamespace(per_device_eval_batch_size=2, output_dir=folder)
    files = {"index_file": str(folder / "index"), "val_file": str(folder / "values.npy"), "k": 8, "knn": True}
    train_base.evaluate(base, WINDOWS, train_base.StageArguments(knn_temp=[1.0, 9.0], **files), training)
    return perplexities(folder)


def joint(base, folder):
    arguments = evaluate_joint.JointArguments(
        lmbda=[0.1, 0.5], per_device_eval_batch_size=2, output_dir=str(folder), dataset_name=str(folder / "windows")
    )
    memory = memory_beside(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.loading.load_windows", lambda *_: WINDOWS)
        patch.setattr("utils.memories.open_memory_of", lambda *_, **__: memory)
        for name, value in {"open_tokenizer": None, "open_base": base}.items():
            patch.setattr(BaseArguments, name, lambda *_, value=value, **__: value)
        evaluate_joint.evaluate(arguments)
    return perplexities(folder)


def online_rows(base, folder):
    source = online_source(base)
    return [source.rows(*source.read(np.arange(len(IDS)))).hidden.cpu()]


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


def recall(base, folder):
    model = MLPMemory(base, memory_beside(base))
    found = Evaluator(model, byte_tokenizer(), batch_size=2).likelihoods([Encoded(row, 5) for row in IDS])
    return [each.total for each in found]


def answers(base, folder):
    """Question answering: texts, and likelihoods, of prompts with a long common start."""
    start = some_ids(batch=1, time=35, seed=5)[0].numpy()
    prompts = [np.concatenate([start, row[:3]]) for row in IDS]
    evaluator = Evaluator(MLPMemory(base, memory_beside(base)), byte_tokenizer(), batch_size=2)
    assert evaluator.share_start(prompts) == 35
    texts = evaluator.continuations(prompts, 5, "\n")
    likelihoods = evaluator.likelihoods([Encoded(np.append(prompt, [7, 8]), 38) for prompt in prompts])
    return [*(ord(letter) for letter in "".join(texts)), *(each.total for each in likelihoods)]


def generated(base, folder):
    """`MLPMemory.generate`, greedy, with beams and of prompts of two lengths."""
    joint = MLPMemory(base, memory_beside(base), lmbda=0.4, knn_temp=2.0)
    ids = torch.from_numpy(IDS).to(base.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return [*joint.generate(ids, **options).tolist(), *joint.generate(ids, num_beams=2, **options).tolist()]


def shown(base, folder):
    """The demo: both continuations token by token, and what the memory does to each token."""
    joint = MLPMemory(base, memory_beside(base), lmbda=0.4)
    ids = torch.from_numpy(IDS[:1])
    tokens = [
        token for _, made in side_by_side(joint, byte_tokenizer(), ids, Sampling(max_new_tokens=3)) for token in made
    ]
    inspected, hidden = inspect_tokens(joint, [*IDS[0].tolist(), *tokens], 5)
    return [tokens, *((each.base, each.memory, each.mixture) for each in inspected), hidden.cpu().numpy()]


def gated(base, folder):
    """Lambda by token: in generation, and in scoring."""
    memory = memory_beside(base)
    torch.manual_seed(3)
    gate = put(LambdaGate(HIDDEN, 16, knn_temp=2.0), base.get_output_embeddings().weight.device)
    joint = MLPMemory(base, memory, "adaptive", gate=gate)
    ids = torch.from_numpy(IDS).to(base.get_input_embeddings().weight.device)
    made = joint.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    scored = [rows for _, _, rows in gate_rows(joint, joint.gate, WINDOWS, 2, "scored")]
    return [*made.tolist(), *(figures.tolist() for rows in scored for figures in rows)]


def memory_beside(base):
    return put(tiny_memory(base), next(captured_module(base).parameters()).device)


def perplexities(folder):
    found = json.loads((folder / "results.json").read_text())
    return [found["base_perplexity"], *(row["perplexity"] for row in found["grid"])]


def knn_generated(base, folder):
    """A kNN-LM's continuation, whose lambda follows the nearest neighbour's distance."""
    knn_lm_files(folder)
    lmbda = Buckets(np.array([30.0, 40.0]), np.array([0.9, 0.5, 0.1]), knn_temp=9.0)
    wrapper = KNNLM(folder / "index", folder / "values.npy", k=8, probe=1, lmbda=lmbda, knn_temp=9.0)
    ids = torch.from_numpy(IDS).to(base.get_input_embeddings().weight.device)
    with wrapper.on(base):
        return base.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "stage",
    [
        embedded,
        embedded_and_scored,
        knn_lm,
        knn_generated,
        joint,
        online_rows,
        recall,
        answers,
        generated,
        shown,
        gated,
    ],
)
def test_a_stage_runs_where_its_base_is_and_gives_the_numbers_of_the_cpu(stage, place, tmp_path):
    expected = stage(tiny_base("llama"), tmp_path)
    base = tiny_base("llama")
    with claimed_devices():
        found = stage(PLACES[place](base), tmp_path)
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [5, 11])
def test_blocks_of_logits_on_a_gpu_are_sized_by_bytes(limit, monkeypatch):
    from models import capture

    base, made, logits = tiny_base("llama"), [], capture.base_logits
    (expected,) = Scorer(base).batches(WINDOWS, 3)
    monkeypatch.setattr("utils.evaluation.GPU_PRODUCT_BYTES", limit * 4 * VOCABULARY)
    monkeypatch.setattr(capture, "base_logits", lambda base, some: made.append(len(some)) or logits(base, some))
    with claimed_devices():
        (found,) = Scorer(put(base, "cuda:0")).batches(WINDOWS, 3)
        assert max(made) == limit and sum(made) == len(found[1]) == 33
        torch.testing.assert_close(found[1].cpu(), expected[1])


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


def one_step(make_source, base, loss):
    """The figures of a step of two loads, each of several micro-batches."""
    memory = put(tiny_memory(base), base.get_input_embeddings().weight.device)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "micro_batch_rows": 5}
    arguments = TrainerArguments(seed=0, loss=loss, **settings)
    trainer = MemoryTrainer(memory, make_source(base), arguments, {}, Alone(memory.lm_head.weight.device))
    NOTED.clear()
    return trainer.train_step(np.arange(len(IDS)), trainer._reads())


@pytest.mark.parametrize("loss", ["fused", "plain"])
@pytest.mark.parametrize(
    ("source", "place", "base_batches"),
    [(offline_source, "one", 0), (online_source, "one", 2), (online_source, "two", 2)],
)
def test_a_training_step_waits_once_for_the_gpu_and_its_copies_are_pinned_in_the_reading_thread(
    source, place, base_batches, loss
):
    expected = one_step(source, tiny_base("llama"), loss)
    base = tiny_base("llama")
    with claimed_devices():
        found = one_step(source, PLACES[place](base), loss)
        # transformers itself looks once in each of the base's batches whether texts are packed in it.
        assert NOTED.waits[-1] == "tolist" and len(NOTED.waits) <= 1 + base_batches
        assert len(NOTED.threads) >= 2 * 5 and threading.main_thread() not in NOTED.threads
    assert found == pytest.approx(expected, rel=1e-5)


def test_waits_for_a_gpu_are_noted_as_they_are_there():
    with claimed_devices():
        here, mask = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:0") > 0
        pinned = torch.ones(3).pin_memory()
        for quick in (
            lambda: pinned[1:].to("cuda:0", non_blocking=True),
            lambda: here[torch.tensor([1]).pin_memory().to("cuda:0", non_blocking=True)],
            lambda: here.repeat_interleave(mask.long(), output_size=3),
        ):
            quick()
            assert NOTED.waits == []
        for slow in (
            *(
                lambda: here.sum().item(),
                lambda: bool(mask.all()),
                lambda: int(here[0]),
                here.tolist,
                here.cpu,
                lambda: here[mask],
            ),
            *(lambda: pinned.to("cuda:0"), lambda: torch.ones(3).to("cuda:0", non_blocking=True)),
            lambda: pinned.to("cuda:0", torch.float64, non_blocking=True),
            lambda: here.repeat_interleave(mask.long()),
        ):
            slow()
            assert NOTED.waits, slow
            NOTED.waits.clear()


def test_mixing_devices_raises_as_on_a_gpu():
    with claimed_devices():
        here, there = torch.ones(3).to("cuda:0"), torch.ones(3, device="cuda:1")
        assert (here + 1).device == torch.device("cuda:0")
        for mixed in (lambda: here + there, lambda: here + torch.ones(3), lambda: here[there > 0]):
            with pytest.raises(RuntimeError, match="cuda:"):
                mixed()
        with pytest.raises(TypeError):
            here.numpy()
        assert there.cpu().numpy().tolist() == here.tolist()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"device": "cuda:1"}, {"": torch.device("cuda:1")}),
        ({}, {"": torch.device("cuda:3")}),
        ({"device_map": "auto"}, "auto"),
        ({"device": "cpu"}, None),
    ],
)
def test_a_base_is_read_straight_onto_its_gpu(given, asked, tmp_path, monkeypatch):
    found, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("utils.loading.default_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *names, device_map=None, **options: found.append(device_map) or load(*names, **options),
    )
    base = make_base("llama", tmp_path / "base")
    arguments = BaseArguments(model_name_or_path=str(base), device_map=given.get("device_map"))
    arguments.open_base(device=given.get("device"))  # a move to a GPU would fail here
    tiny_memory(load(base)).save_pretrained(tmp_path / "memory")
    if "device" in given:
        MLPMemory.from_pretrained(base, tmp_path / "memory", **given)
    assert found == [asked] * (1 + ("device" in given))


def test_a_full_gpu_ends_in_one_line_that_names_the_flags(capsys):
    @command
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "CUDA out of memory" in line and "--micro_batch_rows" in line


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gpt_neox"])
def test_as_many_rows_go_through_the_stack_as_fit_the_cards_free_memory(family, mixed_precision, monkeypatch):
    memory = tiny_memory(tiny_base(family), layers=6)
    row, weights = kept_of_a_row(memory, mixed_precision), sum(weight.numel() for weight in memory.parameters())
    accelerator = Alone("cuda:0")
    accelerator.mixed_precision = mixed_precision
    for rows in (0, 3000, 5000, 9000, 20_000, 10**7):
        room = HEAD_BYTES + rows * row + 16 * weights
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, room=room: (room, 80 << 30))
        with claimed_devices():
            found = rows_at_once(memory, accelerator)
        assert found in (1024, 2048, 4096, 8192, 16384) and (found <= rows or found == 1024)
        assert found > rows / 6 or found == 16384
    accelerator.num_processes = 2
    accelerator.gather = lambda rows: torch.cat([rows, rows * 0 + 2048])  # of another, whose card has less room
    with claimed_devices():
        assert rows_at_once(memory, accelerator) == 2048


def test_a_trainer_asks_the_card_how_many_rows_it_takes(monkeypatch):
    base = tiny_base("llama")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (HEAD_BYTES + 30_000_000, 80 << 30))
    with claimed_devices():
        memory = memory_beside(put(base, "cuda:0"))
        assert (
            MemoryTrainer(memory, offline_source(base), TrainerArguments(seed=0), {}, Alone("cuda:0")).micro_rows
            < 16384
        )


def commands_with_a_base():
    """The dataclass of flags of every command that has --device_map."""
    paths = [path for path in ROOT.glob("[!.]*/*.py") if path.parent.name != "tests"] + [*ROOT.glob("*.py")]
    commands = [path.relative_to(ROOT).with_suffix("").parts for path in paths if "Arguments):" in path.read_text()]
    found = [each for parts in commands for each in vars(importlib.import_module(".".join(parts))).values()]
    kinds = {each for each in found if dataclasses.is_dataclass(each) and isinstance(each, type)}
    return {kind for kind in kinds if any(field.name == "device_map" for field in dataclasses.fields(kind))}


def test_a_base_is_not_spread_by_each_of_several_processes_of_a_machine(monkeypatch):
    kinds = commands_with_a_base()
    assert {"TrainerArguments", "StageArguments", "JointArguments", "ModelArguments"} <= {
        each.__name__ for each in kinds
    }
    for processes, together in (({"WORLD_SIZE": "8"}, 8), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8)):
        with monkeypatch.context() as patch:
            for name, value in processes.items():
                patch.setenv(name, value)
            for kind in kinds:
                with pytest.raises(InputError, match=rf"--device_map auto.* {together} processes"):
                    kind(device_map="auto", **required_of(kind))
                kind(**required_of(kind))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines, a process on each
    assert BaseArguments(device_map="auto").device_map == "auto"
    with pytest.raises(InputError, match=r"--device_map auto.* fine-tuning"):
        train_base.check_arguments(train_base.StageArguments(device_map="auto"), SimpleNamespace(do_train=True))


def required_of(kind):
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    return dict.fromkeys(needed, "x")


def open_a_base(folder):
    BaseArguments(model_name_or_path=str(make_base("llama", folder))).open_base(dtype=torch.float32, device="cpu")


def begin_training_without_a_base(folder):
    TrainerArguments(mixed_precision="no", output_dir=str(folder)).make_accelerator()


@pytest.mark.parametrize("begin", [open_a_base, begin_training_without_a_base])
@pytest.mark.parametrize(("refused", "allowed"), [("", "high"), ("1", "highest")])
def test_a_command_on_a_gpu_may_compute_in_tf32_unless_that_is_refused(tmp_path, monkeypatch, begin, refused, allowed):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(state=None))
    monkeypatch.setenv("MLPMEM_NO_TF32", refused)
    monkeypatch.setattr("training.arguments.default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        begin(tmp_path)
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
