"""The kNN-LM (Khandelwal et al., 2020), the baseline that MLP Memory imitates.

`Neighbours` searches and scores labels for perplexity; `KNNLM` mixes the kNN distribution into a model's logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_utils.adaptive import Buckets
from knn_utils.distribution import dense_probability, hit_tokens, label_probability
from knn_utils.search import load_values, open_searcher
from models.capture import HiddenCapture, captured_module
from models.mixture import fixed_log_weights, log_mixture
from utils.artefact import require
from utils.errors import check_fraction, check_positive


class Neighbours:
    """An index and the values of its rows.

    Args:
        val_file: values of the indexed rows (a datastore, .npy, or the original's .pkl name).
        k: neighbours; at most the number of indexed rows.
        probe: inverted lists searched per query.
        layer_position: the block whose MLP input is searched; must be that of the index.
    """

    def __init__(
        self,
        index_file: str | Path,
        val_file: str | Path,
        *,
        k: int,
        probe: int,
        knn_gpu: bool = False,
        layer_position: int | None = None,
    ) -> None:
        self.searcher = open_searcher(index_file, val_file, probe=probe, gpu=knn_gpu)
        self.searcher.check_k(k)
        self.values, self.k = load_values(val_file), k
        require(index_file, self.searcher.made, layer_position=layer_position)

    def search(self, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(squared distances, row numbers), each (rows, k), of `hidden` (rows, dim)."""
        return self.searcher.search(hidden.detach().to(torch.float16).cpu().numpy(), self.k)

    def probability(self, hidden: Tensor, labels: Tensor, knn_temp: Sequence[float]) -> tuple[Tensor, np.ndarray]:
        """From one search at `hidden` (rows, dim): the kNN probability (rows, temperatures) float64 of `labels` (rows,),
        and the squared distance (rows,) of the nearest hit, infinity where there is none."""
        distances, ids = self.search(hidden)
        found = label_probability(distances, ids, self.values, labels.cpu().numpy(), knn_temp)
        return torch.from_numpy(found), distances[:, 0]


class KNNLM(Neighbours):
    """A kNN-LM as a wrapper: one hook captures the query, another mixes the kNN distribution into the logits.

        with KNNLM(index, values, k=1024, probe=32, lmbda=0.25, knn_temp=10.0).on(model):
            model.generate(...)

    Inside the block the model's logits are log-probabilities of the mixture. `lmbda` is a number, or `Buckets` of numbers
    by the nearest neighbour's distance.
    """

    def __init__(
        self, *args: Any, lmbda: float | Buckets, knn_temp: float, layer_position: int = -1, **options: Any
    ) -> None:
        super().__init__(*args, layer_position=layer_position, **options)
        self.lmbda = lmbda if isinstance(lmbda, Buckets) else check_fraction("--lmbda", lmbda)
        self.knn_temp = check_positive("--knn_temp", knn_temp)
        self.layer_position = layer_position

    def mixture(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """log((1-lambda)·softmax(logits) + lambda·p_kNN): (rows, V) float64 of hidden (rows, dim), logits (rows, V)."""
        distances, ids = self.search(hidden)  # (rows, k) each
        knn = dense_probability(distances, hit_tokens(ids, self.values), logits.shape[-1], self.knn_temp)
        if isinstance(self.lmbda, Buckets):
            lmbda = torch.from_numpy(self.lmbda.lambdas(distances[:, 0])).to(logits.device)[:, None]  # (rows, 1)
            weights = [torch.log1p(-lmbda), lmbda.log()]
        else:
            weights = fixed_log_weights(self.lmbda)
        base = logits.double().log_softmax(-1)  # (rows, V)
        return log_mixture([base, torch.from_numpy(knn).to(base.device).log_()], weights)

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[KNNLM]:
        """Mix into the logits of `model` until the end of the block."""

        def mix(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
            query = capture.hidden[:, -logits.shape[1] :]  # (batch, positions, hidden)
            mixed = self.mixture(query.flatten(0, 1), logits.flatten(0, 1))  # (batch · positions, V)
            return mixed.view(logits.shape).to(logits.dtype)

        with HiddenCapture(captured_module(model, self.layer_position)) as capture:
            hook = model.get_output_embeddings().register_forward_hook(mix)
            try:
                yield self
            finally:
                hook.remove()
