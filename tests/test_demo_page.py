"""The demo's page in a real headless Chromium, served by the command itself for a tiny random model."""

import pytest
from browser import Browser, available, served
from tiny_models import random_gate, tiny_memory

pytestmark = pytest.mark.skipif(not available(), reason="no chromium: apt-get install chromium chromium-driver")
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")

NEW_TOKENS = 6
TOKEN, ACTIVE, DETAIL = ".mlpm-token", ".mlpm-token.mlpm-active", ".mlpm-detail:not([hidden])"
BASE, JOINT = f"[data-side=base] {TOKEN}", f"[data-side=joint] {TOKEN}"


@pytest.fixture(scope="module")
def url(llama_world, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder, base = tmp_path_factory.mktemp("memory"), AutoModelForCausalLM.from_pretrained(llama_world.base)
    memory = tiny_memory(base)
    memory.save_pretrained(folder)
    random_gate(base).save(folder)
    with served(
        *("--model_name_or_path", llama_world.base, "--knn_generator_path", folder, "--torch_dtype", "float32"),
        *("--dstore_path", llama_world.dstore("train"), "--index_path", llama_world.index),
        *("--dataset_name", llama_world.windows, "--prompt", "the river", "--max_new_tokens", NEW_TOKENS),
        *("--candidates", 4, "--passages", 2),
    ) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with Browser() as window:
        yield window


@pytest.fixture
def page(url, browser):
    """The page, freshly loaded."""
    browser.open(url)
    browser.wait(lambda: browser.find("#go"), "button")
    return browser


def set_slider(page, slider, value):
    """Type a value into a slider's number field and leave it."""
    page.type(f"{slider} input[type=number]", f"{value}\t")


def run(page):
    """Click the button and wait for the tokens of this run."""
    page.script("document.querySelectorAll('.mlpm-inspector').forEach(each => each.remove())")
    page.click("#go")
    page.wait(lambda: page.count(TOKEN) and "tokens in" in page.texts("#status")[0], "coloured tokens")


def test_a_click_shows_both_continuations_with_coloured_tokens(page):
    run(page)
    for side, tokens in (("base", BASE), ("joint", JOINT)):
        assert 1 <= page.count(tokens) <= NEW_TOKENS
        assert page.texts(f"#{side} textarea")[0].startswith("the river")
    colours = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e).backgroundColor)"
    assert len(set(page.script(colours, TOKEN))) > 1
    assert page.count(ACTIVE) == page.count(DETAIL) == 1
    assert page.errors() == []


def test_the_pointer_shows_a_tokens_details_and_a_click_keeps_them(page):
    run(page)
    page.hover(BASE)
    first = page.find(DETAIL)
    assert page.texts(f"{DETAIL} h4") == ["Base", "Memory", "Base + memory", "Nearest training passages"]
    assert page.count(f"{DETAIL} .mlpm-list li") == 3 * 4 and page.count(f"{DETAIL} .mlpm-passages li") == 2
    page.hover(JOINT)
    assert page.find(DETAIL) != first
    page.click(BASE)
    page.hover(JOINT)
    assert page.find(DETAIL) == first
    page.click(BASE)
    page.hover(JOINT)
    assert page.find(DETAIL) != first


def test_the_sliders_set_lambda_and_the_memorys_temperature(page):
    set_slider(page, "#lambda", 0)
    run(page)
    assert page.texts(BASE) == page.texts(JOINT) and set(page.texts(".mlpm-factor")) == {"×1"}
    set_slider(page, "#lambda", 1)
    tops = []
    for value in (0.5, 4):
        set_slider(page, "#memory_temp", value)
        run(page)
        memory, mixture = (page.texts(f"#mlpm-joint-0 .mlpm-from-{name} li") for name in ("memory", "mixture"))
        assert memory == mixture
        tops.append(float(page.texts("#mlpm-joint-0 .mlpm-from-memory .mlpm-number")[0].rstrip("%")))
    assert tops[0] > tops[1]


def test_lambda_by_token_hides_the_sliders_and_is_shown_with_each_token(page):
    page.click("#adaptive input")
    page.wait(lambda: page.count("#lambda input:not([hidden])") == 0, "hidden slider")
    run(page)
    lambdas = page.script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.ariaLabel.split(' ').pop())", TOKEN
    )
    assert len(set(lambdas)) > 1
