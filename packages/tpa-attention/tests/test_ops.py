"""The operator tpa::decode: its plain implementation, and what torch.library, compile and export make of it.

Compiled code runs in processes of its own: the run-time check of annotations is not part of the product.
"""

from dataclasses import replace

import pytest
import torch
from decode_cases import Case, assert_agrees, laid_out

from tpa_attention.torch import ops

RAGGED = {"tokens": 12, "lens": (0, 7), "queries": 3}
CASES = {
    "plain": Case(),
    "full Q": Case(q_rank=None, queries=2),
    "ragged": Case(**RAGGED, layout="record"),
    "window and bias": Case(**RAGGED, window=4, bias="dense"),
    "no key at all": Case(bias="nothing", tokens=5),
    "pages": Case(**RAGGED, page=5, layout="record"),
    "int8": Case(**RAGGED, quantised=torch.int8),
    "float8 in pages": Case(**RAGGED, quantised=torch.float8_e4m3fn, page=4),
    "fixed A": Case(layout="fixed a", heads=5),
}
# sums of at most 2^7 products; a half rounds the output once
ERRORS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def call(case, **changed):
    """Arguments of `ops.decode` for a case."""
    factors, arguments = laid_out(case, case.factors())
    return factors, arguments | changed


class Decoder(torch.nn.Module):
    def forward(self, *arguments):
        out, lse = ops.decode(*arguments, scale=0.3)
        return 2 * out, lse


def compile_for_any_length(rank, world_size):
    """Compiled and eager results for two lengths, and the graphs that were compiled."""
    graphs = []

    def counting(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(Decoder(), backend=counting, fullgraph=True, dynamic=True)
    results = []
    for tokens in (12, 19, 33):
        factors, arguments = call(Case(**(RAGGED | {"tokens": tokens})))
        factors = (*factors, arguments["seq_lens"])
        results.append((compiled(*factors), Decoder()(*factors)))
    return results, len(graphs)


def export_for_any_length(rank, world_size):
    factors, _ = call(Case())
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = tuple(None if place < 2 else {1: tokens} for place in range(6))
    program = torch.export.export(Decoder(), factors, dynamic_shapes=(shapes,))
    longer, _ = call(Case(tokens=55))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(*longer), Decoder()(*longer), names


def decode_interpreted(case):
    """Whether the kernel answers a call on the CPU, and what."""
    from tpa_attention.torch.kernels import decode as module

    calls, kernel = [], module.decode_triton
    try:
        module.decode_triton = lambda *args: (calls.append(1), kernel(*args))[1]
        factors, arguments = call(case)
        return ops.decode(*factors, **arguments), len(calls)
    finally:
        module.decode_triton = kernel


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_operator_agrees_with_the_reference(name, dtype):
    case = replace(CASES[name], dtype=dtype)
    if case.quantised is not None and dtype == torch.float64:
        pytest.skip("quantised factors are float32 once they are read")
    factors, arguments = call(case)
    assert_agrees(case, ops.decode(*factors, **arguments), ERRORS[dtype])


def test_a_table_may_hold_anything_past_the_length():
    case = CASES["pages"]
    factors, arguments = call(case)
    expected = ops.decode(*factors, **arguments)
    arguments["block_table"][1, 2:] = -7
    arguments["block_table"][0] = 10**6
    for one, other in zip(ops.decode(*factors, **arguments), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["plain", "full Q", "window and bias", "pages", "int8"])
def test_torch_library_finds_nothing_wrong(name):
    factors, arguments = call(CASES[name])
    torch.library.opcheck(torch.ops.tpa.decode.default, factors, arguments)


def test_shapes_and_types_are_known_without_computing():
    for case in (*CASES.values(), Case(dtype=torch.float64), Case(dtype=torch.bfloat16)):
        factors, arguments = call(case)
        real = ops.decode(*factors, **arguments)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [None if factor is None else mode.from_tensor(factor) for factor in factors]
            tensors = {
                k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()
            }
            fake = ops.decode(*fakes, **tensors)
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_one_graph_without_breaks_serves_every_length(run_distributed):
    (results, graphs), *_ = run_distributed(compile_for_any_length, 1, timeout=120)
    assert graphs == 1
    for compiled, eager in results:
        for one, other in zip(compiled, eager, strict=True):
            assert torch.equal(one, other)


def test_an_exported_program_keeps_the_operator_and_any_length(run_distributed):
    (exported, eager, names), *_ = run_distributed(export_for_any_length, 1, timeout=120)
    assert "tpa.decode.default" in names
    for one, other in zip(exported, eager, strict=True):
        assert torch.equal(one, other)


def test_the_interpreter_answers_where_it_is_asked_to(triton_interpreter):
    case = Case(queries=2, lens=(40, 3))
    result, calls = triton_interpreter(decode_interpreted, case)
    assert calls == 1
    assert_agrees(case, result)
    double = replace(case, dtype=torch.float64)
    result, calls = triton_interpreter(decode_interpreted, double)
    assert calls == 0
    assert_agrees(double, result, ERRORS[torch.float64])


def decode_by_functional(impl):
    """`tpa_decode` from records in pages, with everything that changes the arguments of the operator."""
    from tpa_attention.torch.factors import RecordLayout
    from tpa_attention.torch.functional import tpa_decode

    case = Case(heads=2, k_rank=2, v_rank=3, tokens=12, lens=(9, 12), queries=2)
    aq, bq, ak, bk, av, bv = case.factors()
    layouts = RecordLayout(2, 2, 8), RecordLayout(3, 2, 8)
    records = (
        layout.pack(a, b).reshape(6, 4, -1) for layout, a, b in zip(layouts, (ak, av), (bk, bv), strict=True)
    )
    return tpa_decode(
        *(aq, bq, *records),
        ranks=(2, 3),
        num_heads=2,
        head_dim=8,
        seq_lens=torch.tensor(case.lens),
        block_table=torch.arange(6).view(2, 3),
        attn_bias=torch.arange(12) != 4,
        window=7,
        num_splits=2,
        return_lse=True,
        impl=impl,
    )


def test_the_functional_layer_and_the_kernel_mean_the_same_by_every_argument(triton_interpreter):
    for one, other in zip(
        triton_interpreter(decode_by_functional, "triton"), decode_by_functional("reference"), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)  # float32 in another order


def test_a_gradient_is_refused_with_the_way_to_get_one():
    (aq, bq, *cached), arguments = call(Case())
    out, _ = ops.decode(aq, bq.requires_grad_(), *cached, **arguments)
    with pytest.raises(RuntimeError, match='train with tpa_attention, or take impl="reference"'):
        out.sum().backward()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, ValueError, r"seq_lens must have shape \(2,\), got"),
        ({"seq_lens": torch.ones(2)}, TypeError, "seq_lens must hold integers, got torch.float32"),
        ({"bias": torch.zeros(2, 3, 1, 1)}, ValueError, r"bias must have shape \(2, 3, 1, 40\)"),
        ({"window": 0}, ValueError, "window must be >= 1, got 0"),
        ({"num_splits": 0}, ValueError, "num_splits must be >= 1, got 0"),
        ({"k_scale": torch.ones(2, 40, 2)}, TypeError, "k_scale and v_scale must be given for int8"),
        (
            {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
            ValueError,
            r"block_table must have shape \(2, 1\)",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_argument_that_does_not_fit_is_named(changed, error, message):
    factors, arguments = call(Case(), **changed)
    with pytest.raises(error, match=message):
        ops.decode(*factors, **arguments)


def test_factors_that_do_not_fit_are_named_with_all_shapes():
    (aq, bq, ak, bk, av, bv), arguments = call(Case())
    with pytest.raises(ValueError, match=r"bk must have shape \(2, 40, 2, 8\), got .*'bk': \(2, 40, 1, 8\)"):
        ops.decode(aq, bq, ak, bk[:, :, :1], av, bv, **arguments)
    with pytest.raises(ValueError, match=r"av must have shape \(2, 40, 1, 3\)"):
        ops.decode(aq, bq, ak, bk, av[:, :30], bv, **arguments)
    with pytest.raises(ValueError, match="bq must hold 1 to 16 query tokens, got 17"):
        ops.decode(aq.expand(2, 17, 2, 3), bq.expand(2, 17, 2, 8), ak, bk, av, bv, **arguments)
    with pytest.raises(ValueError, match="bv must have 4 axes"):
        ops.decode(aq, bq, ak, bk, av, bv[0], **arguments)
    with pytest.raises(TypeError, match="all four alike"):
        ops.decode(aq, bq, ak.to(torch.int8), bk, av, bv, **arguments)
