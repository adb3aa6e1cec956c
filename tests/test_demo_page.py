"""The demo's page in a real headless Chromium, served by the command itself over a tiny random model."""

import pytest
from browser import Browser, chromium, served
from tiny_models import tiny_memory

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")

NEW_TOKENS = 6
# Runs at the start of the server's Python: notes whom it connects to and which names it looks up.
WATCH = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            family = getattr(arguments[0], "family", None)
            print(event, getattr(family, "name", ""), arguments[1:] if family else arguments, file=file)
open(os.environ["CONNECTIONS"], "a").close()
sys.addaudithook(note)
"""
TOKEN, ACTIVE, DETAIL = ".mlpm-token", ".mlpm-token.mlpm-active", ".mlpm-detail:not([hidden])"


@pytest.fixture(scope="module")
def url(llama_world, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    memory = tmp_path_factory.mktemp("page") / "memory"
    tiny_memory(AutoModelForCausalLM.from_pretrained(llama_world.base)).save_pretrained(memory)
    flags = {
        "model_name_or_path": llama_world.base,
        "knn_generator_path": memory,
        "dstore_path": llama_world.dstore("train"),
        "index_path": llama_world.index,
        "dataset_name": llama_world.windows,
        "prompt": "the river",
        "torch_dtype": "float32",
        "candidates": 4,
        "passages": 2,
    }
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(WATCH)
    environment = {"PYTHONPATH": str(watch), "CONNECTIONS": str(watch / "connections")}
    with served(*(part for name, value in flags.items() for part in (f"--{name}", value)), **environment) as address:
        yield address
    # No telemetry, no look for a newer version, no hub: the server asked nobody for anything.
    asked = (watch / "connections").read_text().splitlines()
    assert [each for each in asked if "127.0.0.1" not in each and "AF_UNIX" not in each] == []


@pytest.fixture(scope="module")
def browser():
    with Browser(width=1200, height=1400) as window:
        yield window


@pytest.fixture
def shown(url, browser):
    """The page, freshly loaded, set to make a few tokens."""
    browser.open(url)
    browser.wait(lambda: browser.find("#sampling button"), "the page")
    browser.click("#sampling button")
    browser.wait(lambda: browser.find("#new_tokens input[type=number]"), "the sampling settings")
    set_number(browser, "#new_tokens", NEW_TOKENS)
    return browser


def set_number(browser: Browser, slider: str, value: float) -> None:
    """Type a value into a slider's number field and leave it."""
    browser.type(f"{slider} input[type=number]", f"{value}\t")


def go_on(browser: Browser) -> None:
    """Click the button and wait until the tokens of this run are there."""
    browser.script("document.querySelectorAll('.mlpm-inspector').forEach(each => each.remove())")
    browser.click("#go")
    browser.wait(lambda: browser.count(TOKEN), "coloured tokens")
    browser.wait(lambda: "tokens in" in browser.text("#status"), "the end of the run")


def of(side: str, what: str = TOKEN) -> str:
    return f"[data-side={side}] {what}"


def test_a_click_continues_the_prompt_on_both_sides_and_colours_each_token(shown):
    go_on(shown)
    for side in ("base", "joint"):
        assert 1 <= shown.count(of(side)) <= NEW_TOKENS
        pane, tokens = shown.text(f"#{side}"), shown.texts(of(side))
        assert "the river" in pane
        assert "".join(pane.split("the river", 1)[1].split()) == "".join("".join(tokens).split())
    colours = shown.script(
        "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e).backgroundColor)", TOKEN
    )
    assert len(set(colours)) > 1
    assert shown.count(ACTIVE) == shown.count(DETAIL) == 1


def test_the_pointer_shows_a_tokens_candidates_and_passages_and_a_click_keeps_them(shown):
    go_on(shown)
    base, joint = of("base"), of("joint")
    shown.hover(base)
    first = shown.find(DETAIL)
    assert shown.text(f"{DETAIL} h3 code") and shown.count(DETAIL) == 1
    assert shown.texts(f"{DETAIL} h4") == ["Base", "Memory", "Base + memory", "Nearest training passages"]
    assert shown.count(f"{DETAIL} .mlpm-list li") == 3 * 4
    assert shown.count(f"{DETAIL} .mlpm-passages li") == 2
    shown.hover(joint)
    assert shown.find(DETAIL) != first
    shown.click(base)
    shown.hover(joint)
    assert shown.find(DETAIL) == first
    shown.click(base)
    shown.hover(joint)
    assert shown.find(DETAIL) != first


def test_the_arrow_keys_walk_from_token_to_token(shown):
    go_on(shown)
    shown.click(of("base"))
    number = "return [...document.querySelectorAll(arguments[0])].indexOf(document.activeElement)"
    assert shown.script(number, TOKEN) == 0
    shown.type(ACTIVE, "\ue014", clear=False)  # the protocol's key for the right arrow
    assert shown.script(number, TOKEN) == 1
    shown.type(ACTIVE, "\ue012", clear=False)
    assert shown.script(number, TOKEN) == 0


def test_the_sliders_set_the_memorys_weight_and_temperature(shown):
    set_number(shown, "#lambda", 0)
    go_on(shown)
    assert shown.texts(of("base")) == shown.texts(of("joint"))
    assert set(shown.texts(".mlpm-factor")) == {"×1"}
    set_number(shown, "#lambda", 1)
    tops = []
    for value in (0.5, 4):
        set_number(shown, "#knn_temp", value)
        go_on(shown)
        memory, mixture = (shown.texts(f"#mlpm-joint-0 .mlpm-from-{name} li") for name in ("memory", "mixture"))
        assert memory == mixture
        tops.append(float(shown.texts("#mlpm-joint-0 .mlpm-from-memory li .mlpm-number")[0].rstrip("%")))
    assert tops[0] > tops[1]


def test_the_page_loads_nothing_from_elsewhere_and_the_browser_has_no_complaint(url, browser):
    browser.requested(), browser.complaints()
    browser.open(url)
    browser.wait(lambda: browser.find("#go"), "the button")
    go_on(browser)
    asked = browser.requested()
    assert asked and [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
    assert browser.complaints() == []
