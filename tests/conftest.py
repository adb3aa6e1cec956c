"""Shared small world: tiny base models of three families, a tokenizer, text, and every stage's files made from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples at every run.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread: tiny tensors gain nothing by more, and a child of a process whose OpenMP threads have run would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = GOLDEN / "preprocess" / "tokenizer"
FAMILIES = ("gpt2", "llama", "mistral")


def run(*arguments: object, check: bool = True, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python …` in a process of its own. With `check`, a failure shows the process's output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def command(module: str, *arguments: object) -> None:
    """Run a command's `main` in this process, as its command line would."""
    import importlib

    before = sys.argv
    sys.argv = [module, *map(str, arguments)]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before


def refused(*arguments: object, **environment: str) -> str:
    """Run `python …`, expect bad input: exit status 2, one line on stderr, no traceback. Returns the line."""
    done = run(*arguments, check=False, **environment)
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def refused_here(module: str, *arguments: object) -> str:
    """Like `refused`, in this process: the text of the InputError that `main` raises."""
    from utils.errors import InputError

    with pytest.raises(InputError) as caught:
        command(module, *arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def make_base(
    family: str,
    folder: Path,
    *,
    hidden: int = 32,
    vocabulary: int = 276,
    layers: int = 2,
    positions: int = 128,
    seed: int = 0,
) -> Path:
    """A tiny random base model of `family` with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": positions}
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": positions}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def make_text(path: Path, *, lines: int = 600) -> Path:
    """The golden text's lines as a .txt file."""
    text = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"][:lines]
    path.write_text("".join(text))
    return path


class World:
    """A family's files of every stage."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.base = make_base(family, folder / "base")
        self.windows = folder / "windows"
        splits = folder / "text"
        splits.mkdir()
        for name, count in (("train", 500), ("validation", 120), ("test", 110)):
            make_text(splits / f"{name}.txt", lines=count)
        command(
            "utils.preprocess_dataset",
            *("--dataset_name", splits, "--tokenizer_path", self.base, "--output_dir", self.windows),
            *("--block_size", 64, "--stride", 32),
        )
        self.dstore_dir = folder / "dstore"
        for split in ("train", "validation", "test"):
            command(
                "train_base",
                *("--model_name_or_path", self.base, "--dataset_name", self.windows, "--do_eval"),
                *("--eval_subset", split, "--save_knnlm_dstore", "--dstore_dir", self.dstore_dir),
                *("--output_dir", folder / "tmp", "--report_to", "none"),
                *(() if split == "train" else ("--save_logprob",)),
            )
        self.index = folder / "train.index"
        command(
            "knn_utils.build_index",
            *("--dstore_path", self.dstore("train"), "--index_path", self.index, "--index_factory", "Flat"),
        )
        self.targets = folder / "targets"
        command(
            "knn_utils.saveKNNMulti",
            *("--dstore_path", self.dstore("train"), "--index_path", self.index, "--output_path", self.targets),
            *("--k", 16, "--knn_temp", 4, "--ignore_first", "True", "--batch_size", 256),
        )

    def dstore(self, split: str) -> Path:
        return self.dstore_dir / f"dstore_{self.family}_{split}_32.arrow"

    def trainer(self, output: Path, *more: object) -> list[object]:
        """Flags of either trainer for this world."""
        return [
            *("--model_name_or_path", self.base, "--dataset_name", self.windows, "--knn_save_path", self.targets),
            *("--output_dir", output, "--memory_layers", 2, "--num_train_epochs", 1, "--seed", 3),
            *("--per_device_train_batch_size", 16, "--mixed_precision", "no", "--logging_steps", 1, *more),
        ]


@pytest.fixture(scope="session", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World("llama", tmp_path_factory.mktemp("llama_world"))
