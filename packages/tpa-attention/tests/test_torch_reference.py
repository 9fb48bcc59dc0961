"""The truth inside the package against the NumPy truth, to rounding, and its first and second derivatives."""

from unittest import mock

import numpy as np
import pytest
import reference
import torch
from attention_cases import assert_close, draw, expected_decode, shapes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import WORKED_LSE, WORKED_OUT, worked_decode
from torch.utils.flop_counter import FlopCounterMode

from tpa_attention.torch import blockwise
from tpa_attention.torch import reference as plain

ROUNDING = 1e-12  # a few hundred float64 operations on logits of size 1 to 50
PRINTED = 1e-13  # the specification prints 14 significant digits of numbers below 2


def blocks_of_two(factored):
    """Blockwise decoding with the query in one of its forms, whichever is cheaper."""

    def decode(*factors, **keywords):
        with mock.patch.object(blockwise, "prefers_factored_query", lambda *_: factored):
            return blockwise.tpa_decode_factors(*factors, block=2, **keywords)

    return decode


DECODERS = {
    "reference": plain.tpa_decode_factors,
    "blocks of two": blocks_of_two(factored=True),
    "blocks of two with a full query": blocks_of_two(factored=False),
    "one block": blockwise.tpa_decode_factors,
}


@pytest.mark.parametrize("decode", DECODERS)
def test_worked_decode_agrees_with_the_specification(decode):
    out, lse = DECODERS[decode](*tensors(worked_decode()))
    np.testing.assert_allclose(out[0, 0], WORKED_OUT, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(lse[0, 0], WORKED_LSE, rtol=0, atol=PRINTED)


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes(),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([None, 0.7]),
    rank_scale=st.booleans(),
    masked=st.sampled_from(["no", "bool", "bias"]),
)
def test_attention_equals_the_numpy_reference(shape, causal, window, scale, rank_scale, masked):
    factors = draw(**shape)
    T, M = shape["T"], shape["M"]
    window = window if causal else None
    rng = np.random.default_rng(shape["seed"])
    given_mask = rng.random((shape["B"], 1, T, M)) < 0.7 if masked == "bool" else None
    bias = rng.normal(size=(shape["H"], T, M)) if masked == "bias" else None
    mask = reference.causal_mask(T, M, window) if causal else np.ones((T, M), dtype=bool)
    mask = mask if given_mask is None else mask & given_mask
    expected = reference.tpa_attention(*factors, mask=mask, bias=bias, scale=scale, rank_scale=rank_scale)
    attn_mask = given_mask if bias is None else bias
    got = plain.tpa_attention(
        *tensors(factors),
        causal=causal,
        window=window,
        attn_mask=None if attn_mask is None else torch.from_numpy(attn_mask),
        scale=scale,
        rank_scale=rank_scale,
    )
    assert_close(got, expected, atol=ROUNDING)


@pytest.mark.parametrize("decode", DECODERS)
@settings(max_examples=30, deadline=None)
@given(
    shape=shapes(),
    window=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([None, 0.7]),
    rank_scale=st.booleans(),
    ragged=st.booleans(),
    biased=st.booleans(),
)
def test_decode_equals_the_numpy_reference(decode, shape, window, scale, rank_scale, ragged, biased):
    factors = draw(**shape)
    rng = np.random.default_rng(shape["seed"])
    lens = rng.integers(0, shape["M"] + 1, size=shape["B"]) if ragged else None
    bias = rng.normal(size=(shape["T"], shape["M"])) if biased else None
    keywords = {"scale": scale, "rank_scale": rank_scale, "window": window}
    expected = expected_decode(factors, lens, bias=bias, **keywords)
    got = DECODERS[decode](
        *tensors(factors),
        seq_lens=None if lens is None else torch.from_numpy(lens),
        attn_bias=None if bias is None else torch.from_numpy(bias),
        **keywords,
    )
    assert_close(got, expected, atol=ROUNDING)


@pytest.mark.parametrize("N", [1, 3])
def test_a_query_of_low_rank_stays_factored(N):
    factors = draw(0, T=N, M=9, H=33, D=20, ranks=(4, 2, 2))
    assert blockwise.prefers_factored_query(4, 33, 20)
    assert_close(blockwise.tpa_decode_factors(*tensors(factors)), expected_decode(factors), atol=ROUNDING)


@pytest.mark.parametrize("decode", DECODERS)
def test_what_lies_past_the_length_is_never_used(decode):
    factors = [np.copy(f) for f in draw(0, T=2, M=9)]
    lens = np.array([4, 0])
    expected = expected_decode(factors, lens)
    for garbage in factors[2:]:
        garbage[0, 4:], garbage[1] = np.nan, np.inf
    inputs = tensors(factors, requires_grad=True)
    got = DECODERS[decode](*inputs, seq_lens=torch.from_numpy(lens))
    assert_close(got, expected, atol=ROUNDING)
    got[0].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


@pytest.mark.parametrize("cu", [([0, 3, 3, 4, 9], [0, 5, 5, 8, 13]), ([0, 9], [0, 13])])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, None)])
def test_packed_sequences_equal_the_reference_and_each_one_alone(cu, causal, window):
    factors = draw(0, T=9, M=13, B=1)
    cu_q, cu_k = (np.array(bounds) for bounds in cu)
    mask = reference.packed_mask(cu_q, cu_k, causal=causal, window=window)
    got = plain.tpa_attention(
        *tensors(factors),
        causal=causal,
        window=window,
        cu_seqlens_q=torch.from_numpy(cu_q),
        cu_seqlens_k=torch.from_numpy(cu_k),
    )
    assert_close(got, reference.tpa_attention(*factors, mask=mask), atol=ROUNDING)
    for j in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[j : j + 2]), slice(*cu_k[j : j + 2])
        alone = plain.tpa_attention(
            *tensors([f[:, rows] for f in factors[:2]] + [f[:, keys] for f in factors[2:]]),
            causal=causal,
            window=window,
        )
        assert_close([x[:, rows] for x in got], alone, atol=ROUNDING)


@pytest.mark.parametrize("kv_only", [False, True])
def test_attention_is_differentiable_twice(kv_only):
    inputs = tensors(
        draw(0, T=3, M=2, B=1, H=2, D=2, E=3, ranks=(2, 1, 2), kv_only=kv_only), requires_grad=True
    )
    given_ones = [x for x in inputs if x is not None]  # the first query sees no key at all

    def attention(*factors):
        out, lse = plain.tpa_attention(*([None] if kv_only else []), *factors)
        return out, lse[:, 1:]  # -inf has no difference quotient

    assert torch.autograd.gradcheck(attention, given_ones)
    assert torch.autograd.gradgradcheck(attention, given_ones)


@pytest.mark.parametrize("decode", DECODERS)
def test_decode_is_differentiable_twice(decode):
    inputs = tensors(draw(0, T=2, M=3, B=1, H=2, D=2, E=3, ranks=(2, 1, 2)), requires_grad=True)
    assert torch.autograd.gradcheck(DECODERS[decode], inputs)
    assert torch.autograd.gradgradcheck(DECODERS[decode], inputs)


def test_gradients_equal_the_formulas_of_the_specification():
    factors = draw(0, T=5, M=7)
    inputs = tensors(factors, requires_grad=True)
    out, _ = plain.tpa_attention(*inputs, window=3)
    d_out = np.random.default_rng(1).normal(size=tuple(out.shape))
    out.backward(torch.from_numpy(d_out))
    expected = reference.attention_backward(*factors, d_out, mask=reference.causal_mask(5, 7, 3))
    assert_close([x.grad for x in inputs], expected, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decode", DECODERS)
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(decode, dtype):
    factors = tensors(draw(0, T=2, M=9), dtype)
    expected = expected_decode([f.double().numpy() for f in factors])
    out, lse = DECODERS[decode](*factors)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # float32 arithmetic of logits below 50 (2^-24 * 50 * a few), then half an ulp of the result
    np.testing.assert_allclose(lse.double(), expected[1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(out.double(), expected[0], rtol=torch.finfo(dtype).eps / 2, atol=2e-5)


@pytest.mark.parametrize("attend", [plain.tpa_attention, *DECODERS.values()])
def test_autocast_changes_nothing_where_the_arithmetic_is_chosen(attend):
    factors = tensors(draw(0), torch.float32)
    plainly = attend(*factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, attend(*factors), plainly))


@pytest.mark.parametrize(("H", "D", "ranks"), [(32, 64, (16, 1, 1)), (32, 64, (8, 2, 2)), (5, 4, (3, 2, 1))])
def test_decode_multiplies_as_often_as_appendix_a_counts(H, D, ranks):
    rq, rk, rv = ranks

    def products(M):
        factors = tensors(draw(0, T=1, M=M, B=1, H=H, D=D, E=D, ranks=ranks), torch.float32)
        with FlopCounterMode(display=False) as counter:
            plain.tpa_decode_factors(*factors)
        return counter.get_total_flops()

    slope = rq * rk * D + H * rq * rk + H * rv * D  # (A.4), multiply-adds; the counter counts both
    assert products(24) - products(8) == 2 * 16 * slope
