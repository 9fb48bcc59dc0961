"""The compiled CPU step against the loop: rules, dtypes, layouts, threads, and no compiler."""

from dataclasses import replace

import pytest
import torch
from fused_cases import KINDS, RULES, Case, assert_agree, by_backend, by_loop

from mars_optim.torch import _cpu
from mars_optim.torch._cpu import mars_cpu, why_unavailable

HALVES = (torch.bfloat16, torch.float16)
STATE = ("params", "exp_avgs", "exp_avg_sqs", "steps")
LAID_OUT = [("grads",), ("params",), ("params", "grads", "references", "exp_avgs", "exp_avg_sqs")]
COMPILERS = [("/no/such/compiler", "/no/such/compiler"), ("false", "false failed with status 1")]


@pytest.fixture(autouse=True)
def _compiler_needed(request):
    if "without_kernels" not in request.fixturenames and why_unavailable() is not None:
        pytest.skip(f"needs a C++ compiler with OpenMP: {why_unavailable()}")


@pytest.fixture
def without_kernels(monkeypatch, tmp_path):
    """A machine whose cache is empty and whose compiler is what the test sets in CXX."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    caches = (_cpu._library, _cpu.available_or_warn)
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}, {rule[1]}")
def test_every_rule_equals_the_loop(rule, dtype):
    case = Case(kind=rule[0], options=rule[2], dtype=dtype)
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_half_precision_parameters_are_updated_in_float32(kind, dtype):
    case = Case(kind=kind, dtype=dtype)
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


@pytest.mark.parametrize(
    "dtypes",
    [
        {"dtype": torch.float32, "store_dtype": torch.bfloat16},
        {"dtype": torch.float32, "state_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "grad_dtype": torch.float32, "state_dtype": torch.float16},
        {"dtype": torch.float64, "store_dtype": torch.float32, "state_dtype": torch.float32},
        {"dtype": torch.float32, "state_dtype": torch.float64},
    ],
    ids=str,
)
def test_streams_of_other_dtypes_are_converted(dtypes):
    case = Case(**dtypes)
    actual, expected = by_backend(mars_cpu, case), by_loop(case)
    # state in half precision is rounded once more; the loop's own tolerance for its dtype covers that
    assert_agree(actual, expected)


def test_a_common_norm_divides_every_tensor():
    for kind in KINDS:
        case = Case(kind=kind, common_norm=7.5)
        assert_agree(by_backend(mars_cpu, case), by_loop(case))


def test_without_stores_no_gradient_is_copied():
    case = Case(storing=False)
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


def test_tensors_of_several_dtypes_in_one_call_are_each_done_in_their_own():
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    cases = [Case(dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    drawn = [case.lists() for case in cases]
    joined = {
        name: [tensor for lists in drawn for tensor in lists[name]]
        for name in drawn[0]
        if isinstance(drawn[0][name], list)
    }
    mars_cpu(**joined, rule=cases[0].rule, norm=None)
    params = iter(joined["params"])
    for case in cases:
        expected = by_loop(replace(case, storing=False))["params"]
        actual = [next(params) for _ in expected]
        assert_agree({"params": actual}, {"params": expected})


def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    # tensors on both sides of the size up to which one thread does everything
    case = Case(dtype=torch.float32, shapes=((70001,), (300, 301), (17, 5), (64, 64), (64, 64)))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(by_backend(mars_cpu, case))
    for result in results[1:]:
        for name, tensors in results[0].items():
            assert all(torch.equal(a, b) for a, b in zip(result[name], tensors, strict=True)), name


def test_a_thousand_small_tensors_equal_the_loop(threads):
    threads(2)
    case = Case(dtype=torch.float32, shapes=tuple((1 + i % 7, 1 + i % 5) for i in range(1000)))
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def every_other(tensor):
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("changed", LAID_OUT, ids=len)
@pytest.mark.parametrize("layout", [channels_last, every_other])
def test_any_memory_layout_gives_the_same_step(layout, changed, batched):
    case = Case(options={"batched": batched})
    expected = by_loop(case)
    lists = case.lists()
    for name in changed:
        lists[name] = [layout(tensor) for tensor in lists[name]]
    stores = [torch.empty_like(g) for g in lists["grads"]]
    divisors = mars_cpu(**lists, stores=stores)
    actual = {**{name: lists[name] for name in STATE}, "divisors": divisors, "stores": stores}
    assert_agree(actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("shapes", [((0, 3), (2, 2)), ((),)], ids=["an empty tensor", "a scalar"])
def test_degenerate_shapes_take_a_step(shapes):
    case = Case(shapes=shapes)
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


def test_no_tensors_are_no_work():
    assert mars_cpu([], [], None, [], [], [], [], Case().rule, None) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_nan_and_infinity_spread_as_in_the_loop(kind, value):
    class Poisoned(Case):
        def lists(self):
            lists = super().lists()
            lists["grads"][0].flatten()[2] = value
            lists["grads"][7].flatten()[12000] = value
            return lists

    case = Poisoned(kind=kind, dtype=torch.float32)
    assert_agree(by_backend(mars_cpu, case), by_loop(case))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_number_is_read_and_written_exactly(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    still = Case(kind="sgd", options={"clip": None, "decay": 0.0}).rule
    zeros = torch.zeros(len(numbers))
    param, copy = numbers.clone(), torch.empty(len(numbers))
    mars_cpu([param], [zeros.clone()], None, [zeros.clone()], [], [], [torch.tensor(0.0)], still, None)
    mars_cpu([zeros], [numbers], None, [zeros.clone()], [], [], [torch.tensor(0.0)], still, None, [copy])
    known = ~numbers.isnan()
    assert torch.equal(param[known], numbers[known])
    assert param[~known].isnan().all()
    assert torch.equal(copy[known], numbers[known].float())
    assert copy[~known].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_half_precision_is_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    # all bit patterns, what float16 can hold and a little more, and ties of its subnormals and of others
    size = 2.0 ** torch.randint(-26, 17, (count,), generator=generator)
    ordinary = torch.randn(count, generator=generator) * size
    ties = torch.arange(-4100, 4100, dtype=torch.float32) * 2.0**-25
    halfway = ordinary.to(dtype).float() * (1 + 2.0**-9)
    numbers = torch.cat([bits.view(torch.float32), ordinary, ties, halfway])
    stored = torch.empty(len(numbers), dtype=dtype)
    zeros = [torch.zeros(len(numbers)) for _ in range(2)]
    rule = Case(kind="sgd", options={"clip": None}).rule
    mars_cpu([zeros[0]], [numbers], None, [zeros[1]], [], [], [torch.tensor(0.0)], rule, None, [stored])
    torch.testing.assert_close(stored, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow  # it compiles, which takes 4 s of a free core
def test_a_schedule_compiles_nothing_and_a_second_process_finds_the_library(without_kernels):
    compiled = []
    build = _cpu._compile
    without_kernels.setattr(_cpu, "_compile", lambda *arguments: (compiled.append(1), build(*arguments)))
    for lr in (0.1, 0.2):
        case = Case(options={"lr": lr, "gamma": lr})
        assert_agree(by_backend(mars_cpu, case), by_loop(case))
    _cpu._library.cache_clear()  # what a new process starts with
    assert why_unavailable() is None
    assert len(compiled) == 1


@pytest.mark.parametrize(("compiler", "said"), COMPILERS, ids=["missing", "failing"])
def test_without_a_working_compiler_there_is_one_warning_that_says_why(without_kernels, compiler, said):
    without_kernels.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=f"using foreach: .*{said}") as caught:
        assert not _cpu.available_or_warn()
        assert not _cpu.available_or_warn()
    assert len(caught) == 1
