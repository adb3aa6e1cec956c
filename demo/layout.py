"""Where things stand on the page, as Gradio blocks, and what a click does. The one module that imports Gradio.

Knows nothing of models beyond their names and sizes: `viewer.py` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gradio

from demo import page
from demo.opening import Pair, short_name
from demo.streams import Sampling
from demo.viewer import Viewer

NEW_TOKENS, MOST_NEW_TOKENS = 40, 256
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.1, 4.0


def build(viewer: Viewer, pair: Pair) -> gradio.Blocks:
    """The page as Gradio blocks."""
    private = {"api_visibility": "private"}
    flush = {"elem_classes": "mlpm-block"}
    with gradio.Blocks(title="MLP Memory", analytics_enabled=False) as blocks:
        gradio.HTML(page.header(describe(viewer.joint, pair)), **flush)
        with gradio.Row():
            with gradio.Column(scale=3):
                prompt = gradio.Textbox(pair.prompt, label="Prompt", lines=5, max_lines=12, elem_id="prompt")
                with gradio.Row():
                    go = gradio.Button("Continue", variant="primary", elem_id="go")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=2):
                lmbda = gradio.Slider(
                    0, 1, pair.lmbda, step=0.01, label="Lambda: weight of the memory", elem_id="lambda"
                )
                knn_temp = gradio.Slider(
                    min(SMALLEST_TEMPERATURE, pair.knn_temp),
                    max(LARGEST_TEMPERATURE, pair.knn_temp),
                    pair.knn_temp,
                    step=0.01,
                    label="Temperature of the memory",
                    elem_id="knn_temp",
                )
                with gradio.Accordion("Sampling", open=False, elem_id="sampling"):
                    new_tokens = gradio.Slider(
                        1, MOST_NEW_TOKENS, NEW_TOKENS, step=1, label="New tokens", elem_id="new_tokens"
                    )
                    temperature = gradio.Slider(
                        0, 2, 0, step=0.05, label="Sampling temperature (0: greedy)", elem_id="temperature"
                    )
                    top_p = gradio.Slider(0.05, 1, 1, step=0.01, label="Top-p", elem_id="top_p")
                    seed = gradio.Number(42, label="Seed", precision=0, minimum=0, elem_id="seed")
        empty = viewer.empty()
        status = gradio.HTML(empty.status, elem_id="status", **flush)
        with gradio.Row(equal_height=True):
            base = gradio.HTML(empty.base, elem_id="base", **flush)
            joint = gradio.HTML(empty.joint, elem_id="joint", **flush)
        inspector = gradio.HTML(empty.inspector, elem_id="inspector", **flush)

        def run(
            prompt: str,
            lmbda: float | None,
            knn_temp: float | None,
            new_tokens: float | None,
            temperature: float | None,
            top_p: float | None,
            seed: float | None,
            request: gradio.Request,
        ) -> Iterator[tuple[str, ...]]:
            # An emptied field comes as None; the checks of the run then name it.
            lmbda, knn_temp, temperature, top_p = (
                math.nan if value is None else value for value in (lmbda, knn_temp, temperature, top_p)
            )
            sampling = Sampling(int(new_tokens or 0), temperature, top_p, seed=-1 if seed is None else int(seed))
            yield from viewer.run(prompt or "", lmbda, knn_temp, sampling, request.session_hash)

        def halt(request: gradio.Request) -> None:
            viewer.stop(request.session_hash)

        settings = [prompt, lmbda, knn_temp, new_tokens, temperature, top_p, seed]
        shown = [base, joint, inspector, status]
        for start in (go.click, prompt.submit):
            start(run, settings, shown, concurrency_id="models", show_progress="hidden", **private)
        stop.click(halt, queue=False, show_progress="hidden", **private)
    return blocks


def describe(joint: Any, pair: Pair) -> list[str]:
    """Lines that say what base and memory are."""
    return [
        f"base {short_name(pair.base)}, {parameters(joint.base_lm)} parameters",
        f"memory {short_name(pair.memory)}, {parameters(joint.knn_generator)} parameters",
    ]


def parameters(model: Any) -> str:
    """The number of a model's parameters, with two or three digits and a letter."""
    count = sum(weight.numel() for weight in model.parameters())
    for letter, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def mount(application: Any, blocks: gradio.Blocks) -> None:
    """Serve `blocks` at the root of a FastAPI application."""
    gradio.mount_gradio_app(
        application,
        blocks,
        path="/",
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        # System fonts: Gradio's own would be looked for elsewhere.
        theme=gradio.themes.Default(
            primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css=page.asset("page.css"),
        head=f"<script>{page.asset('page.js')}</script>",
    )
