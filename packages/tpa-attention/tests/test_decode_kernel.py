"""The Triton decode against the float64 reference, interpreted on the CPU; on a GPU too where there is one.

Functions that run in the interpreter's process import the kernels themselves: Triton decides when it is
imported whether kernels are interpreted.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_cases import FLOAT32_ERROR, Case, assert_agrees, laid_out, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.torch.kernels.decode_config import Cut

pytest.importorskip("triton", reason="needs triton, which is optional")

# R_Q, R_K, R_V; h, D, E: every rank and every size with a few of the others
CALLS = [
    ((1, 1, 1), (1, 8, 8)),
    ((2, 2, 1), (34, 64, 64)),
    ((3, 1, 4), (5, 10, 12)),
    ((6, 2, 2), (17, 16, 40)),
    ((16, 1, 1), (32, 64, 64)),
    ((None, 1, 1), (47, 8, 8)),
    ((None, 3, 2), (3, 24, 5)),
]
LAYOUTS = ["plain", "record", "transposed", "fixed a"]
RAGGED = {"tokens": 40, "lens": (0, 1, 40, 23), "batch": 4}
SMALL = Cut(block_m=16, block_rows=16, factored=False, num_warps=4, num_stages=2, programs=2)
# A half keeps 11 bits, a bfloat16 8; the interpreter cuts off what hardware rounds, products are float32
OUTPUT_ERROR = {torch.float32: FLOAT32_ERROR, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# On a GPU q, scores and weights too are rounded to the dtype before they are multiplied
GPU_ERROR = {torch.float32: FLOAT32_ERROR, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
PAPER = {
    "heads": 32,
    "width": 64,
    "v_width": 64,
    "q_rank": 16,
    "k_rank": 1,
    "tokens": 512,
    "lens": (512, 9),
    "splits": 2,
}
COMPILED = {
    "float32": Case(**PAPER),
    "float16": Case(**PAPER, dtype=torch.float16),
    "bfloat16": Case(**PAPER, dtype=torch.bfloat16, layout="record"),
    "int8": Case(**PAPER, dtype=torch.bfloat16, quantised=torch.int8),
    "float8": Case(**PAPER, dtype=torch.bfloat16, quantised=torch.float8_e4m3fn),
    "full Q in pages": Case(**(PAPER | {"q_rank": None}), dtype=torch.bfloat16, page=64),
    "queries, window, bias": Case(**PAPER, dtype=torch.bfloat16, queries=4, window=100, bias="dense"),
    "T6 medium": Case(47, 64, 64, 6, 2, 2, tokens=512, splits=2, dtype=torch.bfloat16),
    "wide": Case(**(PAPER | {"width": 128, "v_width": 128}), v_rank=2, dtype=torch.bfloat16),
    "many ranks": Case(**(PAPER | {"k_rank": 9}), dtype=torch.bfloat16),
}
GPU_CASES = {
    "rank 1": Case(heads=32, width=64, v_width=64, q_rank=16, k_rank=1, tokens=3000),
    "general rank": Case(
        heads=47, width=64, v_width=64, q_rank=6, k_rank=2, v_rank=2, tokens=3000, layout="record"
    ),
    "full Q": Case(heads=8, width=96, v_width=128, q_rank=None, tokens=1000),
    "queries": Case(
        heads=12, width=64, v_width=32, q_rank=6, queries=16, tokens=500, window=100, bias="dense"
    ),
    "ragged": Case(
        heads=32, width=128, v_width=64, layout="record", tokens=700, lens=(0, 1, 700, 33), batch=4
    ),
    "paged": Case(heads=16, width=64, v_width=64, tokens=900, lens=(900, 411), page=64, splits=5),
    "many ranks": Case(heads=16, width=32, v_width=32, k_rank=12, v_rank=9, tokens=200),
}


def compare(cases, error=FLOAT32_ERROR, cut=None, device="cpu"):
    from tpa_attention.torch.kernels.decode import decode_triton

    for case in cases:
        factors, arguments = laid_out(case, case.factors())
        factors = [None if factor is None else factor.to(device) for factor in factors]
        moved = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        assert_agrees(case, decode_triton(*factors, **moved, cut=cut), error)


def decode(case, cut=None):
    from tpa_attention.torch.kernels.decode import decode_triton

    factors, arguments = laid_out(case, case.factors())
    return decode_triton(*factors, **arguments, cut=cut)


def count_launches(case):
    """Kernels of one call, and the numbers of float32 scratch it takes."""
    from tpa_attention.torch.kernels import decode as module

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                launches.append((grid, sum(x.numel() for x in args if isinstance(x, torch.Tensor))))
                return self.kernel[grid](*args, **kwargs)

            return launch

    launches = []
    names = ("_decode_split", "_merge_splits")
    kernels = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, Counted(kernels[name]))
        decode(case, SMALL)
    finally:
        for name in names:
            setattr(module, name, kernels[name])
    results = case.batch * case.queries * case.heads * (case.v_width + 1)
    return len(launches), launches[1][1] - results if len(launches) > 1 else 0


def partial_lses(case):
    """What the splits left for the merge, (B, splits)."""
    from tpa_attention.torch.kernels import decode as module

    seen = []
    merge = module.merge_parts
    try:
        module.merge_parts = lambda parts, lses, *rest: seen.append(lses.clone()) or merge(parts, lses, *rest)
        decode(case, SMALL)
    finally:
        module.merge_parts = merge
    return seen[0].amax((2, 3)).numpy()


def decode_pipelined(case):
    """The call with the loop that the compiler pipelines, in place of the portable one."""
    from tpa_attention.torch.kernels import decode as module

    class Pipelined:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: kernel[grid](*args, **{**kwargs, "PIPELINED": True})

    kernel = module._decode_split
    try:
        module._decode_split = Pipelined()
        return decode(case, SMALL)
    finally:
        module._decode_split = kernel


@pytest.mark.parametrize(("ranks", "sizes"), CALLS, ids=str)
def test_every_rank_and_size_agrees_with_the_reference(triton_interpreter, ranks, sizes):
    triton_interpreter(compare, [Case(*sizes, *ranks)])


@pytest.mark.parametrize(("queries", "q_rank"), [(2, None), (5, 2), (16, None)])
def test_several_queries_see_what_precedes_them(triton_interpreter, queries, q_rank):
    case = Case(queries=queries, q_rank=q_rank, **RAGGED)
    triton_interpreter(compare, [replace(case, heads=5)])


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_scores_from_factors_equal_those_from_q(triton_interpreter, factored, rows):
    cut = replace(SMALL, block_rows=rows, factored=factored)
    sizes = ((3, 5), (20, 2))
    cases = [Case(heads=heads, q_rank=3, queries=queries, tokens=16, batch=1) for heads, queries in sizes]
    triton_interpreter(compare, cases, FLOAT32_ERROR, cut)


@pytest.mark.parametrize("splits", [1, 2, 1000])
def test_any_number_of_splits_merges_to_the_same(triton_interpreter, splits):
    case = Case(heads=2, splits=splits, queries=2, **RAGGED)
    triton_interpreter(compare, [case], FLOAT32_ERROR, SMALL)


def test_short_sequences_of_a_long_cache_use_all_their_splits(triton_interpreter):
    case = Case(tokens=160, lens=(40, 160), splits=5, heads=2)
    parts = triton_interpreter(partial_lses, case)
    assert np.isfinite(parts[0, :3]).all() and (parts[0, 3:] == -np.inf).all()  # three tiles of 16
    assert np.isfinite(parts[1]).all()


def test_more_splits_than_the_merge_takes_at_once_agree(triton_interpreter):
    triton_interpreter(compare, [Case(tokens=560, splits=35, batch=1, heads=1)], FLOAT32_ERROR, SMALL)


@pytest.mark.parametrize("window", [1, 7])
def test_a_window_hides_what_lies_behind_it(triton_interpreter, window):
    case = Case(heads=1, window=window, queries=3, **RAGGED)
    triton_interpreter(compare, [case, replace(case, splits=3)], FLOAT32_ERROR, SMALL)


@pytest.mark.parametrize("bias", ["dense", "padding", "nothing"])
def test_a_bias_enters_once_whatever_the_rank(triton_interpreter, bias):
    case = Case(bias=bias, k_rank=3, queries=3, lens=(40, 21), splits=2)
    triton_interpreter(compare, [case, replace(case, lens=None, window=6)])


def test_a_row_without_any_key_is_zero_with_lse_minus_infinity(triton_interpreter):
    for case in (Case(bias="nothing"), Case(lens=(0, 0)), Case(lens=(0, 0), splits=2), Case(tokens=0)):
        out, lse = triton_interpreter(decode, case)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", OUTPUT_ERROR, ids=str)
def test_halves_are_read_and_written_and_lse_stays_float32(triton_interpreter, dtype):
    case = Case(dtype=dtype, queries=2, lens=(40, 17))
    triton_interpreter(compare, [case, replace(case, splits=2)], OUTPUT_ERROR[dtype])


@pytest.mark.parametrize("spread", [40.0, 1e3])
def test_splits_whose_lse_differ_by_hundreds_merge_without_overflow(triton_interpreter, spread):
    case = Case(tokens=48, splits=3, spread=spread, heads=3, q_rank=1, k_rank=1, batch=1)
    _, lse = triton_interpreter(decode, case, SMALL)
    assert lse.max() > 88  # exp(88) overflows float32
    # an error of 2^-22 of a logit is that of its exponential
    triton_interpreter(compare, [case], max(FLOAT32_ERROR, 2.0**-22 * float(lse.max())), SMALL)


@pytest.mark.parametrize("page", [1, 7, 64])
def test_tokens_are_found_in_pages_of_any_size(triton_interpreter, page):
    case = Case(heads=1, queries=2, splits=2, layout="record", page=page, **RAGGED)
    triton_interpreter(compare, [case], FLOAT32_ERROR, SMALL)


def test_pages_give_the_same_bits_as_a_contiguous_cache(triton_interpreter):
    case = Case(heads=2, tokens=64, lens=(64, 29), splits=2)
    contiguous = triton_interpreter(decode, case, SMALL)
    paged = triton_interpreter(decode, replace(case, page=8), SMALL)
    for one, other in zip(paged, contiguous, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_are_read_where_they_lie(triton_interpreter, layout):
    case = Case(layout=layout, k_rank=3, v_rank=2, heads=5)
    triton_interpreter(compare, [case])
    triton_interpreter(compare, [replace(case, dtype=torch.float16)], OUTPUT_ERROR[torch.float16])


@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_are_multiplied_by_their_scales(triton_interpreter, quantised):
    case = Case(quantised=quantised, k_rank=2, v_rank=3, queries=2, lens=(40, 13))
    triton_interpreter(compare, [case, replace(case, splits=2), replace(case, page=8, layout="record")])


def test_more_ranks_than_are_unrolled_agree(triton_interpreter):
    triton_interpreter(compare, [Case(k_rank=9, v_rank=2), Case(k_rank=1, v_rank=11, splits=2)])


def test_a_call_takes_two_kernels_at_most_and_scratch_for_the_splits_alone(triton_interpreter):
    case = Case(tokens=64, queries=2, heads=3, batch=1)
    assert triton_interpreter(count_launches, replace(case, splits=1)) == (1, 0)
    assert triton_interpreter(count_launches, replace(case, splits=4)) == (2, 4 * 2 * 3 * (8 + 1))


@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    and tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2])) < (3, 9),
    reason="this interpreter cannot run a range over a number that the kernel computes",
)
def test_the_pipelined_loop_equals_the_portable_one(triton_interpreter):
    case = Case(queries=2, splits=2, **RAGGED)
    for one, other in zip(
        triton_interpreter(decode_pipelined, case), triton_interpreter(decode, case, SMALL), strict=True
    ):
        assert torch.equal(one, other)


@st.composite
def calls(draw):
    tokens = draw(st.integers(1, 60))
    heads = draw(st.integers(1, 48))
    return Case(
        heads=heads,
        width=2 * draw(st.integers(4, 24)),
        v_width=draw(st.integers(1, 40)),
        q_rank=draw(st.none() | st.integers(1, 6)),
        k_rank=draw(st.integers(1, 4)),
        v_rank=draw(st.integers(1, 4)),
        queries=draw(st.integers(1, min(16, 1 + 48 // heads))),
        tokens=tokens,
        lens=draw(st.none() | st.tuples(st.integers(0, tokens), st.integers(0, tokens))),
        window=draw(st.none() | st.integers(1, 40)),
        bias=draw(st.sampled_from([None, "dense", "padding"])),
        splits=draw(st.integers(1, 3)) if heads < 5 else 1,
        page=draw(st.sampled_from([0, 0, 5, 16])),
        layout=draw(st.sampled_from(["plain", "record", "transposed"])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=8, deadline=None)
@given(case=calls())
def test_any_call_agrees_with_the_reference(triton_interpreter, case):
    triton_interpreter(compare, [case])


@pytest.mark.slow  # interpreted programs take tens of milliseconds each
@settings(max_examples=150, deadline=None)
@given(case=calls())
def test_many_calls_agree_with_the_reference(triton_interpreter, case):
    triton_interpreter(compare, [case])


def compile_for_hopper(case, tmp_path, monkeypatch, **switches):
    """PTX of both kernels and the bytes each thread spills, for the arguments of `case`; needs no GPU.

    What the interpreter accepts, the compiler may not.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tpa_attention.torch.kernels import decode as module

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, num_warps, maxnreg=None, **constants):
            names = self.kernel.arg_names
            numbers = self.kernel.params
            signature, fixed, aligned = {}, {**constants, **switches} if "N" in constants else constants, {}
            fixed = dict(fixed)
            for place, (name, value) in enumerate(zip(names, args, strict=False)):
                generic = numbers[place].do_not_specialize
                if isinstance(value, torch.Tensor):
                    signature[name] = "*" + TRITON_NAMES[value.dtype]
                    aligned[(place,)] = [["tt.divisibility", 16]]
                elif value is None or (value == 1 and isinstance(value, int) and not generic):
                    signature[name], fixed[name] = "constexpr", value
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32"
                    if value % 16 == 0 and not generic:
                        aligned[(place,)] = [["tt.divisibility", 16]]
            signature |= dict.fromkeys((name for name in fixed if name not in signature), "constexpr")
            source = ASTSource(self.kernel, {name: signature[name] for name in names}, fixed, aligned)
            target = GPUTarget("cuda", 90, 32)
            options = {"num_warps": num_warps, "maxnreg": maxnreg}
            code = triton.compile(source, target=target, options=options).asm
            compiled.append((code["ptx"], spilled(code["cubin"], tmp_path)))

    compiled = []
    for name in ("_decode_split", "_merge_splits"):
        monkeypatch.setattr(module, name, Compiled(getattr(module, name)))
    decode(case)
    return compiled


def spilled(cubin, tmp_path):
    """Bytes of stack per thread, as the tool that Triton brings along counts them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


@pytest.mark.slow  # seconds per kernel
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile_for_cuda_use_tensor_cores_and_move_128_bits_at_a_time(name, monkeypatch, tmp_path):
    case = COMPILED[name]
    (split, stack), (merge, _) = compile_for_hopper(case, tmp_path, monkeypatch)
    assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10", split)
    assert ("mma.sync" in split or "wgmma.mma_async" in split) == (case.dtype != torch.float32)
    assert re.search(r"ld\.global[^;]*v[24]\.b32", merge)
    assert stack < 64  # some addresses at most: an output tile in memory would be 128 bytes and more


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_ERROR, ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_every_kind_of_call_agrees_on_the_gpu(name, dtype):
    case = replace(GPU_CASES[name], dtype=dtype)
    compare([case, replace(case, splits=1)], GPU_ERROR[dtype], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_are_read_on_the_gpu(quantised):
    case = Case(heads=32, width=64, v_width=64, dtype=torch.bfloat16, quantised=quantised, tokens=1000)
    compare([case, replace(case, page=64, lens=(1000, 3))], GPU_ERROR[torch.bfloat16], device="cuda")


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_call_for_other_lengths():
    from tpa_attention.torch.kernels.decode import decode_triton

    case = Case(heads=32, width=64, v_width=64, tokens=2000, lens=(2000, 1), layout="record")
    factors, arguments = laid_out(replace(case, lens=None), case.factors())
    factors = [factor.cuda() for factor in factors]
    lens = torch.tensor([2000, 1], dtype=torch.int32, device="cuda")
    arguments["seq_lens"] = lens
    decode_triton(*factors, **arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode_triton(*factors, **arguments)
    for lengths in ((2000, 1), (0, 1999), (77, 1024)):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert_agrees(replace(case, lens=lengths), result)


@pytest.mark.gpu
def test_no_kernel_is_compiled_again_while_the_cache_grows():
    from tpa_attention.torch.kernels import decode as module

    def compiled():
        return sum(
            len(cache[0]) for kernel in (module._decode_split, module._merge_splits)
            for cache in kernel.device_caches.values()
        )  # fmt: skip

    case = Case(heads=34, width=64, v_width=64, q_rank=6)
    counts = []
    for tokens in (2000, 2001, 2002, 2016, 3333, 4096):
        compare([replace(case, tokens=tokens)], device="cuda")
        counts.append(compiled())
    assert counts == counts[:1] * len(counts)


def test_the_reference_of_these_tests_is_the_one_of_the_package():
    out, lse = truth(Case())
    assert out.shape == (2, 1, 3, 8)
    assert lse.shape == (2, 1, 3)
