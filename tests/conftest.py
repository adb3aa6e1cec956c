"""Shared small world: tiny base models of three families, a tokenizer, text, and every stage's files made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import FAMILIES, GOLDEN, command
from hypothesis import settings
from tiny_models import make_base

# The same examples at every run.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


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
