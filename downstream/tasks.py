"""The registry of question-answering tasks: for each its columns, prompts, metrics and hub dataset.

A new task is one entry in `TASKS`. Where the benchmarks leave a choice open, the functions' docstrings say which was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from downstream import metrics

# A row's scores by metric, and what the predictions file shows beside them.
Measured = tuple[dict[str, float], dict[str, Any]]

TRUTHFULQA_PROMPT = (
    "the six demonstrations of TruthfulQA's QA preset (an instruction and six Q:/A: pairs), "
    "from data/ or utilities.py of github.com/sylinrl/TruthfulQA"
)
HALUEVAL_PROMPT = (
    "the QA instruction of HaluEval, from evaluation/qa/qa_evaluation_instruction.txt of github.com/RUCAIBox/HaluEval"
)


@dataclass(frozen=True)
class Column:
    """Names that a column may have (the first one found is taken), and what reads its cells.

    `read` takes the cell and raises ValueError, which says what is wrong with it, if it holds something else.
    """

    names: tuple[str, ...]
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Prompt:
    """What is put to the model: a text to continue greedily, or, with `continuations`, a text whose answers are scored."""

    text: str
    continuations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Likelihood:
    """A continuation's log-probability after its prompt, `total` nats over `tokens` tokens, and whether greedy
    decoding gives it, or at least its first token."""

    total: float
    tokens: int
    greedy: bool = False
    first: bool = False

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        about: one line for `--help` and errors.
        hub: (dataset, configuration, split) used when the command names none.
        columns: role → its column.
        prompts: (row: role → what the column's reader made, text of the prompt file) → what to ask the model.
        measure: (row, a string or a list of `Likelihood` for each prompt) → scores.
        metrics: names of the scores, the first being the one to quote.
        max_new_tokens, stop: generation ends at that many tokens or before the first of these characters.
        keep: rows for which it is false are dropped and counted.
        prompt_file: what `--prompt_file` must hold and where it comes from; None if the task needs none.
    """

    about: str
    hub: tuple[str, str | None, str]
    columns: Mapping[str, Column]
    prompts: Callable[[Mapping[str, Any], str], list[Prompt]]
    measure: Callable[[Mapping[str, Any], Sequence[Any]], Measured]
    metrics: tuple[str, ...]
    max_new_tokens: int = 0
    stop: str = ""
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True
    prompt_file: str | None = None


def text_of(value: Any) -> str:
    """A cell that must hold text. Raises ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is empty" if value is None or isinstance(value, str) else "is not text")
    return value


def list_of(value: Any) -> list[str]:
    """The answers of a cell: a string, a list of strings, or TriviaQA's {value, aliases, …}.

    Empty strings and doubles are left out. Raises ValueError if no answer is left.
    """
    if isinstance(value, Mapping):
        value = [value.get("value"), *(value.get("aliases") or ()), *(value.get("normalized_aliases") or ())]
    found = [value] if isinstance(value, str) or value is None else list(value)
    if not all(answer is None or isinstance(answer, str) for answer in found):
        raise ValueError("is neither text nor a list of texts")
    answers = list(dict.fromkeys(answer for answer in found if answer and answer.strip()))
    if not answers:
        raise ValueError("is empty")
    return answers


def closed(answer: Any) -> str:
    """An answer without outer blanks, closed with a period if it does not end in one."""
    answer = text_of(answer).strip()
    return answer if answer.endswith(".") else answer + "."


def reference_answers(value: Any) -> list[str]:
    """TruthfulQA's references: a list, or one string with `;` between them; each closed with a period; doubles stay."""
    found = value.split(";") if isinstance(value, str) else value or []
    answers = [closed(answer) for answer in found if not isinstance(answer, str) or answer.strip()]
    if not answers:
        raise ValueError("are empty")
    return answers


def short_question(row: Mapping[str, Any], _: str) -> list[Prompt]:
    """NQ and HotpotQA: outer blanks go, a missing question mark is added, the first letter is lower-cased."""
    question = row["question"].strip()
    question = question if question.endswith("?") else question + "?"
    question = question[0].lower() + question[1:]
    return [Prompt(f"Answer these questions:\nQuestion: {question}\nAnswer:")]


def short_answer(row: Mapping[str, Any], outputs: Sequence[str]) -> Measured:
    """Exact match and token F1, best over the answers; outer blanks of the prediction go after the cut."""
    prediction, answers = outputs[0].strip(), row["answers"]
    return (
        {"exact_match": metrics.exact_match(prediction, answers), "f1": metrics.token_f1(prediction, answers)},
        {"prediction": prediction, "answers": answers},
    )


def open_question(row: Mapping[str, Any], _: str) -> list[Prompt]:
    """WebQA and TriviaQA: the question as it stands, then a question mark (also after one, as in the original's demo)."""
    return [Prompt(f"Answer the questions:\n\nQuestion: {row['question']}? The answer is:")]


def open_answer(row: Mapping[str, Any], outputs: Sequence[str]) -> Measured:
    """Correct if an answer's tokens occur in a row in the output. The stop character itself is no part of the output."""
    return (
        {"accuracy": metrics.contains_answer(outputs[0], row["answers"])},
        {"prediction": outputs[0].strip(), "answers": row["answers"]},
    )


def truthfulqa_prompts(row: Mapping[str, Any], demonstrations: str) -> list[Prompt]:
    """The demonstrations, one empty line, `Q: {q}\\nA:`; each answer is scored as ` {answer}`.

    The question is taken as it stands. The best answer is scored by itself only if it is not among the true ones.
    """
    best, true, false = row["best"], row["true"], row["false"]
    extra = [] if best in true else [best]
    prompt = f"{demonstrations}\n\nQ: {row['question']}\nA:"
    return [Prompt(prompt, tuple(f" {answer}" for answer in (*true, *false, *extra)))]


def truthfulqa_scores(row: Mapping[str, Any], outputs: Sequence[Sequence[Likelihood]]) -> Measured:
    """MC1, MC2 and MC3 from summed log-probabilities."""
    best, true, false = row["best"], row["true"], row["false"]
    totals = [likelihood.total for likelihood in outputs[0]]
    scores_true, scores_false = totals[: len(true)], totals[len(true) : len(true) + len(false)]
    score_best = scores_true[true.index(best)] if best in true else totals[-1]
    return (
        metrics.multiple_choice(score_best, scores_true, scores_false),
        {"best": best, "true": true, "false": false, "scores_true": scores_true, "scores_false": scores_false},
    )


def halueval_question(row: Mapping[str, Any], instruction: str) -> str:
    """The instruction, one empty line, `#Question#: {q}`; the question is taken as it stands; knowledge is not shown."""
    question = f"#Question#: {row['question']}"
    return f"{instruction}\n\n{question}" if instruction else question


def halueval_choice_prompts(row: Mapping[str, Any], instruction: str) -> list[Prompt]:
    """The judge's prompt up to `#Answer#:`; the right and the hallucinated answer are scored as ` {answer}`."""
    prompt = f"{halueval_question(row, instruction)}\n#Answer#:"
    return [Prompt(prompt, (f" {row['right']}", f" {row['hallucinated']}"))]


def halueval_choice_scores(row: Mapping[str, Any], outputs: Sequence[Sequence[Likelihood]]) -> Measured:
    """1 if the right answer's mean log-probability per token is above the hallucinated one's (a tie is wrong)."""
    right, hallucinated = outputs[0]
    return (
        {"accuracy": float(right.mean > hallucinated.mean)},
        {
            "right": row["right"],
            "hallucinated": row["hallucinated"],
            "mean_log_probabilities": [right.mean, hallucinated.mean],
        },
    )


def halueval_judge_prompts(row: Mapping[str, Any], instruction: str) -> list[Prompt]:
    """Both answers are judged, the right one first. (HaluEval's own code judges one of the two, drawn at random.)"""
    question = halueval_question(row, instruction)
    answers = row["right"], row["hallucinated"]
    return [Prompt(f"{question}\n#Answer#: {answer}\n#Your Judgement#:") for answer in answers]


def halueval_judge_scores(row: Mapping[str, Any], outputs: Sequence[str]) -> Measured:
    """Share of right judgements: No (no hallucination) for the right answer, Yes for the hallucinated one."""
    judged = [metrics.judgement(output) for output in outputs]
    hits = [float(judged[0] == "No"), float(judged[1] == "Yes")]
    return (
        {
            "accuracy": sum(hits) / 2,
            "accuracy_right": hits[0],
            "accuracy_hallucinated": hits[1],
            "failed": judged.count(None) / 2,
        },
        {"right": row["right"], "hallucinated": row["hallucinated"], "outputs": list(outputs), "judged": judged},
    )


QUESTION_ANSWERS = {
    "question": Column(("question", "Question", "query"), text_of),
    "answers": Column(("answers", "answer", "Answers", "Answer"), list_of),
}
SHORT = {
    "columns": QUESTION_ANSWERS,
    "prompts": short_question,
    "measure": short_answer,
    "metrics": ("exact_match", "f1"),
    "max_new_tokens": 15,
    "stop": "\n",
}
OPEN = {
    "columns": QUESTION_ANSWERS,
    "prompts": open_question,
    "measure": open_answer,
    "metrics": ("accuracy",),
    "max_new_tokens": 100,
    "stop": "\n.,",
}
HALUEVAL = {
    "hub": ("pminervini/HaluEval", "qa", "data"),
    "columns": {
        "question": Column(("question",), text_of),
        "right": Column(("right_answer",), text_of),
        "hallucinated": Column(("hallucinated_answer",), text_of),
    },
}
CHOICE = {"prompts": halueval_choice_prompts, "measure": halueval_choice_scores, "metrics": ("accuracy",)}

TASKS: dict[str, Task] = {
    "nq": Task(
        about="Natural Questions (open): exact match and F1 of a short generated answer",
        hub=("google-research-datasets/nq_open", None, "validation"),
        # An extraction fault of the published file: such a row cannot be answered.
        keep=lambda row: ")" not in row["answers"],
        **SHORT,
    ),
    "hotpotqa": Task(
        about="HotpotQA (closed book): exact match and F1 of a short generated answer",
        hub=("hotpotqa/hotpot_qa", "distractor", "validation"),
        **SHORT,
    ),
    "triviaqa": Task(
        about="TriviaQA (closed book): an answer occurs in the generated text",
        hub=("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
        **OPEN,
    ),
    "webqa": Task(
        about="WebQuestions: an answer occurs in the generated text",
        hub=("stanfordnlp/web_questions", None, "test"),
        **OPEN,
    ),
    "truthfulqa": Task(
        about="TruthfulQA: MC1, MC2 and MC3 by summed log-probability of the reference answers",
        hub=("truthfulqa/truthful_qa", "generation", "validation"),
        columns={
            "question": Column(("Question", "question"), text_of),
            "best": Column(("Best Answer", "best_answer"), closed),
            "true": Column(("Correct Answers", "correct_answers"), reference_answers),
            "false": Column(("Incorrect Answers", "incorrect_answers"), reference_answers),
        },
        prompts=truthfulqa_prompts,
        measure=truthfulqa_scores,
        metrics=("mc1", "mc2", "mc3"),
        prompt_file=TRUTHFULQA_PROMPT,
    ),
    "halueval": Task(
        about="HaluEval QA: the right answer over the hallucinated one, by mean log-probability per token",
        prompt_file=HALUEVAL_PROMPT,
        **HALUEVAL,
        **CHOICE,
    ),
    "halueval_plain": Task(
        about="the same choice without the instruction: #Question#, #Answer# and nothing before them",
        **HALUEVAL,
        **CHOICE,
    ),
    "halueval_judge": Task(
        about="HaluEval QA: Yes or No to whether an answer is hallucinated, by greedy generation",
        prompts=halueval_judge_prompts,
        measure=halueval_judge_scores,
        metrics=("accuracy", "accuracy_right", "accuracy_hallucinated", "failed"),
        max_new_tokens=15,
        stop="\n",
        prompt_file=HALUEVAL_PROMPT,
        **HALUEVAL,
    ),
}
