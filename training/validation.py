"""Validation while a memory trains: joint perplexity from a stored datastore with base log-probabilities.

The base is run once, before training, and never again. Knows the memory only through its hidden states and head.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from knn_utils.datastore import open_scored_datastore, stored_rows
from utils.evaluation import MixtureScore, label_log_probabilities

LAMBDAS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def stored_validation(path: str | Path, dim: int, layer_position: int) -> Callable[[torch.nn.Module], dict[str, Any]]:
    """A function that scores a memory on the datastore at `path`.

    It returns base, memory and the best joint perplexity over a grid of lambda (memory temperature 1). Under
    several processes each scores its share.

    Raises:
        InputError: no log-probabilities in the datastore, or another width or layer.
    """
    datastore = open_scored_datastore(path, dim=dim, layer_position=layer_position)

    @torch.inference_mode()
    def validate(memory: torch.nn.Module) -> dict[str, Any]:
        score, alone = MixtureScore(LAMBDAS, [1.0]), MixtureScore([1.0], [1.0])
        weight = memory.lm_head.weight
        for hidden, base, values in stored_rows(datastore):
            hidden = hidden.to(weight.device, weight.dtype)
            logprob = label_log_probabilities(memory.hidden(hidden), weight, values.to(weight.device)).cpu()
            score.add(base, logprob)
            alone.add(base, logprob)
        score.reduce()
        alone.reduce()
        best = score.best()
        return {
            "base_perplexity": round(score.base_perplexity(), 4),
            "memory_perplexity": round(alone.best()["perplexity"], 4),
            "joint_perplexity": round(best["perplexity"], 4),
            "lmbda": best["lmbda"],
            "tokens": int(score.tokens.item()),
        }

    return validate


def make_validation(arguments: Any, dim: int, load_base: Callable[[], Any]) -> Callable[[Any], dict[str, Any]] | None:
    """The trainers' validation function from their flags, or None where there is nothing to validate on.

    Without --validation_dstore_path the base scores the validation split once, into the output folder.
    """
    import datasets

    from knn_utils.saveEmbedMulti import save_datastore
    from utils.loading import load_windows, model_fingerprint, say, windows_fingerprint

    if arguments.validation_dstore_path:
        return stored_validation(arguments.validation_dstore_path, dim, arguments.layer_position)
    split = arguments.validation_split_name
    if split == "none":
        return None
    splits = datasets.load_from_disk(str(arguments.dataset_name))
    if not isinstance(splits, datasets.DatasetDict) or split not in splits:
        say(f"--validation_split_name {split}: the windows have no such split, no validation while training")
        return None
    windows = load_windows(arguments.dataset_name, split)
    if arguments.max_eval_samples is not None:
        windows = windows.select(range(min(arguments.max_eval_samples, len(windows))))
    path = Path(arguments.output_dir) / "validation_dstore"
    base = load_base()
    settings = {
        "model": model_fingerprint(base),
        "dataset": windows_fingerprint(windows),
        "subset": split,
        "dim": dim,
        "dtype": str(base.dtype).removeprefix("torch."),
        "layer_position": arguments.layer_position,
        "logprob": True,
    }
    save_datastore(
        base,
        windows,
        path,
        settings=settings,
        batch_size=arguments.per_device_eval_batch_size,
        layer_position=arguments.layer_position,
        with_logprob=True,
        overwrite=arguments.overwrite,
    )
    return stored_validation(path, dim, arguments.layer_position)
