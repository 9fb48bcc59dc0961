"""theory.py against the paper's formulas, exact enumeration, exact autocovariances and known methods."""

import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import brentq

from mars_optim import theory

# Formulas that are algebraically equal are compared to this: some hundred float64 roundings.
ROUNDING = 1e-12


def finite_sum(seed, samples=7, dimension=5):
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=(samples, dimension)) + rng.normal(size=dimension)
    return delta, rng.normal(size=(samples, dimension)), rng.normal(size=dimension)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta1", [0.1, 0.5, 0.95, 0.99])
def test_gamma_star_is_the_numeric_minimiser_of_the_enumerated_error(seed, beta1):
    delta, grad, eps = finite_sum(seed)
    star = theory.gamma_star(delta, grad, eps, beta1)

    def slope(gamma):  # the error is quadratic in gamma, so a central difference is its exact derivative
        high, low = (theory.one_step_error(delta, grad, eps, beta1, gamma + d) for d in (1.0, -1.0))
        return high - low

    # The spec asks for 1e-7; the slope is exact up to rounding, so the root is far closer.
    assert star == pytest.approx(brentq(slope, -1e3, 1e3, xtol=1e-13), abs=1e-9)
    at_star = theory.one_step_error(delta, grad, eps, beta1, star)
    assert all(at_star <= theory.one_step_error(delta, grad, eps, beta1, gamma) for gamma in (0.0, 1.0))


def test_one_step_error_is_the_recursion_written_out_for_each_sample():
    delta, grad, eps = finite_sum(3)
    beta1, gamma = 0.9, 0.4
    errors = []
    for i in range(len(delta)):
        momentum_error = (1 - beta1) * (grad[i] - grad.mean(axis=0))
        momentum_error += beta1 * eps + beta1 * (gamma * delta[i] - delta.mean(axis=0))
        errors.append(momentum_error @ momentum_error)
    assert theory.one_step_error(delta, grad, eps, beta1, gamma) == pytest.approx(
        np.mean(errors), rel=ROUNDING
    )


def test_one_step_error_is_what_the_momentum_recursion_produces():
    # f_i(x) = x A_i x / 2 - b_i x, the momentum of eqs. 3.2-3.3 with c = g + gamma beta/(1-beta) (g - h)
    rng = np.random.default_rng(0)
    beta1, gamma = 0.8, 0.7
    curvature, slope = rng.normal(size=(6, 4, 4)), rng.normal(size=(6, 4))
    curvature = curvature + curvature.transpose(0, 2, 1)
    x, x_next, momentum = rng.normal(size=4), rng.normal(size=4), rng.normal(size=4)
    before, after = curvature @ x - slope, curvature @ x_next - slope
    corrected = after + gamma * beta1 / (1 - beta1) * (after - before)
    errors = beta1 * momentum + (1 - beta1) * corrected - after.mean(axis=0)
    expected = np.mean(np.sum(errors**2, axis=1))
    actual = theory.one_step_error(after - before, after, momentum - before.mean(axis=0), beta1, gamma)
    assert actual == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta1", [0.1, 0.5, 0.95, 0.99])
def test_the_best_strength_gains_the_paper_s_m_on_full_strength_which_obeys_the_storm_bound(seed, beta1):
    """Lemma C.2 for samples with gradients A_i x - b_i, which are L-smooth with L the largest ||A_i||."""
    rng = np.random.default_rng(seed)
    curvature, slope = rng.normal(size=(7, 5, 5)), rng.normal(size=(7, 5))
    x, x_next, eps = rng.normal(size=(3, 5))
    grad, before = curvature @ x_next - slope, curvature @ x - slope
    delta = grad - before
    smoothness = max(np.linalg.norm(a, 2) for a in curvature)
    noise = np.mean(np.sum((grad - grad.mean(axis=0)) ** 2, axis=1))
    moved = np.sum((x_next - x) ** 2)
    bound = beta1**2 * eps @ eps + 2 * beta1**2 * smoothness**2 * moved + 2 * (1 - beta1) ** 2 * noise
    star = theory.gamma_star(delta, grad, eps, beta1)
    # the error is a parabola in gamma: M is its drop from 1 to gamma*, >= 0, and 0 at gamma = 1
    gain = beta1**2 * np.mean(np.sum(delta**2, axis=1)) * (1 - star) ** 2
    at_one, at_star = (theory.one_step_error(delta, grad, eps, beta1, gamma) for gamma in (1.0, star))
    assert at_one <= bound
    assert at_star == pytest.approx(at_one - gain, rel=1e-9)  # star is squared, so up to 1e3 times rounding
    assert at_star <= bound - gain


@pytest.mark.parametrize("seed", range(4))
def test_the_misprinted_forms_of_the_overlap_do_not_minimise_the_error(seed):
    delta, grad, eps = finite_sum(seed)
    beta1 = 0.9
    mean_delta, square = delta.mean(axis=0), np.mean(np.sum(delta**2, axis=1))
    star = theory.gamma_star(delta, grad, eps, beta1)
    without_beta = star - (1 - beta1) * (mean_delta @ eps) / (beta1 * square)
    flipped_sign = star + 2 * beta1 * (mean_delta @ eps) / (beta1 * square)
    best = theory.one_step_error(delta, grad, eps, beta1, star)
    assert best < theory.one_step_error(delta, grad, eps, beta1, without_beta)
    assert best < theory.one_step_error(delta, grad, eps, beta1, flipped_sign)


def test_gamma_star_is_one_minus_the_overlap_when_every_sample_moves_alike():
    # no variance in delta and no gradient noise overlap: gamma* = 1 - <Delta, eps> / ||Delta||^2
    delta = np.tile([3.0, 4.0], (5, 1))
    grad = np.random.default_rng(1).normal(size=(5, 2))
    assert theory.gamma_star(delta, grad, np.array([3.0, 4.0]), 0.9) == pytest.approx(0.0, abs=ROUNDING)
    assert theory.gamma_star(delta, grad, np.zeros(2), 0.9) == pytest.approx(1.0, abs=ROUNDING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": np.ones(3)}, r"delta must have shape \(samples, dimension\).*got \(3,\)"),
        ({"delta": np.empty((0, 5))}, r"samples >= 1, got \(0, 5\)"),
        ({"grad": np.ones((2, 5))}, r"grad must have delta's shape \(7, 5\), got \(2, 5\)"),
        ({"eps": np.ones(4)}, r"eps must have shape \(5,\), got \(4,\)"),
        ({"beta1": 0.0}, r"beta1 must be in \(0, 1\), got 0.0"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"delta": np.zeros((7, 5))}, "delta must not be zero"),
    ],
)
def test_gamma_star_names_the_argument_it_refuses(change, message):
    delta, grad, eps = finite_sum(0)
    arguments = {"delta": delta, "grad": grad, "eps": eps, "beta1": 0.9} | change
    with pytest.raises(ValueError, match=message):
        theory.gamma_star(**arguments)


def test_one_step_error_refuses_an_infinite_gamma():
    with pytest.raises(ValueError, match="gamma must be finite, got inf"):
        theory.one_step_error(*finite_sum(0), 0.9, math.inf)


def test_storm_schedule_follows_the_theorem():
    s, c = 1000.0, 33.0
    terms = list(itertools.islice(theory.storm_schedule(s, c), 4))
    etas = [(s + t) ** (-1 / 3) for t in range(5)]
    for t, (eta, beta1, beta2) in enumerate(terms, start=1):
        assert eta == pytest.approx(etas[t], rel=1e-15)
        assert beta1 == pytest.approx(1 - c * etas[t - 1] ** 2, rel=1e-15)
        assert beta2 == pytest.approx(1 - etas[t - 1] ** 6, rel=1e-15)


def test_storm_schedule_starts_with_numbers_worked_by_hand():
    # s = 1000: eta_0 = 0.1, so beta1_1 = 1 - 33 * 0.01 and beta2_1 = 1 - 1e-6; eta_1 = 1001^(-1/3)
    eta, beta1, beta2 = next(theory.storm_schedule(1000.0, 33.0))
    assert (eta, beta1, beta2) == pytest.approx((0.0999666888716, 0.67, 0.999999), rel=1e-9)


@pytest.mark.parametrize(
    ("s", "c", "message"),
    [
        (0.5, 0.1, "s must be finite and >= 1, got 0.5"),
        (math.nan, 1.0, "s must be finite and >= 1, got nan"),
        (8.0, 0.0, "c must be finite and > 0, got 0.0"),
        (8.0, 4.0, r"must be < 1 for the first beta1 to be positive, got 1\.0"),
    ],
)
def test_storm_schedule_refuses_bad_constants_before_the_first_term(s, c, message):
    with pytest.raises(ValueError, match=message):
        theory.storm_schedule(s, c)


@pytest.mark.parametrize(
    ("beta1", "gamma", "expected", "digits"),
    [
        (0.95, 0.025, 1.07006250, 5e-9),
        (0.95, 0.5, 10.975, 5e-10),
        (0.95, 1.0, 39.0, 5e-10),
        (0.9, 0.1, 1.342, 5e-10),
    ],
)
def test_noise_ratio_gives_the_numbers_of_the_spec(beta1, gamma, expected, digits):
    assert theory.noise_ratio(beta1, gamma) == pytest.approx(expected, abs=digits)


@given(beta1=st.floats(0.0, 0.97), gamma=st.floats(0.0, 2.0))
def test_noise_ratio_is_the_sum_of_squares_of_the_impulse_response(beta1, gamma):
    # m is a linear filter of white noise: its variance is the sum of its squared impulse response.
    impulse = np.zeros(3000)
    impulse[0] = 1.0
    average = approximate = previous = 0.0
    a = gamma * beta1 / (1 - beta1)
    squares_average = squares_approximate = 0.0
    for g in impulse:
        average = beta1 * average + (1 - beta1) * g
        approximate = beta1 * approximate + (1 - beta1) * (g + a * (g - previous))
        previous = g
        squares_average += average**2
        squares_approximate += approximate**2
    # the recursion cancels: at beta1 = 0.97, a reaches 65 and the first terms lose about two digits
    assert theory.noise_ratio(beta1, gamma) == pytest.approx(squares_approximate / squares_average, rel=1e-10)


@given(beta1=st.floats(0.0, 0.999), gamma=st.floats(0.0, 1.0))
def test_the_approximate_form_never_reduces_noise(beta1, gamma):
    assert theory.noise_ratio(beta1, gamma) >= 1 - ROUNDING


def test_noise_ratio_is_one_without_correction_or_without_averaging():
    assert theory.noise_ratio(0.95, 0.0) == pytest.approx(1.0, rel=ROUNDING)
    assert theory.noise_ratio(0.0, 0.7) == pytest.approx(1.0, rel=ROUNDING)


@pytest.mark.parametrize(
    ("beta1", "gamma", "message"),
    [
        (1.0, 0.1, r"beta1 must be in \[0, 1\), got 1.0"),
        (0.9, -0.1, "gamma must be finite and >= 0, got -0.1"),
        (0.9, math.inf, "gamma must be finite and >= 0, got inf"),
    ],
)
def test_noise_ratio_refuses_bad_input(beta1, gamma, message):
    with pytest.raises(ValueError, match=message):
        theory.noise_ratio(beta1, gamma)


def mars_momenta(grads, beta1, gamma):
    """m_t of the approximate form with h_1 = 0 and no clipping."""
    momentum, previous, momenta = 0.0, 0.0, []
    for g in grads:
        corrected = g + gamma * beta1 / (1 - beta1) * (g - previous)
        momentum = beta1 * momentum + (1 - beta1) * corrected
        previous = g
        momenta.append(momentum)
    return np.array(momenta)


@pytest.mark.parametrize("updated_first", [False, True])
@given(
    a1=st.floats(0.05, 0.95),
    a2=st.floats(0.05, 1.0),
    b1=st.floats(0.0, 1.0),
    b2=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
@example(a1=0.25, a2=1.0, b1=0.0, b2=5e-324, seed=0)  # the smallest weight there is
def test_linear_momentum_reproduces_the_two_term_recursion(updated_first, a1, a2, b1, b2, seed):
    grads = np.random.default_rng(seed).normal(size=30)
    try:
        beta1, gamma, scale = theory.linear_momentum(a1, a2, b1, b2, updated_first=updated_first)
    except ValueError:
        assert b1 * a2 - a1 * b2 + b2 <= 0 or (not updated_first and a1 * b2 < b1 * a2)
        return
    average, known = 0.0, []
    for g in grads:
        after = a1 * average + a2 * g
        known.append(b1 * (after if updated_first else average) + b2 * g)
        average = after
    # 30 steps with gamma * beta1 / (1 - beta1) <= some hundreds: a few digits above float64 rounding
    np.testing.assert_allclose(scale * mars_momenta(grads, beta1, gamma), known, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.95, 0.98), (0.5, 0.5), (0.0, 0.9)])
def test_lion_is_the_lemma_with_its_own_coefficients(beta1, beta2):
    setting = theory.lion_equivalent(beta1, beta2)
    expected = theory.linear_momentum(beta2, 1 - beta2, beta1, 1 - beta1)
    assert (setting.beta1, setting.gamma, setting.scale) == pytest.approx(expected, abs=ROUNDING)
    assert setting.mars_type == "mars-lion"
    assert setting.is_approx


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.95])
@pytest.mark.parametrize(
    ("equivalent", "mars_type"),
    [(theory.nesterov_equivalent, "mars-sgd"), (theory.muon_equivalent, "mars-shampoo")],
)
def test_nesterov_and_muon_are_lemma_d1_with_their_own_coefficients(momentum, equivalent, mars_type):
    setting = equivalent(momentum)
    expected = theory.linear_momentum(momentum, 1.0, momentum, 1.0, updated_first=True)
    assert (setting.beta1, setting.gamma, setting.scale) == pytest.approx(expected, rel=ROUNDING)
    assert (setting.mars_type, setting.is_approx) == (mars_type, True)


def test_the_default_gamma_is_half_nesterov():
    assert theory.nesterov_equivalent(0.95).gamma == pytest.approx(2 * 0.025, rel=ROUNDING)


def test_storm_is_the_exact_form_at_full_strength():
    assert theory.storm_equivalent(0.9) == ("mars-sgd", 0.9, 1.0, False, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.lion_equivalent(0.99, 0.9), "beta1 must be <= beta2"),
        (lambda: theory.lion_equivalent(0.9, 1.0), r"beta2 must be in \(0, 1\), got 1.0"),
        (lambda: theory.lion_equivalent(-0.1, 0.9), r"beta1 must be in \[0, 1\), got -0.1"),
        (lambda: theory.muon_equivalent(1.0), r"momentum must be in \(0, 1\), got 1.0"),
        (lambda: theory.nesterov_equivalent(0.0), r"momentum must be in \(0, 1\), got 0.0"),
        (lambda: theory.storm_equivalent(1.0), r"beta1 must be in \[0, 1\), got 1.0"),
        (lambda: theory.linear_momentum(1.0, 1.0, 1.0, 1.0), r"a1 must be in \(0, 1\), got 1.0"),
        (lambda: theory.linear_momentum(0.9, 0.0, 0.0, 0.0), r"must be finite and > 0, got 0.0"),
        (lambda: theory.linear_momentum(0.9, 0.1, 1.0, 0.0), "gamma must be finite and >= 0, got -"),
    ],
)
def test_equivalents_refuse_what_has_no_equivalent(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_public_function_names_its_source():
    functions = [f for name, f in inspect.getmembers(theory, inspect.isfunction) if not name.startswith("_")]
    own = [f for f in functions if f.__module__ == theory.__name__]
    assert len(own) >= 8
    assert [f.__name__ for f in own if "Source:" not in (f.__doc__ or "")] == []
