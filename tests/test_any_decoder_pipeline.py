"""Every stage, text to perplexity and generated tokens, for decoder families without a stack class of their own."""

import json
from pathlib import Path

import pytest
import torch
from harness import GOLDEN, TOKENIZER, command
from tiny_models import tiny_base
from transformers import AutoTokenizer

from models import MLPMemory

FAMILIES = ["qwen3", "gemma2", "olmo2", "phi3", "smollm3", "gpt_neox"]
WORDS = 276


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Path:
    """Windows for all families: their tokenizer is the same."""
    folder = tmp_path_factory.mktemp("windows")
    lines = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text("".join(lines[:150]))
    (folder / "text" / "test.txt").write_text("".join(lines[150:200]))
    command(
        "utils.preprocess_dataset",
        *("--dataset_name", folder / "text", "--tokenizer_path", TOKENIZER, "--output_dir", folder / "windows"),
        *("--block_size", 32, "--stride", 32),
    )
    return folder / "windows"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_stage(family, windows, tmp_path):
    base, dstore_dir, targets = tmp_path / "base", tmp_path / "dstore", tmp_path / "targets"
    tiny_base(family, vocab_size=WORDS).save_pretrained(base)
    # Saved under the base's name a tokenizer may be taken for the family's own kind; this one is no family's.
    data = ("--model_name_or_path", base, "--tokenizer_name", TOKENIZER, "--dataset_name", windows)
    command(
        "train_base",
        *(*data, "--do_eval", "--eval_subset", "train", "--save_knnlm_dstore", "--dstore_dir", dstore_dir),
        *("--output_dir", tmp_path / "tmp", "--report_to", "none"),
    )
    (datastore,) = dstore_dir.glob("dstore_*_train_32.arrow")
    index = tmp_path / "train.index"
    command("knn_utils.build_index", "--dstore_path", datastore, "--index_path", index, "--index_factory", "Flat")
    command(
        "knn_utils.saveKNNMulti",
        *("--dstore_path", datastore, "--index_path", index, "--output_path", targets),
        *("--k", 16, "--knn_temp", 4, "--ignore_first", "True"),
    )
    command(
        "train_mlpmem_offline",
        *("--model_name_or_path", base, "--dataset_name", windows, "--knn_save_path", targets),
        *("--knn_dstore_path", datastore, "--output_dir", tmp_path / "memory", "--memory_layers", 2),
        *("--num_train_epochs", 1, "--per_device_train_batch_size", 16, "--mixed_precision", "no", "--seed", 3),
    )
    command(
        "evaluate_joint",
        *("--do_test", "--model_name_or_path", base, "--dataset_name", windows, "--dataset_split_name", "test"),
        *("--knn_generator_path", tmp_path / "memory", "--output_dir", tmp_path / "results", "--report_to", "none"),
    )
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert 1 < results["perplexity"] < 100 * WORDS
    joint = MLPMemory.from_pretrained(base, tmp_path / "memory", dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(TOKENIZER)("zi kimoho ke", return_tensors="pt").input_ids
    assert joint.generate(prompt, max_new_tokens=3, eos_token_id=None, pad_token_id=0).shape == (1, prompt.shape[1] + 3)
