"""The page as Gradio blocks: settings, both texts as they grow, and the inspector of their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio
import torch

from demo import page
from demo.pair import Pair, Sampling, short_name
from demo.passages import Passages
from demo.streams import Token, running_text, side_by_side, text_after
from models import MLPMemory
from models.gate import LambdaGate
from utils.results import ADAPTIVE

LIMITS = (
    "A memory continues the texts that it was trained on, from their beginnings and, after `scripts/remember.sh`, from their "
    "sentences; it answers questions as question-answer pairs have taught it. For questions in other words use retrieval (RAG)."
)


@dataclass
class Viewer:
    """Runs prompts, one at a time: the page's queue ensures that.

    `names`: of the memories. `passages`: where training passages are looked up, or None. `passage_count`, `candidate_count`: how many of each are
    shown per token. `stopped`: set it to end the current run at the next token.
    """

    joint: MLPMemory
    tokenizer: Any
    names: list[str]
    passages: Passages | None = None
    passage_count: int = 3
    candidate_count: int = 6
    stopped: bool = False

    def run(
        self, prompt: str, lmbda: float | list[float] | str, memory_temp: float, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[tuple[str, str, str, str]]:
        """Yield (base's text, text of base + memory, inspector's HTML, status) after each token and at the end.

        With lambda "adaptive" the gate's own memory temperature is used. Raises gradio.Error for settings out of range,
        an empty or too long prompt, and a full GPU.
        """
        self.stopped, started = False, time.monotonic()
        try:
            self.joint.knn_temp, self.joint.lmbda = memory_temp, lmbda
            input_ids = self.tokenizer(prompt, return_tensors="pt").input_ids
            prompt_ids = input_ids[0].tolist()
            for made in side_by_side(self.joint, input_ids, sampling, max_new_tokens, self.candidate_count):
                texts = [prompt + running_text(self.tokenizer, prompt_ids, tokens) for tokens in made.values()]
                yield *texts, "", "generating …"
                if self.stopped:
                    break
            status = f"{sum(map(len, made.values()))} tokens in {time.monotonic() - started:.1f} s"
            for tokens in made.values():
                self._add_texts(prompt_ids, tokens)
            yield *texts, page.inspector(made, self.names), status
        except (ValueError, torch.OutOfMemoryError) as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def _add_texts(self, prompt_ids: list[int], tokens: list[Token]) -> None:
        """Fill in `texts` and `passages` of a continuation's tokens."""
        ids = prompt_ids + [token.token_id for token in tokens]
        for place, token in enumerate(tokens, len(prompt_ids)):
            shown = {token.token_id, *(candidate for top in token.top.values() for candidate, _ in top)}
            token.texts = {each: text_after(self.tokenizer, ids[:place], [each], special=True) for each in shown}
        if self.passages is not None:
            found = self.passages.nearest(torch.stack([token.hidden for token in tokens]), self.passage_count)
            for token, nearest in zip(tokens, found, strict=True):
                token.passages = nearest


def build(viewer: Viewer, pair: Pair, sampling: Sampling) -> gradio.Blocks:
    """The page, with the settings of `pair` and `sampling` at first."""
    adaptive = pair.lmbda == ADAPTIVE
    has_gate = adaptive or all(LambdaGate.load(memory.name_or_path) for memory in viewer.joint.memories)
    shares = [weight / (sum(pair.lmbda) or 1) for weight in pair.lmbda] if isinstance(pair.lmbda, list) else None
    private = {"api_visibility": "private", "show_progress": "hidden"}

    def slider(
        name: str, label: str, least: float, most: float, step: float, value: float, visible: bool = True
    ) -> Any:
        return gradio.Slider(least, max(most, value), value, step=step, label=label, elem_id=name, visible=visible)

    def run(prompt: str, by_token: bool, lmbda: float, memory_temp: float, new_tokens: int, *sampling: Any) -> Any:
        fixed = [lmbda * share for share in shares] if shares else lmbda
        yield from viewer.run(prompt, ADAPTIVE if by_token else fixed, memory_temp, new_tokens, Sampling(*sampling))

    with gradio.Blocks(title="MLP Memory", analytics_enabled=False) as blocks:
        gradio.Markdown(
            f"# MLP Memory\nbase {short_name(pair.model_name_or_path)}; memory {short_name(*pair.knn_generator_path)}\n\n{LIMITS}"
        )
        with gradio.Row():
            with gradio.Column(scale=3):
                prompt = gradio.Textbox(pair.prompt, label="Prompt", lines=5, max_lines=12, elem_id="prompt")
                with gradio.Row():
                    go = gradio.Button("Continue", variant="primary", elem_id="go")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=2):
                label = "Lambda by token: the memory's gate, with its own temperature"
                by_token = gradio.Checkbox(adaptive, label=label, visible=has_gate, elem_id="adaptive")
                weight = Pair.lmbda if adaptive else sum(pair.lmbda) if shares else pair.lmbda
                lmbda = slider("lambda", "Lambda: weight of the memory", 0, 1, 0.01, weight, not adaptive)
                label = "Temperature of the memory"
                memory_temp = slider("memory_temp", label, 0.1, 4, 0.01, pair.memory_temp, not adaptive)
                with gradio.Accordion("Sampling", open=False, elem_id="sampling"):
                    settings = [
                        slider("new_tokens", "New tokens", 1, 256, 1, pair.max_new_tokens),
                        slider("temperature", "Sampling temperature (0: greedy)", 0, 2, 0.05, sampling.temperature),
                        slider("top_p", "Top-p", 0.05, 1, 0.01, sampling.top_p),
                        gradio.Number(sampling.seed, label="Seed", precision=0, minimum=0, elem_id="seed"),
                    ]
        status = gradio.Markdown(elem_id="status")
        with gradio.Row():
            base = gradio.Textbox(label="Base", lines=4, max_lines=12, elem_id="base")
            joint = gradio.Textbox(label="Base + memory", lines=4, max_lines=12, elem_id="joint")
        inspector = gradio.HTML(elem_id="inspector", padding=False)

        inputs, outputs = [prompt, by_token, lmbda, memory_temp, *settings], [base, joint, inspector, status]
        gradio.on([go.click, prompt.submit], run, inputs, outputs, concurrency_limit=1, **private)
        stop.click(lambda: setattr(viewer, "stopped", True), queue=False, **private)
        by_token.change(lambda on: [gradio.update(visible=not on)] * 2, by_token, [lmbda, memory_temp], **private)
    return blocks
