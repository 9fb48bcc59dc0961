"""The NumPy truth of the baselines: counts of Table 1, grouped heads, absorbed latent decode."""

import numpy as np
import pytest
import reference_accounting as accounting
import reference_baselines
from reference_accounting import Shape
from reference_baselines import Heads, Latent, grouped_attention
from reference_rope import Rope

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10

d, h, D = 10, 3, 8


def hidden(seed, T=7, B=2):
    return np.random.default_rng(seed).normal(size=(B, T, d))


@pytest.mark.parametrize(("kind", "groups"), [("mha", 6), ("gqa", 3), ("mqa", 1)])
def test_grouped_baselines_have_the_parameters_of_table_one(kind, groups):
    rng = np.random.default_rng(43)
    weights = Heads(*(rng.normal(size=s) for s in ((6, 4, d), (groups, 4, d), (groups, 4, d), (d, 24))))
    shape = Shape(kind, d=d, h=6, D=4, G=groups)
    assert sum(w.size for w in weights) == accounting.parameters(shape)
    x = hidden(44)
    repeated = Heads(
        weights.q, np.repeat(weights.k, 6 // groups, 0), np.repeat(weights.v, 6 // groups, 0), weights.o
    )
    np.testing.assert_allclose(
        grouped_attention(weights, x, Rope()), grouped_attention(repeated, x, Rope()), rtol=0, atol=ROUNDING
    )


def latent(seed):
    rng = np.random.default_rng(seed)
    shapes = ((7, d), (h, D, 7), (h, 4, 7), (5, d), (h, D, 5), (h, D, 5), (4, d), (d, h * D), (7,), (5,))
    return Latent(*(rng.normal(size=s) / np.sqrt(s[-1]) for s in shapes))


def test_absorbed_mla_decode_equals_the_last_row_of_prefill():
    weights, x, rope = latent(45), hidden(46), Rope()
    expected, cache = reference_baselines.mla(weights, x, rope)
    found = reference_baselines.mla_decode(weights, x[:, -1:], rope, 6, cache)
    np.testing.assert_allclose(found[:, 0], expected[:, -1], rtol=0, atol=ROUNDING)


def test_mla_has_the_cache_and_parameters_of_table_one():
    weights = latent(47)
    shape = Shape("mla", d=d, h=h, D=D, d_c=5, d_cq=7, d_r=4)
    assert sum(w.size for w in weights) == accounting.parameters(shape) + accounting.latent_norms(shape)
    _, cache = reference_baselines.mla(weights, hidden(48), Rope())
    assert sum(array[0, 0].size for array in cache) == accounting.cache_numbers(shape)
