"""A growing corpus: windows of new documents after the old ones, and a datastore that gets them as further parts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import datasets
import numpy as np
import pytest
from harness import GOLDEN, command, refused_here

from knn_utils.datastore import Datastore
from knn_utils.manifest import read_manifest
from knn_utils.saveEmbedMulti import plan_windows, windows_of

LINES = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
SIZES = ("--block_size", 64, "--stride", 32)


def preprocess(world, text, output, *more):
    command(
        "utils.preprocess_dataset",
        *("--dataset_name", text, "--tokenizer_path", world.base, "--output_dir", output, *SIZES, *more),
    )


@pytest.fixture(scope="module")
def corpus(llama_world, tmp_path_factory):
    """Windows of a first text, of a second one, and of the first followed by the second."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, lines in (("first", LINES[:150]), ("second", LINES[150:210])):
        (folder / name).mkdir()
        (folder / name / "train.txt").write_text("".join(lines))
    preprocess(llama_world, folder / "first", folder / "old")
    preprocess(llama_world, folder / "second", folder / "new")
    preprocess(llama_world, folder / "second", folder / "both", "--append_to", folder / "old")
    return folder


def embed(world, windows, folder, *more):
    command(
        "train_base",
        *("--model_name_or_path", world.base, "--dataset_name", windows, "--do_eval", "--eval_subset", "train"),
        *("--save_knnlm_dstore", "--dstore_dir", folder, "--output_dir", folder / "tmp", *more),
        *("--per_device_eval_batch_size", 2),
    )
    return folder / "dstore_llama_train_32.arrow"


def parts(store):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.glob("part-*.arrow"))}


def test_appended_windows_follow_the_old_ones_and_number_their_rows_on(corpus):
    old, new, both = (datasets.load_from_disk(str(corpus / name))["train"] for name in ("old", "new", "both"))
    assert len(both) == len(old) + len(new)
    for column in ("input_ids", "labels", "attention_mask"):
        assert both[column][:] == old[column][:] + new[column][:]
    ranges = np.array(both["dstore_range"][:])
    assert (ranges[1:, 0] == ranges[:-1, 1]).all() and ranges[0, 0] == 0
    summary = json.loads((corpus / "both" / "dstore_summary.json").read_text())
    assert summary == {"train": {"dstore_size": int(ranges[-1, 1]), "dataset_cnt_len": len(both)}}
    record = json.loads((corpus / "both" / "preprocess.json").read_text())
    assert record["splits"]["train"]["windows"] == len(both)


def test_appending_again_finds_the_windows_there(llama_world, corpus, capsys):
    preprocess(llama_world, corpus / "second", corpus / "both", "--append_to", corpus / "old")
    assert "there already" in capsys.readouterr().out


def test_an_older_record_does_not_say_what_was_not_to_choose_then(llama_world, corpus, tmp_path, capsys):
    older = shutil.copytree(corpus / "old", tmp_path / "older")
    record = json.loads((older / "preprocess.json").read_text())
    del record["settings"]["group_rows"], record["settings"]["window_bos"], record["vocabulary_sha256"]
    del record["splits"]["train"]["tokens_of_text"], record["splits"]["train"]["tokens_left_out"]
    (older / "preprocess.json").write_text(json.dumps(record))
    preprocess(llama_world, corpus / "first", older)
    assert "there already" in capsys.readouterr().out
    preprocess(llama_world, corpus / "second", tmp_path / "both", "--append_to", older)
    added, both = capsys.readouterr().out.splitlines()
    assert re.match(r"train, added: 1 documents, [0-9]+ rows, [0-9]+ tokens of text, [0-9]+ tokens left out", added)
    assert both.startswith("train: 2 documents, ") and "left out" not in both
    both = (datasets.load_from_disk(str(folder / "both"))["train"][:] for folder in (tmp_path, corpus))
    assert next(both) == next(both)


def test_a_grown_datastore_keeps_its_parts_and_tells_its_history(llama_world, corpus, tmp_path):
    store = embed(llama_world, corpus / "old", tmp_path / "dstore")
    before, rows = parts(store), Datastore.open(store).rows
    embed(llama_world, corpus / "both", tmp_path / "dstore", "--extend")
    after = parts(store)
    assert before.items() <= after.items() and len(after) > len(before)
    grown = Datastore.open(store, verify=True)
    anew = Datastore.open(embed(llama_world, corpus / "both", tmp_path / "anew"))
    assert grown.rows == anew.rows > rows
    assert np.array_equal(grown.vals(), anew.vals())
    assert np.allclose(grown.keys(), anew.keys(), rtol=2e-3, atol=1e-6)
    manifest = read_manifest(store, "datastore")
    assert [(step["rows_before"], step["rows_after"]) for step in manifest["history"]] == [(rows, grown.rows)]
    # The same command again, with or without --extend, finds it complete.
    for more in ((), ("--extend",)):
        embed(llama_world, corpus / "both", tmp_path / "dstore", *more)
        assert parts(store) == after
    assert read_manifest(store, "datastore")["history"] == manifest["history"]


def test_growing_is_asked_for_and_needs_the_same_first_windows(llama_world, corpus, tmp_path):
    store = embed(llama_world, corpus / "old", tmp_path / "dstore")
    before = parts(store)
    other = tmp_path / "other"
    preprocess(llama_world, corpus / "first", other, "--append_to", corpus / "new")
    flags = (
        *("--model_name_or_path", llama_world.base, "--do_eval", "--eval_subset", "train", "--save_knnlm_dstore"),
        *("--dstore_dir", tmp_path / "dstore", "--output_dir", tmp_path / "tmp", "--per_device_eval_batch_size", 2),
    )
    assert "--overwrite" in refused_here("train_base", "--dataset_name", corpus / "both", *flags)
    for windows in (other, corpus / "new"):
        text = refused_here("train_base", "--dataset_name", windows, *flags, "--extend")
        assert text.startswith("--extend") and str(store) in text
    assert parts(store) == before


def test_windows_that_are_cut_otherwise_cannot_follow(llama_world, corpus, tmp_path, capsys):
    for size in ("--block_size", "--stride"):
        flags = dict(zip(SIZES[::2], SIZES[1::2], strict=True)) | {size: 16 if size == "--stride" else 128}
        with pytest.raises(SystemExit):
            command(
                "utils.preprocess_dataset",
                *("--dataset_name", corpus / "second", "--tokenizer_path", llama_world.base),
                *("--output_dir", tmp_path / "out", "--append_to", corpus / "old"),
                *(item for pair in flags.items() for item in pair),
            )
        text = capsys.readouterr().err
        assert "--append_to" in text and size[2:] in text


def test_parts_without_a_row_join_their_neighbours():
    counts = np.array([0, 3, 3, 0, 0, 2, 0])
    plan = plan_windows(counts, 4, 1)
    assert plan == [3, 3, 2] and windows_of(plan, counts) == [(1, 2), (2, 3), (5, 6)]
