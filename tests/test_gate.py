"""Lambda by token: what the gate sees, what it is fitted to, where it lies, and everything that takes `adaptive`."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import GOLDEN, command, refused_here
from tiny_models import make_base, random_gate, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import AutoModelForCausalLM

from models import MLPMemory
from models.gate import FIGURES, LambdaGate
from training.gate import begin_elsewhere, fit
from utils.gating import GateRows

pytestmark = pytest.mark.unit


@pytest.fixture
def gated():
    joint = tiny_joint()
    joint.gate = random_gate(joint.base_lm, joint.knn_generator, knn_temp=2.0)
    joint.lmbda = "adaptive"
    return joint


def test_the_figures_are_what_their_names_say():
    rng = np.random.default_rng(0)
    base, memory = (torch.from_numpy(rng.normal(size=(4, 11)) * 3).float().log_softmax(-1) for _ in range(2))
    hidden = torch.from_numpy(rng.normal(size=(4, 6))).float()
    gate = LambdaGate(6)
    states = rng.normal(size=(500, 6)) * [1, 2, 3, 1, 1, 5] + 1
    gate.fit_corpus(torch.from_numpy(states))
    b, m, x = base.double().numpy(), memory.double().numpy(), hidden.double().numpy()
    covariance = np.cov(states, rowvar=False)
    inverse = np.linalg.inv(covariance + 0.01 * np.diag(covariance).mean() * np.eye(6))
    centred = x - gate.corpus_mean.double().numpy()
    each = [
        -(np.exp(b) * b).sum(-1),
        b.max(-1),
        -(np.exp(m) * m).sum(-1),
        m.max(-1),
        (np.exp(m) * (m - b)).sum(-1),
        (b.argmax(-1) == m.argmax(-1)).astype(float),
        b[np.arange(4), m.argmax(-1)],
        m[np.arange(4), b.argmax(-1)],
        np.log(np.einsum("ni,ij,nj->n", centred, inverse, centred) / 6),
    ]
    assert gate.figures(base, memory, hidden)[0].numpy() == pytest.approx(np.stack(each, -1), rel=1e-4, abs=1e-4)


def test_a_token_that_is_impossible_to_one_gives_finite_figures():
    base, memory = torch.randn(2, 3, 9).log_softmax(-1)
    base[0, 2] = memory[1, 4] = -math.inf
    assert torch.isfinite(LambdaGate(4).figures(base, memory, torch.zeros(3, 4))[0]).all()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mixture_of_logits_is_that_of_the_formula_in_double_precision(dtype, gradient):
    torch.manual_seed(0)
    gate, base = LambdaGate(6, 16).requires_grad_(gradient), (torch.randn(2, 5, 40) * 4 - 100).to(dtype).float()
    memory, hidden = (torch.randn(2, 5, 40) * 8 + 30).to(dtype).float(), torch.randn(2, 5, 6)
    base[0, 1, 3] = memory[0, 2, 4] = base[1, 0, 7] = memory[1, 0, 7] = -math.inf
    b, m = (each.double().log_softmax(-1) for each in (base, memory))
    favourite, other = (each.argmax(-1, keepdim=True) for each in (b, m))
    each = (
        *(-(b.exp() * b).sum(-1, keepdim=True), b.amax(-1, keepdim=True)),
        *(-(m.exp() * m).sum(-1, keepdim=True), m.amax(-1, keepdim=True)),
        *((m.exp() * (m - b)).sum(-1, keepdim=True), favourite == other),
        *(b.gather(-1, other), m.gather(-1, favourite), hidden.square().mean(-1, keepdim=True).log()),
    )
    logit = gate.logit(torch.cat(each, -1).nan_to_num(60.0).clamp(-60, 60).float()).double()
    expected = torch.logaddexp(b - torch.nn.functional.softplus(logit), m - torch.nn.functional.softplus(-logit))
    mixed = gate.mix(base, memory, hidden)
    assert mixed.requires_grad == gradient
    assert torch.allclose(mixed, expected.float(), rtol=1e-5, atol=1e-4)
    assert mixed[1, 0, 7] == -math.inf and torch.isfinite(mixed).sum() == mixed.numel() - 1


def test_the_model_mixes_each_position_with_its_own_lambda(gated):
    ids = some_ids()
    with torch.no_grad():
        got = gated(ids).logits
        gated.lmbda = 0.0
        base = gated(ids).logits
        gated.lmbda = 1.0
        memory = gated(ids).logits
        logit = gated.gate(base.clone(), memory.clone(), captured_states(gated, ids))
    lmbda = logit.sigmoid()
    assert lmbda.std() > 0.01
    expected = ((1 - lmbda) * base.exp() + lmbda * memory.exp()).log()
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(got.exp().sum(-1), torch.ones(got.shape[:2]), atol=1e-5)


def captured_states(joint, ids):
    from models.capture import hidden_states

    return hidden_states(joint.base_lm, ids)


def test_with_gradients_the_mixture_is_the_same_and_reaches_base_memory_and_gate(gated):
    ids = some_ids()
    with torch.no_grad():
        without = gated(ids).logits
    gated.requires_grad_(True)
    output = gated(ids, labels=ids)
    assert torch.allclose(output.logits, without, atol=1e-5)
    output.loss.backward()
    for part in (gated.base_lm.lm_head, gated.knn_generator.lm_head, gated.gate.outer):
        assert part.weight.grad.abs().sum() > 0


def test_generation_goes_token_by_token_as_the_whole_sequence_is_scored(gated):
    ids = some_ids()
    made = gated.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(gated(made).logits[:, ids.shape[1] - 1 : -1].argmax(-1), made[:, ids.shape[1] :])


def test_half_precision_moves_the_gate_along(gated):
    ids = some_ids()
    with torch.no_grad():
        exact, rough = gated(ids).logits, gated.to(torch.bfloat16)(ids).logits
    assert rough.dtype == torch.float32 and (rough.exp() - exact.exp()).abs().max() < 0.2


def test_the_gate_lies_in_the_memory_s_folder_and_goes_where_the_model_goes(gated, tmp_path, monkeypatch):
    base, memory = make_base("llama", tmp_path / "base"), tmp_path / "memory"
    joint = MLPMemory.from_pretrained(str(base), tiny_memory(AutoModelForCausalLM.from_pretrained(base)))
    joint.knn_generator.save_pretrained(memory)
    random_gate(joint.base_lm, joint.knn_generator, knn_temp=2.0).save(memory)
    opened = MLPMemory.from_pretrained(str(base), str(memory), "adaptive")
    assert opened.knn_temp == 2.0
    monkeypatch.setattr("models.stack.download", lambda name: memory)
    assert MLPMemory.from_pretrained(str(base), "someone/a-memory", "adaptive").knn_temp == 2.0
    ids = some_ids()
    opened.save_pretrained(tmp_path / "joint")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert again.lmbda == "adaptive" and "| adaptive |" in (tmp_path / "joint" / "README.md").read_text()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, opened(ids).logits)
    # A number in place of the word leaves the gate where it is, for later.
    MLPMemory.from_pretrained(str(base), str(memory), 0.5).save_pretrained(tmp_path / "number")
    assert (tmp_path / "number" / "memory" / "gate.safetensors").is_file()


@pytest.mark.parametrize("which", ["base", "memory"])
def test_a_gate_of_another_pair_is_refused_in_any_precision(which, tmp_path):
    base = tiny_base("llama")
    memory = tiny_memory(base)
    memory.save_pretrained(tmp_path)
    other = {"base": tiny_base("llama", seed=9), "memory": tiny_memory(base, seed=9)}
    pair = {"base": base, "memory": memory} | {which: other[which]}
    random_gate(**pair).save(tmp_path)
    from models import load_memory

    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=f"another {which}"):
            MLPMemory(base.to(dtype), load_memory(tmp_path, dtype=dtype), "adaptive")
    random_gate(tiny_base("llama"), load_memory(tmp_path)).save(tmp_path)
    MLPMemory(base, load_memory(tmp_path, dtype=torch.bfloat16), "adaptive")


def test_adaptive_without_a_gate_says_how_to_train_one(tmp_path):
    joint = tiny_joint()
    with pytest.raises(ValueError, match=r"has no gate; train one \(python -m training.gate\)"):
        joint.lmbda = "adaptive"
    (tmp_path / "gate.json").write_text("{}")
    with pytest.raises(ValueError, match="no usable gate"):
        LambdaGate.load(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, an untrained memory, and windows whose validation split is other text."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_base("llama", folder / "base")
    torch.manual_seed(1)
    tiny_memory(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(folder / "memory")
    lines = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
    splits = folder / "text"
    splits.mkdir()
    for name, part in (("train", lines[:200]), ("validation", lines[300:400]), ("test", lines[400:500])):
        (splits / f"{name}.txt").write_text("".join(part))
    command(
        "utils.preprocess_dataset",
        *("--dataset_name", splits, "--tokenizer_path", base, "--output_dir", folder / "windows"),
        *("--block_size", 64, "--stride", 64),
    )
    return folder


def flags(pair, *more):
    which = ("--model_name_or_path", pair / "base", "--knn_generator_path", pair / "memory")
    return [*which, "--dataset_name", pair / "windows", *more]


def test_the_command_fits_a_gate_that_helps_and_every_evaluation_takes_it(pair, tmp_path):
    command("training.gate", *flags(pair, "--known_weight", 1, "--steps", 100))
    record = json.loads((pair / "memory" / "gate.json").read_text())
    found = record["perplexity"]
    best = {kind: min(found[kind]["base"], found[kind]["memory"]) for kind in found}
    assert record["known_weight"] == 1 and found["known"]["mixture"] < best["known"] * 1.02
    split = ("--do_test", "--dataset_split_name", "test", "--output_dir", tmp_path)
    command("evaluate_joint", *flags(pair, *split, "--lmbda", 0.25, "adaptive"))
    results = json.loads((tmp_path / "results.json").read_text())
    joint = MLPMemory.from_pretrained(str(pair / "base"), str(pair / "memory"), "adaptive")
    import datasets

    windows = datasets.load_from_disk(str(pair / "windows"))["test"]
    losses, tokens = 0.0, 0
    for ids, labels in zip(windows["input_ids"], windows["labels"], strict=True):
        count = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            losses += joint(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * count
        tokens += count
    assert results["adaptive"]["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    assert results["lmbda"] == 0.25 and results["tokens"] == tokens and 0 < results["adaptive"]["mean_lambda"] < 1
    command("evaluate_joint", *flags(pair, *split, "--lmbda", "adaptive"))
    alone = json.loads((tmp_path / "results.json").read_text())
    assert alone["lmbda"] == "adaptive" and alone["perplexity"] == pytest.approx(results["adaptive"]["perplexity"])


def test_more_weight_on_known_text_gives_it_more_of_the_likelihood(pair):
    known = {}
    for weight in (0, 3):
        command("training.gate", *flags(pair, "--known_weight", weight, "--steps", 100))
        known[weight] = json.loads((pair / "memory" / "gate.json").read_text())["perplexity"]["known"]["mixture"]
    assert known[3] < known[0]


def test_caution_leaves_stranger_states_to_the_base_and_the_others_to_the_memory_that_knows_them():
    torch.manual_seed(0)
    rows = GateRows(torch.randn(400, FIGURES) * 0.3, torch.full((400,), -3.0), torch.full((400,), -1.0))
    lambdas = {}
    for caution in (0, 1):
        gate = LambdaGate(4, 16)
        fit(gate, rows, rows, SimpleNamespace(learning_rate=0.01, steps=200, known_weight=0.05, caution=caution))
        stranger = torch.zeros(FIGURES)
        stranger[-1] = 1.5
        lambdas[caution] = [gate.logit(each).sigmoid().item() for each in (torch.zeros(FIGURES), stranger)]
    assert min(lambdas[0]) > 0.9
    assert lambdas[1][0] > 0.8 and lambdas[1][1] < 0.2


def test_known_text_begins_elsewhere_behind_the_bos_token_of_its_window():
    import datasets

    ids = np.arange(40).reshape(2, 20)
    ids[:, 0] = 77
    labels = ids.copy()
    labels[:, :2] = -100
    windows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    moved = begin_elsewhere(windows, 1, bos=77)
    for old, new, label in zip(ids, moved["input_ids"], moved["labels"], strict=True):
        begin = new[1] - old[1]
        assert begin > 0 and new[: 20 - begin].tolist() == [77, *old[1 + begin :]]
        assert label.tolist() == [-100, -100, *old[2 + begin :], *[-100] * begin]


def test_results_name_the_temperature_of_the_gate_and_not_that_of_the_flag(pair, tmp_path, capsys):
    from downstream.model import ModelArguments

    command("training.gate", *flags(pair, "--steps", 2, "--knn_temp", 1.5))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "saru\n\nsaru nelo is a cimosa soke"}) + "\n")
    more = ("--articles", tmp_path / "a.jsonl", "--lmbda", "adaptive", "--knn_temp", 3, "--output_dir", tmp_path)
    command("downstream.recall", *flags(pair, *more)[:4], *more, "--examples", 0, "--new_tokens", 1)
    assert json.loads((tmp_path / "results.json").read_text())["knn_temp"] == 1.5
    assert "--knn_temp: has no use with --lmbda adaptive" in capsys.readouterr().out
    stated = ModelArguments("base", use_neural_knn=True, knn_generator_path="memory", lmbda="adaptive").stated()
    assert stated == {"model": "base", "memory": "memory", "lmbda": "adaptive", "knn_temp": None}


def test_bad_input_ends_in_one_line(pair, tmp_path):
    def refused(module, *arguments):
        return refused_here(module, *flags(pair, *arguments))

    assert "--known_weight -1" in refused("training.gate", "--known_weight", -1)
    assert "--caution -1" in refused("training.gate", "--caution", -1)
    told = refused("training.gate", "--validation_split_name", "train")
    assert "--validation_split_name train: is part of the trained text (100%" in told
    (pair / "memory" / "gate.json").unlink(missing_ok=True)
    told = refused("evaluate_joint", "--do_test", "--lmbda", "adaptive", "--output_dir", tmp_path)
    assert "has no gate; train one (python -m training.gate)" in told
    told = refused("evaluate_joint", "--lmbda", "adaptive", "--dstore_path", tmp_path, "--output_dir", tmp_path)
    assert "leave --dstore_path out" in told
