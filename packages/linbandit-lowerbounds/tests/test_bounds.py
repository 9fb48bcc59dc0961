import math

import jax.numpy as jnp
import numpy as np
import pytest
import reference_bounds as reference
from bayes_oracle import bayes_optimal_regret, lemma_gap
from hypothesis import given
from hypothesis import strategies as st

from linbandit_lowerbounds.bounds import (
    HYPERCUBE_KINDS,
    PREFIXED_KINDS,
    hypercube_bound,
    jia_bound,
    jia_rate,
    lattimore_szepesvari_bound,
    oful_upper_bound,
    prefixed_bound,
    rate,
)
from linbandit_lowerbounds.hypercube_bound import max_kl_per_round
from linbandit_lowerbounds.information import kl_bernoulli, tv_upper
from linbandit_lowerbounds.peeling import groups

DIGITS = 0.6e-10  # ten printed decimals and a rounding error
ONES = np.ones(2**14)
TWO_LEVELS = np.repeat([1.0, 0.1], 2**13)
LOG_UNIFORM = 10 ** np.random.default_rng(7).uniform(-3, 0, 2**12)
SEQUENCES = st.lists(st.floats(0, 1), min_size=2, max_size=60).map(np.array)


def holds(bound):
    return [value == 1.0 for name, value in bound.steps.items() if name.endswith(".holds")]


# ---------------------------------------------------------------- fixed variance
def test_hypercube_numbers_match_to_their_printed_digits():
    lemma = hypercube_bound(600, 20)
    assert lemma.value == pytest.approx(25, abs=1e-13)
    assert lemma.steps["gap"] == pytest.approx(1 / 240, abs=1e-17)
    assert lemma.steps["max_regret"] == pytest.approx(100, abs=1e-12)
    tight = hypercube_bound(600, 20, kind="tight")
    assert tight.value == pytest.approx(38.2577806933, abs=DIGITS)
    assert tight.steps["kl"] == pytest.approx(0.1103037714, abs=DIGITS)
    assert hypercube_bound(4096, 4, 0.25).value == pytest.approx(3.2659863237, abs=DIGITS)
    assert hypercube_bound(4096, 4, kind="tight").value == pytest.approx(20.4479726124, abs=DIGITS)
    assert hypercube_bound(2, 1, kind="pinsker_half").value == pytest.approx(
        0.0780058114 * math.sqrt(2), abs=DIGITS
    )


@given(st.integers(2, 3000), st.integers(1, 40), st.floats(0, 1), st.floats(0.01, 1 / 3))
def test_hypercube_bounds_equal_the_reference(K, d, sigma, p0):
    assert hypercube_bound(K, d, sigma, p0).value == pytest.approx(
        reference.lemma_43(K, d, sigma, p0), rel=1e-12
    )
    expected = reference.tight(K, d, sigma, p0)
    # relative error of a divergence of size gap^2 is 2^-52 / gap, its root in TV half of that
    assert hypercube_bound(K, d, sigma, p0, kind="tight").value == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 10**6), st.integers(1, 300), st.floats(0.01, 1), st.floats(0.01, 1 / 3))
def test_three_kinds_are_ordered_and_every_step_of_the_lemma_holds(K, d, sigma, p0):
    lemma, half, tight = (hypercube_bound(K, d, sigma, p0, kind) for kind in HYPERCUBE_KINDS)
    assert all(holds(lemma) + holds(half) + holds(tight))
    assert lemma.value <= half.value * (1 + 1e-12)
    assert half.value <= tight.value * (1 + 1e-9)
    assert tight.value <= tight.steps["random_regret"] <= tight.steps["max_regret"]
    if 2 * p0 * K < d**2 * (1 - 1e-12):
        assert lemma.value == half.value == 0.0
        assert lemma.failed == half.failed == ("K_ge_d2_over_2p0",)
        assert tight.steps["small_group"] == 1.0


def test_worst_regret_is_four_times_and_random_regret_twice_the_lemma():
    bound = hypercube_bound(5000, 11, 0.4)
    assert bound.steps["max_regret"] == pytest.approx(4 * bound.value, rel=1e-14)
    assert bound.steps["random_regret"] == pytest.approx(2 * bound.value, rel=1e-14)


def test_half_of_the_lemma_is_reached_with_probability_one_seventh_or_more():
    assert hypercube_bound(600, 20).steps["probability_half_lemma"] == pytest.approx(1 / 7, abs=1e-14)
    sharper = hypercube_bound(600, 20, kind="pinsker_half").steps["probability_half_lemma"]
    assert sharper == pytest.approx(0.2938844226, abs=DIGITS)


@given(st.integers(1, 12), st.floats(0.02, 1 / 3), st.floats(0.05, 1))
def test_largest_divergence_of_a_flip_is_at_an_end_of_the_segment(d, p0, share):
    gap = share * p0 / (4 * d)
    q = np.linspace(p0 - d * gap, p0 + (d - 2) * gap, 101)
    on_grid = max(kl_bernoulli(q + 2 * gap, q).max(), kl_bernoulli(q, q + 2 * gap).max())
    assert max_kl_per_round(d, gap, p0) == pytest.approx(on_grid, rel=1e-9)  # 2^-52 / gap, as above


@pytest.mark.parametrize("seed", range(5))
def test_chain_rule_pinsker_and_wrong_signs_hold_over_all_histories_of_a_small_game(seed):
    K, gap = 10, lemma_gap(10)
    # any policy without a coin is a table: the action after a history of rewards, here one of random signs
    policy = np.random.default_rng(seed).choice([-1, 1], 2**K)
    histories = (np.arange(2**K)[:, None] >> np.arange(K)) & 1
    actions = np.array([[policy[(1 << k) - 1 + (h & ((1 << k) - 1))] for k in range(K)] for h in range(2**K)])
    success = {theta: 1 / 3 + theta * gap * actions for theta in (1, -1)}
    law = {theta: np.where(histories, p, 1 - p).prod(axis=1) for theta, p in success.items()}
    assert law[1].sum() == pytest.approx(1, abs=1e-13)
    kl = float((law[1] * np.log(law[1] / law[-1])).sum())
    per_round = (law[1][:, None] * kl_bernoulli(success[1], success[-1])).sum(axis=0)
    assert kl == pytest.approx(per_round.sum(), rel=1e-10)  # chain rule
    bound = hypercube_bound(K, 1, kind="tight")
    assert kl <= bound.steps["kl"]
    tv = float(np.abs(law[1] - law[-1]).sum() / 2)
    assert tv <= tv_upper(kl) <= bound.steps["tv"]
    wrong = ((law[1] @ (actions < 0)).sum() + (law[-1] @ (actions > 0)).sum()) / 2
    assert wrong >= K / 2 * (1 - tv)
    assert 2 * gap * wrong >= bound.value


@pytest.mark.parametrize("d", [1, 2, 5, 30])
@pytest.mark.parametrize("fewer", [0.999, 0.5, 0.1])
def test_few_rounds_still_cost_sigma_k_over_eighteen(d, fewer):
    K = max(2, int(1.5 * d**2 * fewer))
    bound = hypercube_bound(K, d, 0.5, kind="tight")
    assert bound.value >= K * 0.5 / 18
    assert bound.steps["gap"] == pytest.approx(1 / (12 * d) if 1.5 * d**2 > K else lemma_gap(K), rel=1e-14)


@pytest.mark.parametrize("K, d", [(2, 1), (3, 1), (4, 1), (6, 1), (2, 2), (3, 2), (4, 2), (2, 3)])
def test_every_kind_lies_below_the_bayes_optimal_regret(K, d):
    tight = hypercube_bound(K, d, kind="tight")
    optimum = bayes_optimal_regret(K, d, gap=tight.steps["gap"])
    assert tight.value < optimum
    for kind in HYPERCUBE_KINDS:
        assert hypercube_bound(K, d, kind=kind).value <= tight.value


# ---------------------------------------------------------------- prefixed variance: peeling
def test_peeling_numbers_match_to_their_printed_digits():
    assert prefixed_bound(ONES, 4).value == pytest.approx(0.4354515536, abs=DIGITS)
    assert prefixed_bound(ONES, 4).steps["groups"] == 15
    assert prefixed_bound(ONES, 4, kind="eq42").value == pytest.approx(0.8531519085, abs=DIGITS)
    theorem = prefixed_bound(TWO_LEVELS, 30, dims="equal")
    assert theorem.value == 0.0
    assert theorem.failed == ("variance_sum_ge_1_plus_384_d2",)
    assert theorem.steps["variance_sum"] == pytest.approx(8273.92, abs=1e-9)
    assert prefixed_bound(TWO_LEVELS, 30, dims="equal", kind="eq42").value == pytest.approx(
        3.6418387161, abs=DIGITS
    )
    total = prefixed_bound(TWO_LEVELS, 30, dims="equal", kind="lemma_sum")
    assert total.value == pytest.approx(5.1961524227, abs=DIGITS)
    assert prefixed_bound(np.ones(2**15), 8).value == pytest.approx(1.15468, abs=0.5e-5)


def test_theorem_needs_124417_rounds_when_d_is_shared_by_all_groups():
    assert prefixed_bound(np.ones(124_417), 18, dims="equal").value > 0
    assert prefixed_bound(np.ones(124_416), 18, dims="equal").failed == ("variance_sum_ge_1_plus_384_d2",)
    assert "d_ge_groups" in prefixed_bound(np.ones(124_417), 17, dims="equal").failed


@pytest.mark.parametrize("dims", ["equal", "occupied", "best"])
@pytest.mark.parametrize("sigma, d", [(TWO_LEVELS[::8], 30), (ONES[:2048], 4), (LOG_UNIFORM[:2048], 26)])
def test_peeling_bounds_equal_the_reference(sigma, d, dims):
    peeling = groups(sigma, d, dims=dims)
    got = {kind: prefixed_bound(sigma, d, dims=dims, kind=kind).steps["raw"] for kind in PREFIXED_KINDS[:4]}
    assert got["theorem"] == pytest.approx(reference.theorem_41(sigma, d), rel=1e-12)
    # the difference of two numbers of like size: absolute error 1e-15 times their size
    assert got["eq42"] == pytest.approx(reference.eq42(sigma, d), rel=1e-11)
    assert got["eq42_sharp"] == pytest.approx(reference.eq42(sigma, d, subtrahend=8), rel=1e-11)
    assert got["lemma_sum"] == pytest.approx(reference.lemma_sum(sigma, peeling.dims.tolist()), rel=1e-12)


def test_tight_sum_adds_tight_hypercubes_at_the_lowest_noise_of_each_group():
    bound = prefixed_bound(TWO_LEVELS, 30, kind="tight_sum")
    expected = reference.tight(2**13, 15, 0.1) + reference.tight(2**13, 15, 1.0)
    assert bound.value == pytest.approx(expected, rel=1e-11)


@given(SEQUENCES, st.integers(1, 30), st.sampled_from(["equal", "occupied", "best"]))
def test_formulas_of_the_paper_never_exceed_what_whole_dimensions_reach(sigma, d, dims):
    bounds = {kind: prefixed_bound(sigma, d, dims=dims, kind=kind) for kind in PREFIXED_KINDS[:5]}
    assert all(all(holds(bound)) for bound in bounds.values())
    for kind in ("theorem", "eq42", "eq42_sharp"):
        assert bounds[kind].value <= bounds["tight_sum"].value * (1 + 1e-9)
    assert 1.5286 * bounds["lemma_sum"].value <= bounds["tight_sum"].value * (1 + 1e-9)
    assert bounds["eq42"].value <= bounds["eq42_sharp"].value or bounds["eq42_sharp"].failed
    for bound in bounds.values():
        assert bound.value == (0.0 if bound.failed else bound.steps["raw"])


def test_printed_equation_42_can_exceed_the_lemma_when_l_does_not_divide_d():
    sigma = np.full(
        2**20, 0.5
    )  # all at the upper end of a group, where the second line of (4.1) has no slack
    bound = prefixed_bound(
        sigma, 22, dims="equal", kind="eq42"
    )  # L = 21: the group gets one dimension, not 22/21
    assert bound.steps["lemma_sum"] < bound.value < bound.steps["pinsker_half_sum"]


def test_printed_formulas_are_withheld_when_the_dimensions_are_elsewhere():
    dims = [0] * 13 + [3, 1]  # sigma = 1 is in group 14
    for kind in ("theorem", "eq42", "eq42_sharp"):
        assert prefixed_bound(ONES, 4, kind=kind).value > 0
    most_to_the_quiet_group = [0] * 5 + [59] + [0] * 8 + [1]
    starved = prefixed_bound(np.repeat([1.0, 0.001], 2**13), 60, dims=most_to_the_quiet_group, kind="eq42")
    assert starved.failed == ("integer_dims",)
    assert prefixed_bound(ONES, 4, dims=dims, kind="eq42").value > 0  # 1 is still more than 4/15
    assert "d_ge_groups" in prefixed_bound(ONES, 4, dims=[0] * 13 + [4, 0], kind="eq42").failed


@given(SEQUENCES)
def test_noise_of_group_0_adds_up_to_less_than_one_over_k(sigma):
    quiet = sigma[groups(sigma).index == 0]
    assert (quiet**2).sum() <= 1 / len(sigma) * (1 + 1e-12)


def test_best_dims_cost_only_the_root_of_the_number_of_groups():
    K, d = len(LOG_UNIFORM), 4
    S = float((LOG_UNIFORM**2).sum())
    value = prefixed_bound(LOG_UNIFORM, d, dims="best", kind="lemma_sum").value
    assert value >= d * math.sqrt((S - 1 / K) / (groups(LOG_UNIFORM).L - 1)) / (16 * math.sqrt(6))


def test_peeling_with_one_occupied_group_is_the_hypercube_at_its_threshold():
    bound = prefixed_bound(ONES, 4, kind="lemma_sum")
    assert bound.value == pytest.approx(hypercube_bound(2**14, 4, 0.5).value, rel=1e-14)
    tight = prefixed_bound(ONES, 4, kind="tight_sum")
    assert tight.value == pytest.approx(hypercube_bound(2**14, 4, 1.0, kind="tight").value, rel=1e-14)


# ---------------------------------------------------------------- other papers
def test_published_numbers_match_to_their_printed_digits():
    assert oful_upper_bound(8, 10**4) == pytest.approx(27615.96992708, abs=0.6e-8)
    assert jia_bound(12, 3, 900.0).value == pytest.approx(3.1426968053, abs=DIGITS)
    assert lattimore_szepesvari_bound(10**4, 1).value == pytest.approx(1.69169, abs=0.5e-5)


def test_jia_bound_counts_whole_rounds_and_states_its_condition():
    bound = jia_bound(12, 3, 903.5)
    expected = math.sqrt(2) / 27 * (225**0.5 + 3 * 226**0.5)  # 903 rounds in turn over four contexts
    assert bound.value == pytest.approx(expected, rel=1e-14)
    assert bound.value < bound.steps["closed_form"]
    assert jia_bound(12, 3, 8.0).value > 0
    assert jia_bound(12, 3, 7.9).failed == ("rounds_per_context_ge_arms_minus_1",)


def test_jia_rates_follow_their_formulas():
    assert jia_rate("weak", d_elu=4, A=9, Lambda=100.0, T=1000).value == 24.0
    assert jia_rate("strong", d_elu=4, A=9, Lambda=100.0, T=1000).value == 24.0
    assert jia_rate("strong", d_elu=400, A=9, Lambda=100.0, T=1000).value == pytest.approx(math.sqrt(9000))


def test_rates_follow_their_formulas():
    sigma = np.full(100, 0.5)
    assert rate("save", 3, sigma)[:2] == ("save", 18.0)
    assert rate("dani", 3, sigma).value == 30.0
    assert rate("chu", 4, sigma).value == 20.0
    assert rate("li-wang-zhou", 3, sigma).value == pytest.approx(30 * math.sqrt(math.log(100)))
    assert [rate(name, 3, sigma).side for name in ("save", "dani")] == ["upper", "lower"]


# ---------------------------------------------------------------- input
@pytest.mark.parametrize("mode", ["float32", "x64"])
def test_values_do_not_depend_on_the_x64_mode(mode, request):
    if mode == "x64":
        request.getfixturevalue("x64")
    levels = np.float32(TWO_LEVELS)
    for kind in PREFIXED_KINDS:
        expected = prefixed_bound(levels.astype(np.float64), 30, kind=kind)
        assert prefixed_bound(jnp.asarray(levels), 30, kind=kind) == expected


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: hypercube_bound(1, 1), ValueError, "K must be >= 2"),
        (lambda: hypercube_bound(2, 0), ValueError, "d must be >= 1"),
        (lambda: hypercube_bound(2.0, 1), TypeError, "K must be an integer"),
        (lambda: hypercube_bound(2, 1, 1.5), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: hypercube_bound(2, 1, math.nan), ValueError, "sigma must be finite"),
        (lambda: hypercube_bound(2, 1, p0=0.0), ValueError, r"p0 must be in \(0, 1/3\]"),
        (lambda: hypercube_bound(2, 1, p0=0.34), ValueError, r"p0 must be in \(0, 1/3\]"),
        (lambda: hypercube_bound(2, 1, kind="loose"), ValueError, "kind must be one of"),
        (lambda: hypercube_bound(5, 2, strict=True), ValueError, r"K must be >= d\^2 / \(2 p0\) = 6"),
        (lambda: prefixed_bound([0.1, 1.2], 1), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: prefixed_bound([0.1, math.nan], 1), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: prefixed_bound([0.1], 1), ValueError, "K >= 2"),
        (lambda: prefixed_bound([0.1, 0.2], 0), ValueError, "d must be >= 1"),
        (lambda: prefixed_bound([0.1, 0.2], 1, kind="eq43"), ValueError, "kind must be one of"),
        (lambda: prefixed_bound([0.1, 0.2], 1, dims="most"), ValueError, "dims must be one of"),
        (
            lambda: prefixed_bound([0.1, 0.2], 1, delta=0.1),
            ValueError,
            "delta must be None with kind='theorem'",
        ),
        (
            lambda: prefixed_bound([0.1, 0.2], 1, delta=0.0, kind="scaled_seq"),
            ValueError,
            "delta must be finite and > 0",
        ),
        (
            lambda: prefixed_bound([0.1, 0.2], 1, dims="best", kind="scaled_seq"),
            ValueError,
            "dims must be left alone",
        ),
        (lambda: jia_bound(2, 3, 1.0), ValueError, "d must be >= 3"),
        (lambda: jia_bound(3, 1, 1.0), ValueError, "A must be >= 2"),
        (lambda: jia_bound(3, 3, 0.0), ValueError, "Lambda must be finite and > 0"),
        (
            lambda: jia_rate("weak", d_elu=100, A=2, Lambda=1.0, T=10),
            ValueError,
            r"d_elu must be <= sqrt\(A T\)",
        ),
        (lambda: lattimore_szepesvari_bound(4, 1, -0.1), ValueError, "sigma must be finite and >= 0"),
        (lambda: lattimore_szepesvari_bound(4, 1, 1.1), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: oful_upper_bound(2, 10, lam=0.5), ValueError, "lam must be finite and >= 1"),
        (lambda: oful_upper_bound(2, 10, delta=1.0), ValueError, r"delta must be in \(0, 1\)"),
        (lambda: rate("lai-robbins", 2, [0.1, 0.2]), ValueError, "name must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_raises_with_the_arguments_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
