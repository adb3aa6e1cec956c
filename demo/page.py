"""The parts of the page that Gradio has no component for, as HTML: running texts, coloured tokens, candidates, passages.

Text in, text out: everything that comes from a model or a corpus is escaped here. Looks are in `page.css`; `page.js`
shows the details of the token under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from demo.inspection import SOURCES, InspectedToken

FULL_COLOUR = 10.0  # the factor at which a raised probability has the full colour
SMALLEST_SCALE = math.log(1.25)  # nats; with a small lambda even the greatest lowering is pale
HEADINGS = {"base": "Base", "memory": "Memory", "mixture": "Base + memory"}


def asset(name: str) -> str:
    """The text of `page.css` or `page.js`."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def header(lines: Sequence[str]) -> str:
    """Title and the lines that say which models these are."""
    told = "".join(f"<span>{escape(line)}</span>" for line in lines)
    return f'<div class="mlpm mlpm-header"><h1>MLP Memory</h1><p>{told}</p></div>'


def status(text: str, *, problem: bool = False) -> str:
    """A line about the run; a `problem` is announced as an alert."""
    kind, role = ("mlpm-problem", "alert") if problem else ("", "status")
    return f'<div class="mlpm mlpm-status {kind}" role="{role}">{escape(text)}</div>'


def running_text(side: str, heading: str, prompt: str, text: str, *, running: bool = False) -> str:
    """A continuation while it is made: the end of the prompt, pale, and what came after it."""
    cursor = '<span class="mlpm-cursor"></span>' if running else ""
    shown = f'<span class="mlpm-prompt">{escape(prompt_end(prompt))}</span>{escape(text)}{cursor}' if prompt else ""
    return (
        f'<div class="mlpm mlpm-pane mlpm-{side}"><h2>{escape(heading)}</h2>'
        f'<p class="mlpm-text">{shown or "&nbsp;"}</p></div>'
    )


def prompt_end(prompt: str, characters: int = 160) -> str:
    """The last line of a prompt that says anything, of so many characters at most; an ellipsis for what is left out."""
    line = prompt[prompt.rstrip().rfind("\n") + 1 :][-characters:]
    return line if line == prompt else f"… {line}"


def strength(moved: float, lmbda: float) -> float:
    """Colour of a move in nats, -1 (lowered as far as can be) … 0 … 1 (raised tenfold or more)."""
    if moved >= 0:
        return min(moved / math.log(FULL_COLOUR), 1.0)
    return -min(-moved / _lowering_scale(lmbda), 1.0)


def _lowering_scale(lmbda: float) -> float:
    """The nats by which a mixture can lower a probability at most, -log(1 - lambda), within the scale's bounds."""
    most = -math.log1p(-lmbda) if lmbda < 1 else math.inf
    return max(min(most, math.log(FULL_COLOUR)), SMALLEST_SCALE)


def inspector(sides: dict[str, tuple[str, list[InspectedToken]]], *, adaptive: bool = False) -> str:
    """Coloured tokens of each side, {name: (heading, tokens)}, and the details of each token, one of them visible.

    The first shown is the one that the memory raised most, among the last side's where it has tokens. `adaptive`: each
    token's own lambda is shown too; the colours are those of the largest of them, so that they mean the same everywhere.
    """
    active = None
    lmbda = max((token.lmbda for _, tokens in sides.values() for token in tokens), default=0.0)
    for name, (_, tokens) in sides.items():
        if tokens:
            active = name, max(range(len(tokens)), key=lambda number: tokens[number].moved)
    flows, details = "", ""
    for name, (heading, tokens) in sides.items():
        buttons = ""
        for number, token in enumerate(tokens):
            shown = f"mlpm-{name}-{number}", token, (name, number) == active
            buttons += token_button(*shown, lmbda, adaptive=adaptive)
            details += token_details(*shown, adaptive=adaptive)
        flows += (
            f'<div class="mlpm-flow" data-side="{name}"><h2>{escape(heading)}</h2>'
            f'<p class="mlpm-tokens">{buttons or "no token"}</p></div>'
        )
    return (
        f'<div class="mlpm mlpm-inspector">{legend(lmbda, adaptive=adaptive)}<div class="mlpm-flows">{flows}</div>'
        f'<div class="mlpm-details">{details}</div></div>'
    )


def legend(lmbda: float, *, adaptive: bool = False) -> str:
    """What the colours mean; the left end is the most that a mixture with this lambda can lower."""
    line = '<span>line below: lambda, 0</span><span class="mlpm-lambda-scale"></span><span>1</span>' if adaptive else ""
    return (
        '<div class="mlpm-legend"><span>The memory lowered the probability</span>'
        f'<span class="mlpm-number">{factor(-_lowering_scale(lmbda))}</span><span class="mlpm-scale"></span>'
        f'<span class="mlpm-number">×{FULL_COLOUR:g} and more</span><span>raised it</span>{line}'
        '<span class="mlpm-hint">point at a token to look inside, click to keep it</span></div>'
    )


def token_button(identity: str, token: InspectedToken, active: bool, lmbda: float, *, adaptive: bool = False) -> str:
    """A token in its colour, `adaptive` with a line of its lambda's colour. Line breaks are shown as an arrow, and made."""
    line, told = (f";--mlpm-l:{token.lmbda:.3f}", f", lambda {token.lmbda:.2f}") if adaptive else ("", "")
    colour = strength(token.moved, lmbda)
    direction = "mlpm-up" if colour >= 0 else "mlpm-down"
    breaks = "<br>" * token.text.count("\n")
    return (
        f'<button type="button" class="mlpm-token {direction}{" mlpm-active" if active else ""}" '
        f'style="--mlpm-s:{abs(colour):.3f}{line}" data-detail="{identity}" '
        f'tabindex="{0 if active else -1}" aria-label="{escape(visible(token.text))} {factor(token.moved)}{told}">'
        f"{escape(token.text.replace(chr(10), '↵')) or '·'}</button>{breaks}"
    )


def token_details(identity: str, token: InspectedToken, active: bool, *, adaptive: bool = False) -> str:
    """Probabilities of a token (and, `adaptive`, its lambda), the candidates of base, memory and mixture, and the nearest training passages."""
    direction = "mlpm-up" if token.moved >= 0 else "mlpm-down"
    lists = "".join(_candidates(name, token) for name in SOURCES)
    lmbda = f"<span>lambda <b>{token.lmbda:.2f}</b></span>" if adaptive else ""
    return (
        f'<section class="mlpm-detail" id="{identity}"{"" if active else " hidden"}>'
        f"<h3><code>{escape(visible(token.text))}</code>"
        f"<span>base <b>{percent(token.base)}</b></span><span>memory <b>{percent(token.memory)}</b></span>"
        f"<span>base + memory <b>{percent(token.mixture)}</b></span>{lmbda}"
        f'<span class="mlpm-factor {direction}" style="--mlpm-s:.6">{factor(token.moved)}</span></h3>'
        f'<div class="mlpm-lists">{lists}</div>{_passages(token)}</section>'
    )


def _candidates(name: str, token: InspectedToken) -> str:
    rows = "".join(
        f"<li{' class=mlpm-chosen' if candidate == token.token_id else ''}>"
        f"<code>{escape(visible(token.texts[candidate]))}</code>"
        f'<span class="mlpm-bar"><i style="width:{100 * probability:.1f}%"></i></span>'
        f'<span class="mlpm-number">{probability:.1%}</span></li>'
        for candidate, probability in token.top[name]
    )
    return f'<div class="mlpm-list mlpm-from-{name}"><h4>{HEADINGS[name]}</h4><ol>{rows}</ol></div>'


def _passages(token: InspectedToken) -> str:
    if token.passages is None:
        return ""
    rows = ""
    for passage in token.passages:
        same = " class=mlpm-same" if passage.token_id == token.token_id else ""
        texts = (passage.before, passage.next, passage.after)
        before, followed, after = (escape(text.replace("\n", " ↵ ")) for text in texts)
        rows += (
            f"<li><span>… {before}</span><mark{same}>{followed}</mark><span>{after} …</span>"
            f'<span class="mlpm-number" title="squared distance of the hidden states">{passage.distance:.1f}</span></li>'
        )
    return f'<div class="mlpm-passages"><h4>Nearest training passages</h4><ol>{rows}</ol></div>'


def visible(text: str) -> str:
    """A token's text with its white space to be seen."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "·"


def percent(log_probability: float) -> str:
    """A log-probability in nats as a percentage with two digits that count."""
    value = 100 * math.exp(log_probability)
    if value >= 10:
        return f"{value:.0f}%"
    return f"{value:.2g}%" if value >= 0.01 else "<0.01%"


def factor(nats: float) -> str:
    """A move in nats as the factor between the probabilities."""
    return "×1000 and more" if nats >= math.log(999) else f"×{math.exp(nats):.3g}"
