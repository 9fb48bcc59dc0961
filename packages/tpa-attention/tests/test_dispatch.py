"""Which implementation answers, and that kernels get whole factors of logits and outputs."""

import numpy as np
import pytest
import torch
from attention_cases import draw, expected_decode, records, tensors

from tpa_attention.torch import dispatch
from tpa_attention.torch.functional import tpa_decode, tpa_decode_factors

SINGLE = 2e-5  # float32 arithmetic of logits below 50: 2^-24 * 50 * a few


def errors_of_kernels():
    """Largest errors of impl="triton" against the NumPy truth: factors, records and pages."""
    found = []
    lens = np.array([9, 4])
    bias = np.random.default_rng(0).normal(size=(2, 1, 1, 9))
    for rank_scale in (True, False):
        for kv_only in (True, False):
            factors = draw(0, T=2, M=9, kv_only=kv_only)
            aq, bq, *kv = tensors(factors, torch.float32)
            cache_k, cache_v, sizes = records(*kv)
            keywords = {"seq_lens": torch.from_numpy(lens).int(), "rank_scale": rank_scale, "impl": "triton"}
            allowed = np.where(bias > 0, 0, -np.inf)
            pages = [cache.flatten(0, 1).unflatten(0, (-1, 3)) for cache in (cache_k, cache_v)]
            table = torch.arange(6, dtype=torch.int32).view(2, 3)
            pairs = [
                (tpa_decode_factors(aq, bq, *kv, attn_bias=torch.from_numpy(bias > 0), **keywords), allowed),
                (tpa_decode(aq, bq, cache_k, cache_v, window=3, **sizes, **keywords), None),
                (tpa_decode(aq, bq, *pages, block_table=table, **sizes, **keywords), None),
            ]
            for (out, b), window in zip(pairs, (None, 3, None), strict=True):
                expected = expected_decode(factors, lens, bias=b, window=window, rank_scale=rank_scale)
                found.append(float(np.abs(out.double().numpy() - expected[0]).max()))
    return found


def test_kernels_give_what_the_reference_gives(triton_interpreter):
    found = triton_interpreter(errors_of_kernels, timeout=120)
    assert len(found) == 12
    assert max(found) <= SINGLE


def test_auto_decodes_in_blocks_on_the_cpu():
    assert dispatch.chosen("auto", torch.ones(1)) == "blockwise"


@pytest.mark.parametrize("impl", ["reference", "sdpa", "flex", "blockwise"])
def test_a_name_is_what_is_chosen(impl):
    assert dispatch.chosen(impl, None, torch.ones(1)) == impl


def test_a_type_that_the_kernels_do_not_take_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert dispatch.chosen("triton", None, single) == "triton"
    with pytest.raises(RuntimeError, match="it takes float32, float16 and bfloat16, got torch"):
        dispatch.chosen("triton", single, double)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "needs_gradient", "expected"),
    [
        (torch.bfloat16, False, "triton"),
        (torch.float32, False, "triton"),
        (torch.float64, False, "blockwise"),
        (torch.float32, True, "blockwise"),
    ],
)
def test_auto_takes_the_kernel_where_type_and_gradient_allow(dtype, needs_gradient, expected):
    pytest.importorskip("triton")
    x = torch.ones(1, device="cuda", dtype=dtype, requires_grad=needs_gradient)
    assert dispatch.chosen("auto", None, x) == expected
    with torch.no_grad():
        assert dispatch.chosen("auto", x) == ("blockwise" if dtype == torch.float64 else "triton")


# ------------------------------------------------------------------------------------------ whole sequences


def whole(dtype=torch.float32, device="cpu", width=8):
    """Six factors of one sequence."""
    return tensors_on(device, tensors(draw(0, T=5, M=5, D=width), dtype))


def tensors_on(device, factors):
    return tuple(None if x is None else x.to(device) for x in factors)


def test_auto_attends_by_torch_on_the_cpu():
    assert dispatch.chosen_attention("auto", whole(), None) == "sdpa"
    for impl in ("reference", "sdpa", "flex"):
        assert dispatch.chosen_attention(impl, whole(), None) == impl


def test_the_type_of_a_call_is_the_widest_of_its_factors_or_that_of_autocast():
    half, single, double = whole(torch.bfloat16), whole(), whole(torch.float64)
    assert dispatch.compute_type(half) == torch.bfloat16
    assert dispatch.compute_type((*half[:3], *single[3:])) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.compute_type((*half[:3], *single[3:])) == torch.bfloat16
        assert dispatch.compute_type((*half[:3], *double[3:])) == torch.float64


def test_what_the_kernel_for_whole_sequences_does_not_take_is_named():
    assert dispatch.attention_problem(whole(), None) is None
    mask = torch.ones(5, 5, dtype=torch.bool)
    assert "takes no attn_mask; use impl='auto' or 'sdpa'" in dispatch.attention_problem(whole(), mask)
    assert "got torch.float64" in dispatch.attention_problem(whole(torch.float64), None)
    assert "up to 256 wide, got 258" in dispatch.attention_problem(whole(width=258), None)


@pytest.mark.gpu
def test_auto_attends_by_the_kernel_on_the_gpu_in_16_bits():
    pytest.importorskip("triton")
    for dtype, expected in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "sdpa")):
        factors = whole(dtype, "cuda")
        assert dispatch.chosen_attention("auto", factors, None) == expected
        assert dispatch.chosen_attention("triton", factors, None) == "triton"
    mask = torch.ones(5, 5, dtype=torch.bool, device="cuda")
    assert dispatch.chosen_attention("auto", whole(torch.bfloat16, "cuda"), mask) == "sdpa"
    assert dispatch.chosen_attention("auto", whole(torch.bfloat16, "cuda", 258), None) == "sdpa"
    with pytest.raises(RuntimeError, match="its kernel for whole sequences takes no attn_mask"):
        dispatch.chosen_attention("triton", whole(torch.bfloat16, "cuda"), mask)
