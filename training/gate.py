"""Train the gate of a memory, for `--lmbda adaptive`: high lambda where the memory knows the text, low where it does not.

    python -m training.gate --model_name_or_path BASE --knn_generator_path MEMORY --dataset_name WINDOWS

The gate (`models/gate.py`) is fitted to maximize the mixture's likelihood on held-out text and on training text, whose
windows begin at a random token of their first half: text returns in other contexts than it was learnt in; and, if it is
there, on other text, for which the memory was not made. Base and memory are frozen; the features of each position are computed once. The gate is written into the folder of the memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least, check_positive
from utils.loading import BaseArguments

if TYPE_CHECKING:
    from knn_utils.scored_rows import GateRows
    from models.gate import LambdaGate

WEIGHT_DECAY = 0.01
FARTHER = 0.5, 2.0  # what is added to the log distance of held-out rows to get rows where lambda is to be 0


@dataclass(kw_only=True)
class GateArguments(BaseArguments):
    """Which base and memory, which texts, and the balance between them."""

    knn_generator_path: str = required("the memory: a folder; the gate is written into it")
    dataset_name: str = required("windows folder made by utils/preprocess_dataset.py")
    validation_split_name: str = flag("validation", "split that the memory was not trained on")
    known_split_name: str = flag("train", "split that the memory was trained on")
    known_weight: float = flag(0.05, "weight of the training text: more recall, but higher perplexity of new text")
    caution: float = flag(1.0, "weight of the loss that keeps lambda at 0 on out-of-domain text")
    other_dataset_name: str | None = flag(None, "windows (split train) of other text, where lambda is to be low")
    other_weight: float = flag(5.0, "weight of the other text")
    other_windows: int = flag(40, "use at most this many of its windows")
    known_windows: int = flag(64, "use at most this many training windows, evenly spread")
    max_eval_samples: int | None = flag(None, "use at most this many validation windows")
    memory_temp: float = flag(1.0, "temperature of the memory's softmax in the mixture")
    width: int = flag(128, "hidden units of the gate")
    steps: int = flag(300, "steps of AdamW, each on all rows")
    learning_rate: float = flag(0.01, "learning rate of the first step; it falls linearly to 0")
    per_device_eval_batch_size: int = flag(8, "windows per batch")
    seed: int = flag(42, "seed of the gate's weights and of the cuts of training windows")


def cut_anew(windows: Any, seed: int, bos: int | None = None) -> Any:
    """The windows, each from a random token of its first half on: a dataset of (windows, time) input_ids and labels.
    A first token `bos` without a label (--window_bos) stays in its place."""
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
    moved["labels"][has_bos, 1] = -100  # nothing is predicted from the BOS token alone
    return datasets.Dataset.from_dict(moved).with_format("numpy")


def fit(gate: LambdaGate, texts: dict[str, GateRows], arguments: GateArguments) -> None:
    """Fit `gate` in place: AdamW on the mean loss of the rows of each text, weighted, + caution · the mean of
    -log(1 - lambda) on held-out rows moved away from the corpus, in place of out-of-domain text."""
    import torch

    from models.gate import DISTANCES

    weights = {"held-out": 1.0, "training": arguments.known_weight, "other": arguments.other_weight}
    features = torch.cat([rows.features for rows in texts.values()])[:, 0, : len(gate.feature_mean)]
    gate.feature_mean.copy_(features.mean(0))
    gate.feature_scale.copy_(features.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=arguments.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, arguments.steps)
    for _ in range(arguments.steps):
        loss = -sum(weights[name] * rows.mixture([gate])[0].mean() for name, rows in texts.items())
        farther = texts["held-out"].features[:, 0].clone()
        farther[:, -DISTANCES] += torch.empty(len(farther)).uniform_(*FARTHER)
        loss += arguments.caution * torch.nn.functional.softplus(gate.logit(farther)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    gate.eval().requires_grad_(False)


def main() -> None:
    (arguments,) = parse(GateArguments, description=__doc__.split("\n")[0])
    check_at_least(0, arguments, "known_weight", "caution", "other_weight")
    check_at_least(1, arguments, "known_windows", "other_windows", "max_eval_samples", "per_device_eval_batch_size")
    check_positive("--memory_temp", arguments.memory_temp)
    train(arguments)


def train(arguments: GateArguments) -> LambdaGate:
    """Score both texts, fit the gate and write it into the memory's folder. Raises InputError for text that is not held out."""
    import numpy as np
    import torch
    from accelerate import PartialState

    from knn_utils.scored_rows import GateRows, check_finite, gate_rows
    from models.gate import DISTANCES, WEIGHTS, LambdaGate
    from utils.artefact import Made, record_path
    from utils.files import atomic, ensure_folder, naming_full_disk, remove
    from utils.loading import check_windows, load_windows, made_id, quiet_libraries
    from utils.memories import open_joint
    from utils.windows import check_held_out

    quiet_libraries()
    started = time.time()
    if PartialState().num_processes > 1:
        raise InputError("training.gate: runs in one process; start it without accelerate launch")
    windows = load_windows(arguments.dataset_name, arguments.validation_split_name, arguments.max_eval_samples)
    trained = load_windows(arguments.dataset_name, arguments.known_split_name)
    corpus = np.concatenate(trained["labels"][:])
    checked = f"--validation_split_name {arguments.validation_split_name}"
    check_held_out(windows, corpus[corpus >= 0], checked, "training")
    tokenizer = arguments.open_tokenizer()
    base = arguments.open_base(tokenizer)
    check_windows(arguments.dataset_name, windows, base.config, tokenizer)
    joint = open_joint(arguments, arguments.knn_generator_path, base)
    folder = ensure_folder(joint.knn_generator.name_or_path)
    numbers = np.unique(np.linspace(0, len(trained) - 1, min(arguments.known_windows, len(trained))).astype(int))
    trained = cut_anew(trained.select(numbers), arguments.seed, getattr(tokenizer, "bos_token_id", None))

    torch.manual_seed(arguments.seed)
    other = bool(arguments.other_dataset_name)
    gate = LambdaGate(base.config.get_text_config().hidden_size, arguments.width, arguments.memory_temp, other)
    gate.to(joint.get_output_embeddings().weight.device)
    batch_size = arguments.per_device_eval_batch_size
    windows_of, states, texts = {"training": trained, "held-out": windows}, {}, {}
    if arguments.other_dataset_name:
        windows_of["other"] = load_windows(arguments.other_dataset_name, "train", arguments.other_windows)
        check_windows(arguments.other_dataset_name, windows_of["other"], base.config, tokenizer)
    for name, text in windows_of.items():
        found, scored, _ = zip(*gate_rows(joint, [gate], text, batch_size, f"{name} text"), strict=True)
        states[name] = torch.cat(found).cpu()
        texts[name] = GateRows(*(each.cpu() for each in GateRows.concatenate(scored)))
        check_finite(base, states[name], texts[name].base)
    gate.cpu().fit_distances(states["training"], states.get("other"))
    for name, rows in texts.items():
        rows.features[:, 0, -DISTANCES:] = gate.distances(states[name])
    fit(gate, texts, arguments)

    perplexity = {}
    for name, rows in texts.items():
        likelihoods = {"base": rows.base, "memory": rows.memory[:, 0], "mixture": rows.mixture([gate])[0]}
        perplexity[name] = {key: each.double().mean().neg().exp().item() for key, each in likelihoods.items()}
        shown = ", ".join(f"{key} {value:.2f}" for key, value in perplexity[name].items())
        say(f"{name} text: {len(rows.base)} tokens, perplexity {shown}")
    made_from = {"base": arguments.base_id(), "memory": made_id(folder), "windows": made_id(arguments.dataset_name)}
    made_from |= {"other": made_id(arguments.other_dataset_name)} if other else {}
    made = Made("gate", {**vars(arguments), "perplexity": perplexity}, made_from=made_from)
    record = record_path(folder / WEIGHTS)
    remove(record)
    with naming_full_disk(folder / WEIGHTS):
        gate.save(folder)
    with atomic(record) as temporary:
        temporary.write_text(made.text)
    say(f"gate: {folder / WEIGHTS} ({time.time() - started:.0f} s)")
    return gate


if __name__ == "__main__":
    command(main)()
