"""Lambda by the distance of the nearest neighbour (Drozdov et al. 2022), and the flag that asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import GOLDEN, command, refused_here, together

from evaluate_joint import JointArguments
from knn_utils.adaptive import Buckets, choose_buckets
from utils.cli import parse
from utils.errors import InputError
from utils.results import ADAPTIVE, check_lambda


@pytest.mark.unit
def test_a_lambda_is_a_number_or_the_word_adaptive(capsys):
    flags = ["--dataset_name", "w", "--knn_generator_path", "m", "--lmbda", "0.25", "adaptive", "1"]
    (given,) = parse(JointArguments, description="", arguments=flags)
    assert given.lmbda == [0.25, ADAPTIVE, 1.0] and type(given.lmbda[0]) is float
    given.check_scored()
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(InputError, match="--lmbda"):
            check_lambda("--lmbda", bad)
    with pytest.raises(SystemExit):
        parse(JointArguments, description="", arguments=[*flags[:-1], "adaptiv"])
    assert "--lmbda" in capsys.readouterr().err


def random_scores(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base log-probabilities (rows,), kNN probabilities (rows, 3) that are better at small distances, distances."""
    random = np.random.default_rng(seed)
    distance = random.gamma(2.0, 4.0, rows).astype(np.float32)
    base = -random.gamma(2.0, 2.0, rows)
    hit = random.random((rows, 3)) < np.exp(-distance / 10)[:, None]
    return base, np.where(hit, random.random((rows, 3)), 0.0), distance


def perplexity(base: np.ndarray, knn: np.ndarray, lmbda: np.ndarray | float) -> float:
    """The formula, for any rows: base log-probabilities, kNN probabilities and lambdas, (rows,) each."""
    return float(np.exp(-np.log((1 - lmbda) * np.exp(base) + lmbda * knn).mean()))


@pytest.mark.unit
def test_each_of_32_buckets_gets_its_most_likely_lambda():
    base, knn, distance = random_scores(3200)
    found = choose_buckets(base, knn, distance, [1.0, 2.0, 8.0])
    order = np.argsort(distance)
    tried = np.linspace(0, 0.99, 991)
    totals, best = np.zeros(3), np.zeros((3, 32))
    for bucket, rows in enumerate(np.split(order, 32)):
        for column in range(3):
            fits = [np.log((1 - each) * np.exp(base[rows]) + each * knn[rows, column]).sum() for each in tried]
            totals[column] += max(fits)
            best[column, bucket] = tried[int(np.argmax(fits))]
    column = int(np.argmax(totals))
    assert found.knn_temp == [1.0, 2.0, 8.0][column]
    np.testing.assert_allclose(found.lmbda, best[column], atol=1e-3)
    np.testing.assert_array_equal(found.edges, np.sort(distance)[99:-1:100])
    mixed = perplexity(base, knn[:, column], found.lambdas(distance))
    assert mixed == pytest.approx(np.exp(-totals[column] / 3200), rel=1e-6)
    assert found.lmbda[0] > 0.3 > 0.1 > found.lmbda[-1]
    assert found.lambdas(np.array([np.inf]))[0] == 0  # no hit: the base alone


class Held:
    """Validation and test text that is not in the indexed text, scored by the world's base."""

    def __init__(self, world, folder: Path) -> None:
        lines = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
        (folder / "text").mkdir()
        for name, share in (("train", lines[:500]), ("validation", lines[500:620]), ("test", lines[620:740])):
            (folder / "text" / f"{name}.txt").write_text("".join(share))
        self.world, self.windows, self.dstore = world, folder / "windows", {}
        command(
            "utils.preprocess_dataset",
            *("--dataset_name", folder / "text", "--tokenizer_path", world.base, "--output_dir", self.windows),
            *("--block_size", 64, "--stride", 64),
        )
        for split in ("validation", "test"):
            command(
                "train_base",
                *("--model_name_or_path", world.base, "--dataset_name", self.windows, "--output_dir", folder / "tmp"),
                *("--eval_subset", split, "--save_knnlm_dstore", "--save_logprob", "--dstore_dir", folder / "dstore"),
            )
            self.dstore[split] = folder / "dstore" / f"dstore_{world.family}_{split}_32.arrow"

    def flags(self, split: str, output: Path, *more: object) -> tuple:
        """Flags of train_base for the kNN-LM on a split."""
        return (
            *("--dataset_name", self.windows, "--do_eval", "--knn", "--eval_subset", split, "--k", 16),
            *("--dstore_path", self.dstore[split], "--val_file", self.world.dstore("train")),
            *("--index_file", self.world.index, "--output_dir", output, *more),
        )

    def scores(self, split: str, knn_temp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Base log-probability, kNN probability and nearest squared distance of each row, worked out in full."""
        from knn_utils.datastore import Datastore

        train, rows = Datastore.open(self.world.dstore("train")), Datastore.open(self.dstore[split])
        queries, keys = np.array(rows.keys(), np.float64), np.array(train.keys(), np.float64)
        squared = ((queries[:, None] - keys[None]) ** 2).sum(-1)
        nearest = np.argsort(squared, axis=1)[:, :16]
        distances = np.take_along_axis(squared, nearest, 1)
        weights = np.exp(-distances / knn_temp)
        weights /= weights.sum(1, keepdims=True)
        knn = (weights * (train.vals()[nearest] == rows.vals()[:, None])).sum(1)
        return rows.logprob().astype(np.float64), knn, distances[:, 0]


@pytest.fixture(scope="module")
def held(llama_world, tmp_path_factory) -> Held:
    return Held(llama_world, tmp_path_factory.mktemp("held"))


@pytest.fixture(scope="module")
def validated(held, tmp_path_factory) -> Path:
    """A results.json of the validation split, with the best number and the best buckets."""
    output = tmp_path_factory.mktemp("validated")
    grid = ("--lmbda", 0.02, 0.1, 0.3, "adaptive", "--knn_temp", 1, 4, 16)
    command("train_base", *held.flags("validation", output, *grid))
    return output / "results.json"


def read(path: Path) -> dict:
    return json.loads((path / "results.json" if path.is_dir() else path).read_text())


def of(found: dict) -> Buckets:
    return Buckets(np.array(found["edges"]), np.array(found["lmbda"]), found["knn_temp"])


def test_the_command_chooses_on_validation_and_reports_on_test(held, validated, tmp_path):
    chosen = read(validated)
    assert len(chosen["grid"]) == 9 and chosen["lmbda"] in (0.02, 0.1, 0.3)
    assert chosen["adaptive"]["perplexity"] < chosen["perplexity"] and len(chosen["adaptive"]["lmbda"]) > 1
    command("train_base", *held.flags("test", tmp_path, "--choose_on", validated))
    tested = read(tmp_path)
    for split, results in (("validation", chosen), ("test", tested)):
        found = results["adaptive"]
        assert all(found[name] == chosen["adaptive"][name] for name in ("edges", "lmbda", "knn_temp", "index"))
        base, knn, nearest = held.scores(split, found["knn_temp"])
        assert found["perplexity"] == pytest.approx(perplexity(base, knn, of(found).lambdas(nearest)), rel=2e-3)
    assert (tested["lmbda"], tested["knn_temp"], len(tested["grid"])) == (chosen["lmbda"], chosen["knn_temp"], 1)


def test_two_processes_choose_the_same(held, validated, tmp_path):
    flags = held.flags("validation", tmp_path / "out", "--lmbda", "adaptive", "--knn_temp", 1, 4, 16)
    for process in together(tmp_path / "log", 2, "train_base", *flags):
        process.done()
    results, expected = read(tmp_path / "out"), read(validated)["adaptive"]
    found = results["adaptive"]
    assert (results["lmbda"], results["grid"], results["perplexity"]) == ("adaptive", [], found["perplexity"])
    np.testing.assert_allclose(found["lmbda"], expected["lmbda"], atol=1e-9)
    assert found["edges"] == expected["edges"] and found["perplexity"] == pytest.approx(expected["perplexity"])


def test_text_that_lambda_must_not_be_chosen_on_is_refused(held, llama_world, tmp_path):
    assert "--lmbda" in refused_here("train_base", *held.flags("test", tmp_path, "--lmbda", "adaptive"))
    text = refused_here(
        "train_base",
        *("--dataset_name", llama_world.windows, "--do_eval", "--knn", "--eval_subset", "validation", "--k", 16),
        *("--dstore_path", llama_world.dstore("validation"), "--val_file", llama_world.dstore("train")),
        *("--index_file", llama_world.index, "--lmbda", "adaptive", "--output_dir", tmp_path),
    )
    assert str(llama_world.windows) in text and not (tmp_path / "results.json").exists()


def test_results_without_buckets_or_of_another_index_are_refused(held, validated, tmp_path):
    results = read(validated)
    del results["adaptive"]
    (tmp_path / "other.json").write_text(json.dumps(results))
    more = ("--lmbda", "adaptive", "--choose_on", tmp_path / "other.json")
    assert str(tmp_path / "other.json") in refused_here("train_base", *held.flags("test", tmp_path, *more))
    index = ("--dstore_path", held.world.dstore("train"), "--index_path", tmp_path / "other.index")
    command("knn_utils.build_index", *index, "--index_factory", "IVF4,Flat")
    more = ("--choose_on", validated, "--index_file", tmp_path / "other.index")
    assert str(validated) in refused_here("train_base", *held.flags("test", tmp_path, *more))


def test_a_split_without_a_token_is_refused(held, tmp_path):
    import datasets

    empty = datasets.load_from_disk(str(held.windows))["validation"].select([0])
    empty = empty.map(lambda row: {"labels": [-100] * 64, "dstore_range": [0, 0]})
    datasets.DatasetDict({"validation": empty}).save_to_disk(str(tmp_path / "empty"))
    flags = ("--model_name_or_path", held.world.base, "--dataset_name", tmp_path / "empty", "--do_eval")
    assert str(tmp_path / "empty") in refused_here("train_base", *flags, "--output_dir", tmp_path / "out")
