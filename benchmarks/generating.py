"""What the rows on generation share: the joint model, prompts, tokens of several models made in turn."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.measure import wait
from benchmarks.setting import Setting


def joint_model(setting: Setting, base: Any) -> Any:
    from models import MLPMemory

    return MLPMemory(base, setting.memory()).eval()


def prompt(setting: Setting, length: int) -> Any:
    """(1, length) token ids of the text."""
    import numpy as np
    import torch

    windows = setting.windows()
    ids = np.concatenate([np.asarray(windows[number]["input_ids"]) for number in range(1, len(windows))])
    ids = np.resize(ids, length)
    return torch.as_tensor(ids.astype("int64"))[None].to(setting.device)


def context_of(base: Any) -> int:
    """Positions that the base has."""
    return int(getattr(base.config, "max_position_embeddings", None) or 1 << 20)


def in_turn(models: dict[Any, tuple[Any, Any]], count: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each of `count` greedy tokens after the first two, one of each (model, prompt) in turn."""
    import torch

    seconds: dict[Any, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        states = {}
        for name, (model, ids) in models.items():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            states[name] = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        for number in range(-1, count):
            for name, (model, _) in models.items():
                token, cache = states[name]
                wait(device)
                start = time.perf_counter()
                out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)
                wait(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                states[name] = token, out.past_key_values
    return seconds


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def put(self, _: Any) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, ids: Any, count: int, **more: Any) -> Any:
    """Exactly `count` tokens, greedily."""
    import torch

    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
