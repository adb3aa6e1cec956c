"""The HTML of the page's inspector: coloured tokens and, for each, its probabilities, candidates and training passages.

Text from models and corpora is escaped here. The looks are in `page.css`; `page.js` shows the details of the token
under the pointer.
"""

from __future__ import annotations

import math
from html import escape

from demo.streams import JOINT, Token

COLOURS = 4  # of memories, in page.css
FULL_COLOUR = 10  # tokens whose probability is raised by this factor or more have the full colour
SMALLEST_SCALE = math.log(1.25)  # nats: with a small lambda even the largest decrease is pale
HEADINGS = {"base": "Base", "mixture": "Base + memory", JOINT: "Base + memory"}


def inspector(sides: dict[str, list[Token]], names: list[str]) -> str:
    """The coloured tokens of each side and the details of each token, first of the one that the memory raised most.

    `names`: of the memories; where there are several, each has its own colour.
    """
    lmbda = max((token.lmbda for tokens in sides.values() for token in tokens), default=0.0)
    active = max(sides[JOINT], key=lambda token: token.moved, default=None)
    flows, details = "", ""
    for side, tokens in sides.items():
        buttons = ""
        for number, token in enumerate(tokens):
            identity = f"mlpm-{side}-{number}"
            buttons += token_button(identity, token, lmbda, active=token is active)
            details += token_details(identity, token, active=token is active)
        flows += (
            f'<div class="mlpm-flow" data-side="{side}"><h2>{HEADINGS[side]}, token by token</h2>'
            f'<p class="mlpm-tokens">{buttons}</p></div>'
        )
    keys = "".join(
        f'<span><i class="mlpm-key mlpm-up {memory_class(number)}" style="--mlpm-s:1"></i>memory {number + 1}: '
        f"{escape(name)}</span>"
        for number, name in enumerate(names if len(names) > 1 else [])
    )
    return (
        '<div class="mlpm mlpm-inspector"><div class="mlpm-legend"><span>The memory lowered the probability</span>'
        f'<span class="mlpm-number">{factor(-lowering_scale(lmbda))}</span><span class="mlpm-scale"></span>'
        f'<span class="mlpm-number">×{FULL_COLOUR} and more</span><span>raised it</span>'
        '<span>line below: lambda, 0</span><span class="mlpm-lambda-scale"></span><span>1</span>'
        f"{keys}"
        '<span class="mlpm-hint">point at a token to look inside, click to keep it</span></div>'
        f'<div class="mlpm-flows">{flows}</div><div class="mlpm-details">{details}</div></div>'
    )


def memory_class(number: int) -> str:
    """The CSS class with the colour of memory `number`."""
    return f"mlpm-memory-{number % COLOURS}"


def strength(moved: float, lmbda: float) -> float:
    """Colour of a change in nats: -1 (lowered as far as possible) … 0 … 1 (raised tenfold or more)."""
    scale = math.log(FULL_COLOUR) if moved >= 0 else lowering_scale(lmbda)
    return max(-1.0, min(moved / scale, 1.0))


def lowering_scale(lmbda: float) -> float:
    """The most that a mixture can lower a log-probability, -log(1 - lambda) nats, within the bounds of the scale."""
    most = -math.log1p(-lmbda) if lmbda < 1 else math.inf
    return max(min(most, math.log(FULL_COLOUR)), SMALLEST_SCALE)


def token_button(identity: str, token: Token, lmbda: float, *, active: bool) -> str:
    """A token in its colour, underlined in the colour of its lambda. Line breaks are shown and made."""
    text, colour = token.texts[token.token_id], strength(token.moved, lmbda)
    direction = f"mlpm-up {memory_class(token.memory)}" if colour >= 0 else "mlpm-down"
    return (
        f'<button type="button" class="mlpm-token {direction}{" mlpm-active" if active else ""}" '
        f'style="--mlpm-s:{abs(colour):.3f};--mlpm-l:{token.lmbda:.3f}" data-detail="{identity}" '
        f'aria-label="{escape(visible(text))} {factor(token.moved)}, lambda {token.lmbda:.2f}">'
        f"{escape(text.replace(chr(10), '↵')) or '·'}</button>{'<br>' * text.count(chr(10))}"
    )


def token_details(identity: str, token: Token, *, active: bool) -> str:
    """Probabilities of a token, the candidates of base, memory and mixture, and the nearest training passages."""
    direction = f"mlpm-up {memory_class(token.memory)}" if token.moved >= 0 else "mlpm-down"
    weights = ", ".join(f"{weight:.2f}" for weight in token.weights)
    probabilities = "".join(
        f"<span>{heading(name).lower()} <b>{math.exp(token.log_probs[name]):.1%}</b></span>" for name in token.log_probs
    )
    return (
        f'<section class="mlpm-detail" id="{identity}"{"" if active else " hidden"}>'
        f"<h3><code>{escape(visible(token.texts[token.token_id]))}</code>{probabilities}"
        f"<span>lambda <b>{weights}</b></span>"
        f'<span class="mlpm-factor {direction}" style="--mlpm-s:.6">{factor(token.moved)}</span></h3>'
        f'<div class="mlpm-lists">{"".join(candidates(name, token) for name in token.log_probs)}</div>{passages(token)}</section>'
    )


def candidates(name: str, token: Token) -> str:
    """The most probable tokens of base, a memory or the mixture, as bars."""
    rows = "".join(
        f"<li{' class=mlpm-chosen' if candidate == token.token_id else ''}>"
        f"<code>{escape(visible(token.texts[candidate]))}</code>"
        f'<span class="mlpm-bar"><i style="width:{100 * probability:.1f}%"></i></span>'
        f'<span class="mlpm-number">{probability:.1%}</span></li>'
        for candidate, probability in token.top[name]
    )
    return f'<div class="mlpm-list mlpm-from-{name.replace(" ", "-")}"><h4>{heading(name)}</h4><ol>{rows}</ol></div>'


def heading(name: str) -> str:
    return HEADINGS.get(name, name.capitalize())


def passages(token: Token) -> str:
    """The nearest training passages; empty without a datastore."""
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
    """A token's text with visible white space."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "·"


def factor(nats: float) -> str:
    """A change in nats as the ratio of the probabilities."""
    return f"×{math.exp(nats):.3g}"
