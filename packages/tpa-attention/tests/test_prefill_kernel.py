"""The Triton kernels of whole sequences against the float64 reference: outputs, log-sum-exps and gradients.

Interpreted on the CPU; on a GPU too where there is one. Functions that run in the interpreter's process
import the kernels themselves: Triton decides when it is imported whether kernels are interpreted.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from hopper import compile_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import FLOAT32_ERROR, Case, assert_agrees, kernels, results, rms_error, truth

from tpa_attention.torch.kernels.prefill_config import Plan, Tile, choose_heads, choose_plan

pytest.importorskip("triton", reason="needs triton, which is optional")

TINY = Tile(16, 16, 4, 2)
BLOCKS = Plan(TINY, TINY, TINY)
UNEQUAL = Plan(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))
# R_Q, R_K, R_V; h, D, E: every rank and every size with a few of the others
CALLS = [
    ((1, 1, 1), (1, 8, 8)),
    ((6, 2, 2), (3, 16, 40)),
    ((3, 1, 4), (2, 10, 5)),
    ((None, 1, 1), (2, 24, 8)),
    ((None, 5, 9), (2, 8, 24)),
]
ACROSS = {"tokens": 24, "keys": 24, "heads": 1}  # two blocks, the last of them not full
KEYS_SEEN = {
    "causal": Case(**ACROSS),
    "later chunk": Case(tokens=10, keys=50, heads=1),
    "more queries than keys": Case(tokens=40, keys=9, heads=1),
    "all": Case(tokens=20, keys=24, heads=1, causal=False),
    "window of one": Case(**ACROSS, window=1),
    "window": Case(tokens=30, keys=41, heads=1, window=18),
    "packed": Case(**ACROSS, bounds=((0, 3, 3, 20, 24), (0, 7, 9, 19, 24))),
    "packed window": Case(tokens=40, keys=40, heads=1, window=5, bounds=((0, 18, 40), (0, 18, 40))),
    "packed, all": Case(**ACROSS, causal=False, bounds=((0, 1, 17, 24), (0, 20, 20, 24))),
    "one packed sequence": Case(**ACROSS, bounds=((0, 24), (0, 24))),
}
# A half keeps 11 bits, a bfloat16 8, and O enters gradients; the interpreter cuts off what hardware rounds
HALF_ERROR = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
GPU_CASES = {
    "T6 medium": Case(tokens=300, keys=300, heads=47, width=64, v_width=64, q_rank=6, k_rank=2, v_rank=2),
    "long": Case(tokens=2100, keys=2100, heads=2, width=64, v_width=64, q_rank=6, k_rank=2, v_rank=2),
    "rank 1": Case(tokens=257, keys=257, heads=8, width=128, v_width=128, q_rank=16, k_rank=1, batch=2),
    "full Q": Case(tokens=200, keys=200, heads=6, width=96, v_width=64, q_rank=None),
    "chunk": Case(tokens=100, keys=333, heads=4, width=64, v_width=32),
    "window": Case(tokens=300, keys=300, heads=4, width=64, v_width=64, window=70),
    "all": Case(tokens=130, keys=70, heads=4, width=40, v_width=72, causal=False, layout="projection"),
    "packed": Case(tokens=300, keys=300, heads=4, width=64, v_width=64, bounds=((0, 1, 90, 300),) * 2),
    "dead rows": Case(tokens=200, keys=100, heads=4, width=64, v_width=64, layout="fixed a"),
    "wide": Case(tokens=150, keys=150, heads=2, width=256, v_width=256),
    "many ranks": Case(tokens=150, keys=150, heads=4, width=64, v_width=64, q_rank=12, k_rank=6, v_rank=5),
}
SIZES = {"heads": 4, "width": 64, "v_width": 64, "tokens": 256, "keys": 256}
COMPILED = {
    "T6 medium": Case(**SIZES, q_rank=6, k_rank=2, v_rank=2, dtype=torch.bfloat16),
    "T6 medium, packed": Case(**SIZES, q_rank=6, k_rank=2, v_rank=2, bounds=((0, 9, 256),) * 2),
    "rank 1, window": Case(**SIZES, q_rank=16, k_rank=1, window=99, dtype=torch.float16),
    "full Q, wide": Case(**(SIZES | {"width": 128, "v_width": 128}), q_rank=None, dtype=torch.bfloat16),
}


def compare(cases, error=FLOAT32_ERROR, plan=None, device="cpu"):
    for case in cases:
        assert_agrees(case, results(case, *kernels(plan), device), error)


def attend(case, plan=None):
    return results(case, *kernels(plan))


def attend_with_nan(case, plan):
    """The call where gradients by log-sum-exp are NaN for rows without keys, as those of -inf may be."""
    forward, backward = kernels(plan)

    def poisoned(dout, dlse, *arguments):
        lse = arguments[7]
        return backward(dout, dlse.masked_fill(lse == -torch.inf, torch.nan), *arguments)

    return results(case, forward, poisoned)


def attend_pipelined(case, plan):
    """The call with the loops that the compiler pipelines, in place of the portable ones."""
    from tpa_attention.torch.kernels import prefill, prefill_backward

    class Pipelined:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.kernel[grid](*args, **{**kwargs, "PIPELINED": True})

    kept = prefill._attend, prefill_backward._grad_queries, prefill_backward._grad_keys
    try:
        prefill._attend, prefill_backward._grad_queries, prefill_backward._grad_keys = map(Pipelined, kept)
        return attend(case, plan)
    finally:
        prefill._attend, prefill_backward._grad_queries, prefill_backward._grad_keys = kept


def assert_same_bits(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_the_truth_of_these_tests_is_the_one_in_numpy():
    case = Case(tokens=5, keys=7, batch=2, by_lse=False)
    factors = [x.double().numpy() for x in case.factors()]
    mask = reference.causal_mask(5, 7)
    out, lse = reference.tpa_attention(*factors, mask=mask)
    grads = reference.attention_backward(*factors, case.gradients()[0].double().numpy(), mask=mask)
    for mine, true in zip(truth(case), (out, lse, *grads), strict=True):
        np.testing.assert_allclose(mine, true, atol=1e-12)  # float64, sums of at most 100 numbers


@pytest.mark.parametrize(("ranks", "sizes"), CALLS, ids=str)
def test_every_rank_and_size_agrees_with_the_reference(triton_interpreter, ranks, sizes):
    heads, width, v_width = sizes
    q_rank, k_rank, v_rank = ranks
    ranks = {"q_rank": q_rank, "k_rank": k_rank, "v_rank": v_rank}
    case = Case(9, 11, heads, width, v_width, **ranks, batch=2)
    triton_interpreter(compare, [case])


@pytest.mark.parametrize("name", KEYS_SEEN)
def test_each_query_sees_its_keys_across_blocks(triton_interpreter, name):
    triton_interpreter(compare, [KEYS_SEEN[name]], FLOAT32_ERROR, BLOCKS)


def test_tiles_of_unequal_sizes_agree(triton_interpreter):
    cases = [KEYS_SEEN["causal"], KEYS_SEEN["packed window"]]
    triton_interpreter(compare, cases, FLOAT32_ERROR, UNEQUAL)


@pytest.mark.parametrize("heads", [1, 2])
def test_any_number_of_heads_at_a_time_gives_the_same_bits(triton_interpreter, heads):
    for case in (Case(9, 7, heads=3), Case(5, 5, heads=3, q_rank=None)):
        assert_same_bits(
            triton_interpreter(attend, case, replace(BLOCKS, heads=heads)),
            triton_interpreter(attend, case, replace(BLOCKS, heads=3)),
        )


def test_more_ranks_than_are_unrolled_agree(triton_interpreter):
    triton_interpreter(compare, [Case(5, 5, q_rank=17, k_rank=9, v_rank=8, heads=1)])


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
def test_halves_are_read_and_written_and_lse_stays_float32(triton_interpreter, dtype):
    triton_interpreter(compare, [Case(9, 9, dtype=dtype)], HALF_ERROR[dtype])


@pytest.mark.parametrize("layout", ["projection", "transposed", "fixed a"])
def test_factors_are_read_where_they_lie(triton_interpreter, layout):
    triton_interpreter(compare, [Case(9, 9, layout=layout, batch=2, v_rank=2)])


def test_a_query_without_keys_gives_zero_and_minus_infinity_and_no_gradient(triton_interpreter):
    out, lse, daq, dbq, *_ = triton_interpreter(attend, KEYS_SEEN["more queries than keys"], BLOCKS)
    dead = slice(0, 31)
    assert (out[:, dead] == 0).all()
    assert (lse[:, dead] == -torch.inf).all()
    assert lse[:, 31:].isfinite().all()
    assert (daq[:, dead] == 0).all()
    assert (dbq[:, dead] == 0).all()


def test_no_gradient_of_a_query_without_keys_reaches_the_others(triton_interpreter):
    case = KEYS_SEEN["more queries than keys"]
    assert_same_bits(
        triton_interpreter(attend_with_nan, case, BLOCKS), triton_interpreter(attend, case, BLOCKS)
    )


def test_without_any_key_or_query_there_is_nothing_to_run(triton_interpreter):
    for case in (Case(keys=0), Case(tokens=0), Case(batch=0)):
        triton_interpreter(compare, [case])


def test_a_negative_scale_turns_the_order_of_logits_around(triton_interpreter):
    triton_interpreter(compare, [Case(**ACROSS, scale=-0.7)], FLOAT32_ERROR, BLOCKS)


@pytest.mark.parametrize("spread", [100.0, 1e3])
def test_logits_hundreds_apart_give_finite_and_correct_numbers(triton_interpreter, spread):
    case = Case(**ACROSS, spread=spread, q_rank=1, k_rank=1)
    largest = float(truth(case)[1].abs().max())
    assert largest > 88  # exp(88) overflows float32
    # an error of 2^-22 of a logit is that of its exponential
    triton_interpreter(compare, [case], max(FLOAT32_ERROR, 2.0**-22 * largest), BLOCKS)


def test_gradients_do_not_change_from_run_to_run(triton_interpreter):
    case = Case(tokens=17, keys=9)
    assert_same_bits(triton_interpreter(attend, case, BLOCKS), triton_interpreter(attend, case, BLOCKS))


@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    and tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2])) < (3, 9),
    reason="this interpreter cannot run a range over a number that the kernel computes",
)
def test_the_pipelined_loop_equals_the_portable_one(triton_interpreter):
    case = Case(tokens=18, keys=35, heads=1)
    assert_same_bits(
        triton_interpreter(attend_pipelined, case, BLOCKS), triton_interpreter(attend, case, BLOCKS)
    )


@st.composite
def calls(draw):
    """Any sizes, ranks, masks and layouts that fit a second of interpreting."""
    tokens, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bounds = None
    if draw(st.booleans()):
        cuts = draw(st.integers(0, 3))
        bounds = tuple(
            (0, *sorted(draw(st.lists(st.integers(0, n), min_size=cuts, max_size=cuts))), n)
            for n in (tokens, keys)
        )
    causal = draw(st.booleans())
    return Case(
        tokens=tokens,
        keys=keys,
        heads=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 40)),
        v_width=draw(st.integers(1, 40)),
        q_rank=draw(st.none() | st.integers(1, 5)),
        k_rank=draw(st.integers(1, 4)),
        v_rank=draw(st.integers(1, 4)),
        batch=1 if bounds else draw(st.integers(1, 2)),
        causal=causal,
        window=draw(st.none() | st.integers(1, 40)) if causal else None,
        bounds=bounds,
        layout=draw(st.sampled_from(["plain", "projection", "transposed", "fixed a"])),
        by_lse=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


PLANS = st.sampled_from([None, BLOCKS, replace(UNEQUAL, heads=1), replace(UNEQUAL, heads=2)])


@settings(max_examples=4, deadline=None)
@given(case=calls(), plan=PLANS)
def test_any_call_agrees_with_the_reference(triton_interpreter, case, plan):
    triton_interpreter(compare, [case], FLOAT32_ERROR, plan)


@pytest.mark.slow  # interpreted programs take tens of milliseconds each
@settings(max_examples=120, deadline=None)
@given(case=calls(), plan=PLANS)
def test_many_calls_agree_with_the_reference(triton_interpreter, case, plan):
    triton_interpreter(compare, [case], FLOAT32_ERROR, plan)


@given(
    share=st.integers(1, 6),
    batch=st.integers(1, 64),
    tokens=st.integers(1, 10**6),
    heads=st.integers(1, 128),
    processors=st.sampled_from([1, 108, 132]),
)
def test_as_few_heads_are_expanded_as_keep_the_device_busy(share, batch, tokens, heads, processors):
    found = choose_heads(share, batch, tokens, heads, processors)
    assert 1 <= found <= heads
    programs, fewest, pieces = batch * -(-tokens // 64), -(-heads // share), -(-heads // found)
    assert found == heads or programs * found >= 8 * processors
    # in one piece more, which memory would like, some processors would have less to do
    assert found == fewest or programs * (heads // (pieces + 1)) < 8 * processors


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 64, 65, 128, 129, 256])
def test_every_width_has_tiles_that_a_matrix_instruction_takes(itemsize, width):
    plan = choose_plan(itemsize, width, 1)
    assert plan == choose_plan(itemsize, 1, width)
    for tile in (plan.forward, plan.grad_q, plan.grad_kv):
        assert min(tile.queries, tile.keys) >= 16


@pytest.mark.slow  # seconds per kernel
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile_for_cuda_use_tensor_cores_and_spill_no_tile(name, monkeypatch, tmp_path):
    case = COMPILED[name]
    compiled = compile_for_hopper(lambda: attend(case), monkeypatch, tmp_path)
    assert set(compiled) == {"_attend", "_grad_queries", "_grad_keys", "_expand", "_collect"}
    for kernel, made in compiled.items():
        if kernel in ("_expand", "_collect"):
            assert made.stack == 0
            continue
        assert ("wgmma.mma_async" in made.ptx) == (case.dtype != torch.float32)
        assert made.shared <= (113 if case.width <= 64 else 227) << 10  # two programs, or one, side by side
        # of the four tiles of wide heads, or wide numbers, some is read back: a tenth of the instructions; of
        # narrow ones a fifth, where three programs share a multiprocessor, which an H100 ran 4 % faster
        wide = case.width * case.dtype.itemsize > 128
        shared_by_three = kernel == "_grad_keys" and not wide
        allowed = 0.0 if kernel == "_attend" else 0.2 if shared_by_three else 0.1 if wide else 0.0
        assert made.spills_in_loops <= allowed, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_every_kind_of_call_agrees_on_the_gpu_in_float32(name):
    compare([GPU_CASES[name]], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_halves_on_the_gpu_are_as_close_as_torch_on_materialised_heads(name, dtype):
    from tpa_attention.torch.functional import tpa_attention

    case = replace(GPU_CASES[name], dtype=dtype, by_lse=False)
    found = results(case, *kernels(), "cuda")
    factors = [None if x is None else x.cuda().requires_grad_() for x in case.factors()]
    bounds = None if case.bounds is None else torch.tensor(case.bounds[0], device="cuda")
    out, lse = tpa_attention(
        *factors, causal=case.causal, window=case.window, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
        impl="sdpa", return_lse=True,
    )  # fmt: skip
    present = [x for x in factors if x is not None]
    grads = torch.autograd.grad(out, present, case.gradients()[0].cuda())
    torch_found = (out, lse, *[None] * (6 - len(grads)), *grads)
    for mine, theirs, true in zip(found, torch_found, truth(case), strict=True):
        if true is not None:
            size = float(true[true.isfinite()].square().mean().sqrt())
            # below the rounding of the result neither is better than the other
            floor = size * torch.finfo(dtype if mine.dtype == dtype else torch.float32).eps
            assert rms_error(mine, true) <= 2 * max(rms_error(theirs, true), floor)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [None, 5])
def test_gradients_on_the_gpu_are_the_same_bits_in_every_run(heads):
    case = replace(GPU_CASES["T6 medium"], dtype=torch.bfloat16, tokens=700, keys=700)
    plan = replace(choose_plan(2, 64, 64), heads=heads)
    first = results(case, *kernels(plan), "cuda")
    for _ in range(5):
        assert_same_bits(first, results(case, *kernels(plan), "cuda"))


@pytest.mark.gpu
def test_no_kernel_is_compiled_again_for_another_length_or_batch():
    from tpa_attention.torch.kernels import prefill, prefill_backward

    def compiled():
        return sum(
            len(cache[0])
            for kernel in (prefill._attend, prefill_backward._grad_queries, prefill_backward._grad_keys)
            for cache in kernel.device_caches.values()
        )

    case = replace(GPU_CASES["T6 medium"], dtype=torch.bfloat16, by_lse=False)
    counts = []
    for tokens, batch in ((512, 2), (1024, 2), (1040, 3), (1536, 1)):
        results(replace(case, tokens=tokens, keys=tokens, batch=batch), *kernels(), "cuda")
        counts.append(compiled())
    assert counts == counts[:1] * len(counts)
