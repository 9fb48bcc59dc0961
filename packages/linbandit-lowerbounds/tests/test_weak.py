import math

import numpy as np
import pytest
import reference_bounds as reference
import small_games
from hypothesis import given, settings
from hypothesis import strategies as st

from linbandit_lowerbounds.information import normal_tail
from linbandit_lowerbounds.peeling import number_of_groups
from linbandit_lowerbounds.scaled_bound import mean_tail
from linbandit_lowerbounds.weak import (
    LEAST_LOADED_GAP,
    SUCCESS_SHARP,
    SUCCESS_TIGHT,
    cyclic_copies,
    cyclic_layout,
    least_loaded_layout,
    least_loaded_sizes,
    required_dimension,
    weak_adversary_bound,
)

VARIANTS = [
    ("paper", "tight"),
    ("paper", "sharp"),
    ("paper", "paper"),
    ("least_loaded", "tight"),
    ("least_loaded", "sharp"),
]
RHO = {"tight": float(normal_tail(LEAST_LOADED_GAP)), "sharp": mean_tail(LEAST_LOADED_GAP)}


def holds(bound):
    return [value == 1.0 for name, value in bound.steps.items() if name.endswith(".holds")]


# ---------------------------------------------------------------- sizes
def test_printed_numbers_of_copies_and_dimensions_match():
    assert (number_of_groups(2**12), number_of_groups(2**20)) == (13, 21)
    assert [cyclic_copies(2**12, 1, 2.0**-12, copies=c) for c in ("tight", "sharp")] == [88, 39]
    assert [cyclic_copies(2**20, 1, 2.0**-20, copies=c) for c in ("tight", "sharp")] == [130, 58]
    assert required_dimension(2**12, 2.0**-12, "paper") == 14_872
    assert 8 / RHO["tight"] == pytest.approx(35.4, abs=0.05)
    assert pytest.approx(0.2938844226, abs=0.6e-10) == SUCCESS_SHARP
    assert 2 * 0.751791524694 * float(normal_tail(0.751791524694)) == pytest.approx(
        0.339942414960, abs=0.6e-12
    )


@given(st.integers(2, 2**20), st.floats(1e-6, 0.5), st.sampled_from(VARIANTS))
def test_required_dimension_is_the_smallest_that_is_accepted(K, eta, variant):
    construction, copies = variant
    d = required_dimension(K, eta, construction, copies=copies)
    layout = cyclic_layout if construction == "paper" else least_loaded_layout
    assert layout(K, d, eta=eta, copies=copies).block_dim == 1
    if d > 1:
        with pytest.raises(ValueError, match=f"d must be >= {d} for construction='{construction}'"):
            layout(K, d - 1, eta=eta, copies=copies)


@given(st.integers(2, 2**24), st.floats(1e-6, 0.9), st.sampled_from(["tight", "sharp"]))
def test_copies_suffice_for_the_failure_probability(K, eta, copies):
    L, B = number_of_groups(K), cyclic_copies(K, 1, eta, copies=copies)
    success = SUCCESS_TIGHT if copies == "tight" else SUCCESS_SHARP
    assert L**2 * (1 - success) ** B <= eta * (1 + 1e-9)
    J, B = least_loaded_sizes(K, eta, copies=copies)
    assert J * math.exp(-B * RHO[copies] / 8) <= eta * (1 + 1e-9)


@given(st.integers(2, 10**6), st.floats(0.01, 0.5), st.floats(0.25, 4))
def test_guesses_cover_every_possible_load_and_no_guess_is_spare(K, eta, V1):
    J, B = least_loaded_sizes(K, eta, V1=V1)
    assert 2 * V1 * 2 ** (J - 1) >= K / (J * B)
    if J > 1:
        fewer = math.ceil(8 * math.log((J - 1) / eta) / RHO["tight"])
        assert K / ((J - 1) * fewer) > 2 * V1 * 2 ** (J - 2)


def test_default_failure_probability_of_the_cyclic_layout_is_one_over_k():
    assert cyclic_layout(2**12, 14_872).copies == 88
    assert cyclic_layout(2**12, 14_872, eta=2.0**-12).copies == 88


def test_gaps_keep_every_probability_in_range():
    layout = cyclic_layout(2**16, 5 * required_dimension(2**16, 0.01, "paper"), eta=0.01)
    assert layout.block_dim == 5
    assert (layout.block_dim * layout.gaps <= (1 / 12) * (1 + 1e-12)).all()
    large = layout.horizons >= 1.5 * layout.block_dim**2
    assert large.any()
    np.testing.assert_allclose(layout.gaps[large], 1 / np.sqrt(96 * layout.horizons[large]), rtol=1e-14)


def test_least_loaded_layout_doubles_its_guesses():
    layout = least_loaded_layout(10**5, 2450, eta=0.05)
    assert (layout.guesses, layout.copies, layout.blocks, layout.block_dim) == (7, 175, 1225, 2)
    assert layout.variances.tolist() == [1, 2, 4, 8, 16, 32, 64]
    np.testing.assert_allclose(layout.gaps, 0.7518 / np.sqrt(layout.variances), rtol=1e-15)


# ---------------------------------------------------------------- the paper's construction
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from(["constant", "two", "many", "stopped"]))
def test_cyclic_bound_equals_playing_the_construction(seed, multiple, shape):
    K, rng = 2**11, np.random.default_rng(seed)
    sigma = {
        "constant": np.full(K, rng.uniform(0.1, 1)),
        "two": rng.choice([1.0, 0.2], K),
        "many": 10 ** rng.uniform(-2, 0, K),
        "stopped": np.where(np.arange(K) < rng.integers(K), 1.0, 0.0),
    }[shape]
    d = multiple * required_dimension(K, 0.3, "paper", copies="sharp") + 17
    bound = weak_adversary_bound(sigma, d, eta=0.3, copies="sharp")
    assert all(holds(bound))
    copies = int(bound.steps["copies"])
    assert bound.steps["raw"] == pytest.approx(reference.cyclic_bound(sigma, d, copies), rel=1e-12)
    assert bound.steps["all_sub_instances"] >= bound.steps["raw"]
    assert bound.failed == (() if bound.steps["raw"] > 0 else ("positive",))


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_printed_closed_form_is_below_the_whole_numbers_where_everything_divides(multiple):
    sigma = np.ones(2**16)
    eta = 0.0151  # B = 64, a power of two like the visits
    d = multiple * required_dimension(2**16, eta, "paper")
    bound = weak_adversary_bound(sigma, d, eta=eta)
    assert bound.steps["copies"] == 64
    assert 0 < bound.steps["closed_form"] <= bound.value


def test_printed_closed_form_can_exceed_the_whole_numbers():
    d = 2 * required_dimension(2**16, 0.0151, "paper") - 1  # one short of two signs per block
    bound = weak_adversary_bound(np.ones(2**16), d, eta=0.0151)
    assert bound.value < bound.steps["closed_form"] < math.sqrt(8) * bound.value


def test_too_few_copies_of_the_paper_withhold_the_bound():
    # ln(d K)^2 is 148 copies; 36 (1 - 0.2939)^148 is 1e-21
    bound = weak_adversary_bound(np.ones(32), 6000, eta=1e-30, copies="paper")
    assert bound.steps["copies"] == 148
    assert "copies_suffice" in bound.failed
    assert bound.value == 0.0


# ---------------------------------------------------------------- least loaded
@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.integers(1, 20))
def test_loads_differ_by_at_most_one_and_the_least_is_as_high_as_claimed(variance, blocks):
    loads = reference.least_loaded_loads(variance, blocks)
    assert loads.max() - loads.min() <= 1 + 1e-12
    assert loads.min() >= (math.fsum(variance) - blocks + 1) / blocks - 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.integers(300, 20_000),
    st.floats(0.05, 0.5),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.sampled_from(["tight", "sharp"]),
)
def test_least_loaded_bound_equals_the_reference(K, eta, level, multiple, copies):
    d = multiple * required_dimension(K, eta, "least_loaded", copies=copies)
    sigma = np.full(K, level)
    bound = weak_adversary_bound(sigma, d, eta=eta, construction="least_loaded", copies=copies)
    J, B = int(bound.steps["guesses"]), int(bound.steps["copies"])
    expected = reference.least_loaded_bound(
        float((sigma**2).sum()), d, J, B, 1.0, LEAST_LOADED_GAP, RHO[copies]
    )
    assert bound.steps["raw"] == pytest.approx(expected, rel=1e-12)
    assert all(holds(bound))
    assert bound.steps.get("all_guesses", 0) >= bound.steps["raw"]
    assert bound.conditions["mean_reward_le_1"] == (multiple * LEAST_LOADED_GAP <= 1)


@pytest.mark.parametrize("copies", ["tight", "sharp"])
def test_printed_least_loaded_closed_form_is_below_the_whole_numbers_where_m_divides_d(copies):
    for K, stop in [(10**5, 10**5), (10**5, 25_000), (30_000, 9000)]:
        sigma = np.where(np.arange(K) < stop, 1.0, 0.0)
        d = required_dimension(K, 0.05, "least_loaded", copies=copies)
        bound = weak_adversary_bound(sigma, d, eta=0.05, construction="least_loaded", copies=copies)
        assert 0 < bound.steps["closed_form"] <= bound.value


def test_least_loaded_bound_is_zero_until_every_block_is_filled():
    K, eta = 10**5, 0.05
    d = required_dimension(K, eta, "least_loaded")
    enough = np.where(np.arange(K) < 2 * 1225 - 1, 1.0, 0.0)
    too_few = np.where(np.arange(K) < 2 * 1225 - 2, 1.0, 0.0)
    assert weak_adversary_bound(enough, d, eta=eta, construction="least_loaded").value > 0
    short = weak_adversary_bound(too_few, d, eta=eta, construction="least_loaded")
    assert (short.value, short.failed) == (0.0, ("variance_fills_blocks", "positive"))


def test_one_guess_and_one_copy_is_the_scaled_hypercube_up_to_the_half_of_chernoff():
    layout = least_loaded_layout(2, 1, eta=0.999)
    assert layout.blocks == 1
    sigma = np.ones(2)
    bound = weak_adversary_bound(sigma, 1, eta=0.999, construction="least_loaded")
    V = bound.steps["guess"]
    assert bound.value == pytest.approx(
        reference.lb_end([V], 1, LEAST_LOADED_GAP / math.sqrt(V)) / 2, rel=1e-12
    )


# ---------------------------------------------------------------- steps of the proofs
@pytest.mark.parametrize("K", [2, 8, 16, 24])
def test_no_policy_stays_below_half_of_the_lemma_more_often_than_six_sevenths(K):
    # d = 1: regret is 2 gap times the wrong rounds, half of the lemma is gap K / 4
    luck = small_games.lucky_probability(K, 1 / math.sqrt(96 * K), K / 8)
    assert luck <= 1 - SUCCESS_SHARP <= 1 - SUCCESS_TIGHT


@pytest.mark.parametrize("order", small_games.ORDERS)
@pytest.mark.parametrize("pair", small_games.PAIRS)
def test_two_games_seen_together_are_worth_the_product_of_their_values(order, pair):
    choice = [
        (3, 1 / math.sqrt(288), lambda wrong: float(wrong < 1)),
        (2, 1 / 12, lambda wrong: math.exp(-0.7 * wrong)),
        (3, 1 / 12, lambda wrong: float(wrong < 2)),
    ]
    games = [choice[i] for i in pair]
    together = small_games.best_together(games, order)
    apart = math.prod(small_games.best_alone(*game) for game in games)
    assert together == pytest.approx(apart, rel=1e-13)


def test_three_games_seen_together_are_worth_the_product_of_their_values():
    game = (2, 1 / 12, lambda wrong: float(wrong < 1))
    together = small_games.best_together([game] * 3, "chosen")
    assert together == pytest.approx(small_games.best_alone(*game) ** 3, rel=1e-13)


@pytest.mark.parametrize("adversary", ["constant", "timid", "bold"])
@pytest.mark.parametrize("V", [1.0, 4.0])
def test_mean_regret_up_to_variance_v_is_at_least_the_integral_without_overshoot(adversary, V):
    gap, runs, rng = LEAST_LOADED_GAP / math.sqrt(V), 40_000, np.random.default_rng(2)
    theta = gap * rng.choice([-1.0, 1.0], runs)
    evidence, clock, cost, full = np.zeros(runs), np.zeros(runs), np.zeros(runs), np.zeros(runs)
    while (active := clock < V).any():
        sure = np.abs(evidence) > 0.8
        sigma = {"constant": np.ones(runs), "timid": np.where(sure, 1, 0.4), "bold": np.where(sure, 0.4, 1)}[
            adversary
        ]
        step = np.where(active, sigma**2, 0.0)
        wrong = np.where(evidence >= 0, 1, -1) * theta < 0
        cost += 2 * gap * wrong * np.minimum(step, np.maximum(V - clock, 0))  # only what falls before V
        full += 2 * gap * wrong * step
        evidence += step * theta + np.sqrt(step) * rng.standard_normal(runs)
        clock += step
    scale = 2 * LEAST_LOADED_GAP * math.sqrt(V)
    error = cost.std() / math.sqrt(runs)
    assert cost.mean() >= scale * RHO["sharp"] - 4 * error
    assert cost.mean() >= scale * RHO["tight"]
    assert (cost <= full).all()
    assert cost.max() <= scale * (1 + 1e-12)
    tv = 1 - 2 * float(normal_tail(gap * math.sqrt(V + 1)))
    assert full.mean() >= gap * (V - (V + 1) * tv)  # with the overshoot, as first planned


@pytest.mark.parametrize("stop", [700, 1200, 2000, "lucky"])
def test_regret_falls_below_the_least_loaded_bound_in_fewer_than_eta_of_runs(stop):
    K, eta, runs, rng = 2000, 0.2, 200, np.random.default_rng(9)
    M = d = required_dimension(K, eta, "least_loaded")
    layout = least_loaded_layout(K, d, eta=eta)
    gap = np.repeat(layout.gaps, layout.copies)
    theta = gap * rng.choice([-1.0, 1.0], (runs, M))
    evidence, regret, estimate = np.zeros((runs, M)), np.zeros(runs), np.zeros(runs)
    playing, stopped = np.ones(runs, bool), np.full(runs, K)
    for k in range(K):
        m = k % M  # sigma = 1: the least loaded block is the next one
        regret += playing * 2 * gap[m] * (np.where(evidence[:, m] >= 0, 1, -1) * theta[:, m] < 0)
        doubt = 1 / (1 + np.exp(2 * gap[m] * np.abs(evidence[:, m])))  # posterior chance of a wrong sign
        estimate += playing * 2 * gap[m] * doubt
        evidence[:, m] += playing * (theta[:, m] + rng.standard_normal(runs))
        # the adversary sees the learner's history, not theta: it stops where regret seems low
        low = (
            estimate < 0.95 * np.median(estimate)
            if stop == "lucky" and k + 1 >= 2 * M
            else np.full(runs, k + 1 == stop)
        )
        stopped[playing & low] = k + 1
        playing &= ~low
    bounds = {
        s: weak_adversary_bound(np.where(np.arange(K) < s, 1.0, 0.0), d, eta=eta, construction="least_loaded")
        for s in np.unique(stopped)
    }
    values = np.array([bounds[s].value for s in stopped])
    every_guess = np.array([bounds[s].steps["all_guesses"] for s in stopped])
    assert (values > 0).all()
    assert (regret < values).mean() < eta
    assert (regret < every_guess).mean() < eta


# ---------------------------------------------------------------- input
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: weak_adversary_bound([0.5, 2.0], 10**6, eta=0.1), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: weak_adversary_bound([0.5], 10**6, eta=0.1), ValueError, "K >= 2"),
        (lambda: weak_adversary_bound(np.ones(4), 0, eta=0.1), ValueError, "d must be >= 1"),
        (lambda: weak_adversary_bound(np.ones(4), 10**6, eta=0.0), ValueError, r"eta must be in \(0, 1\)"),
        (
            lambda: weak_adversary_bound(np.ones(4), 10**6, eta=0.1, construction="ours"),
            ValueError,
            "construction must be",
        ),
        (
            lambda: weak_adversary_bound(np.ones(4), 10**6, eta=0.1, copies="few"),
            ValueError,
            "copies must be one of",
        ),
        (
            lambda: weak_adversary_bound(
                np.ones(4), 10**6, eta=0.1, construction="least_loaded", copies="paper"
            ),
            ValueError,
            "copies must be one of",
        ),
        (lambda: weak_adversary_bound(np.ones(4), 10**6, eta=0.1, x=1.0), ValueError, "V1 and x belong to"),
        (
            lambda: weak_adversary_bound(np.ones(2**12), 14_871, eta=2.0**-12),
            ValueError,
            "d must be >= 14872",
        ),
        (lambda: weak_adversary_bound(np.ones(4), 10**6, eta=None), TypeError, "eta must be a real number"),
        (lambda: required_dimension(1, 0.1, "paper"), ValueError, "K must be >= 2"),
        (lambda: required_dimension(4, 0.1, "ours"), ValueError, "construction must be one of"),
        (lambda: least_loaded_sizes(4, 0.1, V1=0.0), ValueError, "V1 must be finite and > 0"),
        (lambda: least_loaded_sizes(4, 0.1, x=math.inf), ValueError, "x must be finite and > 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_raises_with_the_arguments_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
