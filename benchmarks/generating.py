"""What the rows on generation share: the joint model, prompts, and seconds of each generated token."""

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


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def put(self, _: Any) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def token_seconds(model: Any, ids: Any, count: int, device: str) -> list[float]:
    """Seconds of each of `count` tokens after the first, generated greedily after `ids` (1, time)."""
    clock = Clock(device)
    generate(model, ids, count + 1, streamer=clock)
    # The prompt is put first, then each token.
    return [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]


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
