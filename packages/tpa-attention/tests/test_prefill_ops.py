"""The operators tpa::prefill and tpa::prefill_backward: what torch.library, compile and layers make of them.

Compiled code runs in processes of its own: the run-time check of annotations is not part of the product.
"""

from dataclasses import replace

import pytest
import torch
from prefill_cases import FLOAT32_ERROR, Case, assert_agrees, results
from torch.utils.checkpoint import checkpoint

from tpa_attention import accounting
from tpa_attention.torch import dispatch, prefill_ops
from tpa_attention.torch.layers import TPAttention

CASES = {
    "plain": Case(tokens=6, keys=6, batch=2),
    "full Q": Case(tokens=5, keys=7, q_rank=None),
    "window": Case(tokens=6, keys=9, window=3, layout="projection"),
    "all": Case(tokens=6, keys=3, causal=False, layout="fixed a"),
    "dead rows": Case(tokens=6, keys=3),
    "packed": Case(tokens=9, keys=9, bounds=((0, 2, 2, 9), (0, 4, 5, 9)), scale=-0.4),
    "no key": Case(tokens=3, keys=0),
}
# sums of at most 2^7 products; O, rounded to 8 or 11 bits, enters Delta in 8 products of size 1 to 3, and
# with it gradients times Q and K
ERRORS = {
    torch.float64: 1e-12,
    torch.float32: FLOAT32_ERROR,
    torch.bfloat16: 2.0**-5,
    torch.float16: 2.0**-8,
}
RARE = ("noncontextual_a", "shared b")
LAYERS = {
    "contextual": {},
    "kv_only": {"variant": "kv_only"},
    "noncontextual_a": {"variant": "noncontextual_a", "v_head_dim": 6},
    "shared b": {"shared_kv_b": True, "output_gate": True},
}


def arguments(case, *, grad=False):
    """Arguments of `prefill` for a case."""
    factors = [None if x is None else x.clone().requires_grad_(grad) for x in case.factors()]
    return (*factors, *case.options())


class Attention(torch.nn.Module):
    def forward(self, *factors):
        out, lse = prefill_ops.prefill(*factors, scale=0.3)
        return 2 * out, lse


def gradients(module, factors):
    """Results and gradients by both results."""
    out, lse = module(*factors)
    return out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), factors)


def compile_for_any_length(rank, world_size):
    """Compiled and eager results and gradients for several lengths, and the graphs that were compiled."""
    graphs = []

    def counting(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(Attention(), backend=counting, fullgraph=True, dynamic=True)
    found = []
    for tokens, keys in ((6, 9), (7, 13), (12, 20)):
        factors = arguments(Case(tokens=tokens, keys=keys), grad=True)[:6]
        found.append((gradients(compiled, factors), gradients(Attention(), factors)))
    return [[[x.detach() for x in side] for side in pair] for pair in found], len(graphs)


def compiled_layer(rank, world_size):
    """Output and gradients of a compiled and of a plain layer through the operators, which answer plainly."""
    dispatch.kernel_problem = lambda _: None  # of the CPU, in this process
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        layer = TPAttention(24, 3, 8, 3, 2, 2, impl="triton", zero_init_output=False, generator=generator)
        x = torch.randn(2, 9, 24, generator=generator)
        for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = call(x)
            grads = torch.autograd.grad(y.float().square().mean(), list(layer.parameters()))
            found.append([z.detach() for z in (y, *grads)])
    return found


def chosen_under_compile(rank, world_size):
    """What a compiled function is told about kernels on this device, without a break in its graph."""

    def ask(x):
        problem = dispatch.kernel_problem(torch.device("cuda"))
        return x + 1 if problem is None or "triton is not installed" in problem else x

    return torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(1))


def export_for_any_length(rank, world_size):
    factors = arguments(CASES["window"])[:6]
    T, M = (torch.export.Dim(name, min=2, max=4096) for name in ("T", "M"))
    shapes = tuple({1: T if place < 2 else M} for place in range(6))
    program = torch.export.export(Attention(), factors, dynamic_shapes=(shapes,))
    longer = arguments(Case(tokens=11, keys=17))[:6]
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(*longer), Attention()(*longer), names


def compare_interpreted(case):
    """The operators where the kernels are interpreted, and whether those answered."""
    from tpa_attention.torch.kernels import prefill as module

    calls, kernel = [], module.prefill_triton
    try:
        module.prefill_triton = lambda *args: (calls.append(1), kernel(*args))[1]
        assert_agrees(
            case, results(case, prefill_ops.prefill, prefill_ops.prefill_backward), ERRORS[case.dtype]
        )
    finally:
        module.prefill_triton = kernel
    return len(calls)


def by_functional(impl, packed):
    """`tpa_attention` with every argument that a kernel takes, gradients by both results."""
    from tpa_attention.torch.functional import tpa_attention

    case = Case(tokens=9, keys=9, v_width=5, v_rank=2)
    factors = arguments(case, grad=True)[:6]
    bounds = torch.tensor([0, 4, 9]) if packed else None
    out, lse = tpa_attention(
        *factors, window=3, scale=0.2, rank_scale=not packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
        impl=impl, return_lse=True,
    )  # fmt: skip
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), factors))]


def step_of_layer(impl, options, how, device="cpu"):
    """Output and gradients of a layer with every weight at random, called as training code calls it."""
    generator = torch.Generator().manual_seed(0)
    layer = TPAttention(24, 3, 8, 3, 2, 2, **options, impl=impl, zero_init_output=False, generator=generator)
    x = torch.randn(2, 9, 24, generator=generator).to(device).requires_grad_()
    layer = layer.to(device)
    if how == "autocast":
        with torch.autocast(device, dtype=torch.bfloat16):
            y = layer(x)
    elif how == "checkpoint":
        y = checkpoint(layer, x, use_reentrant=False)
    else:
        y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum()
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [z.detach().float().cpu() for z in (y, *found)]


def kept_numbers():
    """Numbers of the storages that autograd keeps of one call, and those of its factors, output and lse."""
    from tpa_attention.torch.functional import tpa_attention

    case = Case(tokens=12, keys=12, heads=34, width=8, q_rank=6, v_rank=2)
    factors = arguments(case, grad=True)[:6]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tpa_attention(*factors, impl="triton")
    return sum(kept.values()), case


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_operators_agree_with_the_reference(name, dtype):
    case = replace(CASES[name], dtype=dtype)
    assert_agrees(case, results(case, prefill_ops.prefill, prefill_ops.prefill_backward), ERRORS[dtype])
    alone = replace(case, by_lse=False)
    assert_agrees(alone, results(alone, prefill_ops.prefill, prefill_ops.prefill_backward), ERRORS[dtype])


# torch's own check looks at gradients of tensors that are no leaves, and warns about it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["full Q", "packed"])
def test_torch_library_finds_nothing_wrong(name):
    case = CASES[name]
    torch.library.opcheck(torch.ops.tpa.prefill.default, arguments(case, grad=True))
    factors = arguments(case)
    out, lse = prefill_ops.prefill(*factors)
    backward = (*case.gradients(), *factors[:6], out, lse, *factors[6:])
    torch.library.opcheck(torch.ops.tpa.prefill_backward.default, backward)


def test_shapes_and_types_are_known_without_computing():
    cases = [
        replace(case, dtype=dtype) for case in CASES.values() for dtype in (torch.float64, torch.bfloat16)
    ]
    for case in cases:
        real = prefill_ops.prefill(*arguments(case))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments(case)]
            fake = prefill_ops.prefill(*fakes)
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.slow
def test_one_graph_without_breaks_trains_at_every_length(run_distributed):
    (found, graphs), *_ = run_distributed(compile_for_any_length, 1, timeout=120)
    assert graphs == 1
    for compiled, eager in found:
        for one, other in zip(compiled, eager, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_layer_trains_through_the_operators_as_the_plain_one(run_distributed):
    ((plain, compiled, plain_cast, compiled_cast),) = run_distributed(compiled_layer, 1, timeout=120)
    assert plain_cast[0].dtype == torch.bfloat16
    for one, other in zip((*compiled, *compiled_cast), (*plain, *plain_cast), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_function_may_ask_for_the_kernels(run_distributed):
    (result,) = run_distributed(chosen_under_compile, 1)
    assert result == 1


@pytest.mark.slow
def test_an_exported_program_keeps_the_operator_and_any_length(run_distributed):
    (exported, eager, names), *_ = run_distributed(export_for_any_length, 1, timeout=120)
    assert "tpa.prefill.default" in names
    for one, other in zip(exported, eager, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("by", ["out", "lse"])
def test_a_loss_may_use_one_of_the_results(by):
    case = Case(tokens=5, keys=5, by_lse=by == "lse")
    given = arguments(case, grad=True)
    out, lse = prefill_ops.prefill(*given)
    dout, dlse = case.gradients()
    loss = (out * dout).sum() if by == "out" else (lse * dlse).sum()
    found = torch.autograd.grad(loss, given[:6])
    zero = torch.zeros_like(dout)
    expected = prefill_ops.prefill_backward(
        dout if by == "out" else zero, dlse, *arguments(case)[:6], out.detach(), lse.detach(), *given[6:]
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_second_gradient_is_refused_with_the_way_to_get_one():
    given = arguments(CASES["plain"], grad=True)
    out, _ = prefill_ops.prefill(*given)
    (first,) = torch.autograd.grad(out.square().sum(), given[1], create_graph=True)
    with pytest.raises(RuntimeError, match='can be differentiated once; impl="reference"'):
        first.sum().backward()


def test_the_interpreter_answers_where_it_is_asked_to(triton_interpreter):
    assert triton_interpreter(compare_interpreted, CASES["packed"]) == 1
    assert triton_interpreter(compare_interpreted, replace(CASES["plain"], dtype=torch.float64)) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_the_functional_layer_and_the_kernels_mean_the_same_by_every_argument(triton_interpreter, packed):
    for one, other in zip(
        triton_interpreter(by_functional, "triton", packed), by_functional("reference", packed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)  # float32 in another order


@pytest.mark.parametrize(
    "name", ["contextual", "kv_only", *(pytest.param(x, marks=pytest.mark.slow) for x in RARE)]
)
def test_a_layer_trains_through_the_kernels_as_through_torch(triton_interpreter, name):
    found = triton_interpreter(step_of_layer, "triton", LAYERS[name], "plainly")
    for one, other in zip(found, step_of_layer("sdpa", LAYERS[name], "plainly"), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)  # float32 in another order


def test_checkpointing_changes_nothing(triton_interpreter):
    plain = triton_interpreter(step_of_layer, "triton", {}, "plainly")
    for one, other in zip(triton_interpreter(step_of_layer, "triton", {}, "checkpoint"), plain, strict=True):
        assert torch.equal(one, other)


def test_autocast_decides_the_type_of_the_kernels(triton_interpreter):
    found = triton_interpreter(step_of_layer, "triton", {}, "autocast")
    wide = step_of_layer("sdpa", {}, "plainly")
    for one, other in zip(found, wide, strict=True):
        # a few roundings to 8 bits, those of the interpreter downwards
        torch.testing.assert_close(one, other, rtol=0, atol=2.0**-5 * max(1.0, float(other.abs().max())))
    assert not torch.equal(found[0], wide[0])


def test_nothing_is_kept_but_factors_output_and_lse(triton_interpreter):
    kept, case = triton_interpreter(kept_numbers)
    sizes = {"num_heads": 34, "head_dim": 8, "q_rank": 6, "k_rank": 2, "v_rank": 2}
    counted = accounting.saved_activations("tpa", materialised=False, d_model=1, **sizes)
    assert kept == counted * case.tokens * case.batch


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be >= 1 and needs causal=True, got 0"),
        ({"window": 2, "causal": False}, ValueError, "needs causal=True, got 2, causal=False"),
        ({"cu_seqlens_q": torch.tensor([0, 6])}, ValueError, "cu_seqlens_q must be given like the other"),
        ({"bk": torch.zeros(2, 6, 2, 7)}, ValueError, r"bq must have shape \(2, 6, 2, 7\), got .*'bk'"),
        ({"av": torch.zeros(2, 6, 1, 4)}, ValueError, r"av must have shape \(2, 6, 1, 2\), got"),
        ({"bv": torch.zeros(2, 6, 8)}, ValueError, r"bv must have 4 axes, got shape \(2, 6, 8\)"),
        ({"ak": torch.zeros(2, 6, 2, 2).half()}, TypeError, "all factors must have one type, got ak"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_argument_that_does_not_fit_is_named(changed, error, message):
    names = ("aq", "bq", "ak", "bk", "av", "bv")
    given = dict(zip(names, arguments(CASES["plain"])[:6], strict=True)) | changed
    with pytest.raises(error, match=message):
        prefill_ops.prefill(**given)


def test_boundaries_are_integers_of_a_batch_of_one():
    factors = arguments(CASES["plain"])[:6]
    bounds = torch.tensor([0, 6])
    with pytest.raises(ValueError, match="for a batch of 1, got a batch of 2"):
        prefill_ops.prefill(*factors, bounds, bounds)
    one = [x[:1] for x in factors]
    with pytest.raises(TypeError, match="cu_seqlens_q must hold integers"):
        prefill_ops.prefill(*one, bounds.float(), bounds.float())


# ------------------------------------------------------------------------------------------------ on a GPU


def compiled_step(rank, world_size):
    """Gradients of a plain and of a compiled layer under autocast."""
    generator = torch.Generator().manual_seed(0)
    layer = TPAttention(256, 8, 64, 6, 2, 2, zero_init_output=False, generator=generator).cuda()
    x = torch.randn(2, 300, 256, generator=generator).cuda()
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = call(x).square().mean()
        found.append([z.float().cpu() for z in torch.autograd.grad(loss, list(layer.parameters()))])
    return found


@pytest.mark.gpu
def test_a_compiled_train_step_on_the_gpu_has_the_gradients_of_the_plain_one(run_distributed):
    ((plain, compiled),) = run_distributed(compiled_step, 1, timeout=300)
    for one, other in zip(compiled, plain, strict=True):
        # other fusions round to 8 bits elsewhere
        assert float((one - other).norm()) <= 2.0**-6 * float(other.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_under_autocast_trains_through_the_kernels_on_the_gpu(name, monkeypatch):
    calls, kernel = [], dispatch.attend_by_kernel
    monkeypatch.setattr(
        dispatch, "attend_by_kernel", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs))[1]
    )
    found = step_of_layer("auto", LAYERS[name], "autocast", "cuda")
    assert len(calls) == 1
    for one, other in zip(found, step_of_layer("sdpa", LAYERS[name], "plainly", "cuda"), strict=True):
        # factors, heads and their gradients are rounded to 8 bits a few times each
        assert float((one - other).norm()) <= 2.0**-5 * float(other.norm())


@pytest.mark.gpu
def test_a_forward_pass_on_the_gpu_keeps_less_than_materialised_heads_by_2_5():
    from tpa_attention.torch.functional import tpa_attention

    case = Case(
        tokens=2048, keys=2048, heads=47, width=64, v_width=64, q_rank=6, k_rank=2, v_rank=2,
        dtype=torch.bfloat16,
    )  # fmt: skip
    factors = [x.cuda().requires_grad_() for x in case.factors()]
    size = sum(x.numel() * x.itemsize for x in factors)
    kept = {}
    for impl in ("sdpa", "triton"):
        tpa_attention(*factors, impl=impl)  # compiles, fills caches
        before = torch.cuda.memory_allocated()
        result = tpa_attention(*factors, impl=impl)
        kept[impl] = torch.cuda.memory_allocated() - before + size
        del result
    assert kept["sdpa"] >= 2.5 * kept["triton"]
