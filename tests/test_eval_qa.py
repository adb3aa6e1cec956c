"""Facts about question answering: prompts, batched scoring and generation, files read and written, bad input."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from harness import ROOT, command, refused, refused_here, run
from tiny_models import byte_tokenizer, plain_greedy, plain_log_probs, qa_base, save_models, tiny_base, tiny_memory

from downstream.scoring import Encoded, Evaluator, cut
from downstream.tasks import TASKS, Prompt
from models import MLPMemory
from utils.legacy import FolderLock

NQ = [
    {"question": "who wrote it", "answer": ["James", "the first"]},
    {"question": "Where is the moon?", "answer": ["there"]},
    {"question": "what season is it", "answer": [")"]},
    {"question": "which is the right answer of all the answers here", "answer": ["it"]},
    {"question": "Is it", "answer": ["no"]},
]
TRUTH = [
    ("Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
    ("Where is it?", "It is there", "It is there; It is not here.; there", "Here; It is the first, of course"),
    ("Who wrote it?", "No one did", "James", "the answer is here"),
]
HALU = [
    {"question": "Which is it? ", "right_answer": "James", "hallucinated_answer": "the right answer is no"},
    {"question": "Where is it?", "right_answer": "not here, but there", "hallucinated_answer": "here"},
    {"question": "Who?", "right_answer": "the first", "hallucinated_answer": "the first one of all"},
]
DEMONSTRATIONS = (
    "Answer these questions.\n\nQ: Where is the moon?\nA: The moon is there.\n\nQ: Who wrote it?\nA: James.\n\n"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    save_models(folder)
    write_jsonl(folder / "nq.jsonl", NQ)
    write_jsonl(folder / "halu.jsonl", HALU)
    with open(folder / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows(TRUTH)
    (folder / "demonstrations.txt").write_text(DEMONSTRATIONS)
    (folder / "instruction.txt").write_text("I want the right answer.\nThe answer is Yes or No.")
    return folder


def ask(world, output, *flags):
    """Run the command; returns (results, prediction lines)."""
    command("downstream.eval_qa", "--model_name_or_path", world / "base", "--output_dir", output, *flags)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return json.loads((output / "results.json").read_text()), lines


def joint_flags(world, lmbda=0.5):
    return "--use_neural_knn", "--knn_generator_path", world / "memory", "--lmbda", lmbda


TRUTH_FLAGS = ("--task", "truthfulqa", "--dataset_name")


# Prompts


def prompts(task, row, text=""):
    columns = TASKS[task].columns
    return TASKS[task].prompts({role: column.read(row[role]) for role, column in columns.items()}, text)


@pytest.mark.parametrize(
    ("task", "question", "expected"),
    [
        ("nq", "Who wrote it", "Answer these questions:\nQuestion: who wrote it?\nAnswer:"),
        ("hotpotqa", " who wrote it? ", "Answer these questions:\nQuestion: who wrote it?\nAnswer:"),
        ("webqa", "who wrote it?", "Answer the questions:\n\nQuestion: who wrote it?? The answer is:"),
        ("triviaqa", "Who wrote it", "Answer the questions:\n\nQuestion: Who wrote it? The answer is:"),
    ],
)
@pytest.mark.unit
def test_a_question_stands_in_the_prompt_of_its_benchmark(task, question, expected):
    assert prompts(task, {"question": question, "answers": {"value": "James"}}) == [Prompt(expected)]


@pytest.mark.unit
def test_truthfulqa_answers_are_closed_with_a_period_and_follow_the_demonstrations():
    row = {"question": "Is it?", "best": "No", "true": "No; It is not.;", "false": ["Yes", " Of course "]}
    (prompt,) = prompts("truthfulqa", row, "Rules.\n\nQ: A?\nA: B.")
    assert prompt.text == "Rules.\n\nQ: A?\nA: B.\n\nQ: Is it?\nA:"
    assert prompt.continuations == (" No.", " It is not.", " Yes.", " Of course.")


@pytest.mark.unit
def test_halueval_prompts_follow_the_instruction():
    row = {"question": "Which?", "right": "this", "hallucinated": "that"}
    (choice,) = prompts("halueval", row, "Judge.")
    assert choice == Prompt("Judge.\n\n#Question#: Which?\n#Answer#:", (" this", " that"))
    right, hallucinated = prompts("halueval_judge", row, "Judge.")
    assert right.text == "Judge.\n\n#Question#: Which?\n#Answer#: this\n#Your Judgement#:"
    assert hallucinated.text == "Judge.\n\n#Question#: Which?\n#Answer#: that\n#Your Judgement#:"


@pytest.mark.unit
def test_a_generated_text_is_cut_at_the_benchmarks_stop_characters():
    assert (TASKS["nq"].max_new_tokens, TASKS["nq"].stop) == (15, "\n")
    assert (TASKS["webqa"].max_new_tokens, set(TASKS["webqa"].stop)) == (100, {"\n", ".", ","})
    assert [cut(" one. two\nthree", stop) for stop in ("\n", "\n.,")] == [" one. two", " one"]
    assert cut("\nthree", "\n") == ""


# Scoring and generation


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def models_of(family, tokenizer):
    base = qa_base(family, tokenizer)
    return {"base": base, "joint": MLPMemory(base, tiny_memory(base), lmbda=0.4, knn_temp=2.0).eval()}


ANSWERS = (" James.", " The moon is there.", " no", " it is not here, of course.", " the first")
QUESTIONS = ("who wrote it", "is it the right answer or not the right answer", "which", "where is the moon")


def questions_and_answers():
    return [Prompt(f"{DEMONSTRATIONS}Q: {question}?\nA:", ANSWERS[: 2 + i]) for i, question in enumerate(QUESTIONS)]


@pytest.mark.parametrize("kind", ["base", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_answer_scores_equal_those_of_single_texts_whatever_the_batch_size(family, kind, tokenizer):
    model = models_of(family, tokenizer)[kind]
    asked = questions_and_answers()
    expected = [plain_log_probs(model, tokenizer, each.text, answer) for each in asked for answer in each.continuations]
    for batch_size in (1, 4, 64):
        evaluator = Evaluator(model, tokenizer, batch_size)
        sequences = [sequence for prompt in asked for sequence in evaluator.sequences(prompt, 0)]
        for shared in (False, True):
            if shared:
                assert evaluator.share_start([each.ids[: each.begin] for each in sequences]) > 32
            found = evaluator.likelihoods(sequences)
            assert [each.tokens for each in found] == [len(each) for each in expected]
            totals = [each.total for each in found]
            assert np.allclose(totals, [each.sum() for each in expected], atol=2e-4)


@pytest.mark.unit
@pytest.mark.parametrize("others", [(), (3,)])
def test_an_answer_without_tokens_is_not_right(tokenizer, others):
    evaluator = Evaluator(qa_base("llama", tokenizer), tokenizer, 4)
    ids = evaluator.encode("who wrote it")
    empty, *_ = evaluator.likelihoods([Encoded(ids, begin) for begin in (len(ids), *others)])
    assert (empty.total, empty.tokens, empty.greedy, empty.first) == (0, 0, False, False)


@pytest.mark.parametrize("kind", ["base", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_generated_texts_equal_those_of_single_prompts_whatever_the_batch_size(family, kind, tokenizer):
    model = models_of(family, tokenizer)[kind]
    asked = [each.text for each in questions_and_answers()]
    expected = [plain_greedy(model, tokenizer, text, 12) for text in asked]
    assert len(set(expected)) > 1
    for batch_size in (1, 4):
        evaluator = Evaluator(model, tokenizer, batch_size)
        ids = [evaluator.sequences(Prompt(text), 12)[0].ids for text in asked]
        assert evaluator.continuations(ids, 12, "") == expected
        assert evaluator.share_start(ids) > 32
        assert evaluator.continuations(ids, 12, "") == expected
        letter = next(character for character in expected[0] if character.isascii())
        assert evaluator.continuations(ids, 12, letter) == [text.split(letter)[0] for text in expected]


def test_a_shared_start_changes_nothing_where_attention_slides_over_a_window(tokenizer):
    model = tiny_base("mistral", vocab_size=len(tokenizer), max_position_embeddings=512, sliding_window=16)
    evaluator = Evaluator(model, tokenizer, 4)
    asked = questions_and_answers()
    ids = [evaluator.encode(each.text) for each in asked]
    sequences = [sequence for prompt in asked for sequence in evaluator.sequences(prompt, 0)]
    texts, scores = evaluator.continuations(ids, 9, ""), [each.total for each in evaluator.likelihoods(sequences)]
    assert evaluator.share_start(ids) > 32
    assert (
        evaluator.continuations(ids, 9, "") == texts == [plain_greedy(model, tokenizer, each.text, 9) for each in asked]
    )
    assert np.allclose([each.total for each in evaluator.likelihoods(sequences)], scores, atol=2e-4)


def test_a_checkpoints_sampling_settings_play_no_part_but_its_end_token_ends_a_text(tokenizer):
    model = models_of("llama", tokenizer)["base"]
    whole = plain_greedy(model, tokenizer, "who wrote it?", 8)
    first, second, *_ = tokenizer(whole).input_ids
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    for end, expected in ((tokenizer.eos_token_id, whole), (second, tokenizer.decode([first]))):
        model.generation_config.eos_token_id = end
        evaluator = Evaluator(model, tokenizer, 2)
        assert evaluator.continuations([evaluator.encode("who wrote it?")], 8, "") == [expected]
    assert model.generation_config.repetition_penalty == 3.0


def test_an_answer_begins_after_as_many_tokens_as_the_prompt_has_alone(tokenizer):
    evaluator = Evaluator(models_of("llama", tokenizer)["base"], tokenizer, 1)
    (sequence,) = evaluator.sequences(Prompt("the righ", ("t answer",)), 0)
    assert sequence.ids.tolist() == tokenizer("the right answer").input_ids
    assert sequence.begin == len(tokenizer("the righ").input_ids)


def test_an_end_token_that_the_tokenizer_appends_is_left_out(tokenizer):
    from tokenizers.processors import TemplateProcessing

    other = byte_tokenizer()
    special = [("<bos>", other.bos_token_id), ("<eos>", other.eos_token_id)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    evaluator = Evaluator(models_of("llama", tokenizer)["base"], other, 1)
    assert evaluator.encode("who").tolist() == [other.bos_token_id, *tokenizer("who").input_ids]


# The command


def test_the_memory_changes_the_scores_and_lambda_zero_gives_the_bases(world, tmp_path):
    task = ("--task", "halueval_plain", "--dataset_name", world / "halu.jsonl")
    scores = {}
    for name, flags in (("base", ()), ("zero", joint_flags(world, 0)), ("half", joint_flags(world, 0.5))):
        _, lines = ask(world, tmp_path / name, *task, *flags)
        scores[name] = np.array([line["mean_log_probabilities"] for line in lines])
    assert np.allclose(scores["base"], scores["zero"], atol=1e-5)
    assert not np.allclose(scores["base"], scores["half"], atol=1e-2)


def test_results_say_what_was_measured_and_how_and_a_part_can_be_chosen(world, tmp_path):
    data = ("--do_eval", "--dataset_name", world / "nq.jsonl", *joint_flags(world))
    results, lines = ask(world, tmp_path / "whole", *data)
    assert results["task"] == "nq"
    assert set(results["metrics"]) == set(results["standard_errors"]) == {"exact_match", "f1"}
    assert results["counts"] == {"rows": 5, "scored": 4, "dropped": 1, "from_an_earlier_run": 0}
    assert results["lmbda"] == 0.5 and results["knn_temp"] == 1.0
    assert results["settings"]["torch_dtype"] == "float32"
    assert {"torch", "transformers"} <= set(results["versions"]) and results["seconds"] > 0
    assert [line["row"] for line in lines] == [0, 1, 3, 4]
    for name in ("exact_match", "f1"):
        assert results["metrics"][name] == pytest.approx(np.mean([line["scores"][name] for line in lines]))
    results, part = ask(world, tmp_path / "part", *data, "--start", 1, "--max_eval_samples", 3)
    assert part == lines[1:3]
    assert results["counts"]["rows"] == 3 and results["counts"]["dropped"] == 1


def test_truthfulqa_scores_the_best_answer_even_where_it_is_not_among_the_true_ones(world, tmp_path):
    flags = (*TRUTH_FLAGS, world / "truth.csv", "--prompt_file", world / "demonstrations.txt")
    results, lines = ask(world, tmp_path, *flags)
    assert set(results["metrics"]) == {"mc1", "mc2", "mc3"}
    assert [len(line["scores_true"]) for line in lines] == [3, 1]
    assert lines[1]["best"] == "No one did."


def test_a_judge_is_asked_about_both_answers(world, tmp_path):
    data = ("--dataset_name", world / "halu.jsonl", "--prompt_file", world / "instruction.txt")
    results, lines = ask(world, tmp_path, "--task", "halueval_judge", *data)
    assert all(len(line["outputs"]) == len(line["judged"]) == 2 for line in lines)
    parts = results["metrics"]
    assert parts["accuracy"] == pytest.approx((parts["accuracy_right"] + parts["accuracy_hallucinated"]) / 2)


def test_every_file_format_gives_the_same_rows(world, tmp_path):
    import datasets

    rows = [{**row, "answer": list(row["answer"])} for row in NQ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "nq.parquet")
    (tmp_path / "nq.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text((world / "nq.jsonl").read_text())
    for name, delimiter in (("nq.csv", ","), ("nq.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["question", "answer"])
            writer.writerows([row["question"], str(row["answer"])] for row in rows)
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "copy").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "copy" / "validation-00000-of-00001.parquet")
    from downstream.data import Questions

    columns = TASKS["nq"].columns
    expected = list(Questions(str(world / "nq.jsonl"), columns).select(0, None))
    assert len(expected) == 5
    names = {"value": "A b", "aliases": ["A", "A b"], "normalized_aliases": ["a b"]}
    assert columns["answers"].read(names) == ["A b", "A", "a b"]
    for name in ("nq.parquet", "nq.json", "lines.json", "nq.csv", "nq.tsv", "saved", "copy"):
        found = Questions(str(tmp_path / name), columns, split="validation")
        assert list(found.select(0, None)) == expected, name


# Going on after an interruption


def test_a_restart_goes_on_after_the_last_complete_line_and_does_nothing_twice(world, tmp_path, capsys):
    flags = ("--dataset_name", world / "nq.jsonl", "--per_device_eval_batch_size", 1)
    _, whole = ask(world, tmp_path, *flags)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text(lines[0] + lines[1] + lines[2][:20])
    (tmp_path / "results.json").unlink()
    results, again = ask(world, tmp_path, *flags)
    assert again == whole
    assert results["counts"]["from_an_earlier_run"] == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json*")}
    capsys.readouterr()
    ask(world, tmp_path, *flags)
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json*")} == before


def test_changed_settings_and_questions_are_refused_by_name_and_overwrite_does_it_again(world, tmp_path):
    questions = write_jsonl(tmp_path / "nq.jsonl", NQ[:1])
    data = ("--dataset_name", questions, "--max_eval_samples", 1)
    _, before = ask(world, tmp_path, *data, *joint_flags(world, 0.5))
    flags = (*base_flags(world, tmp_path), *data)
    line = refused_here("downstream.eval_qa", *flags, *joint_flags(world, 0.25))
    assert "lmbda 0.5 there, 0.25 now" in line and "--overwrite" in line and "task" not in line
    assert [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == before
    write_jsonl(questions, NQ[1:2])
    assert "dataset_content" in refused_here("downstream.eval_qa", *flags, *joint_flags(world, 0.5))
    results, _ = ask(world, tmp_path, *data, *joint_flags(world, 0.25), "--overwrite")
    assert results["lmbda"] == 0.25


# Bad input


def base_flags(world, output):
    return "--model_name_or_path", world / "base", "--output_dir", output


def test_the_command_runs_as_a_module_and_as_a_script_and_bad_input_is_one_line(world, tmp_path):
    flags = (*base_flags(world, tmp_path / "a"), "--dataset_name", world / "nq.jsonl", "--max_eval_samples", 1)
    assert "exact_match" in run("downstream/eval_qa.py", *flags).stdout
    line = refused("-m", "downstream.eval_qa", *base_flags(world, tmp_path / "b"), "--task", "nqq")
    assert all(task in line for task in ("nqq", "nq", "truthfulqa", "halueval_judge"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dataset_name", "missing.jsonl"), ["missing.jsonl", "no such file"]),
        (("--dataset_name", "empty.jsonl"), ["empty.jsonl", "no rows"]),
        (("--dataset_name", "broken.jsonl"), ["broken.jsonl", "line 2"]),
        (("--dataset_name", "columns.jsonl"), ["query_text", "question"]),
        (("--dataset_name", "blank.jsonl"), ["row 1", "question is empty"]),
        (("--dataset_name", "unanswered.jsonl"), ["row 0", "answer is empty"]),
        (("--dataset_name", "nq.parquet"), ["nq.parquet", "parquet"]),
        (("--dataset_name", "nq.txt"), ["nq.txt", ".jsonl"]),
        (("--dataset_name", "nq.jsonl", "--start", 5), ["--start 5", "5 rows"]),
        (("--dataset_name", "nq.jsonl", "--max_eval_samples", 0), ["--max_eval_samples 0"]),
        (("--dataset_name", "nq.jsonl", "--lmbda", 1.5), ["--lmbda 1.5"]),
        (("--dataset_name", "nq.jsonl", "--use_neural_knn"), ["--use_neural_knn", "--knn_generator_path"]),
        (("--dataset_name", "nq.jsonl", "--torch_dtype", "int8"), ["--torch_dtype int8"]),
        (("--dataset_name", "long.jsonl"), ["row 1", "512"]),
        (("--task", "truthfulqa", "--dataset_name", "nq.jsonl"), ["--prompt_file", "github.com"]),
        (("--task", "halueval", "--dataset_name", "nq.jsonl", "--prompt_file", "none.txt"), ["none.txt"]),
    ],
)
def test_bad_input_is_told_in_one_line(world, tmp_path, monkeypatch, flags, expected):
    write_jsonl(tmp_path / "nq.jsonl", NQ)
    write_jsonl(tmp_path / "empty.jsonl", [])
    (tmp_path / "broken.jsonl").write_text(json.dumps(NQ[0]) + "\n{broken\n")
    write_jsonl(tmp_path / "columns.jsonl", [{"query_text": "who", "answer": "x"}])
    write_jsonl(tmp_path / "blank.jsonl", [NQ[0], {"question": " ", "answer": "x"}])
    write_jsonl(tmp_path / "unanswered.jsonl", [{"question": "who", "answer": []}])
    write_jsonl(tmp_path / "long.jsonl", [NQ[0], {"question": "who " * 400, "answer": "x"}])
    for name in ("nq.parquet", "nq.txt"):
        (tmp_path / name).write_text("not a table")
    monkeypatch.chdir(tmp_path)
    line = refused_here("downstream.eval_qa", *base_flags(world, tmp_path / "out"), *flags)
    assert all(part in line for part in expected), line
    assert not list((tmp_path / "out").glob("*.json*"))


def test_an_output_folder_in_use_is_refused(world, tmp_path):
    with FolderLock(tmp_path):
        line = refused_here("downstream.eval_qa", *base_flags(world, tmp_path), "--dataset_name", world / "nq.jsonl")
    assert "another run" in line


# The shell script


def test_the_script_takes_its_settings_from_the_environment_in_any_folder(world, tmp_path):
    def script(**settings):
        return subprocess.run(
            ["bash", ROOT / "downstream" / "eval_qa.sh"],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}},
            capture_output=True,
            text=True,
        )

    chosen = {"MODEL": world / "base", "DATASET": world / "nq.jsonl", "MAX_EVAL_SAMPLES": 1}
    done = script(**chosen, KNN_PATH=world / "memory", OUTPUT_DIR=tmp_path / "joint")
    assert done.returncode == 0, done.stderr
    assert "downstream.eval_qa" in done.stdout and "--lmbda 0.50" in done.stdout
    assert json.loads((tmp_path / "joint" / "results.json").read_text())["lmbda"] == 0.5
    assert script(**chosen, USE_NEURAL_KNN=0, OUTPUT_DIR=tmp_path / "base").returncode == 0
    assert json.loads((tmp_path / "base" / "results.json").read_text())["memory"] is None
    failed = script(**chosen, KNN_PATH=world / "memory", LAMBDA=2, OUTPUT_DIR=tmp_path / "failed")
    assert failed.returncode == 2 and "stage" in failed.stderr and "evaluate nq" in failed.stderr
