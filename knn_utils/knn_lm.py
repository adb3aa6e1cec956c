"""The kNN-LM (Khandelwal et al., 2020): what MLP Memory imitates, as a baseline.

`Neighbours` searches and scores labels for perplexity; `KNNLM` puts the mixture on a model's logits for a while.
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
from knn_utils.belonging import check_values
from knn_utils.datastore import Datastore
from knn_utils.distribution import dense_probability, hit_tokens, label_probability
from knn_utils.faiss_files import load_values
from knn_utils.search import KNNSearcher
from utils.errors import check_fraction, check_positive
from utils.legacy import check_made


class Neighbours:
    """An index and the values of its rows.

    Args:
        index_file: FAISS index.
        val_file: values of the indexed rows (a datastore, .npy, or the original's .pkl name).
        k: neighbours; at most the number of indexed rows.
        probe: inverted lists searched.
        layer_position: the block whose MLP input is searched; must be the datastore's.
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
        self.values = load_values(val_file)
        datastore = None if Path(val_file).suffix in (".npy", ".pkl") else Datastore.open(val_file)
        if datastore is not None:
            check_made(val_file, datastore.settings, layer_position=layer_position)
        self.searcher = KNNSearcher(index_file, probe=probe, gpu=knn_gpu, datastore=datastore)
        if datastore is None:
            check_values(self.searcher, self.values, val_file)
        self.searcher.check_k(k)
        self.k = k

    def search(self, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(squared distances, row numbers), each (rows, k), of `hidden` (rows, dim)."""
        queries = hidden.detach().to(torch.float16).cpu().numpy()
        return self.searcher.search(queries, self.k)

    def probability(self, hidden: Tensor, labels: Tensor, knn_temp: Sequence[float]) -> tuple[Tensor, np.ndarray]:
        """From one search at `hidden` (rows, dim): the kNN probability (rows, temperatures) float64 of `labels` (rows,),
        and the squared distance (rows,) of the nearest hit, infinity where there is none."""
        distances, ids = self.search(hidden)
        found = label_probability(distances, ids, self.values, labels.cpu().numpy(), knn_temp)
        return torch.from_numpy(found), distances[:, 0]


class KNNLM(Neighbours):
    """A kNN-LM as a wrapper: two hooks, one that captures the query, one that mixes the kNN into the logits.

        with KNNLM(index, values, k=1024, probe=32, lmbda=0.25, knn_temp=10.0).on(model):
            model.generate(...)

    While it is on, the model's logits are log-probabilities of the mixture; afterwards nothing is left of it. `lmbda` is
    a number, or `Buckets` of numbers by the nearest neighbour's distance.
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
        base = torch.softmax(logits.double(), dim=-1)  # (rows, V)
        lmbda = self.lmbda.of(distances[:, 0]) if isinstance(self.lmbda, Buckets) else np.array([self.lmbda])
        lmbda = torch.from_numpy(lmbda).to(base.device)[:, None]  # (rows or 1, 1)
        return base.mul_(1 - lmbda).add_(torch.from_numpy(knn).to(base.device).mul_(lmbda)).log_()

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[KNNLM]:
        """Put the mixture on the logits of `model`; after the block it is off again."""
        from models.capture import HiddenCapture, captured_module

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
