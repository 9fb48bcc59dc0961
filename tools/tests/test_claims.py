"""Verdicts are decided by intervals; hypothesis looks for an interval that is judged wrongly."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tenfold_tools.claims import (
    SCALES,
    Claim,
    Criterion,
    Measurement,
    Number,
    Run,
    Verdict,
    above,
    at_least,
    below,
    claim,
    not_above,
    within,
)

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
finite = st.floats(allow_nan=False, allow_infinity=False)
anything = st.floats()


@st.composite
def numbers(draw: st.DrawFn) -> Number:
    low, value, high = sorted(draw(st.tuples(finite, finite, finite)))
    return Number("x", value, low, high)


def verdict_of_all_points(number: Number, holds) -> Verdict:
    """The definition: a condition on an interval passes if every point meets it and fails if none does."""
    points = [holds(point) for point in (number.low, number.value, number.high)]
    return PASS if all(points) else INCONCLUSIVE if any(points) else FAIL


@given(numbers(), finite)
def test_below_and_above_judge_every_point_of_the_interval(number, threshold):
    assert below(number, threshold).verdict == verdict_of_all_points(number, lambda x: x < threshold)
    assert above(number, threshold).verdict == verdict_of_all_points(number, lambda x: x > threshold)


@given(numbers(), finite, finite)
def test_within_passes_inside_and_fails_only_outside(number, one, other):
    low, high = sorted((one, other))
    verdict = within(number, low, high).verdict
    assert (verdict is PASS) == (low <= number.low and number.high <= high)
    assert (verdict is FAIL) == (max(low, number.low) > min(high, number.high))  # they do not meet


@given(numbers(), finite)
def test_not_above_fails_only_if_the_whole_interval_is_above(number, threshold):
    assert not_above(number, threshold).verdict == (FAIL if number.low > threshold else PASS)


@given(numbers(), finite, finite, finite)
def test_a_wider_interval_never_turns_a_verdict_round(number, threshold, one, other):
    wide = Number("x", number.value, min(number.low, one), max(number.high, other))
    for criterion in (below, above, lambda n, t: within(n, min(t, one), max(t, one))):
        narrow_verdict, wide_verdict = (
            criterion(number, threshold).verdict,
            criterion(wide, threshold).verdict,
        )
        assert wide_verdict in (narrow_verdict, INCONCLUSIVE)


@given(anything, anything, anything, finite)
def test_what_is_not_finite_never_passes(value, low, high, threshold):
    try:
        number = Number("x", value, low, high)
    except ValueError:
        return
    if number.bounded:
        return
    criteria = [
        below(number, threshold),
        above(number, threshold),
        within(number, -1e300, 1e300),
        not_above(number, threshold),
    ]
    assert PASS not in [criterion.verdict for criterion in criteria]
    if not math.isfinite(value):
        assert {criterion.verdict for criterion in criteria} == {FAIL}


@given(st.lists(st.sampled_from([PASS, FAIL, INCONCLUSIVE]), min_size=1, max_size=6), st.data())
def test_at_least_agrees_with_every_way_the_open_criteria_can_turn_out(verdicts, data):
    k = data.draw(st.integers(1, len(verdicts)))
    ways = product(*([PASS, FAIL] if verdict is INCONCLUSIVE else [verdict] for verdict in verdicts))
    reached = [way.count(PASS) >= k for way in ways]
    expected = PASS if all(reached) else INCONCLUSIVE if any(reached) else FAIL
    assert at_least(k, [Criterion("c", verdict) for verdict in verdicts]).verdict is expected


@given(st.lists(st.sampled_from([PASS, FAIL, INCONCLUSIVE]), max_size=5))
def test_a_claim_passes_only_if_every_criterion_does(verdicts):
    verdict = Measurement([], [Criterion("c", verdict) for verdict in verdicts]).verdict
    if FAIL in verdicts:
        assert verdict is FAIL
    else:
        assert verdict is (PASS if verdicts and INCONCLUSIVE not in verdicts else INCONCLUSIVE)


def test_the_mean_has_the_t_interval_of_scipy():
    samples = [0.1, 0.4, 0.2, 0.35]
    number = Number.mean("loss", samples)
    expected = scipy_stats.t.interval(0.95, 3, loc=0.2625, scale=scipy_stats.sem(samples))
    # Two float64 routes to the same t quantile: agreement to a few units in the last place.
    assert (number.low, number.high) == pytest.approx(expected, rel=1e-12)
    assert number.value == pytest.approx(0.2625, rel=1e-15)


@pytest.mark.parametrize("samples", [[1.0], [1.0, 1.0]])
def test_fewer_than_three_seeds_decide_nothing(samples):
    number = Number.mean("loss", samples)
    assert (number.low, number.high) == (-math.inf, math.inf)
    assert below(number, 2).verdict is INCONCLUSIVE
    assert not_above(number, 2).verdict is INCONCLUSIVE


def test_one_diverged_seed_fails_the_criterion():
    assert below(Number.mean("loss", [1.0, 1.0, 1.0, math.nan]), 2).verdict is FAIL
    assert below(Number.mean("loss", [1.0, 1.0, 1.0, -math.inf]), 2).verdict is FAIL


def test_equal_samples_give_an_interval_that_holds_their_mean():
    number = Number.mean("loss", [0.1] * 7)
    assert number.low <= number.value <= number.high


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Number("", 1.0), "name"),
        (lambda: Number("x", 1.0, 2.0, 3.0), "low <= value <= high"),
        (lambda: Number("x", 1.0, math.nan, 3.0), "low <= value <= high"),
        (lambda: Number.mean("x", []), "at least one value"),
        (lambda: below(Number("x", 1.0), math.nan), "threshold must be finite"),
        (lambda: within(Number("x", 1.0), 2, 1), "low <= high"),
        (lambda: at_least(3, [Criterion("c", PASS)]), "k must be between 1"),
        (lambda: at_least(0, [Criterion("c", PASS)]), "k must be between 1"),
        (lambda: Criterion("c", Verdict.ERROR), "PASS, FAIL or INCONCLUSIVE"),
        (lambda: Measurement([Number("x", 1), Number("x", 2)], []), "unique"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_measurement_of_anything_but_numbers_is_refused():
    with pytest.raises(TypeError, match="numbers must hold only Number, got float"):
        Measurement([1.0], [])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number("x", 0.070241, 0.0501, 0.0903, unit="nats"), "x: 0.070 [0.050, 0.090] nats"),
        (Number("x", 36864), "x: 36864"),
        (Number("x", 0.15, -math.inf, math.inf), "x: 0.15 (no interval)"),
        (Number("x", math.nan), "x: nan"),
    ],
)
def test_a_number_reads_as_value_interval_unit(number, text):
    assert number.text() == text


def test_a_criterion_never_shows_a_number_as_the_threshold_that_it_missed():
    assert below(Number("x", 1 - 1e-9), 1).text == "x: 0.999999999 < 1"
    assert below(Number("x", 0.3, 0.2, 0.39999), 0.4).text == "x: 0.300 [0.200, 0.39999] < 0.4"


def make_claim(**changes) -> Claim:
    settings = {"id": "R1", "sentence": "It works.", "source": "Table 1"} | changes
    return claim(settings.pop("id"), **settings)(lambda _run: Measurement([], []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "1"}, "id must be"),
        ({"id": "R 1"}, "id must be"),
        ({"sentence": " "}, "must not be empty"),
        ({"source": ""}, "must not be empty"),
        ({"required_from": "huge"}, "required_from of R1 must be in"),
        ({"seeds": {"quick": 3}}, "seeds of R1 must give a count"),
        ({"seeds": {"quick": 3, "laptop": 0, "full": 1}}, "seeds of R1 must give a count"),
        ({"first_seed": -1}, "first_seed of R1"),
    ],
)
def test_a_claim_that_is_described_wrongly_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_claim(**changes)


@pytest.mark.parametrize(
    ("required_from", "required"),
    [
        (None, [False, False, False]),
        ("quick", [True, True, True]),
        ("laptop", [False, True, True]),
        ("full", [False, False, True]),
    ],
)
def test_a_claim_is_required_from_its_scale_upwards(required_from, required):
    assert [make_claim(required_from=required_from).required(scale) for scale in SCALES] == required


def test_seeds_count_up_from_the_first_one():
    counted = make_claim(seeds={"quick": 3, "laptop": 5, "full": 9}, first_seed=100)
    assert counted.seeds_at("quick") == (100, 101, 102)
    assert counted.seeds_at("laptop", 2) == (100, 101)
    assert make_claim(first_seed=7).seeds_at("full", 4) == (7,)  # no chance involved: one seed


def test_an_experiment_that_returns_no_measurement_is_refused():
    broken = claim("R1", sentence="It works.", source="Table 1")(lambda _run: 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="R1 must return a Measurement, got float"):
        broken(Run("quick", (0,)))


def test_a_run_without_a_tracker_iterates_silently():
    assert list(Run("quick", (0, 1)).track("ab", "letters")) == ["a", "b"]
