"""Reading a prompt of 1,024 tokens and making the first token, with the memory and without."""

from __future__ import annotations

from benchmarks.generating import context_of, generate, joint_model, prompt
from benchmarks.measure import Row, median, ratio, rounds
from benchmarks.setting import Setting

STAGE = "first_token"


def measure(setting: Setting) -> list[Row]:
    base = setting.base()
    joint = joint_model(setting, base)
    ids = prompt(setting, min(1024, context_of(base) - 8))
    runs = {"base": lambda: generate(base, ids, 1), "joint": lambda: generate(joint, ids, 1)}
    seconds = rounds(runs, 3 * setting.repeats, device=setting.device)
    detail = (
        f"{median(seconds['joint']):.3f} s against {median(seconds['base']):.3f} s, prompt of {ids.shape[1]} tokens"
    )
    return [
        Row(
            STAGE,
            "time to the first token, of the base alone",
            ratio(seconds, "joint", "base"),
            "<=",
            1.03,
            "x",
            detail,
        )
    ]
