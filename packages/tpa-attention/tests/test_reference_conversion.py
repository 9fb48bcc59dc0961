"""The NumPy truth of conversion: exact, truncated, for calibration data, refined."""

from itertools import pairwise

import numpy as np
import pytest
import reference_conversion as conversion
from reference_baselines import Heads, grouped_attention
from reference_layer import FactorMap, Layer, forward, numbers_per_token
from reference_rope import Rope

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10

ROPES = [Rope(), Rope(layout="interleaved", sign=1), Rope(fraction=0.5), None]


def heads(seed, h=6, groups=6, D=4, E=4, d=10):
    rng = np.random.default_rng(seed)
    return Heads(
        rng.normal(size=(h, D, d)),
        rng.normal(size=(groups, D, d)),
        rng.normal(size=(groups, E, d)),
        rng.normal(size=(d, h * E)),
    )


def worked_weights():
    """Worked value 3: W[i,j,l], h=6, D=4, d=10."""
    i, j, k = np.ogrid[0:6, 0:4, 0:10]
    return np.sin(1.1 * i + 0.3 * j * (1 + i) + 0.2 * k**1.5)


def tokens(seed, n, d=10):
    """Correlated hidden states."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("factored_query", [True, False])
@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_mha_gqa_and_mqa_are_tensor_product_attention(rope, factored_query, groups):
    weights = heads(0, groups=groups)
    x = np.random.default_rng(1).normal(size=(2, 5, 10))
    expected = grouped_attention(weights, x, rope)
    found, cache = forward(conversion.exact(weights, rope, factored_query=factored_query), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    assert numbers_per_token(cache) == 2 * groups * 4  # A is free: the cache is that of the original


def test_group_masks_are_scaled_unit_vectors_for_mha_and_ones_for_mqa():
    np.testing.assert_array_equal(conversion.group_masks(4, 4), 4 * np.eye(4))
    np.testing.assert_array_equal(conversion.group_masks(4, 1), np.ones((1, 4)))
    np.testing.assert_array_equal(conversion.group_masks(4, 2), [[2, 2, 0, 0], [0, 0, 2, 2]])


def test_worked_singular_values_and_relative_errors():
    w = worked_weights()
    sigma = np.linalg.svd(w.reshape(6, 40), compute_uv=False)
    printed = (6.75385112929, 6.75151954872, 4.03386650375, 3.44575145587, 0.711434935025, 0.679100765649)
    np.testing.assert_allclose(sigma, printed, rtol=1e-12)  # twelve digits are printed
    errors = (0.7879460349364, 0.4919142595083, 0.3266933050992, 0.0896671661666)
    np.testing.assert_allclose(conversion.relative_errors(sigma)[:4], errors, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_truncation_has_the_error_that_the_singular_values_say(rank):
    w = worked_weights()
    a, b, errors = conversion.truncate(w, rank)
    error = np.linalg.norm(conversion.rebuild(a, b) - w) / np.linalg.norm(w)
    assert error == pytest.approx(errors[rank - 1], rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_heads_are_exact_at_the_rank_of_their_groups(groups):
    w = conversion.per_head(heads(2, groups=groups).k, 6)
    a, b, errors = conversion.truncate(w, groups)
    np.testing.assert_allclose(conversion.rebuild(a, b), w, rtol=0, atol=ROUNDING)
    assert errors[groups - 1] < 1e-14


def test_full_rank_truncation_of_a_layer_reproduces_it_under_rope():
    weights = heads(3, groups=3)
    x = np.random.default_rng(4).normal(size=(2, 5, 10))
    k, v = (conversion.truncate(conversion.per_head(w, 6), 3) for w in (weights.k, weights.v))
    layer = Layer(
        None,
        (FactorMap(weights.q),),
        FactorMap(constant=k.a),
        (FactorMap(k.b),),
        FactorMap(constant=v.a),
        (FactorMap(v.b),),
        weights.o,
    )
    np.testing.assert_allclose(
        forward(layer, x)[0], grouped_attention(weights, x, Rope()), rtol=0, atol=ROUNDING
    )


def mean_error(w, fitted, x):
    """E ||K - K^||^2 over the rows of x."""
    difference = w - conversion.rebuild(fitted.a, fitted.b)
    return float(np.mean(np.sum(np.einsum("hkd,nd->nhk", difference, x) ** 2, axis=(1, 2))))


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_calibrated_truncation_minimises_the_error_in_the_keys(rank):
    w, x = heads(5).k, tokens(6, 200)
    c = conversion.second_moment(x, ridge=0.0)
    fitted, plain = conversion.truncate_for(w, rank, c), conversion.truncate(w, rank)
    size = np.mean(np.sum(np.einsum("hkd,nd->nhk", w, x) ** 2, axis=(1, 2)))
    assert np.sqrt(mean_error(w, fitted, x) / size) == pytest.approx(
        fitted.relative_errors[rank - 1], rel=1e-9
    )
    assert mean_error(w, fitted, x) < mean_error(w, plain, x)
    rng = np.random.default_rng(7)
    for _ in range(20):  # a minimum: small changes of either factor only add error
        moved = fitted._replace(
            a=fitted.a + 1e-3 * rng.normal(size=fitted.a.shape),
            b=fitted.b + 1e-3 * rng.normal(size=fitted.b.shape),
        )
        assert mean_error(w, moved, x) > mean_error(w, fitted, x)


def test_calibration_with_white_inputs_is_plain_truncation():
    w = worked_weights()
    plain, white = conversion.truncate(w, 3), conversion.truncate_for(w, 3, 2.5 * np.eye(10))
    np.testing.assert_allclose(
        conversion.rebuild(*white[:2]), conversion.rebuild(*plain[:2]), rtol=0, atol=ROUNDING
    )
    np.testing.assert_allclose(white.relative_errors, plain.relative_errors, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_calibration_is_never_worse_than_plain_truncation_even_with_the_ridge(rank, seed):
    """Four tokens, ten features: C is singular, the ridge lambda makes C^{-1/2} exist, the bound still holds.

    err(fitted) + lambda |W - W^|^2 <= err(plain) + lambda |W - W_plain|^2 and plain truncation has the least
    |W - W_plain|, so err(fitted) <= err(plain).
    """
    w, x = heads(8 + seed).k, tokens(30 + seed, 4)
    fitted = conversion.truncate_for(w, rank, conversion.second_moment(x))
    plain = conversion.truncate(w, rank)
    size = np.mean(np.sum(np.einsum("hkd,nd->nhk", w, x) ** 2, axis=(1, 2)))
    assert mean_error(w, fitted, x) <= mean_error(w, plain, x) + 1e-12 * size


def test_linear_contextual_factors_are_even_in_the_hidden_state():
    """Why a bias is needed: K(-x) = K(x) and K(2x) = 4 K(x), which no linear map satisfies."""
    rng = np.random.default_rng(10)
    model = conversion.Contextual(np.zeros((2, 6)), rng.normal(size=(2, 6, 10)), rng.normal(size=(2, 4, 10)))
    x = rng.normal(size=(5, 10))
    np.testing.assert_array_equal(conversion.heads_of(model, -x), conversion.heads_of(model, x))
    np.testing.assert_allclose(
        conversion.heads_of(model, 2 * x), 4 * conversion.heads_of(model, x), rtol=1e-14
    )


def test_contextualising_starts_at_the_converted_keys():
    w, x = heads(11).k, tokens(12, 30)
    fitted = conversion.truncate(w, 2)
    found = conversion.heads_of(conversion.contextualise(fitted), x)
    expected = np.einsum("hkd,nd->nhk", conversion.rebuild(fitted.a, fitted.b), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * 10)


def test_refinement_only_lowers_the_error():
    w, x = heads(13).k, tokens(14, 80)
    target = np.einsum("hkd,nd->nhk", w, x)
    start = conversion.contextualise(conversion.truncate_for(w, 2, conversion.second_moment(x)))
    model, errors = conversion.refine(start, x, target, steps=6)
    assert len(errors) > 1
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert float(np.mean((conversion.heads_of(model, x) - target) ** 2)) == pytest.approx(
        errors[-1], rel=1e-9
    )


def test_refinement_finds_a_layer_that_is_contextual_in_truth():
    """Started near a contextual truth, alternating least squares reaches it."""
    rng = np.random.default_rng(15)
    truth = conversion.Contextual(
        rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 4, 5))
    )
    x = rng.normal(size=(200, 5))
    near = truth._replace(w=truth.w + 0.1 * rng.normal(size=truth.w.shape))
    _, errors = conversion.refine(near, x, conversion.heads_of(truth, x), steps=40, ridge=1e-12)
    assert errors[-1] < 1e-12 * errors[0]
