"""Clipping g_t and h_t by one factor, whichever way h_t comes."""

import math

import pytest
import torch
from trajectories import assert_same, draw
from wrapped import ROUNDING, STEPS, Recorder, Softmax

from mars_optim.torch import MARS, clip_grad_norm_pair_
from mars_optim.torch.wrapper import VarianceReduced

SHAPES = ((6, 4), (5,), (), (0, 2), (2, 3, 2))
MAX_NORM = 0.9  # between the norms of the gradients of Softmax, which are 0.4 to 1.4


def pair(dtype=torch.float64, seed=0):
    """Parameters with gradients, one without, and h_t for all but one of them."""
    generator = torch.Generator().manual_seed(seed)
    params, references = [], []
    for shape in (*SHAPES, (3,)):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        params.append(param)
        references.append(torch.randn(shape, generator=generator).to(dtype))
    params[-1].grad = None
    references[1] = None
    return params, references


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_gradients_are_clipped_as_torch_clips_them_and_references_by_the_same_factor(
    dtype, norm_type, max_norm
):
    params, references = pair(dtype)
    alone, untouched = pair(dtype)
    expected = torch.nn.utils.clip_grad_norm_(alone, max_norm, norm_type)
    norm = clip_grad_norm_pair_(params, references, max_norm, norm_type)
    assert torch.equal(norm, expected)
    factor = (max_norm / (expected + 1e-6)).clamp(max=1.0)
    for param, other, h, before in zip(params, alone, references, untouched, strict=True):
        assert other.grad is None or torch.equal(param.grad, other.grad)
        assert h is None or torch.equal(h, before.mul_(factor))


def test_largest_entry_is_the_norm_of_infinite_order():
    params, references = pair()
    del params[3], references[3]  # without entries there is no largest
    alone, _ = pair()
    expected = torch.nn.utils.clip_grad_norm_(alone[:3] + alone[4:], 0.5, math.inf)
    assert torch.equal(clip_grad_norm_pair_(params, references, 0.5, math.inf), expected)
    assert max(p.grad.abs().max() for p in params if p.grad is not None) == pytest.approx(0.5, rel=1e-5)


def test_one_tensor_an_iterator_and_no_gradient_at_all_are_accepted():
    param = torch.nn.Parameter(torch.zeros(2))
    h = torch.ones(2)
    assert clip_grad_norm_pair_(param, [h], 1.0) == 0.0
    assert torch.equal(h, torch.ones(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_pair_(iter([param]), [h], 1.0) == 5.0
    torch.testing.assert_close(h, torch.full((2,), 0.2))


def make_mars(params):
    return MARS(
        params, lr=0.05, lr_1d=0.05, betas=(0.9, 0.99), gamma=0.7, clip=0.3, optimize_1d=True, is_approx=False
    )


def make_wrapped(params):
    return VarianceReduced(
        torch.optim.AdamW(params, lr=0.05, betas=(0.9, 0.99)), gamma=0.7, clip=0.3, is_approx=False
    )


def way_1(task, optimizer, t):
    with optimizer.at_previous_params():
        task.loss(t).backward()
    task.loss(t).backward()
    norm = clip_grad_norm_pair_(task.params, optimizer, MAX_NORM)
    optimizer.step()
    return norm


def way_3(task, optimizer, t):
    task.loss(t + 1).backward()
    optimizer.record_next_batch_grad()
    optimizer.zero_grad()
    task.loss(t).backward()
    norm = clip_grad_norm_pair_(task.params, optimizer, MAX_NORM)
    optimizer.step()
    return norm


def way_3_folded(task, optimizer, t):
    task.loss(t).backward()
    norm = clip_grad_norm_pair_(task.params, optimizer, MAX_NORM)
    optimizer.fold()
    optimizer.zero_grad()
    task.loss(t + 1).backward()
    optimizer.step()
    return norm


def run(make, way):
    task = Softmax()
    optimizer = make(task.params)
    norms = []
    for t in range(STEPS):
        optimizer.zero_grad()
        norms.append(way(task, optimizer, t))
    assert 0 < sum(norm > MAX_NORM for norm in norms) < STEPS
    return task.result()


def run_way_4(make, clip=clip_grad_norm_pair_):
    """Way 4 with the previous parameters kept here, by the same operations as in a pass over the module."""
    task = Softmax()
    optimizer = make(task.params)
    previous = None
    for t in range(STEPS):
        optimizer.zero_grad()
        now = [p.detach().clone() for p in task.params]
        references = [None] * len(now)
        if previous is not None:
            for param, value in zip(task.params, previous, strict=True):
                param.data = value
            references = list(torch.autograd.grad(task.loss(t), task.params))
            for param, value in zip(task.params, now, strict=True):
                param.data = value.clone()
        task.loss(t).backward()
        clip(task.params, references, MAX_NORM)
        optimizer.step(prev_grads=references)
        previous = now
    return task.result()


@pytest.mark.parametrize("make", [make_mars, make_wrapped])
def test_by_context_manager_and_by_given_gradients_it_is_one_trajectory_bit_for_bit(make):
    assert_same(run(make, way_1), run_way_4(make), rtol=0, atol=0)


@pytest.mark.parametrize("way", [way_3, way_3_folded])
@pytest.mark.parametrize("make", [make_mars, make_wrapped])
def test_by_looking_ahead_it_is_the_same_trajectory(make, way):
    assert_same(run(make, way), run_way_4(make), rtol=0, atol=ROUNDING)


def test_clipping_each_by_its_own_norm_is_another_trajectory():
    def each_by_its_own(params, references, max_norm):
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        given = [h for h in references if h is not None]
        if given:
            norm = torch.nn.utils.get_total_norm(given)
            for h in given:
                h.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    apart = run_way_4(make_wrapped, each_by_its_own)
    assert abs(apart[0] - run(make_wrapped, way_1)[0]).max() > 1e-3


def test_where_nothing_moved_the_correction_vanishes_and_the_gradient_is_scaled():
    """With lr = 0 the previous parameters are the present ones, so h = g and c = g times the factor."""
    task = Softmax()
    base = Recorder(task.params)
    optimizer = VarianceReduced(base, gamma=1.0, clip=None, is_approx=False)
    for t in range(3):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        g = [p.grad.clone() for p in task.params]
        norm = clip_grad_norm_pair_(task.params, optimizer, 0.05)
        optimizer.step()
        assert norm > 0.05
        for shown, gradient in zip(base.shown[-1], g, strict=True):
            assert torch.equal(shown, gradient * (0.05 / (norm + 1e-6)))


def test_first_step_and_the_one_after_a_reset_clip_the_gradient_alone():
    task = Softmax()
    optimizer = make_mars(task.params)
    for t in range(2):
        optimizer.zero_grad()
        task.loss(t).backward()
        clip_grad_norm_pair_(task.params, optimizer, 0.01)
        assert torch.nn.utils.get_total_norm([p.grad for p in task.params]) == pytest.approx(0.01, rel=1e-3)
        optimizer.step()
        optimizer.reset_correction()


def test_tensors_that_are_not_corrected_or_not_the_optimizers_are_clipped_without_a_reference():
    task = Softmax()
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MARS(task.params, is_approx=False)  # the bias is a vector, so it gets plain AdamW
    for t in range(2):
        optimizer.zero_grad()
        task.loss(t).backward()
        other.grad = torch.ones_like(other)
        if t == 1:
            # a step that keeps h of the weight alone
            optimizer.state[task.weight]["last_grad"] = torch.ones_like(task.weight)
        norm = clip_grad_norm_pair_([*task.params, other], optimizer, 1.0)
        assert torch.equal(other.grad, 1.0 / (norm + 1e-6) * torch.ones_like(other))
        if t == 0:
            optimizer.step()
    assert torch.equal(
        optimizer.state[task.weight]["last_grad"], 1.0 / (norm + 1e-6) * torch.ones_like(task.weight)
    )


def stepped(make=make_mars):
    """A task after its first step, with the gradient of the second and no h_t."""
    task = Softmax()
    optimizer = make(task.params)
    task.loss(0).backward()
    optimizer.step()
    optimizer.zero_grad()
    task.loss(1).backward()
    return task, optimizer


@pytest.mark.parametrize("make", [make_mars, make_wrapped])
def test_nothing_held_after_the_first_step_raises_and_scales_nothing(make):
    task, optimizer = stepped(make)
    before = task.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"found no gradient.*step\(closure\)` leaves no place"):
        clip_grad_norm_pair_(task.params, optimizer, 1e-3)
    assert torch.equal(task.weight.grad, before)


def test_after_fold_and_in_the_approximate_form_it_raises():
    task = Softmax()
    optimizer = make_mars(task.params)
    task.loss(0).backward()
    optimizer.fold()
    with pytest.raises(RuntimeError, match=r"must come before fold\(\)"):
        clip_grad_norm_pair_(task.params, optimizer, 1.0)
    with pytest.raises(RuntimeError, match="is_approx=False"):
        clip_grad_norm_pair_(task.params, MARS(task.params), 1.0)


def parameter():
    param = torch.nn.Parameter(torch.zeros(2, 3))
    param.grad = torch.full((2, 3), 9.0)
    return param


ERRORS = {
    "norm": (lambda p: ([p], [None], 0.0), ValueError, "max_norm must be > 0, got 0.0"),
    "norm nan": (lambda p: ([p], [None], math.nan), ValueError, "max_norm must be > 0, got nan"),
    "order": (lambda p: ([p], [None], 1.0, 0.0), ValueError, "norm_type must be > 0, got 0.0"),
    "count": (lambda p: ([p, p], [None], 1.0), ValueError, r"one entry per parameter \(2\), got 1"),
    "base": (
        lambda p: ([p], torch.optim.AdamW([p]), 1.0),
        TypeError,
        "sequence of tensors.*MARS.*got AdamW",
    ),
    "tensor": (lambda p: (p, torch.zeros(2, 3), 1.0), TypeError, "sequence of tensors.*got Tensor"),
    "entry": (lambda p: ([p], [1.0], 1.0), TypeError, "tensors or None, got float"),
    "shape": (
        lambda p: ([p], [torch.zeros(3, 2)], 1.0),
        ValueError,
        r"#0 must have shape \(2, 3\), got \(3, 2\)",
    ),
    "own": (lambda p: ([p], [p.grad.detach()], 1.0), ValueError, "#0 must not be its own .grad"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arguments_that_do_not_fit_raise_and_scale_nothing(case):
    make, error, message = ERRORS[case]
    param = parameter()
    with pytest.raises(error, match=message):
        clip_grad_norm_pair_(*make(param))
    assert torch.equal(param.grad, torch.full((2, 3), 9.0))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nonfinite_norm_behaves_as_in_torch_and_raises_if_asked(value):
    params, references = pair()
    params[0].grad[0, 0] = value
    before = [None if p.grad is None else p.grad.clone() for p in params]
    h = references[0].clone()
    with pytest.raises(RuntimeError, match=f"norm {value} of order 2.0"):
        clip_grad_norm_pair_(params, references, 1.0, error_if_nonfinite=True)
    for param, gradient in zip(params, before, strict=True):
        assert gradient is None or torch.equal(param.grad.nan_to_num(7.0), gradient.nan_to_num(7.0))
    assert torch.equal(references[0], h)
    alone, _ = pair()
    alone[0].grad[0, 0] = value
    torch.nn.utils.clip_grad_norm_(alone, 1.0)
    clip_grad_norm_pair_(params, references, 1.0)
    for param, other in zip(params, alone, strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    expected = torch.zeros_like(h) if math.isinf(value) else torch.full_like(h, math.nan)
    torch.testing.assert_close(references[0], expected, rtol=0, atol=0, equal_nan=True)


SHARDED = ((5, 4), (1, 6), (3, 2, 2), (4,), (3, 3))


def clip_on_shards(rank, world_size, norm_types):
    """The norm and whole tensors after clipping by each of the norms."""
    return [clip_shards(world_size, norm_type) for norm_type in norm_types]


def clip_shards(world_size, norm_type):
    """Row shards, uneven and empty, a replicated and a plain tensor; the norm and whole tensors after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    drawn = draw(seed=5, shapes=SHARDED, steps=1)

    def placed(arrays):
        *rows, repeated, plain = [torch.tensor(x) for x in arrays]
        rows = [distribute_tensor(x, mesh, [Shard(0)]) for x in rows]
        return [*rows, distribute_tensor(repeated, mesh, [Replicate()]), plain]

    params = [torch.nn.Parameter(x) for x in placed(drawn[0])]
    references = placed(drawn[2][0])
    for param, gradient in zip(params, placed(drawn[1][0]), strict=True):
        param.grad = gradient
    norm = clip_grad_norm_pair_(params, references, 1.0, norm_type)
    assert type(norm) is torch.Tensor
    whole = [*(p.grad for p in params), *references]
    return [norm.numpy()] + [(x.full_tensor() if hasattr(x, "full_tensor") else x).numpy() for x in whole]


def test_shards_of_two_processes_are_clipped_as_whole_tensors_of_one(run_distributed):
    norm_types = [1.0, 2.0]
    # the limit is for a busy machine
    ranks = run_distributed(clip_on_shards, 2, norm_types, timeout=200)
    drawn = draw(seed=5, shapes=SHARDED, steps=1)
    for norm_type, first, second in zip(norm_types, *ranks, strict=True):
        params = [torch.nn.Parameter(torch.tensor(x)) for x in drawn[0]]
        references = [torch.tensor(x) for x in drawn[2][0]]
        for param, gradient in zip(params, drawn[1][0], strict=True):
            param.grad = torch.tensor(gradient)
        norm = clip_grad_norm_pair_(params, references, 1.0, norm_type)
        whole = [norm.numpy(), *(p.grad.numpy() for p in params), *(h.numpy() for h in references)]
        assert norm > 1.0
        # sums of a few dozen float64 numbers in another order
        assert_same(first, whole, rtol=1e-13, atol=0)
        assert_same(second, first, rtol=0, atol=0)
