"""Files that do not belong together are refused by the command that reads them; published layouts are read by it."""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pytest
from conftest import command, make_base, refused_here

from knn_utils.datastore import Datastore, KNNTargets, TargetRows, targets_batch
from knn_utils.parts import write_single_file


@pytest.fixture(scope="module")
def memory(llama_world, tmp_path_factory):
    """A memory of one step for the small Llama."""
    output = tmp_path_factory.mktemp("belonging")
    more = ("--knn_dstore_path", llama_world.dstore("train"), "--validation_split_name", "none")
    command("train_mlpmem_offline", *llama_world.trainer(output, *more, "--max_train_steps", 1))
    return output / "epoch_1"


def joint(world, memory, output, **changes):
    flags = {"--model_name_or_path": world.base, "--knn_generator_path": memory, "--dataset_name": world.windows}
    flags |= {"--output_dir": output, "--max_eval_samples": 2}
    return [word for pair in (flags | changes).items() for word in pair]


def trainer(world, output, **changes):
    words = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none")
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return [word for pair in (flags | changes).items() for word in pair]


def copied(memory, folder):
    """A copy of the memory alone."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(memory / name, folder / name)
    return folder


def changed_ranges(world, folder, change):
    """The windows with `change` applied to their dstore_range, int64 (windows, 2)."""
    splits = datasets.load_from_disk(str(world.windows))
    ranges = np.array(splits["train"]["dstore_range"][:])
    change(ranges)
    train = splits["train"].remove_columns("dstore_range").add_column("dstore_range", ranges.tolist())
    datasets.DatasetDict({**splits, "train": train}).save_to_disk(str(folder))
    return folder


class TestRefused:
    @pytest.mark.parametrize("name", ["train_mlpmem_offline", "train_mlpmem_online"])
    def test_an_unknown_preset_lists_the_known_and_says_that_sizes_can_come_from_the_config(
        self, llama_world, tmp_path, name
    ):
        words = llama_world.trainer(tmp_path, "--base_model_name", "gpt5")
        text = refused_here(name, *words)
        assert text.startswith("--base_model_name gpt5")
        assert all(known in text for known in ("small", "med", "large", "llama2", "llama3", "mistral", "config"))

    @pytest.mark.parametrize(("sizes", "told"), [({"hidden": 48}, ["32", "48"]), ({"vocabulary": 300}, ["276", "300"])])
    def test_a_memory_of_another_width_or_vocabulary(self, llama_world, memory, tmp_path, sizes, told):
        base = make_base("llama", tmp_path / "base", **sizes)
        if "vocabulary" in sizes:
            for path in (*base.glob("tokenizer*"), *base.glob("special*")):
                path.unlink()
        changes = {"--model_name_or_path": base, "--tokenizer_name": base}
        text = refused_here("evaluate_joint", *joint(llama_world, memory, tmp_path, **changes))
        assert str(memory) in text and all(number in text for number in told)
        (tmp_path / "nq.jsonl").write_text('{"question": "zi kimoho", "answer": ["mo"]}\n')
        tokenizer = ("--tokenizer_name", llama_world.base) if "hidden" in sizes else ()
        asked = ("--model_name_or_path", base, "--dataset_name", tmp_path / "nq.jsonl", *tokenizer)
        joined = ("--use_neural_knn", "--knn_generator_path", memory, "--output_dir", tmp_path / "qa")
        if "hidden" in sizes:
            assert "48" in refused_here("downstream.eval_qa", *asked, *joined)

    def test_a_folder_with_several_memories_names_them(self, llama_world, memory, tmp_path):
        for epoch in (1, 2, 10):
            copied(memory, tmp_path / "run" / f"epoch_{epoch}")
        text = refused_here("evaluate_joint", *joint(llama_world, tmp_path / "run", tmp_path))
        assert "epoch_1, epoch_2, epoch_10" in text and "name one" in text

    @pytest.mark.parametrize("name", ["train_mlpmem_offline", "train_mlpmem_online"])
    def test_targets_of_another_dataset_with_as_many_rows(self, llama_world, tmp_path, name):
        found = KNNTargets.open(llama_world.targets)
        rows = found.read(0, found.rows)
        labels = np.array(rows.label)
        labels[40:] = (labels[40:] + 1) % 276
        batch = targets_batch(TargetRows(rows.id_cnt, rows.token_id, rows.prob, labels, None))
        write_single_file(tmp_path / "other", batch.schema, [batch])
        words = trainer(llama_world, tmp_path / "out", **{"--knn_save_path": tmp_path / "other"})
        if name == "train_mlpmem_online":
            at = words.index("--knn_dstore_path")
            words = [*words[:at], *words[at + 2 :]]
        text = refused_here(name, *words)
        assert str(tmp_path / "other") in text and "row 40" in text and "other windows" in text

    def test_a_dstore_range_that_leaves_the_datastore(self, llama_world, tmp_path):
        rows = Datastore.open(llama_world.dstore("train")).rows

        def longer(ranges):
            ranges[-1, 1] += 5

        windows = changed_ranges(llama_world, tmp_path / "windows", longer)
        text = refused_here("train_mlpmem_offline", *trainer(llama_world, tmp_path, **{"--dataset_name": windows}))
        assert f"dstore_range goes to {rows + 5}" in text and f"holds {rows} rows" in text

    def test_a_dstore_range_that_jumps(self, llama_world, tmp_path):
        def jump(ranges):
            ranges[2:] += 7

        windows = changed_ranges(llama_world, tmp_path / "windows", jump)
        text = refused_here("train_mlpmem_offline", *trainer(llama_world, tmp_path, **{"--dataset_name": windows}))
        assert text.startswith("--dataset_name: window 2") and "dstore_range" in text
