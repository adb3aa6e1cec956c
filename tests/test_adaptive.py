"""Lambda by the distance of the nearest neighbour (Drozdov et al. 2022), and the flag that asks for it."""

from __future__ import annotations

import pytest

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
