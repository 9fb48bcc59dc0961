"""Coverage of the confidence radii by Monte Carlo, and where docs/radii.md finds another constant.

theta* and S_theta are 0 in the simulations, so that nothing but the noise part of a radius is tried; the bias
part is an identity. The design follows the error: every other action points where the estimate is worst.
Each radius is also shown to fail when it is made too small, so that these tests can fail.
"""

import math

import derived_radii as derived
import numpy as np
import pytest
from reference import OFUL, WeightedOFUL, WeightedOFULPlus
from reference_layers import SAVE

RUNS = 1500


def too_often(misses, delta):
    """True if the frequency of misses exceeds delta by more than three standard errors."""
    return np.mean(misses) > delta + 3 * math.sqrt(delta * (1 - delta) / len(misses))


def worst_direction(inverse, total, k, rng):
    """Unit actions [runs, d]: along the error V^{-1} S in odd rounds, at random in even rounds."""
    free = rng.normal(size=total.shape)
    error = np.einsum("nij,nj->ni", inverse, total)
    x = error if k % 2 and np.all(np.linalg.norm(error, axis=1) > 0) else free
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def worst_ratio(rounds, d, lam, noise, weigh, radius, *, seed, norm=None):
    """max over n of ||sum w^2 x noise||_{Z^{-1}} / radius(n, ln det ratio) in each of the runs.

    weigh(norms before the update) gives the weight w of x. Actions have length 1, or with `norm` that length
    in the norm of the inverse Gram matrix.
    """
    rng = np.random.default_rng(seed)
    inverse = np.tile(np.eye(d) / lam, (RUNS, 1, 1))
    total = np.zeros((RUNS, d))
    log_det = np.zeros(RUNS)
    worst = np.zeros(RUNS)
    for k in range(1, rounds + 1):
        x = worst_direction(inverse, total, k, rng)
        norms = np.sqrt(np.einsum("ni,nij,nj->n", x, inverse, x))
        if norm is not None:
            x = x * (norm / norms)[:, None]
            norms = np.full(RUNS, norm)
        w = weigh(norms)
        solved = np.einsum("nij,nj->ni", inverse, x)
        grow = 1 + w**2 * norms**2
        total = total + (w**2 * noise(rng))[:, None] * x
        inverse = inverse - (w**2 / grow)[:, None, None] * solved[:, :, None] * solved[:, None, :]
        log_det = log_det + np.log(grow)
        error = np.sqrt(np.maximum(np.einsum("ni,nij,nj->n", total, inverse, total), 0))
        worst = np.maximum(worst, error / radius(k, log_det))
    return worst


def mixture(delta):
    """The radius of the method of mixtures for 1-subgaussian noise."""
    return lambda _, log_det: np.sqrt(log_det + 2 * math.log(1 / delta))


def signs(rng):
    return rng.choice([-1.0, 1.0], size=RUNS)


def rare(p):
    """Centred skewed noise in [-1, 1]: 1 - p with probability p, else -p, of variance p (1 - p)."""
    return lambda rng: (rng.random(RUNS) < p) - p


def constant(w):
    return lambda norms: np.full_like(norms, w)


def test_oful_covers_and_half_its_radius_does_not():
    worst = worst_ratio(200, 2, 1.0, signs, constant(1.0), mixture(0.1), seed=0)
    assert not too_often(worst > 1, 0.1)
    assert too_often(worst > 0.5, 0.1)


def test_oful_determinant_and_its_trace_bound_agree_with_the_reference():
    det, trace = OFUL(3, S_theta=0.0), OFUL(3, S_theta=0.0, radius="trace")
    rng = np.random.default_rng(1)
    for _ in range(50):
        x = rng.normal(size=3)
        x = x / np.linalg.norm(x)
        det.update(x, 0.0)
        trace.update(x, 0.0)
        assert det.beta <= trace.beta


def trace_misses(d, delta, lam, rounds, runs, rng):
    """Runs in which the noise part of the trace radius fails on one repeated coordinate of an R^d problem."""
    sums = np.cumsum(rng.choice([-1.0, 1.0], size=(runs, rounds)), axis=1)
    n = np.arange(1, rounds + 1)
    error = np.abs(sums) / np.sqrt(lam + n)
    radius = np.sqrt(d * np.log((1 + n / lam) / delta))
    return np.any(error > radius, axis=1)


def test_trace_radius_of_oful_fails_in_one_dimension():
    """Docs, section 1: for d = 1 it covers with probability 1 - sqrt(delta), not 1 - delta."""
    delta = 0.01
    misses = trace_misses(1, delta, 20.0, 4000, 1000, np.random.default_rng(2))
    assert too_often(misses, delta)
    assert not too_often(misses, math.sqrt(delta))


def test_trace_radius_of_oful_covers_in_two_dimensions():
    assert not too_often(trace_misses(2, 0.01, 20.0, 4000, 1000, np.random.default_rng(3)), 0.01)


def test_sup_lin_ucb_width_needs_rewards_in_an_interval_of_length_one():
    """Docs, section 2: the printed alpha is right for noise in [-1/2, 1/2] and too small for [-1, 1]."""
    delta = 0.1
    alpha = math.sqrt(0.5 * math.log(2 / delta))  # one action, one round, one stage
    sums = np.sum(np.random.default_rng(4).choice([-1.0, 1.0], size=(RUNS, 100)), axis=1)
    assert not too_often(np.abs(0.5 * sums) / math.sqrt(101) > alpha, delta)
    assert too_often(np.abs(sums) / math.sqrt(101) > alpha, delta)
    ours = derived.sup_lin_ucb_alpha(1, 1, stages=1, delta=delta)
    assert not too_often(np.abs(sums) / math.sqrt(101) > ours, delta)


def test_weighted_ucb_needs_subgaussian_noise_not_only_a_small_variance():
    """Docs, section 4: whitened rare noise of variance 1 breaks the radius; whitened signs do not."""
    delta, p = 0.01, 0.01
    whiten = constant(1 / math.sqrt(p * (1 - p)))
    spikes = worst_ratio(100, 1, 1.0, rare(p), whiten, mixture(delta), seed=5)
    gauss = worst_ratio(100, 1, 1.0, signs, constant(1.0), mixture(delta), seed=5)
    assert too_often(spikes > 1, delta)
    assert not too_often(gauss > 1, delta)


@pytest.mark.parametrize("step", [2 / 3, 4 / 3])
def test_bernstein_constants_solve_the_three_inequalities_of_the_induction(step):
    """(C s + c r)^2 >= (C s + c r)(2 sqrt(2) s + step r) + (s^2 + sqrt(2) s r + 2/3 r^2) / l, termwise."""
    big, small, log_min = derived.C_GAUSS, derived.range_constant(step), math.log(4)
    assert big**2 == pytest.approx(2 * math.sqrt(2) * big + 1 / log_min, rel=1e-14)
    assert small**2 == pytest.approx(step * small + 2 / (3 * log_min), rel=1e-14)
    assert 2 * big * small >= 2 * math.sqrt(2) * small + step * big + math.sqrt(2) / log_min


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_derived_weighted_oful_radius_covers(p):
    assert not too_often(weighted_oful_ratio(rare(p), math.sqrt(p * (1 - p))) > 1, 0.1)


def test_a_twenty_fifth_of_the_derived_weighted_oful_radius_does_not_cover():
    assert too_often(weighted_oful_ratio(signs, 1.0) > 1 / 25, 0.1)


def weighted_oful_ratio(noise, sigma, d=4):
    sbar = max(1 / math.sqrt(d), sigma)

    def radius(n, log_det):
        return derived.weighted_oful_radius(n, d, delta=0.1, S_theta=0.0)

    return worst_ratio(200, d, 1.0, noise, constant(1 / sbar), radius, seed=6)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_derived_weighted_oful_plus_radius_covers(p):
    assert not too_often(weighted_oful_plus_ratio(rare(p), math.sqrt(p * (1 - p))) > 1, 0.1)


def test_a_fiftieth_of_the_derived_weighted_oful_plus_radius_does_not_cover():
    assert too_often(weighted_oful_plus_ratio(signs, 1.0) > 1 / 50, 0.1)


def weighted_oful_plus_ratio(noise, sigma, d=4):
    plus = WeightedOFULPlus(d, K=200)
    bundle = {"lam": plus.lam, "alpha": plus.alpha, "gamma": plus.gamma, "S_theta": 0.0}

    def radius(n, log_det):
        return derived.weighted_oful_plus_radius(n, d, delta=0.1, **bundle)

    def weigh(norms):
        return 1 / np.maximum(max(sigma, plus.alpha), plus.gamma * np.sqrt(norms))

    return worst_ratio(200, d, plus.lam, noise, weigh, radius, seed=7)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(
    ("radius", "too_small"), [(derived.save_mixture_radius, 0.6), (derived.save_bernstein_radius, 0.08)]
)
def test_derived_save_radii_cover_and_a_part_does_not(radius, too_small, layer):
    """Actions of norm 2^{-l} have weight 1, the worst case of |w noise| <= R."""
    scale = 2.0**-layer

    def at(n, log_det):
        return radius(n, layer, layers=1, delta=0.1, S_theta=0.0)

    rounds = min(16 * 4**layer, 400)  # after that (1 + 4^{-l})^n is too large for float64
    worst = worst_ratio(rounds, 2, scale**2, signs, constant(1.0), at, seed=8, norm=scale)
    assert not too_often(worst > 1, 0.1)
    assert too_often(worst > too_small, 0.1)


def test_voful_radius_covers_and_a_third_does_not():
    K, level = 400, 2
    rng = np.random.default_rng(9)
    clipped = np.clip(rng.uniform(-1, 1, size=(RUNS, K)), -(2.0**-level), 2.0**-level)
    terms = clipped * rng.choice([-1.0, 1.0], size=(RUNS, K))
    sums, squares = np.cumsum(terms, axis=1), np.cumsum(terms**2, axis=1)
    radius = np.vectorize(lambda q: derived.voful_radius(q, level, directions=1, layers=1, K=K, delta=0.1))
    ratio = np.max(np.abs(sums) / radius(squares), axis=1)
    assert not too_often(ratio > 1, 0.1)
    assert too_often(ratio > 1 / 3, 0.1)


@pytest.mark.parametrize("d", [1, 2, 8, 64])
@pytest.mark.parametrize("K", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("delta", [0.5, 0.01, 1e-6])
def test_printed_bernstein_radii_are_at_least_the_derived_ones(d, K, delta):
    """The papers' constants are valid: they exceed what the derivation needs, in every round."""
    oful = WeightedOFUL(d, delta=delta)
    plus = WeightedOFULPlus(d, K=K, delta=delta)
    bundle = {"delta": delta, "lam": plus.lam, "alpha": plus.alpha, "gamma": plus.gamma}
    for k in (1, 2, 3, 10, K // 2, K):
        oful.k = plus.k = k
        assert oful.beta >= derived.weighted_oful_radius(k - 1, d, delta=delta)
        assert plus.beta >= derived.weighted_oful_plus_radius(k - 1, d, **bundle)


@pytest.mark.parametrize("K", [10, 1000, 1_000_000])
def test_printed_save_radii_are_at_least_the_derived_ones(K):
    save = SAVE(2, K=K)
    bundle = {"layers": save.layers, "delta": save.delta}
    for n in (1, 2, 9):
        save.count[:] = n
        save.k = n + 1
        for layer in range(1, save.layers + 1):
            if 2.0**layer < 64 * math.sqrt(math.log(4 * (n + 2) ** 2 * save.layers / save.delta)):
                assert save.theory_radius(layer) >= derived.save_bernstein_radius(n, layer, **bundle)


@pytest.mark.parametrize("n", [1, 10, 10_000])
@pytest.mark.parametrize("R", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("v_hat", [0.0, 1.0, 1000.0])
def test_printed_save_radius_is_large_enough_in_the_empirical_branch(n, R, v_hat):
    """Docs, section 6: the largest V that the two inequalities allow is within the printed estimate."""
    layers, delta = 20, 0.01
    log_k = math.log(4 * (n + 1) ** 2 * layers / delta)
    log_k1 = math.log(4 * (n + 2) ** 2 * layers / delta)
    log_peel = math.log(8 * n**2 * layers * (2 + math.log2(n)) / delta)
    scale = 1 / (64 * math.sqrt(log_k1))  # the largest 2^{-l} of this branch

    def radius(variance):
        gaussian = derived.C_GAUSS * math.sqrt(2 * max(variance, R**2 / 2) * log_peel)
        return scale * (gaussian + derived.C_PRODUCT * R * log_peel + 1)

    variance = 0.0
    for _ in range(100):  # the map is increasing with slope < 0.12: its fixed point is the largest V
        variance = 4 * v_hat + 4 * radius(variance) ** 2 + 2 * R**2 * log_peel
    estimate = 8 * v_hat + 6 * R**2 * log_k1 + 16 * scale**2
    printed = 16 * scale * math.sqrt(estimate * log_k) + 6 * scale * R * log_k + 2 * scale
    assert variance <= estimate
    assert radius(variance) <= printed


@pytest.mark.parametrize("layer", [1, 3, 6])
def test_streamed_variance_of_save_equals_the_direct_sum(layer):
    rng = np.random.default_rng(10)
    save = SAVE(3, K=200)
    theta = np.array([0.6, -0.5, 0.3])
    for _ in range(100):
        x = rng.normal(size=3)
        x = x / np.linalg.norm(x)
        save.layer = layer
        save.update(x, theta @ x + 0.3 * rng.normal())
    direct = save.empirical_variance_direct(layer)
    # the identity cancels sum w^2 r^2 against b^T theta: a few hundred rounding errors of size 1e-16
    assert save.empirical_variance(layer) == pytest.approx(direct, abs=1e-13 * save.squares[layer - 1])


def test_variance_bound_of_save_holds_in_the_empirical_branch():
    """V <= 8 V-hat + 6 R^2 l + 2^{4-2l} (docs, section 6) at layer 9, weights 1; V <= V-hat does not hold."""
    layer, layers, updates, p = 9, 10, 1000, 0.05
    scale = 2.0**-layer
    rng = np.random.default_rng(11)
    inverse = np.tile(np.eye(2) / scale**2, (RUNS, 1, 1))
    b, squares = np.zeros((RUNS, 2)), np.zeros(RUNS)
    for k in range(updates):
        x = worst_direction(inverse, b, k, rng)
        x = x * scale / np.sqrt(np.einsum("ni,nij,nj->n", x, inverse, x))[:, None]  # w = 1
        e = rare(p)(rng)
        b = b + e[:, None] * x
        squares = squares + e**2
        solved = np.einsum("nij,nj->ni", inverse, x)
        inverse = inverse - solved[:, :, None] * solved[:, None, :] / (1 + scale**2)
    theta = np.einsum("nij,nj->ni", inverse, b)
    v_hat = squares - np.sum(b * theta, axis=1) - scale**2 * np.sum(theta**2, axis=1)
    variance = updates * p * (1 - p)
    log_k = math.log(4 * (updates + 1) ** 2 * layers / 0.1)
    assert not too_often(variance > 8 * v_hat + 6 * log_k + 16 * scale**2, 0.1)
    assert too_often(variance > v_hat, 0.1)
