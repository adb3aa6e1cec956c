"""Train the gate of a memory, for `--lmbda adaptive`: lambda high where the memory knows, low where it does not.

    python -m training.gate --model_name_or_path BASE --knn_generator_path MEMORY --dataset_name WINDOWS

The gate (`models/gate.py`) is fitted to raise the likelihood of the mixture on two kinds of text at once: validation
text, which the memory has never seen, and text that it was trained on, each window of which begins anew somewhere in its
first half, since text comes back in other surroundings than it was learnt in. Stranger states are left to the base. Base
and memory stay as they are; their figures of each position are computed once. The gate is written into the memory's
folder.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least, check_positive, check_seed
from utils.loading import BaseArguments

if TYPE_CHECKING:
    from models.gate import LambdaGate
    from utils.gating import GateRows

WEIGHT_DECAY = 0.01
STRANGER = (0.5, 2.0)  # how much stranger than validation text the rows are at which lambda is to be 0


@dataclass(kw_only=True)
class GateArguments(BaseArguments):
    """Which pair, which text, and the balance between its two kinds."""

    knn_generator_path: str = required("the memory: a folder; the gate is written into it")
    dataset_name: str = required("windows folder made by utils/preprocess_dataset.py")
    validation_split_name: str = flag("validation", "split that the memory was not trained on")
    known_split_name: str = flag("train", "split that it was trained on")
    known_weight: float = flag(
        0.05,
        "weight of the known text's likelihood beside the validation text's: more recall, higher perplexity of new text",
    )
    caution: float = flag(
        1.0, "weight of a lambda of 0 at states stranger than the validation text's: less harm to text of another kind"
    )
    known_windows: int = flag(64, "windows of known text at most, taken evenly")
    max_eval_samples: int | None = flag(None, "use this many validation windows at most")
    knn_temp: float = flag(1.0, "temperature of the memory's softmax in the mixture")
    width: int = flag(128, "hidden units of the gate")
    steps: int = flag(300, "steps of AdamW, each on all rows")
    learning_rate: float = flag(0.01, "learning rate of the first step; it falls to 0")
    per_device_eval_batch_size: int = flag(8, "windows scored at a time")
    seed: int = flag(42, "of the gate's start, and of where the known windows begin")

    def check(self) -> None:
        """Check the values by themselves. Raises InputError."""
        self.require_base()
        check_at_least(0, self, "known_weight", "caution")
        check_at_least(1, self, "known_windows", "max_eval_samples", "width", "steps", "per_device_eval_batch_size")
        check_positive("--knn_temp", self.knn_temp)
        check_positive("--learning_rate", self.learning_rate)
        check_seed("--seed", self.seed)


def begin_elsewhere(windows: Any, seed: int, bos: int | None = None) -> Any:
    """The same windows, each from a random token of its first half on: (windows, time) input_ids and labels.

    A token `bos` without a label that a window begins with (--window_bos) stays there, and predicts nothing.
    """
    import datasets
    import numpy as np

    ids, labels = (np.asarray(windows[name][:]) for name in ("input_ids", "labels"))
    used = (labels != -100).sum(1)
    begins = np.random.default_rng(seed).integers(0, used // 2 + 1)
    column = np.arange(ids.shape[1]) + begins[:, None]  # (windows, time): where each token comes from
    has_bos = (ids[:, 0] == bos) & (labels[:, 0] == -100)
    column[has_bos, 0] = 0
    inside, column = column < ids.shape[1], np.minimum(column, ids.shape[1] - 1)
    moved = {
        "input_ids": np.take_along_axis(ids, column, 1),
        "labels": np.where(inside, np.take_along_axis(labels, column, 1), -100),
    }
    moved["labels"][has_bos, 1] = -100
    return datasets.Dataset.from_dict(moved).with_format("numpy")


def fit(gate: LambdaGate, unseen: GateRows, known: GateRows, arguments: GateArguments) -> None:
    """Fit `gate` in place to the rows' labels: AdamW on the unseen rows' mean loss plus known_weight · the known's.

    And caution · the loss of a lambda above 0 where the unseen rows are as they are but stranger: validation text is of the
    corpus's kind, so nothing else tells the gate what to do with text that is not.
    """
    import torch

    figures = torch.cat([unseen.figures, known.figures])
    gate.figure_mean.copy_(figures.mean(0))
    gate.figure_scale.copy_(figures.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=arguments.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, arguments.steps)
    for _ in range(arguments.steps):
        loss = -unseen.log_likelihoods(gate).mean() - arguments.known_weight * known.log_likelihoods(gate).mean()
        stranger = unseen.figures.clone()
        stranger[:, -1] += torch.empty(len(stranger)).uniform_(*STRANGER)
        loss += arguments.caution * torch.nn.functional.softplus(gate.logit(stranger)).mean()  # of -log(1 - lambda)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    gate.eval().requires_grad_(False)


def main() -> None:
    (arguments,) = parse(GateArguments, description=__doc__.split("\n")[0])
    arguments.check()
    from utils.loading import quiet_libraries

    quiet_libraries()
    train(arguments)


def train(arguments: GateArguments) -> LambdaGate:
    """Score both texts, fit the gate and write it beside the memory. Raises InputError for text that is not held out."""
    import numpy as np
    import torch
    from accelerate import PartialState

    from models.gate import LambdaGate, probe
    from models.stack import find_memory
    from utils.evaluation import check_held_out
    from utils.gating import GateRows, gate_rows
    from utils.loading import check_windows, load_windows
    from utils.memories import open_joint

    started = time.time()
    if PartialState().num_processes > 1:
        raise InputError("training.gate: runs in one process; start it without a launcher")
    unseen = load_windows(arguments.dataset_name, arguments.validation_split_name, arguments.max_eval_samples)
    trained = load_windows(arguments.dataset_name, arguments.known_split_name)
    corpus = np.concatenate(trained["labels"][:])
    told = f"--validation_split_name {arguments.validation_split_name}"
    check_held_out(unseen, corpus[corpus >= 0], told, "trained")
    places = np.unique(np.linspace(0, len(trained) - 1, min(arguments.known_windows, len(trained))).astype(int))

    tokenizer = arguments.open_tokenizer()
    known = begin_elsewhere(trained.select(places), arguments.seed, getattr(tokenizer, "bos_token_id", None))
    base = arguments.open_base(tokenizer)
    check_windows(arguments.dataset_name, unseen, base.config, tokenizer)
    joint = open_joint(arguments, arguments.knn_generator_path, base)
    torch.manual_seed(arguments.seed)
    gate = LambdaGate(base.config.get_text_config().hidden_size, arguments.width, arguments.knn_temp)
    device, size = joint.get_output_embeddings().weight.device, arguments.per_device_eval_batch_size
    found = list(gate_rows(joint, gate.to(device), known, size, "known text"))
    states = torch.cat([hidden.cpu() for hidden, _, _ in found])
    gate.cpu().fit_corpus(states)
    known_rows = GateRows.together([rows for _, _, rows in found])
    known_rows.figures[:, -1:] = gate.strangeness(states)
    unseen_rows = [rows for _, _, rows in gate_rows(joint, gate.to(device), unseen, size, "unseen text")]
    unseen_rows = GateRows.together(unseen_rows)
    fit(gate.cpu(), unseen_rows, known_rows, arguments)

    measured = {}
    for name, rows in (("unseen", unseen_rows), ("known", known_rows)):
        means = {"base": rows.base.mean(), "memory": rows.memory.mean(), "mixture": rows.log_likelihoods(gate).mean()}
        measured[name] = {each: math.exp(-value.item()) for each, value in means.items()}
        told = ", ".join(f"{each} {value:.2f}" for each, value in measured[name].items())
        say(f"{name} text: {len(rows.base)} tokens, perplexity {told}")
    probes = {"base_probe": probe(joint.base_lm), "memory_probe": probe(joint.knn_generator)}
    gate.about = {
        "known_weight": arguments.known_weight,
        "caution": arguments.caution,
        "perplexity": measured,
        **probes,
    }
    folder: Path = find_memory(arguments.knn_generator_path)
    gate.save(folder)
    say(f"gate: {folder / 'gate.safetensors'} ({time.time() - started:.0f} s)")
    return gate


if __name__ == "__main__":
    command(main)()
