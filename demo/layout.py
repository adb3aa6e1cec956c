"""Where things stand on the page, as Gradio blocks, and what a click does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gradio

from demo import page
from demo.pair import Pair, Sampling, short_name
from demo.viewer import Viewer
from utils.results import ADAPTIVE


def build(viewer: Viewer, pair: Pair) -> gradio.Blocks:
    """The page as Gradio blocks."""
    private = {"api_visibility": "private", "show_progress": "hidden"}
    flush = {"elem_classes": "mlpm-block"}

    def slider(name: str, least: float, most: float, value: float, step: float, label: str) -> gradio.Slider:
        """A slider whose range holds its `value`."""
        return gradio.Slider(min(least, value), max(most, value), value, step=step, label=label, elem_id=name)

    models = [
        f"base {short_name(pair.base)}, {parameters(viewer.joint.base_lm)} parameters",
        f"memory {short_name(pair.memory)}, {parameters(viewer.joint.knn_generator)} parameters",
    ]
    with gradio.Blocks(title="MLP Memory", analytics_enabled=False) as blocks:
        gradio.HTML(page.header(models), **flush)
        with gradio.Row():
            with gradio.Column(scale=3):
                prompt = gradio.Textbox(pair.prompt, label="Prompt", lines=5, max_lines=12, elem_id="prompt")
                with gradio.Row():
                    go = gradio.Button("Continue", variant="primary", elem_id="go")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=2):
                weight = Pair.lmbda if pair.lmbda == ADAPTIVE else pair.lmbda
                lmbda = slider("lambda", 0, 1, weight, 0.01, "Lambda: weight of the memory")
                knn_temp = slider("knn_temp", 0.1, 4, pair.knn_temp, 0.01, "Temperature of the memory")
                lmbda.interactive = knn_temp.interactive = pair.lmbda != ADAPTIVE
                adaptive = gradio.Checkbox(
                    pair.lmbda == ADAPTIVE,
                    label="Lambda by token: the memory's gate, with its own temperature",
                    visible=viewer.has_gate(),
                    elem_id="adaptive",
                )
                with gradio.Accordion("Sampling", open=False, elem_id="sampling"):
                    new_tokens = slider("new_tokens", 1, 256, 40, 1, "New tokens")
                    temperature = slider("temperature", 0, 2, 0, 0.05, "Sampling temperature (0: greedy)")
                    top_p = slider("top_p", 0.05, 1, 1, 0.01, "Top-p")
                    seed = gradio.Number(42, label="Seed", precision=0, minimum=0, elem_id="seed")
        empty = viewer.empty()
        status = gradio.HTML(empty.status, elem_id="status", **flush)
        with gradio.Row(equal_height=True):
            base = gradio.HTML(empty.base, elem_id="base", **flush)
            joint = gradio.HTML(empty.joint, elem_id="joint", **flush)
        inspector = gradio.HTML(empty.inspector, elem_id="inspector", **flush)

        def run(
            request: gradio.Request, prompt: str, by_token: bool, *values: float | None
        ) -> Iterator[tuple[str, ...]]:
            # An emptied field comes as None; the checks of the run then name it.
            lmbda, knn_temp, temperature, top_p = (math.nan if value is None else value for value in values[:4])
            new_tokens, seed = (-1 if value is None else int(value) for value in values[4:])
            sampling = Sampling(new_tokens, temperature, top_p, seed=seed)
            lmbda = ADAPTIVE if by_token else lmbda
            yield from viewer.run(prompt or "", lmbda, knn_temp, sampling, request.session_hash)

        def halt(request: gradio.Request) -> None:
            viewer.stop(request.session_hash)

        settings = [prompt, adaptive, lmbda, knn_temp, temperature, top_p, new_tokens, seed]
        shown = [base, joint, inspector, status]
        for start in (go.click, prompt.submit):
            start(run, settings, shown, concurrency_id="models", concurrency_limit=1, **private)
        stop.click(halt, queue=False, **private)
        adaptive.change(lambda on: [gradio.update(interactive=not on)] * 2, adaptive, [lmbda, knn_temp], **private)
    return blocks


def parameters(model: Any) -> str:
    """The number of a model's parameters, with three digits and a letter."""
    count = model.num_parameters()
    letter, size = next((each for each in (("B", 1e9), ("M", 1e6)) if count >= each[1]), ("K", 1e3))
    return f"{count / size:.3g}{letter}"
