"""Adaptive lambda of a memory: the gate's features, its fit, its file, and the commands that use it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import GOLDEN, command, refused_here
from tiny_models import make_base, random_gate, some_ids, tiny_joint, tiny_memory
from transformers import AutoModelForCausalLM

from knn_utils.scored_rows import GateRows
from models import MLPMemory
from models.gate import DISTANCES, FEATURES, WEIGHTS, LambdaGate, mix
from training.gate import cut_anew, fit
from utils.artefact import read_made

pytestmark = pytest.mark.unit


@pytest.fixture
def gated():
    joint = tiny_joint()
    joint.gates = torch.nn.ModuleList([random_gate(joint.base_lm, memory_temp=2.0)])
    joint.lmbda = "adaptive"
    return joint


@pytest.mark.parametrize("other", [False, True])
def test_features_and_mixture_are_those_of_the_formula(other):
    rng = np.random.default_rng(0)
    base, memory = (torch.from_numpy(rng.normal(size=(4, 11)) * 3).float() for _ in range(2))
    hidden = torch.from_numpy(rng.normal(size=(4, 6))).float()
    gate = LambdaGate(6, other=other).requires_grad_(False)
    states = rng.normal(size=(500, 6)) * [1, 2, 3, 1, 1, 5] + 1
    elsewhere = rng.normal(size=(400, 6)) * [4, 1, 1, 2, 1, 1] - 2
    gate.fit_distances(torch.from_numpy(states), torch.from_numpy(elsewhere) if other else None)
    b, m = (each.double().log_softmax(-1).numpy() for each in (base, memory))

    def distance(text):
        covariance, centred = np.cov(text, rowvar=False), hidden.double().numpy() - text.mean(0)
        inverse = np.linalg.inv(covariance + 0.01 * np.diag(covariance).mean() * np.eye(6))
        return np.log(np.einsum("ni,ij,nj->n", centred, inverse, centred) / 6)

    each = [
        *(-(np.exp(b) * b).sum(-1), b.max(-1), -(np.exp(m) * m).sum(-1), m.max(-1), (np.exp(m) * (m - b)).sum(-1)),
        b.argmax(-1) == m.argmax(-1),
        *(b[np.arange(4), m.argmax(-1)], m[np.arange(4), b.argmax(-1)]),
        distance(states),
        distance(elsewhere) if other else np.zeros(4),
    ]
    features = gate.features(base, memory, hidden)[0]
    assert features.numpy() == pytest.approx(np.stack(each, -1).astype(float), rel=1e-4, abs=1e-4)
    lmbda = gate.logit(features).sigmoid().double().numpy()
    mixed = mix([gate], base.clone(), [memory.clone()], hidden).double().exp().numpy()
    np.testing.assert_allclose(mixed, (1 - lmbda) * np.exp(b) + lmbda * np.exp(m), atol=1e-5)
    base[1, 3] = memory[2, 4] = -math.inf  # an impossible token
    assert torch.isfinite(gate.features(base, memory, hidden)[0]).all()


def test_gradients_reach_base_memory_and_gate(gated):
    ids = some_ids()
    with torch.no_grad():
        without = gated(ids).logits
    gated.requires_grad_(True)
    output = gated(ids, labels=ids)
    assert torch.allclose(output.logits, without, atol=1e-5)
    output.loss.backward()
    for part in (gated.base_lm.lm_head, gated.knn_generator.lm_head, gated.gates[0].outer):
        assert part.weight.grad.abs().sum() > 0


def test_the_gate_goes_where_the_model_goes(gated, tmp_path):
    base, memory = make_base("llama", tmp_path / "base"), tmp_path / "memory"
    joint = MLPMemory.from_pretrained(str(base), tiny_memory(AutoModelForCausalLM.from_pretrained(base)))
    joint.knn_generator.save_pretrained(memory)
    with pytest.raises(ValueError, match=r"training\.gate"):
        MLPMemory.from_pretrained(str(base), str(memory), "adaptive")
    random_gate(joint.base_lm, memory_temp=2.0).save(memory)
    opened = MLPMemory.from_pretrained(str(base), str(memory), "adaptive")
    assert opened.knn_temp == 2.0
    opened.save_pretrained(tmp_path / "joint")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert again.lmbda == "adaptive"
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, opened(ids).logits)
    # With a fixed lambda the gate is kept for later.
    MLPMemory.from_pretrained(str(base), str(memory), 0.5).save_pretrained(tmp_path / "number")
    assert (tmp_path / "number" / "memory" / WEIGHTS).is_file()


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


def trained_gate(pair, *more):
    """The record of a gate that the command trains."""
    command("training.gate", *flags(pair, "--steps", 100, *more))
    return read_made(pair / "memory" / WEIGHTS)


def test_the_command_fits_a_gate_that_evaluation_uses(pair, tmp_path):
    import datasets

    other = ("--other_dataset_name", pair / "windows")
    assert "other" in trained_gate(pair, *other).settings["perplexity"]
    made = trained_gate(pair, "--known_weight", 1, "--memory_temp", 1.5)
    assert made.kind == "gate" and made.settings["known_weight"] == 1
    assert made.made_from["windows"] == read_made(pair / "windows").id
    found = made.settings["perplexity"]["training"]
    assert found["mixture"] < min(found["base"], found["memory"]) * 1.02
    split = ("--do_test", "--dataset_split_name", "test", "--output_dir", tmp_path)
    command("evaluate_joint", *flags(pair, *split, "--lmbda", 0.25, "adaptive"))
    results = json.loads((tmp_path / "results.json").read_text())
    joint = MLPMemory.from_pretrained(str(pair / "base"), str(pair / "memory"), "adaptive")
    windows = datasets.load_from_disk(str(pair / "windows"))["test"].with_format("torch")
    with torch.no_grad():
        loss = joint(windows["input_ids"][:], labels=windows["labels"][:]).loss.item()
    assert results["adaptive"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results["adaptive"]["memory_temp"] == 1.5 and 0 < results["adaptive"]["mean_lambda"] < 1
    assert (results["lmbda"], results["memory_temp"]) == (0.25, 1.0)
    command("evaluate_joint", *flags(pair, *split, "--lmbda", "adaptive"))
    alone = json.loads((tmp_path / "results.json").read_text())
    assert (alone["lmbda"], alone["memory_temp"]) == ("adaptive", 1.5)
    assert alone["perplexity"] == pytest.approx(results["adaptive"]["perplexity"])


def test_caution_leaves_distant_states_to_the_base():
    torch.manual_seed(0)
    rows = GateRows(torch.randn(400, 1, FEATURES) * 0.3, torch.full((400,), -3.0), torch.full((400, 1), -1.0))
    lambdas = {}
    for caution in (0, 1):
        gate = LambdaGate(4, 16)
        weights = SimpleNamespace(learning_rate=0.01, steps=200, known_weight=0.05, other_weight=5.0, caution=caution)
        fit(gate, {"held-out": rows, "training": rows}, weights)
        distant = torch.zeros(FEATURES)
        distant[-DISTANCES] = 1.5
        lambdas[caution] = [gate.logit(each).sigmoid().item() for each in (torch.zeros(FEATURES), distant)]
    assert min(lambdas[0]) > 0.9
    assert lambdas[1][0] > 0.8 and lambdas[1][1] < 0.2


def test_other_text_is_left_to_the_base():
    torch.manual_seed(0)
    known = GateRows(torch.randn(400, 1, FEATURES) * 0.3, torch.full((400,), -3.0), torch.full((400, 1), -1.0))
    other = GateRows(known.features + 2.0, known.base, known.memory - 4.0)
    weights = SimpleNamespace(learning_rate=0.01, steps=200, known_weight=0.05, other_weight=1.0, caution=0.0)
    lambdas = {}
    for texts in ({"held-out": known, "training": known}, {"held-out": known, "training": known, "other": other}):
        gate = LambdaGate(4, 16)
        fit(gate, texts, weights)
        lambdas[len(texts)] = [gate.logit(torch.full((FEATURES,), place)).sigmoid().item() for place in (0.0, 2.0)]
    assert min(lambdas[2]) > 0.9
    assert lambdas[3][0] > 0.9 and lambdas[3][1] < 0.1


def test_windows_are_cut_anew_behind_their_bos_token():
    import datasets

    ids = np.arange(40).reshape(2, 20)
    ids[:, 0] = 77
    labels = ids.copy()
    labels[:, :2] = -100
    windows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    moved = cut_anew(windows, 1, bos=77)
    for old, new, label in zip(ids, moved["input_ids"], moved["labels"], strict=True):
        begin = new[1] - old[1]
        assert begin > 0 and new[: 20 - begin].tolist() == [77, *old[1 + begin :]]
        assert label.tolist() == [-100, -100, *old[2 + begin :], *[-100] * begin]


def test_input_errors_name_the_flag(pair, tmp_path):
    for more in (("--known_weight", -1), ("--validation_split_name", "train")):
        assert more[0] in refused_here("training.gate", *flags(pair, *more))
    adaptive = ("--lmbda", "adaptive", "--output_dir", tmp_path)
    assert "--dstore_path" in refused_here("evaluate_joint", *flags(pair, *adaptive, "--dstore_path", tmp_path))
    (pair / "memory" / WEIGHTS).unlink(missing_ok=True)
    assert str(pair / "memory") in refused_here("evaluate_joint", *flags(pair, *adaptive))


def test_a_gate_with_other_text_is_read_as_it_was_written_and_uses_the_distance(tmp_path):
    torch.manual_seed(0)
    gate = LambdaGate(6, 8, other=True).requires_grad_(False)
    gate.fit_distances(torch.randn(50, 6), torch.randn(50, 6) + 4)
    gate.save(tmp_path)
    opened, inputs = LambdaGate.load(tmp_path), (torch.randn(3, 11), torch.randn(3, 11), torch.randn(3, 6))
    assert torch.equal(opened(*inputs), gate(*inputs))
    gate.other_mean += 9
    assert not torch.equal(opened(*inputs), gate(*inputs))
    assert LambdaGate(6).features(*inputs)[0][:, -1].abs().max() == 0
