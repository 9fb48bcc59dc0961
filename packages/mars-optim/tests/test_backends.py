"""The choice of a backend, and MARS(fused=True) on the CPU against the NumPy truth."""

from dataclasses import replace

import pytest
import torch
from test_functional import BASE, CASES, CLIPS, ROUNDING, name_of
from trajectories import TYPES, assert_same, draw, run_mars, run_reference, varying

from mars_optim.torch import MARS, _cpu, backends
from mars_optim.torch.backends import choose_backend


@pytest.fixture
def kernels():
    if _cpu.why_unavailable() is not None:
        pytest.skip(f"needs a C++ compiler with OpenMP: {_cpu.why_unavailable()}")


def steps_of(optimizer, params, gradients):
    """Every step's parameters and remembered gradients."""
    for gradient in gradients:
        for param, grad in zip(params, gradient, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        yield (
            [p.detach().clone() for p in params],
            [optimizer.state[p]["last_grad"].clone() for p in params if "last_grad" in optimizer.state[p]],
        )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_fused_step_follows_the_reference(kernels, case):
    mars_type, is_approx, clip, table, changed = case
    options = replace(BASE, mars_type=mars_type, is_approx=is_approx, clip=CLIPS[clip], **table[changed])
    options = varying(options) if changed == "schedule" else options
    drawn = draw(seed=3)
    assert_same(
        run_mars(drawn, options, fused=True), run_reference(drawn, options), rtol=ROUNDING, atol=ROUNDING
    )


@pytest.mark.parametrize("mars_type", TYPES)
def test_the_fused_step_agrees_with_the_loop_in_float32(kernels, mars_type):
    options = replace(BASE, mars_type=mars_type, clip=4.0, weight_decay=0.1)
    drawn = draw(seed=2)
    loop = run_mars(drawn, options, dtype=torch.float32, foreach=False)
    fused = run_mars(drawn, options, dtype=torch.float32, fused=True)
    # a few ulp (1.2e-7) of entries of order one; atol covers entries that have cancelled to small numbers
    assert_same(fused, loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mars_type", ["lion", "shampoo", "m", "sgd"])
def test_the_fused_step_needs_no_previous_gradient_when_memory_efficient(kernels, mars_type):
    options = replace(BASE, mars_type=mars_type, clip=None)
    drawn = draw(seed=4)
    efficient = run_mars(drawn, options, fused=True, memory_efficient=True)
    assert_same(efficient, run_reference(drawn, options), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("prev_grad_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_remembers_the_same_gradients_as_the_loop(kernels, dtype, prev_grad_dtype):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 5, generator=generator), torch.randn(5, generator=generator)]
    gradients = [[torch.randn(x.shape, generator=generator).to(dtype) for x in start] for _ in range(4)]
    runs = []
    for backend in ({"foreach": False}, {"fused": True}):
        params = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in start]
        optimizer = MARS(params, lr=0.01, prev_grad_dtype=prev_grad_dtype, **backend)
        runs.append(list(steps_of(optimizer, params, gradients)))
    for (loop, loop_kept), (fused, fused_kept) in zip(*runs, strict=True):
        assert len(fused_kept) == 1  # the vector is under plain AdamW
        assert all(torch.equal(a, b) for a, b in zip(fused_kept, loop_kept, strict=True))
        # bfloat16: values that agree in float32 may be rounded to neighbours, once per step
        tolerance = 4 * 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(fused, loop, rtol=tolerance, atol=tolerance)


def test_a_fused_run_continues_bit_for_bit_from_its_checkpoint(kernels):
    drawn = draw(seed=5, steps=6)
    gradients = [[torch.tensor(g) for g in step] for step in drawn[1]]

    def start():
        params = [torch.nn.Parameter(torch.tensor(x)) for x in drawn[0]]
        return params, MARS(params, lr=0.01, fused=True)

    params, optimizer = start()
    uninterrupted = list(steps_of(optimizer, params, gradients))[-1][0]
    params, optimizer = start()
    list(steps_of(optimizer, params, gradients[:3]))
    resumed, second = start()
    second.load_state_dict(optimizer.state_dict())
    for new, old in zip(resumed, params, strict=True):
        new.data.copy_(old.data)
    continued = list(steps_of(second, resumed, gradients[3:]))[-1][0]
    assert all(torch.equal(a, b) for a, b in zip(continued, uninterrupted, strict=True))


def test_a_graph_from_before_the_fused_step_is_known_to_be_stale(kernels):
    param = torch.nn.Parameter(torch.ones(2, 2))
    loss = param.square().sum()
    param.grad = torch.ones(2, 2)
    MARS([param], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_each_backend_is_chosen_for_its_reason(kernels):
    plain, complex_ = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.complex64)

    class Wrapped(torch.Tensor):
        pass

    chosen = {
        "lists": choose_backend(plain, foreach=None, fused=None),
        "no lists": choose_backend(plain, foreach=False, fused=None),
        "fused": choose_backend(plain, foreach=None, fused=True),
        "fused, no lists": choose_backend(plain, foreach=False, fused=True),
        "complex": choose_backend(complex_, foreach=None, fused=True),
        "subclass": choose_backend(plain.as_subclass(Wrapped), foreach=None, fused=True),
    }
    assert {case: backend.name for case, backend in chosen.items()} == {
        "lists": "foreach",
        "no lists": "loop",
        "fused": "cpu",
        "fused, no lists": "cpu",
        "complex": "loop",
        "subclass": "loop",
    }
    assert all(backend.reason for backend in chosen.values())


def test_kernels_are_never_used_unasked(monkeypatch):
    monkeypatch.setattr(_cpu, "available_or_warn", lambda: pytest.fail("the compiler was asked for"))
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    MARS([param]).step()
    MARS([param], fused=False).step()


def test_without_kernels_the_step_is_that_of_the_lists(monkeypatch):
    monkeypatch.setattr(_cpu, "available_or_warn", lambda: False)
    drawn = draw(seed=6, steps=3)
    assert_same(run_mars(drawn, BASE, fused=True), run_mars(drawn, BASE, foreach=True), rtol=0, atol=0)


def test_a_device_without_kernels_is_named_once():
    backends._triton_or_warn.cache_clear()
    meta = torch.zeros(2, 2, device="meta")
    with pytest.warns(UserWarning, match=r"using foreach: there are none for the device 'meta'") as caught:
        names = [choose_backend(meta, foreach=None, fused=True).name for _ in range(2)]
    assert names == ["foreach", "foreach"]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fused": 1.5}, TypeError, "fused must be None, True or False, got 1.5"),
        ({"fused": True, "foreach": True}, ValueError, "foreach and fused must not both be True"),
    ],
    ids=["no flag", "two backends"],
)
def test_flags_that_choose_no_backend_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MARS([torch.nn.Parameter(torch.ones(2))], **arguments)
