"""The compared methods, each made from a finished quickstart folder: what it is, and what it adds on disk.

Knows nothing of how methods are scored beyond the `Method` that it fills in.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.compare_scores import Method, score_windows
from utils.errors import InputError
from utils.files import read_json
from utils.loading import say

# As the table calls them.
TITLES = {
    "base": "base",
    "knnlm": "kNN-LM",
    "rag_bm25": "RAG, BM25",
    "rag_dense": "RAG, dense",
    "lora": "LoRA",
    "memory": "MLP memory",
}


@dataclass(frozen=True)
class Work:
    """A finished quickstart folder.

    Attributes:
        folder: of the stages' outputs.
        model: folder or hub name of the base.
        training: settings of the memory's training, which name the windows, the base and the index by checksum.
        memory: folder of the trained memory.
        joint, knnlm: results on the validation articles, with the chosen lambda and temperature.
        dtype: of the base, as the stages used it.
    """

    folder: Path
    model: str
    training: dict[str, Any]
    memory: Path
    joint: dict[str, Any]
    knnlm: dict[str, Any]
    dtype: str

    @classmethod
    def open(cls, folder: Path, model: str | None) -> Work:
        """Read what the stages recorded. Raises InputError when the folder is not that of a finished quickstart."""
        hint = f"--work {folder}: is not the work folder of a finished quickstart"
        read = {}
        for name in ("memory/training.json", "joint_validation/results.json", "knnlm_validation/results.json"):
            if not (folder / name).is_file():
                raise InputError(f"{hint} ({name} is missing); make one with bash scripts/quickstart.sh")
            read[name] = read_json(folder / name)
        record, joint, knnlm = read.values()
        try:
            if not record["complete"]:
                raise InputError(f"{hint} (the memory is not trained to its end); run bash scripts/quickstart.sh again")
            embedded = folder / "embedded" / "model"
            model = model or (str(embedded) if embedded.is_dir() else joint["model"])
            chosen = [{name: row[name] for name in ("lmbda", "knn_temp", "perplexity")} for row in (joint, knnlm)]
            chosen[1] |= {name: knnlm[name] for name in ("k", "probe")}
            memory = folder / "memory" / record["checkpoint"]
            return cls(folder, model, record["settings"], memory, chosen[0], chosen[1], joint["dtype"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{hint} ({error} is missing from its records); make one with an up-to-date quickstart"
            ) from None

    @property
    def windows(self) -> Path:
        return self.folder / "windows"

    @property
    def layer_position(self) -> int:
        return self.training["data"].get("layer_position", -1)

    def articles(self) -> list[str]:
        """The trained articles. Raises InputError where the text came without a list of them."""
        from downstream.recall import read_articles

        path = self.windows / "raw" / "train.jsonl"
        if not path.exists():
            raise InputError(
                f"--work {self.folder}: windows/raw/train.jsonl is missing, a text that was not divided by article"
            )
        return [text for text in read_articles(str(path)) if text.strip()]

    def train_datastore(self) -> Path:
        found = sorted((self.folder / "dstore").glob("dstore_*_train_*.arrow"))
        if not found:
            raise InputError(f"--work {self.folder}: dstore holds no datastore of the train split")
        return found[0]

    def identity(self) -> dict[str, Any]:
        """What a result depends on."""
        return {"training": self.training, "joint": self.joint, "knnlm": self.knnlm, "dtype": self.dtype}


@dataclass
class Bench:
    """What the methods of a run share: the folder they come from, the flags, the loaded base and tokenizer."""

    work: Work
    flags: Any
    output: Path

    @functools.cached_property
    def tokenizer(self) -> Any:
        from utils.base_model import load_tokenizer

        return load_tokenizer(self.work.model, required=True)

    @functools.cached_property
    def base(self) -> Any:
        return self.load_base()

    @functools.cached_property
    def articles(self) -> list[str]:
        return self.work.articles()

    def load_base(self, dtype: str | None = None) -> Any:
        from utils.base_model import load_base
        from utils.loading import resolve_dtype

        return load_base(self.work.model, tokenizer=self.tokenizer, dtype=resolve_dtype(dtype or self.work.dtype))

    def build(self, name: str, record: dict[str, Any], save: Callable[[], None]) -> Method:
        """Make the method; what it takes long to find out is kept in `record` by calling `save`."""
        if name in SEARCHES:
            return rag(self, name, record, save)
        return BUILDERS[name](self)


def plain(bench: Bench) -> Method:
    """The base alone."""
    return Method(bench.base)


def memory(bench: Bench) -> Method:
    """Base and memory, mixed at the lambda and temperature that were best on the validation articles."""
    from models import MLPMemory
    from models.mlpMemory import joint_log_probs
    from utils.loading import open_memory_of

    work, base = bench.work, bench.base
    learned = open_memory_of(base, work.memory, layer_position=work.layer_position, dtype=base.dtype)
    lmbda, knn_temp = work.joint["lmbda"], work.joint["knn_temp"]
    joint = MLPMemory(base, learned, lmbda, knn_temp, work.layer_position).eval()

    def mix(hidden: Tensor, logits: Tensor) -> Tensor:
        return joint_log_probs(logits, joint.memory_logits(hidden), lmbda, knn_temp)

    files = [path for path in work.memory.iterdir() if path.suffix in (".safetensors", ".json")]
    return Method(
        base,
        mix,
        generator=lambda: contextlib.nullcontext(joint),
        bytes=sum(path.stat().st_size for path in files),
        settings={
            "lmbda": lmbda,
            "knn_temp": knn_temp,
            "epochs": work.training["num_train_epochs"],
            "parameters": sum(weight.numel() for weight in learned.parameters()),
        },
        layer_position=work.layer_position,
    )


def knnlm(bench: Bench) -> Method:
    """The kNN-LM over the trained positions, at its own best lambda and temperature."""
    from knn_utils.knn_lm import KNNLM

    work, base = bench.work, bench.base
    index = work.folder / "dstore" / "train.index"
    settings = {name: work.knnlm[name] for name in ("k", "probe", "lmbda", "knn_temp")}
    retriever = KNNLM(index, work.train_datastore(), **settings, layer_position=work.layer_position)

    @contextlib.contextmanager
    def generator() -> Iterator[Any]:
        with retriever.on(base):
            yield base

    files = index.rglob("*") if index.is_dir() else [index]
    bytes_of_index = sum(path.stat().st_size for path in files if path.is_file())
    return Method(
        base,
        retriever.mixture,
        generator=generator,
        # To answer it needs the index, which holds the keys, and the values; not the datastore.
        bytes=bytes_of_index + 4 * len(retriever.values),
        settings={**settings, "rows": len(retriever.values)},
        layer_position=work.layer_position,
    )


def bm25(bench: Bench) -> tuple[Any, int]:
    from benchmarks.compare_rag import bm25_search

    return bm25_search(bench.articles, bench.output / "work" / "bm25")


def dense(bench: Bench) -> tuple[Any, int]:
    from benchmarks.compare_rag import dense_search, fetch_encoder

    own = bench.flags.encoder
    encoder = Path(own) if own else fetch_encoder(bench.output / "work" / "encoder")
    return dense_search(bench.articles, encoder, bench.output / "work" / "dense")


def rag(bench: Bench, name: str, record: dict[str, Any], save: Callable[[], None]) -> Method:
    """Trained articles put before the text; how many is chosen on validation windows, as lambda is for the mixtures."""
    from benchmarks.compare_rag import passages
    from utils.loading import load_windows

    flags = bench.flags
    search, bytes_on_disk = SEARCHES[name](bench)
    method = Method(bench.base, bytes=bytes_on_disk + sum(len(text.encode()) for text in bench.articles))

    def use(count: int) -> None:
        method.passages = passages(search, bench.articles, bench.tokenizer, count, flags.passage_tokens)

    tried = record.setdefault("choice", {})
    if len(flags.rag_passages) > 1:
        windows = load_windows(bench.work.windows, "validation")
        windows = windows.select(range(min(flags.choose_windows, len(windows))))
        for count in flags.rag_passages:
            if str(count) not in tried:
                use(count)
                found = score_windows(method, windows, bench.tokenizer, flags.rag_chunk, flags.rag_query)
                tried[str(count)] = found["perplexity"]
                say(f"{name}: {count} article(s), validation perplexity {found['perplexity']:.4f}")
                save()
    best = min(tried, key=tried.get) if tried else str(flags.rag_passages[0])
    use(int(best))
    method.settings = {
        "passages": int(best),
        "validation": dict(tried),
        "chunk": flags.rag_chunk,
        "query": flags.rag_query,
        "passage_tokens": flags.passage_tokens,
        "articles": len(bench.articles),
    }
    return method


def lora(bench: Bench) -> Method:
    """The base with a LoRA adapter, trained on the memory's windows, merged into its weights."""
    from benchmarks.compare_lora import adapter, adapter_bytes, merged

    flags, training = bench.flags, bench.work.training
    identity = [training, flags.lora_rank, flags.lora_learning_rate, flags.lora_epochs]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    folder = bench.output / "work" / f"lora-{digest}"
    found = adapter(
        bench.load_base("float32"),
        bench.work.windows,
        folder,
        flags,
        training,
        bench.work.dtype == "bfloat16",
    )
    return Method(merged(bench.load_base(), folder), bytes=adapter_bytes(folder), settings=found)


SEARCHES = {"rag_bm25": bm25, "rag_dense": dense}
BUILDERS: dict[str, Callable[[Bench], Method]] = {"base": plain, "knnlm": knnlm, "lora": lora, "memory": memory}
