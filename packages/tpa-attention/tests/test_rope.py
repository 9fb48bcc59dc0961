"""RoPE in torch against the NumPy truth: every layout, sign, fraction, scaling and position."""

import jaxtyping
import numpy as np
import pytest
import reference
import reference_rope
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.config import RopeConfig
from tpa_attention.torch.rope import frequencies, rope, rotate, rotation_table, unrope

ROUNDING = 1e-13  # a dozen float64 operations on numbers below 10
FLOAT32 = 2e-6  # three float32 operations on numbers below 5: 2^-24 * 5 * 3, and the rounding of cos and sin

SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with its betas": {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 2048,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3 with its bounds": {
        "rope_type": "llama3",
        "factor": 32.0,
        "original_max_position_embeddings": 2048,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
    },
}
EVERY = [
    pytest.param(layout, sign, fraction, id=f"{layout} {sign:+d} {fraction}")
    for layout in ("half", "interleaved")
    for sign in (-1, 1)
    for fraction in (1.0, 0.5)
]


@pytest.fixture
def unchecked():
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def truth(b, positions, config):
    """The reference's answer to the same call."""
    same = reference_rope.Rope(config.base, config.fraction, config.layout, config.sign, config.scaling)
    return reference_rope.rotate(b.double().numpy(), positions.numpy(), same)


def rows(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def positions_of(seed, *shape, limit=5000):
    return torch.randint(-limit, limit, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("layout", "sign", "fraction"), EVERY)
def test_rope_equals_the_reference(layout, sign, fraction, scaling):
    config = RopeConfig(layout=layout, sign=sign, fraction=fraction, scaling=SCALINGS[scaling])
    b, positions = rows(0, 2, 5, 3, 12), positions_of(1, 2, 5)
    np.testing.assert_allclose(rope(b, positions, config), truth(b, positions, config), rtol=0, atol=ROUNDING)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 16)),
    fraction=st.floats(0, 1),
    base=st.floats(1.5, 1e6),
    layout=st.sampled_from(["half", "interleaved"]),
    sign=st.sampled_from([-1, 1]),
    limit=st.sampled_from([1, 100, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_rope_equals_the_reference_for_any_shape_and_position(
    shape, fraction, base, layout, sign, limit, seed
):
    B, T, R, half = shape
    config = RopeConfig(base=base, fraction=fraction, layout=layout, sign=sign)
    b, positions = rows(seed, B, T, R, 2 * half), positions_of(seed, B, T, limit=limit)
    # an angle of 10^6 carries a float64 rounding of 10^-10, and so do its sine and cosine
    np.testing.assert_allclose(
        rope(b, positions, config), truth(b, positions, config), rtol=0, atol=ROUNDING + 1e-15 * limit
    )


@pytest.mark.parametrize(("layout", "sign", "fraction"), EVERY)
def test_turning_the_rows_of_b_turns_every_materialised_head(layout, sign, fraction):
    config = RopeConfig(layout=layout, sign=sign, fraction=fraction)
    a, b, positions = rows(0, 2, 5, 3, 7), rows(1, 2, 5, 3, 8), positions_of(2, 2, 5)
    before = torch.from_numpy(reference.materialize(a.numpy(), b.numpy()))
    after = reference.materialize(a.numpy(), rope(b, positions, config).numpy())
    np.testing.assert_allclose(rope(before, positions, config), after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
@settings(max_examples=15, deadline=None)
@given(shift=st.integers(-(10**5), 10**5), seed=st.integers(0, 2**31))
def test_logits_do_not_change_when_all_positions_shift(scaling, shift, seed):
    config = RopeConfig(scaling=SCALINGS[scaling])
    q, k, positions = rows(seed, 1, 4, 2, 8), rows(seed + 1, 1, 4, 2, 8), positions_of(seed, 1, 4, limit=50)

    def logits(by):
        return torch.einsum(
            "btrd,bmsd->btmrs", rope(q, positions + by, config), rope(k, positions + by, config)
        )

    # angles of 10^5 carry a float64 rounding of 10^-11; logits are sums of eight products of numbers below 5
    np.testing.assert_allclose(logits(shift), logits(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("layout", "sign", "fraction"), EVERY)
def test_unrope_undoes_rope(layout, sign, fraction, scaling):
    config = RopeConfig(layout=layout, sign=sign, fraction=fraction, scaling=SCALINGS[scaling])
    b, positions = rows(0, 2, 5, 3, 12), positions_of(1, 2, 5)
    np.testing.assert_allclose(
        unrope(rope(b, positions, config), positions, config), b, rtol=0, atol=ROUNDING
    )


def test_unrope_undoes_rope_with_rounded_cosines_and_sines():
    config = RopeConfig(dtype="bfloat16")
    b, positions = rows(0, 2, 5, 3, 8), positions_of(1, 2, 5)
    np.testing.assert_allclose(
        unrope(rope(b, positions, config), positions, config), b, rtol=0, atol=ROUNDING
    )


def test_rounded_cosines_and_sines_are_those_of_bfloat16_in_a_float32_model():
    config = RopeConfig(dtype="bfloat16")
    b, positions = rows(0, 2, 5, 3, 8, dtype=torch.float32), positions_of(1, 2, 5)
    cos, sin = rotation_table(positions, 8, config, dtype=torch.float32)
    assert torch.equal(cos, cos.bfloat16().float())
    assert torch.equal(sin, sin.bfloat16().float())
    difference = (rope(b, positions, config) - rope(b, positions, RopeConfig())).abs().max()
    assert 1e-4 < difference < 5 * 2**-8  # half an ulp of bfloat16 (2^-9) on each of two terms below 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_float64_answer_rounded_once(dtype):
    b, positions = rows(0, 2, 5, 3, 8, dtype=dtype), positions_of(1, 2, 5, limit=10**5)
    turned = rope(b, positions, RopeConfig())
    assert turned.dtype == dtype
    exact = truth(b, positions, RopeConfig())
    half_an_ulp = torch.finfo(dtype).eps / 2 * np.abs(exact)
    assert (np.abs(turned.double().numpy() - exact) <= half_an_ulp + FLOAT32).all()


def test_a_factor_free_of_the_token_turns_with_the_positions_of_all_tokens():
    b, positions = rows(0, 1, 1, 3, 8), positions_of(1, 2, 5)
    expected = rope(b.expand(2, 5, 3, 8), positions, RopeConfig(fraction=0.5))
    assert torch.equal(rope(b, positions, RopeConfig(fraction=0.5)), expected)


def test_one_row_of_positions_serves_the_whole_batch():
    b, positions = rows(0, 3, 5, 2, 8), torch.arange(5)
    assert torch.equal(rope(b, positions, RopeConfig()), rope(b, positions.expand(3, 5), RopeConfig()))
    assert torch.equal(rope(b, positions.int(), RopeConfig()), rope(b, positions, RopeConfig()))


def test_no_rope_returns_the_rows_as_they_are():
    b = rows(0, 2, 5, 3, 7)
    assert rope(b, torch.arange(5), RopeConfig.none()) is b
    assert unrope(b, torch.arange(5), RopeConfig.none()) is b


def test_no_token_is_turned_into_no_token():
    assert rope(rows(0, 2, 0, 3, 8), torch.arange(0), RopeConfig(fraction=0.5)).shape == (2, 0, 3, 8)


def test_a_table_made_once_turns_like_rope():
    config = RopeConfig(fraction=0.5, layout="interleaved")
    b, positions = rows(0, 2, 5, 3, 8), positions_of(1, 2, 5)
    cos, sin = rotation_table(positions, 4, config, dtype=torch.float64)
    assert torch.equal(rotate(b, cos, sin, config), rope(b, positions, config))


def test_frequencies_start_at_one_and_follow_the_base():
    theta, factor = frequencies(8, RopeConfig(base=10000.0))
    np.testing.assert_allclose(theta, [1, 1e-1, 1e-2, 1e-3], rtol=1e-15)
    assert factor == 1.0


def test_the_scaling_of_llama3_keeps_short_waves_stretches_long_ones_and_mixes_between():
    # Llama 3.1: wavelengths 2 pi 500000^(i/64) against 8192/4 and 8192/1
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    plain, _ = frequencies(128, RopeConfig(base=500000.0))
    scaled, factor = frequencies(128, RopeConfig(base=500000.0, scaling=scaling))
    wavelength, ratio = 2 * np.pi / plain, scaled / plain
    short, long = wavelength < 2048, wavelength > 8192
    assert (short.sum(), long.sum()) == (29, 29)
    np.testing.assert_allclose(ratio[short], 1.0, rtol=1e-15)
    np.testing.assert_allclose(ratio[long], 1 / 8, rtol=1e-15)
    # i = 32: 8192 / (2 pi sqrt(500000)) = 1.8438478 turns, s = 0.28128261, 1/8 + 7/8 s
    np.testing.assert_allclose(ratio[32], 0.37112228, rtol=1e-7)
    assert factor == 1.0


def test_gradients_pass_through_the_rotation():
    b, positions = rows(0, 1, 3, 2, 6).requires_grad_(), positions_of(1, 1, 3)
    config = RopeConfig(fraction=0.7, scaling=SCALINGS["yarn"])
    assert torch.autograd.gradcheck(lambda x: rope(x, positions, config), b)
    assert torch.autograd.gradgradcheck(lambda x: rope(x, positions, config), b)


def test_the_types_that_do_not_fit_are_named(unchecked):
    b, positions = rows(0, 2, 5, 3, 8), torch.arange(5)
    with pytest.raises(TypeError, match=r"b must be a floating tensor, got torch.int64"):
        rope(torch.ones(2, 5, 3, 8, dtype=torch.int64), positions, RopeConfig())
    with pytest.raises(TypeError, match=r"position_ids must be integers, got torch.float32"):
        rope(b, positions.float(), RopeConfig())
    with pytest.raises(TypeError, match=r"position_ids must be integers, got torch.bool"):
        rope(b, positions.bool(), RopeConfig())


def test_the_shapes_that_do_not_fit_are_named(unchecked):
    b = rows(0, 2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"b must have shape \(B, T, R, D\), got \(5, 8\)"):
        rope(b[0, :, 0], torch.arange(5), RopeConfig())
    for shape in [(4,), (3, 5), (2, 5, 1), ()]:
        with pytest.raises(ValueError, match=r"position_ids must have shape \(T,\) or \(B, T\) to fit b"):
            rope(b, torch.zeros(shape, dtype=torch.int64), RopeConfig())
    with pytest.raises(ValueError, match=r"width that RoPE rotates must be even, got 7"):
        rope(rows(0, 2, 5, 3, 7), torch.arange(5), RopeConfig())
    cos = torch.ones(5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the rotary dimension must not exceed D = 8, got 10"):
        rotate(b, cos, cos, RopeConfig())
    with pytest.raises(ValueError, match=r"n must be even and > 0, got 3"):
        frequencies(3, RopeConfig())
    with pytest.raises(ValueError, match=r"rope scaling 'ntk' needs more than 2 rotated features, got 2"):
        frequencies(2, RopeConfig(scaling=SCALINGS["ntk"]))
