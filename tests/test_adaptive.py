"""Lambda by the distance of the nearest neighbour (Drozdov et al. 2022), and the flag that asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import command, refused_here, together
from hypothesis import given
from hypothesis import strategies as st

from knn_utils import adaptive
from knn_utils.adaptive import Buckets, choose_buckets
from utils.cli import parse
from utils.errors import InputError
from utils.results import ADAPTIVE, ScoreArguments, check_grid


@pytest.mark.unit
def test_a_lambda_is_a_number_or_the_word_adaptive():
    (given,) = parse(ScoreArguments, description="", arguments=["--lmbda", "0.25", "adaptive", "1"])
    assert given.lmbda == [0.25, ADAPTIVE, 1.0] and type(given.lmbda[0]) is float
    check_grid(given.lmbda, [1.0])
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(InputError, match="--lmbda"):
            check_grid([ADAPTIVE, bad], [1.0])


@pytest.mark.unit
def test_another_word_is_refused_with_what_was_expected(capsys):
    with pytest.raises(SystemExit):
        parse(ScoreArguments, description="", arguments=["--lmbda", "adaptiv"])
    assert capsys.readouterr().err == (
        "error: argument --lmbda: 'adaptiv': expected a number from 0 to 1, or adaptive; see --help\n"
    )


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
def test_each_of_32_equally_filled_buckets_gets_the_lambda_that_makes_its_rows_most_likely():
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
    mixed = perplexity(base, knn[:, column], found.of(distance))
    assert mixed == pytest.approx(np.exp(-totals[column] / 3200), rel=1e-6)
    assert found.lmbda[0] > 0.3 > 0.1 > found.lmbda[-1]


@pytest.mark.unit
@given(
    st.lists(
        st.tuples(
            st.floats(-60, 0),
            st.floats(0, 1),
            st.one_of(st.sampled_from([0.0, 1.0, np.inf]), st.floats(0, 100, width=32)),
        ),
        min_size=1,
        max_size=120,
    ),
    st.sampled_from([1, 7, 100]),
)
def test_on_the_rows_it_was_chosen_on_it_is_never_worse_than_one_lambda(rows, least_rows):
    base, knn, distance = (np.array(column) for column in zip(*rows, strict=True))
    knn[np.isinf(distance)] = 0  # no hit, no probability
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "LEAST_ROWS", least_rows)
        found = choose_buckets(base, knn[:, None], distance, [1.0])
    assert (
        1 <= len(found.lmbda) == len(found.edges) + 1 <= max(min(32, len(rows) // least_rows), 1)
        and (np.diff(found.edges) > 0).all()
    )
    assert ((found.lmbda >= 0) & (found.lmbda <= 0.99)).all()
    mixed = perplexity(base, knn, found.of(distance))
    assert all(mixed <= perplexity(base, knn, each) * (1 + 1e-9) for each in np.linspace(0, 0.99, 34))


@pytest.mark.unit
def test_where_nothing_was_found_the_base_answers_alone():
    buckets = Buckets(np.array([1.0, 4.0]), np.array([0.8, 0.3, 0.1]), 2.0)
    assert buckets.of(np.array([0.0, 1.0, 1.5, 4.0, 9.0, np.inf])).tolist() == [0.8, 0.8, 0.3, 0.3, 0.1, 0.0]


class Held:
    """Validation and test text that the indexed text does not hold, scored by the world's base."""

    def __init__(self, world, folder: Path) -> None:
        from harness import GOLDEN

        lines = json.loads((GOLDEN / "preprocess" / "expected.json").read_text())["text"]
        (folder / "text").mkdir()
        for name, share in (("train", lines[:500]), ("validation", lines[500:620]), ("test", lines[620:740])):
            (folder / "text" / f"{name}.txt").write_text("".join(share))
        self.world, self.windows = world, folder / "windows"
        command(
            "utils.preprocess_dataset",
            *("--dataset_name", folder / "text", "--tokenizer_path", world.base, "--output_dir", self.windows),
            *("--block_size", 64, "--stride", 64),
        )
        self.dstore = {}
        for split in ("validation", "test"):
            command(
                "train_base",
                *("--model_name_or_path", world.base, "--dataset_name", self.windows, "--do_eval"),
                *("--eval_subset", split, "--save_knnlm_dstore", "--save_logprob", "--dstore_dir", folder / "dstore"),
                *("--output_dir", folder / "tmp", "--report_to", "none"),
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
    both, alone = tmp_path / "both", tmp_path / "alone"
    command("train_base", *held.flags("test", both, "--choose_on", validated))
    command("train_base", *held.flags("test", alone, "--choose_on", validated, "--lmbda", "adaptive"))
    for split, results in (("validation", chosen), ("test", read(both)), ("test", read(alone))):
        found = results["adaptive"]
        assert {name: found[name] for name in ("edges", "lmbda", "knn_temp")} == {
            name: chosen["adaptive"][name] for name in ("edges", "lmbda", "knn_temp")
        }
        base, knn, nearest = held.scores(split, found["knn_temp"])
        assert found["perplexity"] == pytest.approx(perplexity(base, knn, of(found).of(nearest)), rel=2e-3)
    number, varying = read(both), read(alone)
    assert (number["lmbda"], number["knn_temp"], len(number["grid"])) == (chosen["lmbda"], chosen["knn_temp"], 1)
    assert (varying["lmbda"], varying["grid"]) == ("adaptive", [])
    assert varying["perplexity"] == varying["adaptive"]["perplexity"] == number["adaptive"]["perplexity"]


def test_two_processes_choose_the_same(held, validated, tmp_path):
    flags = held.flags("validation", tmp_path / "out", "--lmbda", "adaptive", "--knn_temp", 1, 4, 16)
    for process in together(tmp_path / "log", 2, "train_base", *flags):
        process.done()
    found, expected = read(tmp_path / "out")["adaptive"], read(validated)["adaptive"]
    np.testing.assert_allclose(found["lmbda"], expected["lmbda"], atol=1e-9)
    assert found["edges"] == expected["edges"] and found["perplexity"] == pytest.approx(expected["perplexity"])


def test_the_wrapper_takes_lambda_by_distance_as_well(held, validated):
    import torch
    from transformers import AutoModelForCausalLM

    from knn_utils.datastore import Datastore
    from knn_utils.knn_lm import KNNLM
    from utils.loading import load_windows

    buckets = Buckets.read(validated)
    model = AutoModelForCausalLM.from_pretrained(held.world.base).eval()
    ids = torch.tensor(load_windows(held.windows, "test")[0]["input_ids"])[None]
    near = KNNLM(held.world.index, held.world.dstore("train"), k=16, probe=1, lmbda=buckets, knn_temp=buckets.knn_temp)
    with torch.no_grad(), near.on(model):
        mixed = model(ids).logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].double()
    base, knn, nearest = (each[:63] for each in held.scores("test", buckets.knn_temp))
    expected = np.log((1 - buckets.of(nearest)) * np.exp(base) + buckets.of(nearest) * knn)
    assert len(Datastore.open(held.dstore["test"])) > 63
    np.testing.assert_allclose(mixed.numpy(), expected, atol=5e-3)


class TestRefused:
    def test_the_tested_split_without_a_choice_on_validation(self, held, tmp_path):
        text = refused_here("train_base", *held.flags("test", tmp_path, "--lmbda", "adaptive"))
        assert "--lmbda adaptive" in text and "--eval_subset validation" in text and "--choose_on" in text

    def test_a_choice_on_the_split_that_is_scored(self, held, validated, tmp_path):
        more = ("--lmbda", "adaptive", "--choose_on", validated)
        text = refused_here("train_base", *held.flags("validation", tmp_path, *more))
        assert "--choose_on" in text and "split validation" in text

    def test_validation_text_that_is_indexed(self, llama_world, tmp_path):
        text = refused_here(
            "train_base",
            *("--dataset_name", llama_world.windows, "--do_eval", "--knn", "--eval_subset", "validation", "--k", 16),
            *("--dstore_path", llama_world.dstore("validation"), "--val_file", llama_world.dstore("train")),
            *("--index_file", llama_world.index, "--lmbda", "adaptive", "--output_dir", tmp_path),
        )
        assert "--lmbda adaptive" in text and "split validation" in text and str(llama_world.windows) in text
        assert not (tmp_path / "results.json").exists()

    def test_results_without_buckets_or_with_damaged_ones(self, held, validated, tmp_path):
        results = read(validated)
        found = results.pop("adaptive")
        for changed in ({}, {"adaptive": found | {"lmbda": [0.5]}}, {"adaptive": found | {"edges": "x"}}):
            (tmp_path / "other.json").write_text(json.dumps(results | changed))
            more = ("--lmbda", "adaptive", "--choose_on", tmp_path / "other.json")
            text = refused_here("train_base", *held.flags("test", tmp_path, *more))
            assert str(tmp_path / "other.json") in text and "--lmbda adaptive" in text

    def test_buckets_of_another_index(self, held, validated, tmp_path):
        index = ("--dstore_path", held.world.dstore("train"), "--index_path", tmp_path / "other.index")
        command("knn_utils.build_index", *index, "--index_factory", "IVF4,Flat")
        more = ("--choose_on", validated, "--index_file", tmp_path / "other.index")
        text = refused_here("train_base", *held.flags("test", tmp_path, *more))
        assert str(validated) in text and "index" in text

    def test_a_split_without_a_token(self, held, tmp_path):
        import datasets

        empty = datasets.load_from_disk(str(held.windows))["validation"].select([0])
        empty = empty.map(lambda row: {"labels": [-100] * 64, "dstore_range": [0, 0]})
        datasets.DatasetDict({"validation": empty}).save_to_disk(str(tmp_path / "empty"))
        text = refused_here(
            "train_base",
            *("--model_name_or_path", held.world.base, "--dataset_name", tmp_path / "empty", "--do_eval", "--knn"),
            *("--val_file", held.world.dstore("train"), "--index_file", held.world.index, "--k", 16),
            *("--lmbda", "adaptive", "--output_dir", tmp_path / "out"),
        )
        assert "holds no token to predict" in text
