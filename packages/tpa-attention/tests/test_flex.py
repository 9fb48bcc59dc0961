"""The FlexAttention route: its masks as functions, and its results.

Compiling FlexAttention for the CPU takes half a minute a mask, so all but one test run it uncompiled.
"""

import numpy as np
import pytest
import reference
import torch
from attention_cases import assert_close, draw, expected_decode, tensors
from torch.nn.attention.flex_attention import create_mask, flex_attention

from tpa_attention.torch import flex
from tpa_attention.torch.functional import tpa_attention, tpa_decode_factors

ROUNDING = 1e-12  # a few hundred float64 operations on logits of size 1 to 50
SINGLE = 2e-5  # the same in float32: 2^-24 * 50 * a few

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def eager(monkeypatch):
    """FlexAttention as it runs without a compiler."""
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)


def dense(B, T, M, **given):
    """What the mask function allows, (B, T, M) for the first head."""
    keywords = {"causal": True, "window": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    keywords |= {"seq_lens": None, "mask": None}
    function = flex.mask_function(T, M, **(keywords | given))
    return create_mask(function, B, 1, T, M, device="cpu")[:, 0].numpy()


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("T", "M"), [(5, 5), (3, 8), (6, 4)])
def test_the_causal_mask_is_aligned_at_the_end(T, M, window):
    assert (dense(1, T, M, window=window)[0] == reference.causal_mask(T, M, window)).all()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_see_themselves_alone(causal, window):
    cu_q, cu_k = np.array([0, 3, 3, 4, 9]), np.array([0, 5, 5, 8, 13])
    window = window if causal else None
    packing = {"cu_seqlens_q": torch.from_numpy(cu_q), "cu_seqlens_k": torch.from_numpy(cu_k)}
    got = dense(1, 9, 13, causal=causal, window=window, **packing)[0]
    assert (got == reference.packed_mask(cu_q, cu_k, causal=causal, window=window)).all()


def test_lengths_and_a_mask_of_the_user_join():
    lens = np.array([7, 2, 0])
    allowed = np.random.default_rng(0).random((3, 1, 3, 7)) < 0.7
    got = dense(3, 3, 7, window=4, seq_lens=torch.from_numpy(lens), mask=torch.from_numpy(allowed))
    assert (got == (reference.ragged_mask(3, 7, lens, 4) & allowed)[:, 0]).all()


def test_nothing_to_mask_is_no_mask():
    assert flex.mask_function(3, 4, False, None, None, None, None, None) is None


@uncompiled
@pytest.mark.parametrize("kind", ["causal", "windowed", "biased", "masked", "everything", "no key"])
def test_attention_equals_the_reference(eager, kind):
    T, M = (6, 4) if kind == "no key" else (5, 9)
    factors = draw(0, T=T, M=M)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(3, T, M)) if kind == "biased" else None
    given = rng.random((2, 1, T, M)) < 0.6 if kind == "masked" else None
    mask = reference.causal_mask(T, M, 2 if kind == "windowed" else None)
    mask = np.ones_like(mask) if kind == "everything" else mask if given is None else mask & given
    attn_mask = given if bias is None else bias
    out = tpa_attention(
        *tensors(factors),
        causal=kind != "everything",
        window=2 if kind == "windowed" else None,
        attn_mask=None if attn_mask is None else torch.from_numpy(attn_mask),
        impl="flex",
    )
    assert_close([out], reference.tpa_attention(*factors, mask=mask, bias=bias)[:1], atol=ROUNDING)


@uncompiled
@pytest.mark.parametrize("kv_only", [False, True])
def test_decoding_equals_the_reference(eager, kv_only):
    factors = draw(0, T=3, M=9, kv_only=kv_only)
    lens = np.array([9, 2])
    out = tpa_decode_factors(*tensors(factors), seq_lens=torch.from_numpy(lens), window=4, impl="flex")
    assert_close([out], expected_decode(factors, lens, window=4)[:1], atol=ROUNDING)


def test_what_the_cpu_cannot_do_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"impl='flex' has no backward pass on the CPU .* use impl='sdpa'"):
        tpa_attention(*tensors(draw(0), requires_grad=True), impl="flex")
    with pytest.raises(RuntimeError, match=r"impl='flex' returns no log-sum-exp on the CPU"):
        tpa_attention(*tensors(draw(0)), impl="flex", return_lse=True)


def compiled_error(_rank, _world_size):
    factors = draw(0, T=20, M=33, D=16, E=16)
    out = tpa_attention(*tensors(factors, torch.float32), window=5, impl="flex")
    expected, _ = reference.tpa_attention(*factors, mask=reference.causal_mask(20, 33, 5))
    return float(np.abs(out.numpy() - expected).max())


@pytest.mark.slow
def test_compiled_attention_equals_the_reference(run_distributed):
    (error,) = run_distributed(compiled_error, 1, timeout=300)
    assert error <= SINGLE


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch 2.11 warns while it compiles
@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 2, 2)])
def test_attention_and_gradients_on_a_gpu_equal_those_of_the_reference(ranks):
    numbers = draw(0, T=200, M=300, B=1, H=4, D=16, E=16, ranks=ranks)
    bounds = {name: torch.tensor([0, n // 3, n], device="cuda") for name, n in (("q", 200), ("k", 300))}
    packing = {"cu_seqlens_q": bounds["q"], "cu_seqlens_k": bounds["k"]}
    results = {}
    for impl, dtype in (("reference", torch.float64), ("flex", torch.float32)):
        inputs = [x.detach().cuda().requires_grad_() for x in tensors(numbers, dtype)]
        out, lse = tpa_attention(*inputs, window=40, impl=impl, return_lse=True, **packing)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        results[impl] = [x.detach().double().cpu().numpy() for x in (out, lse, *gradients)]
    # FlexAttention multiplies float32 in TF32 (2^-11) unless told otherwise; gradients are sums of size 10
    assert_close(results["flex"], results["reference"], atol=5e-2, rtol=1e-2)
