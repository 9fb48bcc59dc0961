"""The Triton step against the loop, interpreted on the CPU; on a GPU too where there is one.

Functions that run in the interpreter's process import `_triton` themselves: Triton decides when it is
imported whether kernels are interpreted.
"""

from dataclasses import replace

import pytest
import torch
from fused_cases import KINDS, RULES, Case, assert_agree, by_backend, by_loop

from mars_optim.torch import UpdateRule

pytest.importorskip("triton", reason="needs triton, which is optional")

# below one chunk, exactly one block, one element, one full chunk and a part of the next
SHAPES = ((6, 4), (5,), (2, 3, 3, 2), (1,), (1025, 5), (1024,))
MATRICES = ((6, 4), (2, 3, 3, 2), (7, 1), (1025, 5))
DTYPES = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.float32, "store_dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "grad_dtype": torch.float32, "state_dtype": torch.bfloat16},
    {"dtype": torch.float64, "store_dtype": torch.float32, "state_dtype": torch.float32},
]
CLIPS = {"clip": {}, "no clip": {"clip": None}, "batched": {"batched": True}}
STREAMS = dict.fromkeys(("scalars", "partials", "numbers"), "*fp64") | {"table": "*i64", "noise": "*i64"}
COUNTS = dict.fromkeys(("entries", "blocks", "divisor_stride"), "i32")


def small(case):
    return replace(case, shapes=MATRICES if case.kind in ("shampoo", "m") else SHAPES)


def tiny(case):
    """Below one chunk, for what does not depend on how many chunks there are."""
    case = small(case)
    return replace(case, shapes=tuple(shape for shape in case.shapes if max(shape) < 1024))


def compare(*cases, device="cpu"):
    from mars_optim.torch._triton import mars_triton

    for case in cases:
        # the interpreter cuts a float32 off where the hardware rounds it to a half
        assert_agree(by_backend(mars_triton, case, device), by_loop(case), rounds=device != "cpu")


def count_launches(cases):
    """Kernel launches of one step of each case, and what the step did."""
    from mars_optim.torch import _triton

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches[-1] += 1
            return self.kernel[grid]

    launches = []
    names = ("_sum_squares", "_finish", "_update")
    kernels = {name: getattr(_triton, name) for name in names}
    try:
        for name in names:
            setattr(_triton, name, Counted(kernels[name]))
        for case in cases:
            launches.append(0)
            compare(case)
    finally:
        for name in names:
            setattr(_triton, name, kernels[name])
    return launches


def count_on_the_device(options, kind, factor):
    """One step that counts and reads its numbers on the device, with tensor numbers if there is a factor."""
    from mars_optim.torch._triton import mars_triton

    case = tiny(Case(kind=kind, options=options))
    numbers = {name: getattr(case.rule, name) for name in ("lr", "decay", "beta1")}
    if factor is not None:
        numbers = {name: torch.tensor(factor * value, dtype=torch.float64) for name, value in numbers.items()}
    expected = by_loop(replace(case, options={**options, **{name: float(x) for name, x in numbers.items()}}))
    on_device = replace(case, options={**options, **numbers, "capturable": True})
    assert_agree(by_backend(mars_triton, on_device), expected)


def round_at_random():
    """Ten thousand bfloat16 parameters after a step that is a quarter of their spacing, twice over."""
    from mars_optim.torch._triton import mars_triton

    rule = UpdateRule(kind="sgd", lr=2.0**-10, beta1=0.0, stochastic_rounding=True)
    results = []
    for seed in (0, 0, 1):
        params = [torch.ones(100, 100, dtype=torch.bfloat16), torch.full((5,), torch.inf).bfloat16()]
        grads = [-torch.ones_like(param) for param in params]
        averages = [torch.zeros(param.shape) for param in params]
        steps = [torch.tensor(0.0) for _ in params]
        generator = torch.Generator().manual_seed(seed)
        mars_triton(params, grads, None, averages, [], [], steps, rule, None, None, generator)
        results.append(params)
    return results


def keep_tables():
    """Uploads of the second and third step with the same tensors and another learning rate."""
    from mars_optim.torch import _triton

    uploads, upload = [], _triton._to_device
    lists = small(Case()).lists()
    try:
        _triton._to_device = lambda array, device: (uploads.append(array.dtype), upload(array, device))[1]
        for lr in (0.123, 0.321, 0.321):
            uploads.append("step")
            lists["rule"] = replace(lists["rule"], lr=lr, capturable=True)
            _triton.mars_triton(**lists)
    finally:
        _triton._to_device = upload
    return [str(entry) for entry in uploads]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}, {rule[1]}")
def test_every_rule_equals_the_loop(triton_interpreter, rule):
    sized = small if rule[1] in ("plain", "batched") else tiny
    triton_interpreter(compare, sized(Case(kind=rule[0], options=rule[2])))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_streams_of_any_dtype_are_computed_in_the_working_dtype(triton_interpreter, dtypes):
    triton_interpreter(compare, small(Case(**dtypes)))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_the_loop_for_every_kind(triton_interpreter, kind):
    triton_interpreter(compare, small(Case(kind=kind, dtype=torch.float32)))


def test_a_common_norm_divides_every_tensor(triton_interpreter):
    triton_interpreter(compare, small(Case(common_norm=7.5)), small(Case(kind="m", common_norm=0.5)))


def test_without_stores_the_gradient_is_left_to_the_caller(triton_interpreter):
    triton_interpreter(compare, small(Case(storing=False)), small(Case(kind="lion", storing=False)))


def test_degenerate_shapes_take_a_step(triton_interpreter):
    triton_interpreter(compare, Case(shapes=((0, 3), (2, 2))), Case(shapes=((),)))


def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(triton_interpreter):
    shapes = [tuple((1 + i % 3, 2) for i in range(count)) for count in (1, 12)]
    clipped = [Case(shapes=shape) for shape in shapes]
    unclipped = [Case(shapes=shape, options={"clip": None}) for shape in shapes]
    assert triton_interpreter(count_launches, [*clipped, *unclipped]) == [3, 3, 1, 1]


@pytest.mark.slow  # a thousand interpreted programs per kernel
def test_a_thousand_tiny_tensors_equal_the_loop(triton_interpreter):
    shapes = tuple((1 + i % 7, 1 + i % 5) for i in range(1000))
    triton_interpreter(compare, Case(dtype=torch.float32, shapes=shapes), timeout=300)


@pytest.mark.parametrize("factor", [None, 0.3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", CLIPS)
def test_steps_and_learning_rate_may_live_on_the_device(triton_interpreter, clip, kind, factor):
    triton_interpreter(count_on_the_device, CLIPS[clip], kind, factor)


def test_beta_zero_and_eps_before_correction_are_read_on_the_device_too(triton_interpreter):
    options = {"beta1": 0.0, "eps_before_correction": True, "eps": 0.1}
    triton_interpreter(count_on_the_device, options, "adamw", None)


def test_tables_stay_on_the_device_while_the_tensors_stay(triton_interpreter):
    uploads = triton_interpreter(keep_tables)
    # the first step brings the table and the scalars, the second its new learning rate, the third nothing
    assert uploads == ["step", "int64", "float64", "step", "float64", "step"]


def test_stochastic_rounding_is_right_in_the_mean_and_follows_the_generator(triton_interpreter):
    first, again, other = triton_interpreter(round_at_random)
    values, counts = first[0].unique(return_counts=True)
    assert values.tolist() == [1.0, 1.0 + 2.0**-7]  # the neighbours of 1 + 2^-10
    # one in eight goes up: 1250 of 10000, standard deviation 33
    assert abs(int(counts[1]) - 1250) < 5 * 33
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert first[1].isinf().all()


@pytest.mark.slow  # about a second per kernel
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "momentum"])
@pytest.mark.parametrize("param", ["fp32", "bf16", "fp64"])
def test_kernels_compile_for_cuda_and_move_128_bits_at_a_time(kind, param, monkeypatch, tmp_path):
    # needs no GPU: what the interpreter accepts, the compiler may not
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mars_optim.torch import _triton

    dtype = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}[param]
    work = tl.float64 if param == "fp64" else tl.float32
    types = {**STREAMS, **COUNTS, "divisors": "*fp64" if param == "fp64" else "*fp32"}
    constants = dict.fromkeys("XGHS", dtype) | dict.fromkeys("MVL", work)
    constants |= {"WORK": work, "CHUNK": _triton._CHUNK, "BLOCK": _triton._BLOCK, "KIND": kind}
    switches = "NORM COUNTING ADAM EPS_FIRST CLIPPED QUASI OF_GRADIENT CAUTIOUS CORRECTED ALIGNED"
    constants |= dict.fromkeys(switches.split(), True) | {"NOISY": param == "bf16"}
    for kernel in (_triton._sum_squares, _triton._finish, _triton._update):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        fixed = {name: constants[name] for name in kernel.arg_names if name not in types}
        source = ASTSource(kernel, signature, fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        if kernel is not _triton._finish:
            assert "ld.global.v" in compiled.asm["ptx"] or ".v4.b32" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}, {rule[1]}")
def test_every_rule_equals_the_loop_on_the_gpu(rule, dtype):
    if rule[0] in ("shampoo", "m") and dtype != torch.float64:
        pytest.skip("Newton-Schulz runs in bfloat16 on CUDA and in float32 on the CPU")
    compare(Case(kind=rule[0], options=rule[2], dtype=dtype), device="cuda")


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_step():
    from mars_optim.torch._triton import mars_triton

    def steps(captured):
        lists = Case(dtype=torch.float32, options={"capturable": True}).lists()
        for name in ("params", "grads", "references", "exp_avgs", "exp_avg_sqs", "steps"):
            lists[name] = [tensor.cuda() for tensor in lists[name]]
        lists["stores"] = lists["references"]
        mars_triton(**lists)  # brings the tables to the device
        if not captured:
            for _ in range(3):
                mars_triton(**lists)
            return lists["params"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mars_triton(**lists)
        for _ in range(3):
            graph.replay()
        return lists["params"]

    for replayed, stepped in zip(steps(True), steps(False), strict=True):
        assert torch.equal(replayed, stepped)
