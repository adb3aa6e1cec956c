"""The demos: both continuations and their tokens' figures, the command line, passages, the page's runs. No browser."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import FAMILIES, GOLDEN, ROOT, command, refused, refused_here, run
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, random_gate, save_models, tiny_joint, tiny_memory

from demo import page
from demo.pair import Pair, PairArguments, Sampling, choose_pair
from demo.passages import Passage, Passages
from demo.streams import BASE, JOINT, running_text, side_by_side, sources_of, text_after
from models import MLPMemory
from utils.errors import InputError
from utils.loading import load_windows

PROMPT = torch.tensor([[5, 9, 13, 40]])
GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.5, top_p=0.95, seed=7)


def last(model, sampling=GREEDY, max_new_tokens=12, prompt=PROMPT):
    """The tokens of both sides at the end."""
    *_, made = side_by_side(model, prompt, sampling, max_new_tokens)
    return made


def ids(tokens) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_both_continuations_are_what_generate_gives(family):
    joint = tiny_joint(family, lmbda=0.6, knn_temp=2.0)
    made = last(joint)
    for side, model in ((BASE, joint.base_lm), (JOINT, joint)):
        expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert ids(made[side]) == expected[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lmbda", "knn_temp", "name"), [(0.25, 1.0, "l025_t1"), (0.6, 2.0, "l06_t2")])
def test_the_figures_of_a_token_are_the_golden_ones(family, lmbda, knn_temp, name):
    golden = load_file(GOLDEN / family / "expected.safetensors")
    model = MLPMemory.from_pretrained(GOLDEN / family / "base", GOLDEN / family / "memory", lmbda, knn_temp)
    expected = {
        "base": golden["base_logits"][0].log_softmax(-1),
        "memory": (golden["memory_logits"][0] / knn_temp).log_softmax(-1),
        "mixture": golden[f"joint_logprobs_{name}"][0],
    }
    for end in range(1, golden["input_ids"].shape[1], 3):
        (token,) = last(model, max_new_tokens=1, prompt=golden["input_ids"][:1, :end])[JOINT]
        assert torch.allclose(token.hidden, golden["mlp_input"][0, end - 1], atol=1e-4)
        assert token.lmbda == pytest.approx(lmbda)
        for source in sources_of(1):
            log_probs = expected[source][end - 1]  # (vocabulary,)
            assert token.log_probs[source] == pytest.approx(log_probs[token.token_id].item(), abs=1e-4)
            candidates, probabilities = zip(*token.top[source], strict=True)
            assert probabilities == pytest.approx(log_probs.exp().topk(6).values.tolist(), abs=1e-5)
            assert probabilities == pytest.approx(log_probs[list(candidates)].exp().tolist(), abs=1e-5)


@pytest.mark.unit
def test_with_a_gate_each_token_has_its_own_lambda():
    gated = tiny_joint("llama")
    gated.gates = torch.nn.ModuleList([random_gate(gated.base_lm)])
    gated.lmbda = "adaptive"
    tokens = last(gated)[JOINT]
    whole = torch.tensor([[*PROMPT[0].tolist(), *ids(tokens)]])
    with torch.no_grad():
        expected = gated(whole).logits[0, PROMPT.shape[1] - 1 : -1].gather(-1, whole[0, PROMPT.shape[1] :, None])
    assert [token.log_probs["mixture"] for token in tokens] == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    for token in tokens:
        base, memory, mixture = (math.exp(token.log_probs[source]) for source in sources_of(1))
        assert mixture == pytest.approx((1 - token.lmbda) * base + token.lmbda * memory, rel=1e-3)
    assert max(token.lmbda for token in tokens) - min(token.lmbda for token in tokens) > 0.01


@pytest.mark.unit
def test_a_seed_fixes_both_texts_and_lambda_0_makes_them_equal():
    model = tiny_joint("mistral", lmbda=0.6)
    made = last(model, SAMPLED)
    assert ids(made[BASE]) != ids(made[JOINT])
    again = last(model, SAMPLED)
    assert all(ids(again[side]) == ids(tokens) for side, tokens in made.items())
    assert ids(last(model, Sampling(1.5, 0.95, seed=8))[BASE]) != ids(made[BASE])
    model.lmbda = 0.0
    equal = last(model, SAMPLED)
    assert ids(equal[BASE]) == ids(equal[JOINT]) == ids(made[BASE])
    assert {token.moved for token in equal[JOINT]} == {0.0}


def test_samples_follow_the_distribution_at_their_temperature_and_top_p():
    model = tiny_joint("gpt2", lmbda=0.5)
    drawn = [last(model, Sampling(2.0, 0.8, seed), 1)[JOINT][0] for seed in range(300)]
    with torch.no_grad():
        probabilities = (model(PROMPT).logits[0, -1] / 2).softmax(-1).sort(descending=True)  # (vocabulary,)
    kept = int((probabilities.values.cumsum(-1) < 0.8).sum()) + 1
    nucleus = probabilities.indices[:kept].tolist()
    assert {token.token_id for token in drawn} <= set(nucleus)
    expected = probabilities.values[0] / probabilities.values[:kept].sum()
    share = sum(token.token_id == nucleus[0] for token in drawn) / len(drawn)
    assert share == pytest.approx(expected.item(), abs=0.1)


@pytest.mark.unit
def test_a_side_that_has_ended_waits_for_the_other():
    model = tiny_joint("llama", lmbda=0.6, knn_temp=2.0)
    whole = last(model)
    end = ids(whole[BASE])[5]
    model.base_lm.generation_config.eos_token_id = end
    made = last(model)
    for side, tokens in whole.items():
        assert ids(made[side]) == ids(tokens)[: [*ids(tokens), end].index(end) + 1]


@pytest.mark.unit
def test_generation_ends_with_the_context_and_when_it_is_closed():
    model = tiny_joint("llama")
    made = last(model, max_new_tokens=40, prompt=torch.full((1, 60), 7))
    assert len(made[BASE]) <= 5
    for length in (0, 65):
        with pytest.raises(ValueError, match=r"prompt"):
            last(model, prompt=torch.full((1, length), 7))
    steps = side_by_side(model, PROMPT, GREEDY, 40)
    assert len(next(steps)[BASE]) == 1
    steps.close()
    assert ids(last(model, max_new_tokens=1)[BASE])


@pytest.mark.unit
def test_a_character_of_several_tokens_is_shown_when_it_is_complete():
    tokenizer = byte_tokenizer()
    prompt, pieces = tokenizer("x").input_ids, tokenizer("é€").input_ids
    tokens = last(tiny_joint("llama"), max_new_tokens=len(pieces))[BASE]
    for token, piece in zip(tokens, pieces, strict=True):
        token.token_id = piece
    seen = [running_text(tokenizer, prompt, tokens[: number + 1]) for number in range(len(pieces))]
    assert seen == ["", "é", "é", "é", "é€"]


@pytest.mark.unit
def test_the_text_of_a_token_keeps_the_space_in_front_of_a_word():
    tokenizer = byte_tokenizer()
    whole = tokenizer("Where is the moon?").input_ids
    pieces = [text_after(tokenizer, whole[:number], [whole[number]]) for number in range(1, len(whole))]
    assert tokenizer.decode(whole[:1]) + "".join(pieces) == "Where is the moon?"
    assert text_after(tokenizer, whole, [tokenizer.eos_token_id]) == ""
    assert text_after(tokenizer, whole, [tokenizer.eos_token_id], special=True) == "<eos>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a base and of its memory, which has a gate."""
    base, memory = save_models(tmp_path_factory.mktemp("saved"), context=64)
    random_gate(MLPMemory.from_pretrained(base, memory).base_lm, 2.0).save(memory)
    return base, memory


def flags(saved: tuple[Path, Path], *more: object) -> list[object]:
    return [
        *("--model_name_or_path", saved[0], "--knn_generator_path", saved[1], "--torch_dtype", "float32"),
        *("--prompt", "Who wrote it?", "--max_new_tokens", 6, *more),
    ]


def test_without_a_quickstart_the_commands_name_its_script(tmp_path):
    for module in ("demo.generation_example", "demo.app"):
        line = refused("-m", module, "--quickstart", tmp_path)
        assert "scripts/quickstart.sh" in line and str(tmp_path) in line


def test_without_flags_the_quickstarts_last_memory_is_shown(saved, tmp_path, capsys):
    work = tmp_path / "work"
    (work / "embedded").mkdir(parents=True)
    (work / "embedded" / "model").symlink_to(saved[0])
    (work / "memory" / "epoch_11").mkdir(parents=True)  # was not finished
    for epoch in (2, 10):
        (work / "memory" / f"epoch_{epoch}").symlink_to(saved[1])
    results = {"lambda": 0.55, "memory_temp": 1.2, "examples": [{"prompt": "Where is the moon?"}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    command("demo.generation_example", "--quickstart", tmp_path, "--max_new_tokens", 4)
    out = capsys.readouterr().out
    assert "Where is the moon?" in out and "epoch_10, lambda 0.55, temperature 1.2" in out
    pair = choose_pair(PairArguments(quickstart=str(tmp_path), lmbda=0.1, prompt="Why?", model_name_or_path="other"))
    assert (pair.lmbda, pair.memory_temp, pair.prompt, pair.model_name_or_path) == (0.1, 1.2, "Why?", "other")


def test_lambda_by_token_takes_the_gates_temperature(saved, capsys):
    command("demo.generation_example", *flags(saved, "--lmbda", "adaptive", "--knn_temp", 3))
    assert "lambda adaptive, temperature 2" in capsys.readouterr().out


@pytest.mark.unit
def test_the_mistral_preset_is_the_originals_example():
    pair = choose_pair(PairArguments(preset="mistral"))
    models = ("mistralai/Mistral-7B-v0.3", "Rubin-Wei/MLPMemory-Mistral-wikipedia")
    assert (pair.model_name_or_path, *pair.knn_generator_path) == models
    assert (pair.lmbda, pair.memory_temp, pair.max_new_tokens) == (0.75, 1.0, 20)
    assert pair.prompt.endswith("who sings i can't take my eyes off of you?? The answer is:")


def test_piped_output_is_one_labelled_text_after_the_other(saved):
    done = run("-m", "demo.generation_example", *flags(saved), PYTHONIOENCODING="ascii")
    assert "\x1b" not in done.stdout
    model, tokenizer = MLPMemory.from_pretrained(*saved, 0.25), byte_tokenizer()
    made = last(model, max_new_tokens=6, prompt=tokenizer("Who wrote it?", return_tensors="pt").input_ids)
    for label, tokens in (("base", made[BASE]), ("base + memory", made[JOINT])):
        text = running_text(tokenizer, tokenizer("Who wrote it?").input_ids, tokens)
        block = done.stdout.split(f"[{label}: ")[1].split("]\n", 1)[1]
        assert block.startswith(text.encode("ascii", "replace").decode() + "\n\n")


def test_a_terminal_shows_two_columns(saved):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "demo.generation_example", *map(str, flags(saved))]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while block := os.read(ours, 4096):
            seen += block
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"base: .*base \+ memory: ", seen)


@pytest.fixture(scope="module")
def opened(llama_world):
    """(joint model, tokenizer, arguments of `Passages`) of the small world."""
    arguments = PairArguments(model_name_or_path=str(llama_world.base), torch_dtype="float32")
    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    files = (llama_world.dstore("train"), llama_world.index, llama_world.windows)
    return MLPMemory(base, tiny_memory(base), 0.4).eval(), tokenizer, (*map(str, files), "train", tokenizer, arguments)


def test_the_nearest_passage_of_a_training_position_is_itself(llama_world, opened):
    joint, tokenizer, arguments = opened
    passages = Passages(*arguments)
    window = load_windows(str(llama_world.windows), "train")[3]["input_ids"]
    for place in (40, 50, 60):
        (token,) = last(joint, max_new_tokens=1, prompt=torch.from_numpy(window[None, :place]))[BASE]
        nearest, *others = passages.nearest(token.hidden[None], 3)[0]
        assert nearest.distance < 1e-3 and all(other.distance >= nearest.distance for other in others)
        assert nearest.token_id == window[place]
        assert nearest.before == tokenizer.decode(window[place - 24 : place])
        assert nearest.next.strip() == tokenizer.decode([window[place]]).strip()


def test_passages_of_another_base_are_refused(llama_world, opened, monkeypatch):
    monkeypatch.setattr(PairArguments, "base_id", lambda self: "0" * 64)
    with pytest.raises(InputError, match=str(llama_world.dstore("train"))):
        Passages(*opened[2])


def count(html: str, kind: str) -> int:
    return len(re.findall(rf'class="{kind}[ "]', html))


@pytest.fixture(scope="module")
def viewer(saved):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    from demo.viewer import Viewer

    return Viewer(MLPMemory.from_pretrained(*saved), byte_tokenizer(), ["memory"])


def shown(viewer, lmbda=0.4, prompt="Who wrote it?", sampling=GREEDY):
    """(what a run yields before its end, the inspector's HTML at the end)."""
    *before, (_, _, inspector, status) = viewer.run(prompt, lmbda, 1.0, 8, sampling)
    assert "tokens in" in status
    return before, inspector


def test_a_run_yields_growing_texts_then_the_details_of_each_token(viewer):
    before, inspector = shown(viewer)
    assert len(before) >= 8 and all(html == "" for _, _, html, _ in before)
    lengths = [len(joint) for _, joint, _, _ in before]
    assert lengths == sorted(lengths) and before[0][0].startswith("Who wrote it?")
    tokens = count(inspector, "mlpm-token")
    assert tokens == count(inspector, "mlpm-detail") == count(inspector, "mlpm-list") / 3 > 8
    assert inspector.count("mlpm-active") == 1 and inspector.count('" hidden>') == tokens - 1
    assert set(re.findall(r"--mlpm-s:\d[^\"]*", shown(viewer, lmbda=0.0)[1])) == {"--mlpm-s:0.000;--mlpm-l:0.000"}
    assert len(set(re.findall(r"--mlpm-l:([\d.]+)", shown(viewer, "adaptive")[1]))) > 1


def test_wrong_settings_are_shown_as_an_error_and_the_next_run_works(viewer):
    import gradio

    for wrong in ({"prompt": ""}, {"lmbda": 1.2}, {"sampling": Sampling(1.0, top_p=3.0)}):
        with pytest.raises(gradio.Error):
            shown(viewer, **wrong)
        assert shown(viewer)[1]


def test_a_stopped_run_shows_the_tokens_that_were_made(viewer):
    views = viewer.run("Who wrote it?", 0.4, 1.0, 50, GREEDY)
    next(views), next(views)
    viewer.stopped = True
    *_, (_, _, inspector, _) = views
    assert 2 <= count(inspector, "mlpm-token") <= 8


@pytest.mark.parametrize("lmbda", [0.3, "adaptive"])
def test_the_sliders_of_the_mixture_are_hidden_while_lambda_is_by_token(viewer, saved, lmbda):
    from demo.viewer import build

    blocks = build(viewer, Pair(str(saved[0]), [str(saved[1])], lmbda, 2.0), GREEDY)
    props = {each["props"].get("elem_id"): each["props"] for each in blocks.get_config_file()["components"]}
    assert props["adaptive"]["visible"] and props["adaptive"]["value"] == (lmbda == "adaptive")
    assert all(props[name]["visible"] == (lmbda != "adaptive") for name in ("lambda", "memory_temp"))


def test_text_of_a_model_or_a_corpus_is_escaped(viewer):
    evil = '<script>alert(1)</script>"&'
    made = last(viewer.joint, max_new_tokens=1)
    for (token,) in made.values():
        token.texts = dict.fromkeys({token.token_id, *(each for top in token.top.values() for each, _ in top)}, evil)
        token.passages = [Passage(evil, evil, evil, token.token_id, 1.5)]
    html = page.inspector(made, ["memory"])
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize("lmbda", [0.0, 0.1, 1.0])
@pytest.mark.unit
def test_a_colour_has_the_sign_of_its_change_and_is_full_at_the_ends(lmbda):
    values = [page.strength(moved, lmbda) for moved in (-30.0, -0.3, 0.0, 0.3, math.log(10), 30.0)]
    assert values == sorted(values) and values[0] == -1 and values[2] == 0 and values[4:] == [1, 1]


def test_the_page_needs_all_three_files_for_passages(saved):
    assert "--index_path" in refused_here("demo.app", *flags(saved, "--dstore_path", "x"))
