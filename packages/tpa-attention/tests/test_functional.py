"""The public functions: every implementation against the NumPy truth, and the laws attention obeys."""

from itertools import pairwise, product

import numpy as np
import pytest
import reference
import torch
from attention_cases import assert_close, draw, expected_decode, records, shapes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_attention.config import RopeConfig
from tpa_attention.torch.blockwise import prefers_factored_query
from tpa_attention.torch.functional import merge_partials, tpa_attention, tpa_decode, tpa_decode_factors
from tpa_attention.torch.rope import rope

ROUNDING = 1e-12  # a few hundred float64 operations on logits of size 1 to 50
SINGLE = 2e-5  # the same in float32: 2^-24 * 50 * a few

ATTENTION = ("reference", "sdpa", "auto")
DECODING = ("reference", "sdpa", "blockwise", "auto")


def both(result):
    """Outputs and log-sum-exps in NumPy."""
    return tuple(x.detach().double().numpy() for x in result)


# ------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("impl", ATTENTION)
@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([None, 0.7]),
    rank_scale=st.booleans(),
    masked=st.sampled_from(["no", "bool", "bias", "bias with -inf"]),
)
def test_attention_equals_the_reference(impl, shape, causal, window, scale, rank_scale, masked):
    factors = draw(**shape)
    T, M = shape["T"], shape["M"]
    window = window if causal else None
    rng = np.random.default_rng(shape["seed"])
    given_mask = rng.random((shape["B"], 1, T, M)) < 0.6 if masked == "bool" else None
    bias = rng.normal(size=(shape["H"], T, M)) if masked.startswith("bias") else None
    if masked == "bias with -inf":
        bias = np.where(rng.random(bias.shape) < 0.4, -np.inf, bias)
    mask = reference.causal_mask(T, M, window) if causal else np.ones((T, M), dtype=bool)
    mask = mask if given_mask is None else mask & given_mask
    expected = reference.tpa_attention(*factors, mask=mask, bias=bias, scale=scale, rank_scale=rank_scale)
    attn_mask = given_mask if bias is None else bias
    keywords = {
        "causal": causal,
        "window": window,
        "attn_mask": None if attn_mask is None else torch.from_numpy(attn_mask),
        "scale": scale,
        "rank_scale": rank_scale,
        "impl": impl,
    }
    inputs = tensors(factors)
    assert_close(tpa_attention(*inputs, return_lse=True, **keywords), expected, atol=ROUNDING)
    assert_close([tpa_attention(*inputs, **keywords)], expected[:1], atol=ROUNDING)


@pytest.mark.parametrize("impl", DECODING)
@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(max_queries=16, max_keys=20),
    window=st.sampled_from([None, 1, 3]),
    rank_scale=st.booleans(),
    ragged=st.booleans(),
    masked=st.sampled_from(["no", "bool", "bias"]),
)
def test_decoding_equals_the_reference(impl, shape, window, rank_scale, ragged, masked):
    factors = draw(**shape)
    rng = np.random.default_rng(shape["seed"])
    lens = rng.integers(0, shape["M"] + 1, size=shape["B"]) if ragged else None
    bias = rng.normal(size=(shape["B"], 1, 1, shape["M"])) if masked != "no" else None
    attn_bias = None if bias is None else torch.from_numpy(bias)
    if masked == "bool":
        bias, attn_bias = np.where(bias > 0, 0, -np.inf), attn_bias > 0
    expected = expected_decode(factors, lens, window=window, bias=bias, rank_scale=rank_scale)
    keywords = {
        "seq_lens": None if lens is None else torch.from_numpy(lens.astype(np.int32)),
        "attn_bias": attn_bias,
        "window": window,
        "rank_scale": rank_scale,
        "return_lse": True,
        "impl": impl,
    }
    aq, bq, *kv = tensors(factors)
    assert_close(tpa_decode_factors(aq, bq, *kv, **keywords), expected, atol=ROUNDING)
    cache_k, cache_v, sizes = records(*kv)
    assert_close(tpa_decode(aq, bq, cache_k, cache_v, **sizes, **keywords), expected, atol=ROUNDING)


@pytest.mark.parametrize("impl", DECODING)
@pytest.mark.parametrize("window", [None, 4])
def test_pages_hold_what_a_contiguous_cache_holds(impl, window):
    factors = draw(0, T=2, M=15, B=3)
    aq, bq, *kv = tensors(factors)
    cache_k, cache_v, sizes = records(*kv)
    lens = torch.tensor([15, 7, 0], dtype=torch.int32)
    size = 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:15].view(3, 5).int()
    pages = [torch.full((20, size, c.shape[-1]), torch.nan, dtype=torch.float64) for c in (cache_k, cache_v)]
    for page, cache in zip(pages, (cache_k, cache_v), strict=True):
        page[order.flatten().long()] = cache.view(15, size, -1)
    order[1, 3:], order[2] = -1, 10**6  # entries past the length point nowhere
    keywords = {"seq_lens": lens, "window": window, "return_lse": True, "impl": impl, **sizes}
    got = tpa_decode(aq, bq, *pages, block_table=order, **keywords)
    assert_close(got, expected_decode(factors, lens.numpy(), window=window), atol=ROUNDING)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_as_close_as_float32_is(impl, packed):
    factors = [None if f is None else f.astype(np.float32).astype(np.float64) for f in draw(0, T=9, M=9, B=1)]
    cu = np.array([0, 4, 9]) if packed else np.array([0, 9])
    expected = reference.tpa_attention(*factors, mask=reference.packed_mask(cu, cu))
    bounds = torch.from_numpy(cu) if packed else None
    got = tpa_attention(
        *tensors(factors, torch.float32),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        impl=impl,
        return_lse=True,
    )
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_close(got, expected, atol=SINGLE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_packed_sequences_equal_the_reference_by_sdpa(window, masked):
    factors = draw(0, T=9, M=13, B=1)
    cu_q, cu_k = np.array([0, 3, 3, 4, 9]), np.array([0, 5, 5, 8, 13])
    bias = np.random.default_rng(0).normal(size=(9, 13)) if masked else None
    mask = reference.packed_mask(cu_q, cu_k, window=window)
    got = tpa_attention(
        *tensors(factors),
        window=window,
        attn_mask=None if bias is None else torch.from_numpy(bias),
        cu_seqlens_q=torch.from_numpy(cu_q).int(),
        cu_seqlens_k=torch.from_numpy(cu_k).int(),
        impl="sdpa",
        return_lse=True,
    )
    assert_close(got, reference.tpa_attention(*factors, mask=mask, bias=bias), atol=ROUNDING)


def test_worked_layer_agrees_with_the_specification():
    T, d, h, D, ranks = 4, 6, 2, 4, {"q": 3, "k": 2, "v": 1}
    t, i = torch.arange(T, dtype=torch.float64), torch.arange(d, dtype=torch.float64)
    x = torch.sin(0.1 * (t[:, None] + 1) * (i + 1))

    def weights(rows, columns, phi):
        o = torch.arange(rows, dtype=torch.float64)[:, None]
        return torch.cos(phi + 0.7 * o + 1.3 * torch.arange(columns, dtype=torch.float64))

    def a(name, phi):  # rows of the specification's W^a are head * R + rank
        return (x @ weights(h * ranks[name], d, phi).T).view(1, T, h, ranks[name]).mT

    def b(name, phi):
        return (x @ weights(ranks[name] * D, d, phi).T).view(1, T, ranks[name], D)

    positions, config = torch.arange(T), RopeConfig()
    heads = tpa_attention(
        a("q", 0.1),
        rope(b("q", 0.4), positions, config),
        a("k", 0.2),
        rope(b("k", 0.5), positions, config),
        a("v", 0.3),
        b("v", 0.6),
    )
    y = heads.flatten(-2)[0] @ weights(d, h * D, 0.7).T
    expected = [
        *[0.42272687838258, 0.029245032786357, -0.37799120869553],
        *[-0.60745227845235, -0.55121904994936, -0.23573888921993],
        *[0.7153283603713, 0.040902581770611, -0.65276032015726],
        *[-1.0394198438538, -0.93722397360285, -0.39423702403791],
        *[0.73283474736383, 0.0297825239271, -0.68727688587731],
        *[-1.0810992372561, -0.96646372471171, -0.39728522102318],
        *[0.56698133176376, 0.018009658180645, -0.5394322390535],
        *[-0.84317072539954, -0.75035284468416, -0.30463229652721],
    ]
    # the specification prints 14 significant digits
    np.testing.assert_allclose(y.flatten(), expected, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------ laws of attention


@pytest.mark.parametrize(
    ("function", "impl"),
    [*product([tpa_attention], ATTENTION), *product([tpa_decode_factors], DECODING)],
)
@settings(max_examples=12, deadline=None)
@given(shape=shapes(), c=st.floats(0.1, 10), constant=st.floats(-50, 50))
def test_ranks_and_heads_have_no_order_and_scales_cancel(function, impl, shape, c, constant):
    factors = tensors(draw(**shape))
    aq, bq, ak, bk, av, bv = factors
    options = {"impl": impl, "return_lse": True}
    out, lse = function(*factors, **options)
    generator = torch.Generator().manual_seed(shape["seed"])
    rq, rk, rv = (torch.randperm(b.shape[2], generator=generator) for b in (bq, bk, bv))
    heads = torch.randperm(shape["H"], generator=generator)
    full = aq is None  # then rows of bq are heads
    ranks = (None, bq) if full else (aq[:, :, rq], bq[:, :, rq])
    scales = (None, bq) if full else (c * aq, bq / c)
    others = {
        "ranks": (*ranks, ak[:, :, rk], bk[:, :, rk], av[:, :, rv], bv[:, :, rv]),
        "scales": (*scales, c * ak, bk / c, av / c, c * bv),
    }
    for other in others.values():
        assert_close(function(*other, **options), both((out, lse)), atol=ROUNDING)
    query = (None, bq[:, :, heads]) if full else (aq[..., heads], bq)
    permuted = function(*query, ak[..., heads], bk, av[..., heads], bv, **options)
    assert_close(permuted, both((out[:, :, heads], lse[:, :, heads])), atol=ROUNDING)
    bias = torch.full((1,), constant, dtype=torch.float64)
    name = "attn_mask" if function is tpa_attention else "attn_bias"
    shifted = function(*factors, **{name: bias}, **options)
    # a constant of 50 rounds logits to 50 * 2^-53 and changes nothing but the log-sum-exp
    assert_close(shifted, both((out, lse + constant)), atol=ROUNDING)


@pytest.mark.parametrize("impl", ATTENTION)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (3, 1), (2, 1, 1), (2, 1, 1, 5)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_a_mask_of_few_axes_broadcasts_over_the_others(impl, shape, kind):
    factors = draw(0, T=3, M=5, H=2, kv_only=True)
    numbers = np.random.default_rng(1).normal(size=shape)
    mask, bias = (numbers > 0, None) if kind == "bool" else (None, numbers)
    expected = reference.tpa_attention(
        *factors,
        mask=np.broadcast_to(True if mask is None else mask, (2, 2, 3, 5)),
        bias=None if bias is None else np.broadcast_to(bias, (2, 2, 3, 5)),
    )
    given_mask = torch.from_numpy(np.asarray(numbers if mask is None else mask))
    got = tpa_attention(*tensors(factors), causal=False, attn_mask=given_mask, impl=impl, return_lse=True)
    assert_close(got, expected, atol=ROUNDING)


@pytest.mark.parametrize("impl", DECODING)
@settings(max_examples=12, deadline=None)
@given(shape=shapes())
def test_decode_step_t_is_row_t_of_full_attention(impl, shape):
    T = shape["T"]
    aq, bq, *kv = tensors(draw(**shape | {"M": T}))
    full = tpa_attention(aq, bq, *kv, impl="reference", return_lse=True)
    for t in range(T):
        step = None if aq is None else aq[:, t : t + 1]
        cached = [f[:, : t + 1] for f in kv]
        got = tpa_decode_factors(step, bq[:, t : t + 1], *cached, impl=impl, return_lse=True)
        assert_close(got, both(x[:, t : t + 1] for x in full), atol=ROUNDING)


@pytest.mark.parametrize("impl", ATTENTION)
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 11), max_size=3), window=st.sampled_from([None, 4]))
def test_chunks_of_a_prefill_equal_one_pass(impl, cuts, window):
    T = 11
    aq, bq, *kv = tensors(draw(0, T=T, M=T))
    full = tpa_attention(aq, bq, *kv, window=window, impl="reference")
    bounds = sorted({0, T, *cuts})
    chunks = [
        tpa_attention(aq[:, i:j], bq[:, i:j], *(f[:, :j] for f in kv), window=window, impl=impl)
        for i, j in pairwise(bounds)
    ]
    assert_close([torch.cat(chunks, dim=1)], both([full]), atol=ROUNDING)


@pytest.mark.parametrize("impl", ATTENTION)
@settings(max_examples=12, deadline=None)
@given(shape=shapes(), padding=st.integers(0, 4))
def test_left_padding_changes_nothing(impl, shape, padding):
    T = shape["T"]
    aq, bq, *kv = tensors(draw(**shape | {"T": T + padding, "M": T + padding, "kv_only": False}))
    valid = torch.arange(T + padding) >= padding
    padded = tpa_attention(aq, bq, *kv, attn_mask=valid, impl=impl)
    alone = tpa_attention(*(f[:, padding:] for f in (aq, bq, *kv)), impl=impl)
    assert_close([padded[:, padding:]], both([alone]), atol=ROUNDING)
    assert not padded[:, :padding].any()  # padded queries see padded keys alone, that is none


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 10**5), layout=st.sampled_from(["half", "interleaved"]))
def test_a_shift_of_all_positions_changes_nothing(shift, layout):
    config = RopeConfig(layout=layout)
    aq, bq, ak, bk, av, bv = tensors(draw(0, T=6, M=6))

    def at(start):
        positions = torch.arange(start, start + 6)
        return tpa_attention(
            aq, rope(bq, positions, config), ak, rope(bk, positions, config), av, bv, return_lse=True
        )

    # angles of 10^5 carry a float64 rounding of 10^-11, multiplied by rows of size 10
    assert_close(at(shift), both(at(0)), atol=1e-9)


@pytest.mark.parametrize("impl", DECODING)
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_a_cache_cut_anywhere_merges_to_the_whole(impl, cuts):
    factors = tensors(draw(0, T=1, M=12))
    bounds = [0, *sorted(cuts), 12]
    parts = [
        tpa_decode_factors(*factors[:2], *(f[:, i:j] for f in factors[2:]), impl=impl, return_lse=True)
        for i, j in pairwise(bounds)
    ]
    merged = merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    assert_close(merged, expected_decode([f.numpy() for f in factors]), atol=ROUNDING)


@pytest.mark.parametrize("impl", DECODING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_whose_logits_differ_by_hundreds_merge_to_finite_and_correct_numbers(impl, dtype):
    factors = list(draw(0, T=1, M=8))
    factors[3][:, 4:] *= 400  # keys of the second half
    inputs = tensors(factors, dtype)
    expected = expected_decode([f.double().numpy() for f in inputs])
    parts = [
        tpa_decode_factors(*inputs[:2], *(f[:, half] for f in inputs[2:]), impl=impl, return_lse=True)
        for half in (slice(4), slice(4, 8))
    ]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    assert (lses[0] - lses[1]).abs().max() > 88  # more than float32's exp holds
    rounding = ROUNDING if dtype == torch.float64 else SINGLE
    # a rounding of logits of size 400 is what the softmax sees: ten times that of logits below 50
    assert_close(merge_partials(outs, lses), expected, atol=10 * rounding)
    assert_close(tpa_decode_factors(*inputs, impl=impl, return_lse=True), expected, atol=10 * rounding)


def test_empty_parts_weigh_nothing():
    outs, lses = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2, 4)
    lses[1], lses[:, 0, 0] = -torch.inf, -torch.inf
    out, lse = merge_partials(outs, lses)
    assert not out[0, 0].any() and lse[0, 0] == -torch.inf
    assert_close([out[1]], [(outs[0, 1] + outs[2, 1]).double().numpy() / 2], atol=1e-6)  # float32 mean of two


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("case", ["square", "longer keys", "rows without a key", "windowed", "packed", "lse"])
def test_gradients_by_sdpa_equal_those_of_the_reference(case):
    T, M = {"longer keys": (4, 7), "rows without a key": (7, 4)}.get(case, (6, 6))
    keywords = {"window": 2} if case == "windowed" else {}
    if case == "packed":
        keywords = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 2, 6]))
    gradients = {}
    for impl in ("reference", "sdpa"):
        inputs = tensors(draw(0, T=T, M=M, B=1), requires_grad=True)
        out, lse = tpa_attention(*inputs, impl=impl, return_lse=True, **keywords)
        loss = out.square().sum() + (lse.sin().sum() if case == "lse" else 0)
        gradients[impl] = both(torch.autograd.grad(loss, inputs))
    assert_close(gradients["sdpa"], gradients["reference"], atol=ROUNDING)


@pytest.mark.parametrize("impl", ["sdpa", "blockwise"])
def test_gradients_of_a_decode_equal_those_of_the_reference(impl):
    gradients = {}
    for name in ("reference", impl):
        inputs = tensors(draw(0, T=3, M=9), requires_grad=True)
        out = tpa_decode_factors(*inputs, seq_lens=torch.tensor([9, 2]), window=4, impl=name)
        gradients[name] = both(torch.autograd.grad(out.square().sum(), inputs))
    assert_close(gradients[impl], gradients["reference"], atol=ROUNDING)


# ------------------------------------------------------------------------------------------- types and memory


@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 2, 2)])
def test_attention_under_autocast_is_bfloat16_and_as_close_as_that(ranks):
    factors = tensors(draw(0, T=5, M=5, ranks=ranks), torch.float32)
    expected = tpa_attention(*factors, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = tpa_attention(*factors)
    assert out.dtype == torch.bfloat16
    # Q, K, V and weights rounded to 2^-9 of values below 10: logits off by 0.1, outputs by 0.1 of their size
    np.testing.assert_allclose(out.float(), expected, rtol=0, atol=0.3)


class Allocations(TorchDispatchMode):
    """The largest storage any operation returns that is not one of the given tensors'."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given if x is not None}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_takes_scratch_that_does_not_grow_with_the_cache(ragged, dtype):
    def largest(M):
        factors = tensors(draw(0, T=1, M=M, B=1, H=32, D=8, E=8, ranks=(2, 2, 2)), dtype)
        cache_k, cache_v, sizes = records(*factors[2:])
        lens = torch.tensor([M - 1]) if ragged else None
        mode = Allocations([*factors, cache_k, cache_v])
        with mode:
            tpa_decode(*factors[:2], cache_k, cache_v, seq_lens=lens, **sizes)
        return mode.largest

    assert largest(4 * 2048) == largest(16 * 2048)


def test_a_cache_of_sixteen_bits_is_not_widened_under_autocast():
    factors = tensors(draw(0, T=1, M=4 * 4096, B=1, H=32, D=8, E=8, ranks=(2, 2, 2)), torch.bfloat16)
    mode = Allocations(factors)
    with torch.autocast("cpu", torch.bfloat16), mode:
        out = tpa_decode_factors(*factors)
    assert out.dtype == torch.bfloat16
    assert mode.largest == 4096 * 2 * 32 * 4  # A of one block of 4096 tokens in float32, a quarter of it all


def test_the_query_form_follows_the_count_of_multiply_adds():
    assert prefers_factored_query(16, 32, 64)  # 16 (64 + 32) = 1536 < 2048
    assert prefers_factored_query(6, 34, 64)  # as 16 (64 + 48) = 1792 < 3072
    assert not prefers_factored_query(32, 32, 64)  # 3072 > 2048
    assert not prefers_factored_query(1, 8, 8)  # in tiles of 16: 16 (16 + 16) = 512 > 256
    for rank, heads, width in [(6, 34, 64), (40, 34, 64), (20, 12, 64), (16, 16, 16)]:
        expected = reference.prefers_factored_query(rank, heads, width, tile=16)
        assert prefers_factored_query(rank, heads, width) == expected
