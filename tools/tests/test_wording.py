"""Numbers as text: rounded where rounding is honest, and never rounded onto a threshold."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tenfold_tools.wording import duration, interval, joined, short

finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.070241, "0.07024"), (36864, "36864"), (-1234.5678, "-1235"), (5.1514e-14, "5.151e-14"), (0, "0")],
)
def test_a_number_has_four_digits_and_thousands_are_written_out(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "texts"),
    [
        (0.0739, 0.0637, 0.0841, ("0.074", "0.064", "0.084")),
        (1.00006, 0.99949, 1.00064, ("1.00006", "0.99949", "1.00064")),
        (123.4, 100.0, 150.0, ("123", "100", "150")),
        (2e8, 1e8, 3e8, ("2e+08", "1e+08", "3e+08")),
        (0.5, 0.5, 0.5, ("0.5", "0.5", "0.5")),
    ],
)
def test_an_interval_has_two_digits_of_its_half_width(value, low, high, texts):
    assert interval(value, low, high) == texts


@example([0.0, 3e-225, 1.0], (0.0,), 0)
@example([0.2, 0.3, 0.39999], (0.4,), 0)
@given(st.tuples(finite, finite, finite).map(sorted), st.tuples(finite), st.integers(0, 2))
def test_no_number_is_rounded_onto_a_threshold_that_it_missed(ordered, others, rounded):
    low, value, high = ordered
    thresholds = (*others, float(interval(value, low, high)[rounded]))  # also one that a rounded number meets
    for number, text in zip((value, low, high), interval(value, low, high, thresholds), strict=True):
        assert number in thresholds or float(text) not in thresholds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "under 0.1 s"),
        (1.24, "1.2 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7620, "2 h 7 min"),
    ],
)
def test_durations_are_told_in_words(seconds, text):
    assert duration(seconds) == text


def test_neighbouring_seeds_are_joined():
    assert joined([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
