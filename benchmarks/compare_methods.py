"""The compared methods, each made from a finished quickstart folder: what it is, and what it adds on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compare_rag import bm25_search, bytes_of, dense_search, fetch_encoder, passages
from benchmarks.compare_scores import Method, score_windows

# As the table calls them, in the order in which they are measured.
from utils.cli import say
from utils.errors import InputError
from utils.files import read_json
from utils.loading import BaseArguments, load_windows

# As the table calls them, in the order in which they are measured.
TITLES = {
    "base": "base",
    "knnlm": "kNN-LM",
    "rag_bm25": "RAG, BM25",
    "rag_dense": "RAG, dense",
    "lora": "LoRA",
    "memory": "MLP memory",
}
LORA_EVALUATIONS = 4


class Quickstart:
    """The work folder of a finished quickstart, and the texts that every method is asked; opened when first needed.

    Attributes:
        training: settings of the memory's training, which name the windows, the base and the index by checksum.
        memory: folder of the trained memory.
        joint, knnlm: lambda and temperature that were chosen on the validation articles (and k, probe).
        dtype: of the base, as the stages used it.

    Raises:
        InputError: the folder is not that of a finished quickstart, or the web text is missing.
    """

    def __init__(self, flags: Any) -> None:
        self.flags, self.folder, self.output = flags, Path(flags.work), Path(flags.output_dir)
        hint = f"--work {self.folder}: is not the work folder of a finished quickstart"
        found = []
        for name in ("memory/training.json", "joint_validation/results.json", "knnlm_validation/results.json"):
            if not (self.folder / name).is_file():
                raise InputError(f"{hint} ({name} is missing); make one with bash scripts/quickstart.sh")
            found.append(read_json(self.folder / name))
        record, joint, knnlm = found
        try:
            if not record["complete"]:
                raise InputError(f"{hint} (the memory is not trained to its end); run bash scripts/quickstart.sh again")
            self.training, self.memory = record["settings"], self.folder / "memory" / record["checkpoint"]
            self.joint, self.knnlm = ({name: row[name] for name in ("lmbda", "knn_temp")} for row in (joint, knnlm))
            self.knnlm |= {name: knnlm[name] for name in ("k", "probe")}
            self.dtype, model = joint["dtype"], joint["model"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{hint} (no {error} in its records); make one with an up-to-date quickstart") from None
        embedded = self.folder / "embedded" / "model"
        self.name = "SmolLM2-135M-Instruct"
        if flags.model_name_or_path or not embedded.is_dir():
            embedded = flags.model_name_or_path or model
            self.name = Path(embedded).name
        self.layer_position = self.training["data"].get("layer_position", -1)
        self.models = BaseArguments(
            model_name_or_path=str(embedded), torch_dtype=self.dtype, layer_position=self.layer_position
        )
        self.web_path = Path(flags.web_text or self.folder / "embedded" / "web.txt")
        if not self.web_path.is_file():
            raise InputError(
                f"--web_text {self.web_path}: no such file; name a text that nothing was trained on "
                "(python -m utils.embedded_default writes one, web.txt)"
            )

    def identity(self) -> dict[str, Any]:
        """What the results of all methods depend on, beside the flags."""
        web = hashlib.sha256(self.web_path.read_bytes()).hexdigest()[:16]
        return {"training": self.training, "joint": self.joint, "knnlm": self.knnlm, "dtype": self.dtype, "web": web}

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.models.open_tokenizer(required=True)

    @functools.cached_property
    def base(self) -> Any:
        return self.models.open_base(self.tokenizer)

    def windows(self, split: str) -> Any:
        return load_windows(self.folder / "windows", split)

    def some(self, windows: Any) -> list[dict[str, Any]]:
        """Windows evenly taken, of --max_eval_tokens tokens at most, one window at least."""
        most = max(self.flags.max_eval_tokens // len(windows[0]["input_ids"]), 1)
        step = max(len(windows) / most, 1.0)
        return [windows[int(number * step)] for number in range(min(most, len(windows)))]

    @functools.cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Windows of articles that nothing was trained on."""
        return self.some(self.windows("test"))

    @functools.cached_property
    def web(self) -> list[dict[str, Any]]:
        """The web text in windows as long as the held-out ones, without overlap; the rest of it falls away."""
        from utils.windows import token_ids

        length = len(self.held_out[0]["input_ids"])
        try:
            lines = [line for line in self.web_path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError:
            raise InputError(f"--web_text {self.web_path}: is not UTF-8 text") from None
        ids = token_ids(lines, self.tokenizer)
        if len(ids) < length:
            raise InputError(f"--web_text {self.web_path}: has {len(ids)} tokens, a window takes {length}")
        rows = ids[: len(ids) // length * length].reshape(-1, length)  # (windows, time)
        return self.some([{"input_ids": row, "labels": row} for row in rows])

    @functools.cached_property
    def articles(self) -> list[str]:
        """The trained articles. Raises InputError where the text came without a list of them."""
        from downstream.recall import read_articles

        path = self.folder / "windows" / "raw" / "train.jsonl"
        if not path.exists():
            raise InputError(f"--work {self.folder}: its text was not divided by article (no windows/raw/train.jsonl)")
        return [text for text in read_articles(str(path)) if text.strip()]

    @functools.cached_property
    def cases(self) -> list[Any]:
        """Facts of the trained articles."""
        from downstream.recall import choose_cases

        return choose_cases(self.articles, self.flags.max_cases, self.flags.answer_words)

    def build(self, name: str, record: dict[str, Any]) -> Method:
        """Make a method. `record`: what is known of it from an earlier start."""
        if name.startswith("rag"):
            return rag(self, name, record)
        return {"base": lambda work: Method(work.base), "knnlm": knnlm, "lora": lora, "memory": memory}[name](self)


# -- mixtures -------------------------------------------------------------------------------------------


def memory(work: Quickstart) -> Method:
    """Base and memory, mixed at the lambda and temperature that were best on the validation articles."""
    from models import MLPMemory

    learned = work.models.open_memory_of(work.base, work.memory)
    joint = MLPMemory(work.base, learned, work.joint["lmbda"], work.joint["knn_temp"], work.layer_position).eval()
    millions = sum(weight.numel() for weight in learned.parameters()) / 1e6
    return Method(
        work.base,
        on=lambda: contextlib.nullcontext(joint),
        bytes=bytes_of(path for path in work.memory.iterdir() if path.suffix in (".safetensors", ".json")),
        note=f"{millions:.1f}M parameters, {work.training['num_train_epochs']} epochs, {chosen(work.joint)}.",
    )


def chosen(row: dict[str, Any]) -> str:
    return f"lambda {row['lmbda']:g} and temperature {row['knn_temp']:g} chosen on the validation articles"


def knnlm(work: Quickstart) -> Method:
    """The kNN-LM over the trained positions, at its own best lambda and temperature."""
    from knn_utils.knn_lm import KNNLM

    stores = sorted((work.folder / "dstore").glob("dstore_*_train_*.arrow"))
    if not stores:
        raise InputError(f"--work {work.folder}: dstore holds no datastore of the train split")
    index = work.folder / "dstore" / "train.index"
    near = KNNLM(index, stores[0], **work.knnlm, layer_position=work.layer_position)

    @contextlib.contextmanager
    def on() -> Iterator[Any]:
        with near.on(work.base):
            yield work.base

    return Method(
        work.base,
        on=on,
        # To answer it needs the index, which holds the keys, and the values; not the datastore.
        bytes=bytes_of(index.rglob("*") if index.is_dir() else [index]) + 4 * len(near.values),
        note=f"k {near.k}, {work.knnlm['probe']} lists probed, {chosen(work.knnlm)}; on disk the index and the values.",
    )


# -- retrieval-augmented generation ---------------------------------------------------------------------


def rag(work: Quickstart, name: str, record: dict[str, Any]) -> Method:
    """Trained articles put before the text; how many is chosen on validation windows, as lambda is for the mixtures."""
    flags, articles = work.flags, work.articles
    if name == "rag_bm25":
        search, on_disk = bm25_search(articles, work.output / "work" / "bm25")
    else:
        encoder = Path(flags.encoder) if flags.encoder else fetch_encoder(work.output / "work" / "encoder")
        search, on_disk = dense_search(articles, encoder, work.output / "work" / "dense")

    def using(count: int) -> Method:
        before = passages(search, articles, work.tokenizer, count, flags.passage_tokens)
        return Method(work.base, passages=before, bytes=on_disk + sum(len(text.encode()) for text in articles))

    tried = record.get("settings", {}).get("validation", {})
    if len(flags.rag_passages) > 1 and not tried:
        windows = work.windows("validation")
        windows = windows.select(range(min(flags.choose_windows, len(windows))))
        for count in flags.rag_passages:
            found = score_windows(using(count), windows, work.tokenizer, flags.rag_chunk, flags.rag_query)
            tried[str(count)] = found["perplexity"]
            say(f"{TITLES[name]}: {count} article(s), validation perplexity {found['perplexity']:.4f}")
    best = int(min(tried, key=tried.get)) if tried else flags.rag_passages[0]
    told = ", ".join(f"{count}: {value:.2f}" for count, value in tried.items())
    method = using(best)
    method.settings = {"passages": best, "validation": tried}
    method.note = (
        f"{best} of {len(articles)} trained articles (at most {flags.passage_tokens} tokens each) before the text"
        + (f", chosen on validation windows (perplexity with {told})" if tried else "")
        + f". A window is scored in chunks of {flags.rag_chunk} tokens: the query is the {flags.rag_query} tokens before "
        "the chunk, the input is the articles, then the window up to the chunk; the first chunk of a window has no query "
        "and no article. For facts and speed the query is the prompt. On disk the articles"
        + (" and the index." if name == "rag_bm25" else ", their vectors and the encoder.")
    )
    return method


# -- LoRA -----------------------------------------------------------------------------------------------


def lora(work: Quickstart) -> Method:
    """LoRA (Hu et al., 2021): low-rank matrices on every linear layer but the head, merged into the base's weights.

    Trained by `utils.finetune` on the memory's windows, epochs and windows a step. The validation loss is measured four
    times along the way, and the adapter with the lowest one is kept. An interrupted training continues.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise InputError("--methods lora: needs the package peft; pip install 'peft>=0.14'") from None
    from transformers import TrainingArguments

    from utils.finetune import RECORD, finetune

    flags, training = work.flags, work.training
    rank, at_once = flags.lora_rank, training["windows_per_step"]
    epochs = flags.lora_epochs or training["num_train_epochs"]
    identity = [training, rank, flags.lora_learning_rate, flags.lora_epochs]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    folder = work.output / "work" / f"lora-{digest}"
    steps = math.ceil(len(work.windows("train")) / at_once) * epochs
    every = max(math.ceil(steps / LORA_EVALUATIONS), 1)  # and once more at the end
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=flags.lora_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(training["num_warmup_steps"], steps // 2),
        num_train_epochs=epochs,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        weight_decay=0.0,
        seed=training["seed"],
        bf16=work.dtype == "bfloat16",
        **{"eval_strategy": "steps", "eval_steps": every, "save_steps": every, "logging_steps": every},
        **{"save_total_limit": 2, "report_to": "none", "disable_tqdm": True},
    )
    # More patience than there are evaluations: none ends the training early.
    data = SimpleNamespace(
        **{"dataset_name": str(work.folder / "windows"), "eval_subset": "validation", "max_train_samples": None},
        **{"max_eval_samples": None, "patience": LORA_EVALUATIONS + 2},
    )
    base = work.models.open_base(work.tokenizer, dtype=torch.float32)
    torch.manual_seed(training["seed"])
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries' about each other
        model = get_peft_model(base, config)
        finetune(model, None, data, arguments)
    record = read_json(folder / RECORD)
    losses = [[entry["step"], entry["eval_loss"]] for entry in record["log"] if "eval_loss" in entry]
    kept = (record["best"] or {}).get("step")
    millions = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / 1e6
    return Method(
        PeftModel.from_pretrained(work.models.open_base(work.tokenizer), str(folder)).merge_and_unload().eval(),
        bytes=bytes_of(folder.glob("adapter_*")),
        note=f"rank {rank}, alpha {2 * rank}, on all linear layers but the head ({millions:.1f}M parameters), learning rate "
        f"{flags.lora_learning_rate:g} (not tuned), linear decay, epochs of the memory's windows: {epochs}, {at_once} "
        f"windows a step; of {len(losses)} states the one with the lowest validation loss was kept (step {kept} of "
        f"{record['steps']}); merged into the base's weights.",
        settings={"kept": kept, "validation": losses},
    )
