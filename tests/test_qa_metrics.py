"""Facts about the scores of question answering: normalisation, exact match, F1, containment, choices, judgements."""

import math

import pytest

from downstream import metrics

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("  an  apple   a day ", "apple day"),
        ("U.S.A.", "usa"),
        ("A-team", "ateam"),
        ("theatre", "theatre"),
        ("İstanbul", "i̇stanbul"),
        ("12,000", "12000"),
        ("the", ""),
    ],
)
def test_normalisation_is_squads(text, expected):
    assert metrics.normalize_answer(text) == expected


def test_the_best_answer_counts_and_f1_takes_tokens_as_bags():
    assert metrics.exact_match("The James I.", ["William", "james i"]) == 1.0
    assert metrics.exact_match("King James I", ["James I"]) == 0.0
    assert metrics.token_f1("king james i of england", ["James I"]) == pytest.approx(4 / 7)
    assert metrics.token_f1("a b b", ["b b b"]) == pytest.approx(0.8)  # "a" is an article
    assert metrics.token_f1("december 1972", ["14 December 1972 UTC", "December 1972"]) == 1.0
    assert metrics.token_f1("", ["the"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Yes, they were", "yes", 1.0),
        ("yesterday", "yes", 1.0),  # by substring
        ("No", "Yes", 0.0),
        ("nothing", "no", 1.0),
        ("", "no", 0.0),
        ("there is noanswer here", "noanswer", 1.0),
        ("no", "no one", pytest.approx(2 / 3)),  # the rule is about the gold answer only
    ],
)
def test_f1_of_yes_and_no_is_by_substring(prediction, answer, expected):
    assert metrics.token_f1(prediction, [answer]) == expected


def test_tokens_are_runs_of_letters_and_digits_or_single_symbols():
    assert metrics.simple_tokens("Don't, pay $5!") == ["don", "'", "t", ",", "pay", "$", "5", "!"]
    assert metrics.simple_tokens("a_b\u00a0c\td") == ["a", "_", "b", "c", "d"]
    assert metrics.simple_tokens("\u200b\u00ad") == []


def test_accents_are_decomposed_before_tokens_are_compared():
    composed, decomposed = "Beyonc\u00e9", "Beyonce\u0301"
    assert metrics.simple_tokens(composed) == metrics.simple_tokens(decomposed) == ["beyonce\u0301"]
    assert metrics.contains_answer(f"it was {composed}", [decomposed]) == 1.0
    assert metrics.contains_answer("it was Beyonce", [composed]) == 0.0


def test_an_answer_has_to_occur_as_whole_tokens_in_a_row():
    assert metrics.contains_answer(" Frankie Valli. ;)", ["frankie valli"]) == 1.0
    assert metrics.contains_answer("Frankie and Valli", ["Frankie Valli"]) == 0.0
    assert metrics.contains_answer("19720", ["1972"]) == 0.0
    assert metrics.contains_answer("anything", ["", " "]) == 0.0


def test_multiple_choice_scores_follow_their_definitions():
    scores = metrics.multiple_choice(-2.0, [-2.0, -5.0, -1.0], [-3.0, -4.0])
    mass = [math.exp(value) for value in (-2.0, -5.0, -1.0, -3.0, -4.0)]
    assert scores["mc1"] == 1.0
    assert scores["mc2"] == pytest.approx(sum(mass[:3]) / sum(mass))
    assert scores["mc3"] == pytest.approx(2 / 3)


def test_a_tie_is_no_win_and_long_answers_do_not_underflow():
    assert metrics.multiple_choice(-3.0, [-3.0], [-3.0]) == {"mc1": 0.0, "mc2": 0.5, "mc3": 0.0}
    assert metrics.multiple_choice(-2000.0, [-2000.0], [-2001.0])["mc2"] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" No", "No"), ("Yes.", "Yes"), ("Yes and No", None), ("maybe", None), ("", None), ("no", None), ("Nope", "No")],
)
def test_a_judgement_holds_exactly_one_of_yes_and_no(text, expected):
    assert metrics.judgement(text) == expected
