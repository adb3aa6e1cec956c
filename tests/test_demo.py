"""The demos' parts: inspection, streams in turn, the command line, passages, the page's HTML. No browser."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from harness import FAMILIES, GOLDEN, ROOT, command, refused, refused_here, run
from safetensors.torch import load_file
from tiny_models import (
    byte_tokenizer,
    letter_tokenizer,
    random_gate,
    save_models,
    tiny_base,
    tiny_joint,
    tiny_memory,
)

from demo import page
from demo.generation_example import printable
from demo.inspection import SOURCES, inspect_tokens
from demo.pair import Pair, PairArguments, Sampling, choose_pair
from demo.passages import Passage, Passages
from demo.streams import BASE, JOINT, RunningText, encode_prompt, side_by_side, text_after
from demo.viewer import Viewer
from models import MLPMemory
from utils.errors import InputError

PROMPT = [5, 9, 13, 40]


@pytest.fixture(scope="module")
def joint() -> MLPMemory:
    return tiny_joint("llama", lmbda=0.6, knn_temp=2.0)


# ------------------------------------------------------------------------------------------------------- inspection


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lmbda", "knn_temp", "name"), [(0.25, 1.0, "l025_t1"), (0.6, 2.0, "l06_t2")])
def test_inspected_probabilities_are_the_golden_ones(family, lmbda, knn_temp, name):
    golden = load_file(GOLDEN / family / "expected.safetensors")
    model = MLPMemory.from_pretrained(GOLDEN / family / "base", GOLDEN / family / "memory", lmbda, knn_temp)
    for row, ids in enumerate(golden["input_ids"].tolist()):
        tokens, hidden = inspect_tokens(model, ids, 1, top=5)
        expected = {
            "base": golden["base_logits"][row].log_softmax(-1),
            "memory": (golden["memory_logits"][row] / knn_temp).log_softmax(-1),
            "mixture": golden[f"joint_logprobs_{name}"][row],
        }
        assert [token.token_id for token in tokens] == ids[1:]
        assert torch.allclose(hidden, golden["mlp_input"][row, :-1], atol=1e-4)
        for token in tokens:
            for source in SOURCES:
                before = expected[source][token.position - 1]  # (V,)
                assert getattr(token, source) == pytest.approx(before[token.token_id].item(), abs=1e-4)
                candidates, found = zip(*token.top[source], strict=True)
                assert found == pytest.approx(before.exp().topk(5).values.tolist(), abs=1e-5)
                assert found == pytest.approx(before[list(candidates)].exp().tolist(), abs=1e-5)


def test_inspection_from_a_later_token_is_the_tail_of_the_whole(joint):
    ids = [5, 9, 13, 40, 7, 22, 31, 8]
    whole, hidden = inspect_tokens(joint, ids, 1)
    tail, later = inspect_tokens(joint, ids, 5)
    assert [token.position for token in tail] == [5, 6, 7]
    assert [token.mixture for token in tail] == pytest.approx([token.mixture for token in whole[4:]], abs=1e-5)
    assert torch.allclose(later, hidden[4:], atol=1e-5)


@pytest.mark.unit
def test_a_mixture_lowers_no_token_below_its_bound_and_with_lambda_0_moves_none():
    model = tiny_joint("gpt2", lmbda=0.3)
    tokens, _ = inspect_tokens(model, list(range(2, 40)), 1)
    assert min(token.moved for token in tokens) >= math.log(0.7) - 1e-5
    assert any(token.moved > 0.01 for token in tokens) and any(token.moved < -0.01 for token in tokens)
    model.lmbda = 0.0
    assert {token.moved for token in inspect_tokens(model, [5, 6, 7], 1)[0]} == {0.0}


@pytest.mark.unit
def test_with_a_gate_each_inspected_token_has_the_lambda_it_was_mixed_with(joint):
    assert {round(token.lmbda, 6) for token in inspect_tokens(joint, [5, 6, 7], 1)[0]} == {0.6}
    gated = tiny_joint("llama")
    gated.gate = random_gate(gated.base_lm, gated.knn_generator, knn_temp=2.0)
    gated.lmbda = "adaptive"
    ids = list(range(2, 40))
    tokens, _ = inspect_tokens(gated, ids, 1)
    with torch.no_grad():
        expected = gated(torch.tensor([ids])).logits[0, :-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [token.mixture for token in tokens] == pytest.approx(expected.tolist(), abs=1e-5)
    for token in tokens:
        mixed = (1 - token.lmbda) * math.exp(token.base) + token.lmbda * math.exp(token.memory)
        assert math.exp(token.mixture) == pytest.approx(mixed, rel=1e-4)
    assert max(token.lmbda for token in tokens) - min(token.lmbda for token in tokens) > 0.01


# ---------------------------------------------------------------------------------------------------------- streams


def both(model, sampling, prompt=PROMPT, **options) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {BASE: [], JOINT: []}
    for side, some in side_by_side(model, letter_tokenizer(), torch.tensor([prompt]), sampling, **options):
        tokens[side] += some
    return tokens


@pytest.mark.parametrize(("family", "beams"), [("gpt2", 1), ("llama", 1), ("llama", 3), ("mistral", 1)])
def test_both_continuations_are_what_generate_gives(family, beams):
    joint, ids = tiny_joint(family, lmbda=0.6, knn_temp=2.0), torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    greedy, sampled = Sampling(12, num_beams=beams), Sampling(12, temperature=1.5, top_p=0.9, seed=7)
    for sampling in (greedy,) if beams > 1 else (greedy, sampled):
        made = both(joint, sampling)
        for side, model in ((BASE, joint.base_lm), (JOINT, joint)):
            torch.manual_seed(sampling.seed)
            options = {"max_new_tokens": 12, "pad_token_id": 0, **sampling.options()}
            expected = model.generate(ids, attention_mask=mask, **options)
            assert made[side] == expected[0, len(PROMPT) :].tolist()


def test_attention_that_slides_over_a_window_gives_what_generate_gives():
    base = tiny_base("mistral", sliding_window=4)
    joint, ids = MLPMemory(base, tiny_memory(base), 0.5).eval(), torch.tensor([PROMPT])
    expected = joint.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0)
    assert both(joint, Sampling(12))[JOINT] == expected[0, len(PROMPT) :].tolist()


def test_tokens_come_in_turn_or_one_side_after_the_other_and_are_the_same(joint):
    sampling = Sampling(8, temperature=1.0, seed=3)
    pieces = (letter_tokenizer(), torch.tensor([PROMPT]), sampling)
    in_turn = [side for side, _ in side_by_side(joint, *pieces)]
    after = [side for side, _ in side_by_side(joint, *pieces, in_turn=False)]
    assert in_turn[:4] == [BASE, JOINT, BASE, JOINT]
    assert after == sorted(after, key=[BASE, JOINT].index)
    assert both(joint, sampling) == both(joint, sampling, in_turn=False)


def test_a_seed_fixes_both_texts_and_leaves_the_callers_randomness_alone(joint):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = both(joint, Sampling(10, temperature=1.5, top_p=0.95, seed=7))
    assert torch.equal(torch.rand(2), expected)
    assert both(joint, Sampling(10, temperature=1.5, top_p=0.95, seed=7)) == first
    assert both(joint, Sampling(10, temperature=1.5, top_p=0.95, seed=8)) != first


@pytest.mark.unit
def test_with_lambda_0_both_sides_sample_the_same_text():
    made = both(tiny_joint("mistral", lmbda=0.0), Sampling(12, temperature=1.2))
    assert made[BASE] == made[JOINT] != []


def test_a_prompt_is_refused_when_empty_or_too_long_and_the_tokens_asked_for_fit_the_context(joint):
    tokenizer = letter_tokenizer()
    for empty in ("", "  \n"):
        with pytest.raises(InputError, match="is empty"):
            encode_prompt(joint, tokenizer, empty, Sampling())
    with pytest.raises(InputError, match="65 tokens, longer than the base's context of 64"):
        encode_prompt(joint, tokenizer, "a" * 65, Sampling())
    sampling = Sampling(40)
    ids, remark = encode_prompt(joint, tokenizer, "a" * 60, sampling)
    assert ids.shape == (1, 60) and sampling.max_new_tokens == 5 and "room for 5" in remark
    assert encode_prompt(joint, tokenizer, "a" * 20, Sampling(40))[1] is None
    assert len(both(joint, sampling, prompt=ids[0].tolist())[BASE]) <= 5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1.0, math.nan, math.inf)),
        ("top_p", (0.0, 1.1, math.nan)),
        *(("num_beams", (0,)), ("max_new_tokens", (0,)), ("seed", (-1, 1 << 64))),
    ],
)
@pytest.mark.unit
def test_a_sampling_setting_out_of_range_is_named(name, values):
    for value in values:
        with pytest.raises(InputError, match=f"^--{name} .*expected"):
            Sampling(**{name: value}).check()


@pytest.mark.unit
def test_a_character_made_of_several_tokens_is_shown_when_it_is_whole():
    tokenizer = byte_tokenizer()
    prompt, ids = tokenizer("x").input_ids, tokenizer("é€").input_ids
    assert len(ids) == 5
    running, seen = RunningText(tokenizer, prompt), []
    for token in ids:
        running.tokens.append(token)
        seen.append(running.text())
    assert seen == ["", "é", "é", "é", "é€"]
    running.tokens.append(ids[0])
    assert running.text(ended=True).startswith("é€") and len(running.text(ended=True)) > 2


@pytest.mark.unit
def test_text_after_keeps_the_blank_in_front_of_a_word():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Where is the moon?").input_ids
    pieces = [text_after(tokenizer, ids[:number], [ids[number]]) for number in range(1, len(ids))]
    assert tokenizer.decode(ids[:1]) + "".join(pieces) == "Where is the moon?"
    assert text_after(tokenizer, ids, [tokenizer.eos_token_id]) == ""
    assert text_after(tokenizer, ids, [tokenizer.eos_token_id], special=True) == "<eos>"


@pytest.mark.unit
def test_nothing_in_a_text_moves_the_terminals_cursor():
    assert printable("a\x1b[2Jb\r\nc\td\x07\x9b") == "a·[2Jb\nc    d··"


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    return save_models(tmp_path_factory.mktemp("saved"), context=64)


@pytest.fixture(scope="module")
def gated_memory(tmp_path_factory, saved) -> Path:
    """The saved memory with a gate beside it."""
    folder = tmp_path_factory.mktemp("gated") / "memory"
    shutil.copytree(saved[1], folder)
    joint = MLPMemory.from_pretrained(*saved)
    random_gate(joint.base_lm, joint.knn_generator, knn_temp=2.0).save(folder)
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, saved) -> Path:
    """A folder as the quickstart leaves it, with epochs 2 and 10 and an epoch 11 that was never finished."""
    folder = tmp_path_factory.mktemp("quickstart")
    work = folder / "work"
    (work / "embedded").mkdir(parents=True)
    (work / "embedded" / "model").symlink_to(saved[0])
    (work / "memory").mkdir()
    for epoch in (2, 10):
        (work / "memory" / f"epoch_{epoch}").symlink_to(saved[1])
    (work / "memory" / "epoch_11").mkdir()
    results = {"lambda": 0.55, "knn_temp": 1.2, "examples": [{"prompt": "Where is the moon?"}]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def flags(saved: tuple[Path, Path], *more: object) -> list[object]:
    return [
        *("--model_name_or_path", saved[0], "--knn_generator_path", saved[1], "--torch_dtype", "float32"),
        *("--prompt", "Who wrote it?", "--max_new_tokens", 6, *more),
    ]


def test_without_a_quickstart_the_command_says_in_a_line_how_to_get_one(tmp_path):
    for module in ("demo.generation_example", "demo.app"):
        line = refused("-m", module, "--quickstart", tmp_path)
        assert "bash scripts/quickstart.sh" in line and str(tmp_path) in line
    assert "demo.pair: expected one argument" in refused("-m", "demo.pair")


def test_without_flags_the_last_memory_of_the_quickstart_is_shown_at_its_best_mixture(quickstart, capsys):
    command("demo.generation_example", "--quickstart", quickstart, "--max_new_tokens", 4)
    out = capsys.readouterr().out
    assert "Where is the moon?" in out and "lambda 0.55, temperature 1.2" in out
    pair = choose_pair(PairArguments(quickstart=str(quickstart)))
    assert pair.memory.endswith("epoch_10") and pair.base.endswith("embedded/model") and pair.dstore_path is None
    pair = choose_pair(PairArguments(quickstart=str(quickstart), lmbda=0.1, prompt="Why?", model_name_or_path="other"))
    assert (pair.lmbda, pair.knn_temp, pair.prompt, pair.base) == (0.1, 1.2, "Why?", "other")


def test_a_quickstart_whose_memory_has_a_gate_opens_with_it(saved, gated_memory, tmp_path, capsys):
    (tmp_path / "work" / "memory").mkdir(parents=True)
    (tmp_path / "work" / "memory" / "epoch_1").symlink_to(gated_memory)
    results = {"lambda": "adaptive", "knn_temp": 1.0, "examples": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    asked = ("--quickstart", tmp_path, "--model_name_or_path", saved[0], "--max_new_tokens", 4)
    command("demo.generation_example", *asked)
    assert "lambda adaptive, temperature 2" in capsys.readouterr().out
    command("demo.generation_example", *asked, "--lmbda", 0.3)
    assert "lambda 0.3, temperature 1" in capsys.readouterr().out


@pytest.mark.unit
def test_the_mistral_preset_is_the_originals_example():
    pair = choose_pair(PairArguments(preset="mistral"))
    assert (pair.base, pair.memory) == ("mistralai/Mistral-7B-v0.3", "Rubin-Wei/MLPMemory-Mistral-wikipedia")
    assert (pair.lmbda, pair.knn_temp) == (0.75, 1.0)
    assert pair.prompt.endswith("who sings i can't take my eyes off of you?? The answer is:")


def test_piped_output_is_two_labelled_blocks_with_what_generate_gives(saved):
    done = run("-m", "demo.generation_example", *flags(saved), PYTHONIOENCODING="ascii")
    assert "\x1b" not in done.stdout
    model = MLPMemory.from_pretrained(*saved, 0.25)
    tokenizer = byte_tokenizer()
    ids = tokenizer("Who wrote it?", return_tensors="pt").input_ids
    for label, each in (("base", model.base_lm), ("base + memory", model)):
        made = each.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
        text = printable(text_after(tokenizer, ids[0].tolist(), made)).encode("ascii", "replace").decode()
        block = done.stdout.split(f"[{label}: ")[1].split("]\n", 1)[1]
        assert block.startswith(text + "\n\n")


def test_a_reader_that_leaves_early_is_no_failure(saved):
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.generation_example", *map(str, flags(saved, "--max_new_tokens", 40))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == 0
    process.stderr.close()


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_that_is_wide_enough_shows_two_columns(saved, columns):
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.generation_example", *map(str, flags(saved))],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while block := os.read(mine, 4096):
            seen += block
    os.close(mine)
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    text = seen.decode()
    if columns == 100:
        assert re.search(r"base: .*│.*base \+ memory: ", text) and "\x1b[1A" in text
    else:
        assert "[base: " in text and "[base + memory: " in text and "\x1b[" not in text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--lmbda", 1.5), "--lmbda 1.5: expected a number from 0 to 1"),
        (("--lmbda", "adaptive"), "has no gate; train one (python -m training.gate)"),
        (("--knn_temp", 0), "--knn_temp 0: expected a number above 0"),
        (("--prompt", " "), "--prompt: is empty"),
        (("--prompt", "moon " * 100), "longer than the base's context of 64"),
        (("--preset", "large"), "--preset large: expected quickstart or mistral"),
        (("--layer_position", 7), "expected a number from -2 to 1"),
        (("--model_name_or_path", ROOT / "tests"), "holds no tokenizer"),
        (("--knn_generator_path", ROOT / "tests"), "--knn_generator_path"),
        (("--torch_dtype", "int8"), "--torch_dtype int8: expected"),
    ],
)
def test_bad_input_is_told_in_a_line(saved, wrong, told):
    assert told in refused_here("demo.generation_example", *flags(saved, *wrong))


def test_a_memory_for_another_base_is_refused(saved, tmp_path):
    tiny_memory(tiny_base("mistral", vocab_size=len(byte_tokenizer()))).save_pretrained(tmp_path)
    pair = ("--model_name_or_path", saved[0], "--knn_generator_path", tmp_path)
    told = "the memory is for the mistral family, the base is llama"
    assert told in refused_here("demo.generation_example", *pair)
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    assert told in refused_here("demo.app", *pair, "--port", 0)


# --------------------------------------------------------------------------------------------------------- passages


@pytest.fixture(scope="module")
def opened(llama_world):
    from utils.loading import BaseArguments

    arguments = BaseArguments(str(llama_world.base))
    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    return MLPMemory(base, tiny_memory(base), 0.4).eval(), tokenizer


def passages_of(world, tokenizer, **changes) -> Passages:
    options = {"dim": 32, "layer_position": -1} | changes
    return Passages(*map(str, (world.dstore("train"), world.index, world.windows)), tokenizer, **options)


def test_the_nearest_passage_of_a_training_position_is_that_position(llama_world, opened):
    from utils.loading import load_windows

    joint, tokenizer = opened
    passages = passages_of(llama_world, tokenizer)
    window = load_windows(str(llama_world.windows), "train")[3]
    ids = window["input_ids"].tolist()
    tokens, hidden = inspect_tokens(joint, ids, 40)
    for token, (nearest, *others) in zip(tokens, passages.nearest(hidden, 3), strict=True):
        assert nearest.distance < 1e-3 and all(other.distance >= nearest.distance for other in others)
        assert nearest.token_id == token.token_id
        assert nearest.before == tokenizer.decode(ids[token.position - 24 : token.position])
        assert nearest.next.strip() == tokenizer.decode([token.token_id]).strip()


def test_passages_refuse_what_does_not_belong_together(llama_world, opened):
    _, tokenizer = opened
    with pytest.raises(InputError, match="--index_path: is needed"):
        Passages("dstore", None, "windows", tokenizer, dim=32, layer_position=-1)
    with pytest.raises(InputError, match="32 wide, but the model's hidden states 64"):
        passages_of(llama_world, tokenizer, dim=64)
    with pytest.raises(InputError, match="hidden states of block -1, but --layer_position is 0"):
        passages_of(llama_world, tokenizer, layer_position=0)
    with pytest.raises(InputError, match="dstore_range goes to"):
        passages_of(llama_world, tokenizer, split="test")


# ------------------------------------------------------------------------------------------------------ page's HTML


class Tags(HTMLParser):
    """Start tags with their attributes, and the text, of well-formed HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, kind: str) -> list[dict]:
        return [attributes for _, attributes in self.tags if kind in attributes.get("class", "").split()]


def last_view(viewer, prompt="Who wrote it?", lmbda=0.4, knn_temp=1.0, sampling=None):
    *before, last = viewer.run(prompt, lmbda, knn_temp, sampling or Sampling(8))
    return before, last


@pytest.fixture(scope="module")
def viewer(saved):
    return Viewer(MLPMemory.from_pretrained(*saved, 0.25), byte_tokenizer())


def test_a_run_shows_the_texts_growing_and_then_each_token_with_its_details(viewer):
    before, last = last_view(viewer)
    assert len(before) >= 8 and all(view.inspector == "" for view in before)
    lengths = [len(Tags(view.joint).text) for view in before]
    assert lengths == sorted(lengths)
    inspector = Tags(last.inspector)
    tokens, details = inspector.of("mlpm-token"), inspector.of("mlpm-detail")
    assert [token["data-detail"] for token in tokens] == [detail["id"] for detail in details]
    assert sum("hidden" not in detail for detail in details) == len(inspector.of("mlpm-active")) == 1
    assert len(inspector.of("mlpm-list")) == 3 * len(details)
    assert not inspector.of("mlpm-passages")
    assert "tokens in" in Tags(last.status).text
    _, last = last_view(viewer, lmbda=0.0)
    assert {token["style"] for token in Tags(last.inspector).of("mlpm-token")} == {"--mlpm-s:0.000"}


def test_lambda_by_token_is_offered_where_there_is_a_gate_and_shown_with_each_token(viewer, saved, gated_memory):
    assert not viewer.has_gate()
    gated = Viewer(MLPMemory.from_pretrained(saved[0], gated_memory, 0.3, 1.5), byte_tokenizer())
    assert gated.has_gate() and (gated.joint.lmbda, gated.joint.knn_temp) == (0.3, 1.5)
    inspector = Tags(last_view(gated, lmbda="adaptive")[1].inspector)
    assert gated.joint.knn_temp == 2.0
    tokens = inspector.of("mlpm-token")
    lines = [float(token["style"].split("--mlpm-l:")[1]) for token in tokens]
    assert len(set(lines)) > 1 and all(0 <= line <= 1 for line in lines)
    assert all(", lambda " in token["aria-label"] for token in tokens)
    assert len(re.findall(r"lambda [01]\.\d\d", inspector.text)) == len(tokens) and inspector.of("mlpm-lambda-scale")
    again = Tags(last_view(gated, lmbda=0.4)[1].inspector)
    assert gated.joint.knn_temp == 1.0 and "lambda" not in again.text and not again.of("mlpm-lambda-scale")
    assert not any("--mlpm-l" in token["style"] for token in again.of("mlpm-token"))


@pytest.mark.parametrize("lmbda", [0.3, "adaptive"])
def test_the_page_offers_lambda_by_token_beside_the_slider(saved, gated_memory, lmbda):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    from demo.layout import build

    def parts(memory, value):
        opened = Viewer(MLPMemory.from_pretrained(saved[0], memory, value), byte_tokenizer())
        blocks = build(opened, Pair(str(saved[0]), str(memory), value, 2.0))
        return {each["props"].get("elem_id"): each["props"] for each in blocks.get_config_file()["components"]}

    shown = parts(gated_memory, lmbda)
    assert shown["adaptive"]["visible"] and shown["adaptive"]["value"] == (lmbda == "adaptive")
    assert all(shown[name]["interactive"] == (lmbda != "adaptive") for name in ("lambda", "knn_temp"))
    assert shown["lambda"]["value"] == (0.25 if lmbda == "adaptive" else 0.3)
    assert not parts(saved[1], 0.3)["adaptive"]["visible"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"lmbda": 1.2}, "lambda 1.2: expected a number from 0 to 1"),
        ({"sampling": Sampling(8, top_p=3.0)}, "top_p 3.0: expected"),
    ],
)
def test_bad_input_is_told_on_the_page_and_the_next_run_works(viewer, wrong, told):
    before, last = last_view(viewer, **wrong)
    assert before == [] and told in Tags(last.status).text and Tags(last.status).tags[0][1]["role"] == "alert"
    assert last_view(viewer)[1].inspector


def test_a_stopped_run_shows_and_inspects_what_was_made(viewer):
    views = viewer.run("Who wrote it?", 0.4, 1.0, Sampling(50), owner="me")
    next(views)
    viewer.stop("someone else")
    next(views)
    viewer.stop("me")
    *_, last = views
    assert "stopped" in Tags(last.status).text
    assert 2 <= len(Tags(last.inspector).of("mlpm-token")) <= 8


def test_what_comes_from_a_model_or_a_corpus_is_never_markup(viewer):
    evil = '<script>alert(1)</script>"&'
    token = inspect_tokens(viewer.joint, [5, 6], 1)[0][0]
    token.texts = dict.fromkeys({6, *(each for top in token.top.values() for each, _ in top)}, evil)
    token.passages = [Passage(evil, evil, evil, 6, 1.5)]
    html = [
        page.inspector({"base": (evil, [token]), "joint": (evil, [token])}, adaptive=True),
        page.running_text("base", evil, evil, evil, running=True),
        page.status(evil, problem=True),
        page.header([evil]),
    ]
    for each in html:
        parsed = Tags(each)
        assert "script" not in {tag for tag, _ in parsed.tags}
        assert "alert(1)" in parsed.text


@pytest.mark.unit
def test_a_prompt_is_shown_by_the_end_of_its_last_line():
    prompts = (" the river ", "Title\n\nThe river is", "Q: why?\nA:\n", "word " * 60)
    shown = [page.prompt_end(prompt) for prompt in prompts]
    assert shown == [" the river ", "… The river is", "… A:\n", "… " + "word " * 32]


@pytest.mark.parametrize("lmbda", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.unit
def test_the_colour_of_a_move_has_its_sign_and_is_full_at_the_ends_of_the_legend(lmbda):
    values = [page.strength(moved, lmbda) for moved in (-30.0, -0.3, 0.0, 0.3, math.log(10), 30.0)]
    assert values == sorted(values) and values[2] == 0
    assert values[0] == -1 and values[4:] == [1, 1] and values[1] < 0 < values[3]


# ------------------------------------------------------------------------------------------- the page's own command


def test_a_port_in_use_is_told_before_anything_is_loaded(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        pair = ("--model_name_or_path", tmp_path, "--knn_generator_path", tmp_path)
        told = refused_here("demo.app", *pair, "--port", port)
    assert f"--port {port}: cannot listen there (" in told and "in use" in told


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--port", 70000), "port must be 0-65535"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 "),
        (("--candidates", 0), "--candidates 0: expected 1 or more"),
        (("--passages", -1), "--passages -1: expected 0 or more"),
        (("--port", 0, "--dstore_path", "x"), "--index_path: is needed"),
    ],
)
def test_bad_input_of_the_page_is_told_in_a_line(saved, wrong, told):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    assert told in refused_here("demo.app", "--model_name_or_path", saved[0], "--knn_generator_path", saved[1], *wrong)


def test_the_page_starts_with_the_passages_of_its_flags(llama_world, opened, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    opened[0].knn_generator.save_pretrained(tmp_path)
    served = []
    monkeypatch.setattr("demo.layout.build", lambda viewer, pair: viewer)
    monkeypatch.setattr("demo.app.serve", lambda viewer, listener: served.append(viewer))
    pair = ("--model_name_or_path", llama_world.base, "--knn_generator_path", tmp_path, "--torch_dtype", "float32")
    places = ("--dstore_path", llama_world.dstore("train"), "--index_path", llama_world.index)
    asked = ("--dataset_name", llama_world.windows, "--passages", 2, "--port", 0)
    command("demo.app", *pair, *places, *asked)
    inspector = Tags(last_view(served[0], "the river", sampling=Sampling(3))[1].inspector)
    assert len(inspector.of("mlpm-passages")) == len(inspector.of("mlpm-detail")) > 0
