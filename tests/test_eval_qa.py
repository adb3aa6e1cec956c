"""Question answering: prompts, batched scoring and generation, files that are read and written, user errors."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from harness import command, refused_here, run
from tiny_models import (
    byte_tokenizer,
    plain_greedy,
    plain_log_probs,
    qa_base,
    save_models,
    some_ids,
    tiny_base,
    tiny_memory,
)

from downstream.scoring import Encoded, Evaluator, common_start
from downstream.tasks import TASKS, Prompt
from models import MLPMemory

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
    return folder


def ask(world, output, *flags):
    """Run the command; returns (results, prediction lines)."""
    command("downstream.eval_qa", "--model_name_or_path", world / "base", "--output_dir", output, *flags)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return json.loads((output / "results.json").read_text()), lines


def joint_flags(world, lmbda=0.5):
    return "--use_neural_knn", "--knn_generator_path", world / "memory", "--lmbda", lmbda


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
def test_truthfulqa_answers_end_in_a_period_and_follow_the_examples():
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


@pytest.mark.parametrize(("family", "kind"), [("llama", "base"), ("gpt2", "joint"), ("mistral", "joint")])
def test_scores_and_texts_equal_those_of_single_prompts(family, kind, tokenizer):
    model = models_of(family, tokenizer)[kind]
    asked = questions_and_answers()
    expected = [plain_log_probs(model, tokenizer, each.text, answer) for each in asked for answer in each.continuations]
    texts = [plain_greedy(model, tokenizer, each.text, 12) for each in asked]
    assert len(set(texts)) > 1
    letter = next(character for character in texts[0] if character.isascii())
    for batch_size in (1, 4):
        evaluator = Evaluator(model, tokenizer, batch_size)
        found = evaluator.likelihoods([sequence for prompt in asked for sequence in evaluator.sequences(prompt, 0)])
        assert [each.tokens for each in found] == [len(each) for each in expected]
        assert np.allclose([each.total for each in found], [each.sum() for each in expected], atol=2e-4)
        ids = [evaluator.sequences(Prompt(each.text), 12)[0].ids for each in asked]
        assert evaluator.continuations(ids, 12, "") == texts
        assert evaluator.continuations(ids, 12, letter) == [text.split(letter)[0] for text in texts]


def test_what_all_prompts_begin_with_is_read_once(tokenizer):
    model, read = models_of("llama", tokenizer)["joint"], []
    evaluator = Evaluator(model, tokenizer, 4)
    ids = [evaluator.encode(prompt.text) for prompt in questions_and_answers()]
    shared = len(common_start([Encoded(each, len(each)) for each in ids]))
    longest = max(len(each) for each in ids) - shared
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: read.append(args[0].numel()))
    evaluator.continuations(ids, 1, "")
    assert shared >= 32 and sum(read) == shared + len(ids) * longest


def test_beams_are_those_of_generate(tokenizer):
    model = models_of("llama", tokenizer)["joint"]
    ids = tokenizer("who wrote it?", return_tensors="pt").input_ids
    expected = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    evaluator = Evaluator(model, tokenizer, 2, num_beams=3)
    assert evaluator.continuations([evaluator.encode("who wrote it?")], 8, "") == [evaluator.decode(expected.tolist())]


@pytest.mark.unit
def test_an_answer_without_tokens_is_not_right(tokenizer):
    evaluator = Evaluator(qa_base("llama", tokenizer), tokenizer, 4)
    ids = evaluator.encode("who wrote it")
    for others in ((), (3,)):
        empty, *_ = evaluator.likelihoods([Encoded(ids, begin) for begin in (len(ids), *others)])
        assert (empty.total, empty.tokens, empty.greedy, empty.first) == (0, 0, False, False)


def test_sampling_settings_are_ignored_and_the_end_token_ends_a_text(tokenizer):
    model = models_of("llama", tokenizer)["base"]
    whole = plain_greedy(model, tokenizer, "who wrote it?", 8)
    first, second, *_ = tokenizer(whole).input_ids
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    for end, expected in ((tokenizer.eos_token_id, whole), (second, tokenizer.decode([first]))):
        model.generation_config.eos_token_id = end
        evaluator = Evaluator(model, tokenizer, 2)
        assert evaluator.continuations([evaluator.encode("who wrote it?")], 8, "") == [expected]
    assert model.generation_config.repetition_penalty == 3.0


def test_an_end_token_that_the_tokenizer_appends_is_left_out(tokenizer):
    from tokenizers.processors import TemplateProcessing

    other = byte_tokenizer()
    special = [("<bos>", other.bos_token_id), ("<eos>", other.eos_token_id)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    evaluator = Evaluator(models_of("llama", tokenizer)["base"], other, 1)
    assert evaluator.encode("who").tolist() == [other.bos_token_id, *tokenizer("who").input_ids]
    # A special token of the text stays.
    assert evaluator.encode("who<eos>").tolist() == [*evaluator.encode("who").tolist(), other.eos_token_id]


# The command


def test_the_memory_changes_scores_and_lambda_0_gives_the_bases(world, tmp_path):
    task = ("--task", "halueval_plain", "--dataset_name", world / "halu.jsonl")
    scores = {}
    for name, flags in (("base", ()), ("zero", joint_flags(world, 0)), ("half", joint_flags(world, 0.5))):
        _, lines = ask(world, tmp_path / name, *task, *flags)
        scores[name] = np.array([line["mean_log_probabilities"] for line in lines])
    assert np.allclose(scores["base"], scores["zero"], atol=1e-5)
    assert not np.allclose(scores["base"], scores["half"], atol=1e-2)


def test_results_record_the_settings_and_rows_can_be_selected(world, tmp_path):
    data = ("--do_eval", "--dataset_name", world / "nq.jsonl", *joint_flags(world))
    results, lines = ask(world, tmp_path / "whole", *data)
    assert results["task"] == "nq"
    assert set(results["metrics"]) == set(results["standard_errors"]) == {"exact_match", "f1"}
    assert results["counts"] == {"rows": 5, "scored": 4, "dropped": 1, "from_an_earlier_run": 0}
    assert results["lmbda"] == 0.5 and results["memory_temp"] == 1.0
    assert results["settings"]["torch_dtype"] == "float32"
    assert {"torch", "transformers"} <= set(results["versions"]) and results["seconds"] > 0
    assert [line["row"] for line in lines] == [0, 1, 3, 4]
    for name in ("exact_match", "f1"):
        assert results["metrics"][name] == pytest.approx(np.mean([line["scores"][name] for line in lines]))
    results, part = ask(world, tmp_path / "part", *data, "--start", 1, "--max_eval_samples", 3)
    assert part == lines[1:3]
    assert results["counts"]["rows"] == 3 and results["counts"]["dropped"] == 1


def test_truthfulqa_scores_a_best_answer_that_is_not_among_the_true(world, tmp_path):
    flags = ("--dataset_name", world / "truth.csv", "--prompt_file", world / "demonstrations.txt")
    results, lines = ask(world, tmp_path, "--task", "truthfulqa", *flags)
    assert set(results["metrics"]) == {"mc1", "mc2", "mc3"}
    assert [len(line["scores_true"]) for line in lines] == [3, 1] and lines[1]["best"] == "No one did."


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
    from downstream.data import questions, read_table

    columns = TASKS["nq"].columns
    expected = list(questions(read_table(str(world / "nq.jsonl")), columns))
    assert len(expected) == 5
    names = {"value": "A b", "aliases": ["A", "A b"], "normalized_aliases": ["a b"]}
    assert columns["answers"].read(names) == ["A b", "A", "a b"]
    for name in ("nq.parquet", "nq.json", "lines.json", "nq.csv", "nq.tsv", "saved", "copy"):
        table = read_table(str(tmp_path / name), split="validation")
        assert list(questions(table, columns)) == expected, name


# Interruptions and other settings


def test_an_interrupted_run_continues_and_a_complete_one_is_left_alone(world, tmp_path):
    flags = ("--dataset_name", world / "nq.jsonl", "--per_device_eval_batch_size", 1)
    _, whole = ask(world, tmp_path, *flags)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text(lines[0] + lines[1] + lines[2][:20])
    (tmp_path / "results.json").unlink()
    (tmp_path / "made.json").rename(tmp_path / "making.json")
    results, again = ask(world, tmp_path, *flags)
    assert again == whole
    assert results["counts"]["from_an_earlier_run"] == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json*")}
    ask(world, tmp_path, *flags)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json*")} == before


def test_other_settings_models_and_questions_are_refused_by_name(world, tmp_path):
    questions, output = write_jsonl(tmp_path / "nq.jsonl", NQ[:1]), tmp_path / "out"
    data = ("--dataset_name", questions, "--max_eval_samples", 1)
    _, before = ask(world, output, *data, *joint_flags(world, 0.5))
    flags = (*base_flags(world, output), *data)
    line = refused_here("downstream.eval_qa", *flags, *joint_flags(world, 0.25))
    assert "lmbda: 0.5" in line and "--overwrite" in line
    save_models(tmp_path / "other", "gpt2")
    other = ("--model_name_or_path", tmp_path / "other" / "base")
    assert "base: " in refused_here("downstream.eval_qa", *flags, *other, *joint_flags(world, 0.5))
    assert [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()] == before
    write_jsonl(questions, NQ[1:2])
    assert "questions: " in refused_here("downstream.eval_qa", *flags, *joint_flags(world, 0.5))
    results, _ = ask(world, output, *data, *joint_flags(world, 0.25), "--overwrite")
    assert results["lmbda"] == 0.25 and results["counts"]["from_an_earlier_run"] == 0


# User errors


def base_flags(world, output):
    return "--model_name_or_path", world / "base", "--output_dir", output


def test_the_command_runs_as_a_script_too(world, tmp_path):
    flags = (*base_flags(world, tmp_path / "a"), "--dataset_name", world / "nq.jsonl", "--max_eval_samples", 1)
    assert "exact_match" in run("downstream/eval_qa.py", *flags).stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--task", "nqq"), "nqq"),
        (("--dataset_name", "missing.jsonl"), "missing.jsonl"),
        (("--dataset_name", "broken.jsonl"), "broken.jsonl"),
        (("--dataset_name", "columns.jsonl"), "query_text"),
        (("--dataset_name", "blank.jsonl"), "row 1"),
        (("--dataset_name", "nq.jsonl", "--start", 5), "--start"),
        (("--dataset_name", "nq.jsonl", "--lmbda", 1.5), "--lmbda 1.5"),
        (("--dataset_name", "nq.jsonl", "--use_neural_knn"), "--knn_generator_path"),
        (("--dataset_name", "long.jsonl"), "row 1"),
        (("--task", "halueval", "--dataset_name", "halu.jsonl"), "--prompt_file"),
    ],
)
def test_user_errors_name_the_flag_file_or_row(world, tmp_path, monkeypatch, flags, expected):
    write_jsonl(tmp_path / "nq.jsonl", NQ)
    write_jsonl(tmp_path / "halu.jsonl", HALU)
    (tmp_path / "broken.jsonl").write_text(json.dumps(NQ[0]) + "\n{broken\n")
    write_jsonl(tmp_path / "columns.jsonl", [{"query_text": "who", "answer": "x"}])
    write_jsonl(tmp_path / "blank.jsonl", [NQ[0], {"question": " ", "answer": ["x"]}])
    write_jsonl(tmp_path / "long.jsonl", [NQ[0], {"question": "who " * 400, "answer": ["x"]}])
    monkeypatch.chdir(tmp_path)
    assert expected in refused_here("downstream.eval_qa", *base_flags(world, tmp_path / "out"), *flags)


def test_a_long_common_start_is_read_once_and_changes_nothing(monkeypatch):
    base = tiny_base("llama")
    model = MLPMemory(base, tiny_memory(base))
    ids = [np.append(some_ids(batch=1, time=40, seed=5)[0].numpy(), row.numpy()) for row in some_ids(batch=3)]
    pairs = [Encoded(row, 44 + number) for number, row in enumerate(ids)]
    found = []
    for shortest in (32, 1000):
        monkeypatch.setattr("downstream.scoring.SHORTEST_START", shortest)
        found.append(Evaluator(model, byte_tokenizer(), batch_size=2).likelihoods(pairs))
    for ours, theirs in zip(*found, strict=True):
        assert ours.total == pytest.approx(theirs.total, abs=1e-4) and ours.greedy == theirs.greedy
