"""Several memories of one base: the mixture, its weights, files, commands and the page."""

import json
import math
import re

import pytest
import torch
from harness import command, refused_here
from tiny_models import random_gate, save_models, some_ids, tiny_base, tiny_memory
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig

from models import MLPMemory, export, memory_class, memory_config
from models.stack import find_memory
from utils.artefact import Made, record_path


def tied_memory(base, seed):
    """A random memory that uses the head of `base`."""
    torch.manual_seed(seed)
    config = memory_config(base.config, 2)
    config.tie_head, config.head_scale = "base", 1.0
    memory = memory_class(config)(config).eval()
    for weight in memory.parameters():
        weight.data.mul_(8 if weight.ndim > 1 else 1)
    return memory


@pytest.fixture
def three():
    """A base, and memories of which the first two are tied to its head."""
    base = tiny_base("llama")
    return base, [tied_memory(base, 7), tied_memory(base, 8), tiny_memory(base)]


@pytest.mark.unit
@torch.no_grad()
@pytest.mark.parametrize("lmbda", [0.6, [0.1, 0.2, 0.3], [0.0, 0.5, 0.5], "adaptive"])
def test_the_mixture_is_that_of_base_and_memories(three, lmbda):
    base, memories = three
    gates = [random_gate(base, temp) for temp in (1.0, 2.0, 0.5)]
    joint = MLPMemory(base, memories, lmbda, 2.0, gates=gates)
    ids = some_ids()
    singles = [MLPMemory(base, memory, 1.0, temp) for memory, temp in zip(memories, joint.temperatures, strict=True)]
    own = base(ids).logits
    distributions = [own.softmax(-1), *(single(ids).logits.exp() for single in singles)]
    if lmbda == "adaptive":
        assert joint.temperatures == [1.0, 2.0, 0.5]
        captured = {}
        handle = base.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
        base(ids)
        handle.remove()
        pairs = zip(gates, distributions[1:], strict=True)
        odds = torch.cat([gate(own, other.log(), captured["x"]).exp() for gate, other in pairs], -1)
        together = odds.pow(3).mean(-1, keepdim=True).pow(1 / 3)  # the odds of all memories
        shares = odds / odds.sum(-1, keepdim=True) * together / (1 + together)
        weights = [1 / (1 + together[..., 0]), *shares.unbind(-1)]
    else:
        each = lmbda if isinstance(lmbda, list) else [lmbda / 3] * 3
        weights = [torch.tensor(weight) for weight in (1 - sum(each), *each)]
    expected = sum(weight[..., None] * probs for weight, probs in zip(weights, distributions, strict=True))
    torch.testing.assert_close(joint(ids).logits.exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.unit
@torch.no_grad()
def test_base_and_tied_memories_share_one_product(three):
    base, memories = three
    rows = []
    base.lm_head.register_forward_hook(lambda head, args, output: rows.append(args[0].shape[:2]))
    joint = MLPMemory(base, memories, 0.5)
    whole = joint(some_ids()).logits
    assert rows == [(2 * 3, 12)]
    last = joint(some_ids(), logits_to_keep=1).logits  # so few rows are multiplied the other way round
    assert rows[1] == (0, 1)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-5)
    joint.lmbda = 0.0
    assert joint(some_ids()).logits.shape[:2] == (2, 12) and rows[2] == (2, 12)


@pytest.mark.unit
def test_gradients_of_tied_memories_reach_the_shared_head(three):
    base, memories = three
    joint = MLPMemory(base, memories, 0.9).train()
    ids = some_ids()
    joint(ids, labels=ids).loss.backward()
    assert all(memory.blocks[0].mlp.gate_proj.weight.grad.abs().sum() > 0 for memory in memories)
    assert base.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.unit
@torch.no_grad()
def test_a_memory_of_weight_0_leaves_the_numbers_of_the_other(three):
    base, memories = three
    both, one = MLPMemory(base, memories[:2], [0.3, 0.0]), MLPMemory(base, memories[0], 0.3)
    assert torch.equal(both(some_ids()).logits, one(some_ids()).logits)
    ids = some_ids(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(both.generate(ids, **options), one.generate(ids, **options))


@pytest.mark.unit
@pytest.mark.parametrize("lmbda", [[0.5], [0.7, 0.7], [0.5, -0.1], "much"])
def test_weights_that_are_none_are_refused(three, lmbda):
    base, memories = three
    with pytest.raises(ValueError, match="lambda"):
        MLPMemory(base, memories[:2], lmbda)


@pytest.fixture
def saved(tmp_path):
    """(base, [memory, memory]) as folders."""
    base, memory = save_models(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(base)
    tied_memory(opened, 4).save_pretrained(tmp_path / "tied")
    return base, [memory, tmp_path / "tied"]


def test_the_folder_of_several_opens_with_their_gates(saved, tmp_path):
    base, memories = saved
    with pytest.raises(ValueError, match="no gate"):
        MLPMemory.from_pretrained(base, memories, "adaptive")
    for memory, temp in zip(memories, (1.0, 3.0), strict=True):
        random_gate(AutoModelForCausalLM.from_pretrained(base), temp).save(memory)
    joint = MLPMemory.from_pretrained(base, memories, "adaptive")
    joint.save_pretrained(tmp_path / "joint")
    again = MLPMemory.from_pretrained(tmp_path / "joint")
    assert again.temperatures == [1.0, 3.0]
    with torch.no_grad():
        assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)
    export.main([str(base), *map(str, memories), str(tmp_path / "exported"), "--lmbda", "0.2,0.1"])
    assert MLPMemory.from_pretrained(tmp_path / "exported").lmbda == [0.2, 0.1]
    with pytest.raises(ValueError, match="memory_2"):
        find_memory(tmp_path / "joint")
    (tmp_path / "joint" / "memory_of_mine").mkdir()
    MLPMemory.from_pretrained(base, memories[0], 0.2).save_pretrained(tmp_path / "joint")
    assert (tmp_path / "joint" / "memory_of_mine").exists()
    assert not (tmp_path / "joint" / "memory_2").exists()
    assert MLPMemory.from_pretrained(tmp_path / "joint").lmbda == 0.2


def test_a_gate_of_another_base_is_refused(saved):
    base, memories = saved
    opened = AutoModelForCausalLM.from_pretrained(base)
    for memory in memories:
        random_gate(opened).save(memory)
    record_path(memories[1] / "gate.safetensors").write_text(Made("gate", {}, made_from={"base": "0" * 64}).text)
    with pytest.raises(ValueError, match="another base"):
        MLPMemory.from_pretrained(base, memories, "adaptive")
    MLPMemory.from_pretrained(base, memories, [0.1, 0.2])


def test_perplexity_recall_and_demo_take_several(saved, llama_world, tmp_path, capsys):
    base, memories = llama_world.base, [tmp_path / "one", tmp_path / "two"]
    opened = AutoModelForCausalLM.from_pretrained(base)
    for number, memory in enumerate(memories):
        tied_memory(opened, number).save_pretrained(memory)
        random_gate(opened).save(memory)
    model = ("--model_name_or_path", base, "--knn_generator_path")
    found = {}
    for name, more in (("both", memories), ("one", memories[:1])):
        weights = ("0.2,0", "0.4", "adaptive") if name == "both" else ("0.2", "adaptive")
        windows = ("--dataset_name", llama_world.windows, "--output_dir", tmp_path / name)
        command("evaluate_joint", *model, *more, *windows, "--lmbda", *weights)
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert found["both"]["grid"][0]["perplexity"] == found["one"]["grid"][0]["perplexity"]
    assert found["both"]["grid"][1]["perplexity"] != found["both"]["grid"][0]["perplexity"]
    stored = ("--dstore_path", llama_world.dstore("test"), "--lmbda", "0.2,0", "0.4")
    command("evaluate_joint", *model, *memories, *windows[:2], "--output_dir", tmp_path / "stored", *stored)
    grid = json.loads((tmp_path / "stored" / "results.json").read_text())["grid"]
    assert [row["perplexity"] for row in grid] == pytest.approx(
        [row["perplexity"] for row in found["both"]["grid"]], rel=1e-4
    )
    assert "2" in refused_here("evaluate_joint", *model, *memories, *windows, "--lmbda", "0.1,0.2,0.3")

    articles = tmp_path / "articles.jsonl"
    articles.write_text(json.dumps({"text": "Moon\n\nThe moon is the first of all, in 1900 and more."}) + "\n")
    recalled = ("--articles", articles, "--output_dir", tmp_path, "--new_tokens", 4)
    command("downstream.recall", *model, *memories, *recalled, "--lmbda", "adaptive")
    assert json.loads((tmp_path / "results.json").read_text())["cases"] == 2
    capsys.readouterr()
    command("demo.generation_example", *model, *memories, "--lmbda", "0.3,0.2", "--max_new_tokens", 4)
    assert "lambda 0.3,0.2" in capsys.readouterr().out


@pytest.mark.unit
def test_the_page_gives_each_memory_a_colour(three):
    from demo import page
    from demo.pair import Sampling
    from demo.streams import JOINT, side_by_side

    base, memories = three
    joint = MLPMemory(base, memories, [0.3, 0.1, 0.3])
    *_, made = side_by_side(joint, some_ids(1, 6), Sampling(), 20)
    for token in made[JOINT]:
        token.texts = {each: str(each) for top in token.top.values() for each, _ in top} | {token.token_id: "x"}
        probabilities = {name: math.exp(value) for name, value in token.log_probs.items()}
        learned = [probabilities[f"memory {number}"] for number in (1, 2, 3)]
        shares = [weight * value for weight, value in zip(token.weights, learned, strict=True)]
        assert probabilities["mixture"] == pytest.approx(0.3 * probabilities["base"] + sum(shares), rel=1e-3)
        assert token.memory == shares.index(max(shares))
    html = page.inspector({"base": [], JOINT: made[JOINT]}, ["first", "second", "third"])
    raised = {token.memory for token in made[JOINT] if token.moved >= 0}
    buttons = "".join(re.findall(r"<button.*?>", html))
    assert {int(number) for number in re.findall(r"mlpm-memory-(\d)", buttons)} == raised and len(raised) > 1
    assert "memory 2: second" in html


@pytest.mark.parametrize("lmbda", [0.6, "adaptive"])
def test_generation_with_a_static_cache_is_one_graph(three, lmbda):
    """On CUDA transformers compiles it by itself."""
    base, memories = three
    joint = MLPMemory(base, memories, lmbda, gates=[random_gate(base) for _ in memories])
    ids = some_ids()[:1]
    expected = joint.generate(ids, max_new_tokens=6, do_sample=False)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(joint.generate(ids, max_new_tokens=6, do_sample=False, **static), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
