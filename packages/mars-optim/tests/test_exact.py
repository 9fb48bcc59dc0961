"""The four ways to supply h_t, on softmax regression and small networks."""

import copy

import numpy as np
import pytest
import torch
from exact_ways import (
    ROUNDING,
    STEPS,
    WAYS,
    Softmax,
    assert_state_equal,
    optimizer_for,
    run,
    way_1,
    way_2,
    way_3_folded,
    way_3_official_order,
    way_4_sequence,
)
from trajectories import TYPES, assert_same

from mars_optim.torch import MARS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mars_type", TYPES)
def test_all_ways_give_one_trajectory(mars_type, way):
    assert_same(run(way, mars_type=mars_type), run(way_1, mars_type=mars_type), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "changed",
    [
        {"prev_grad_init": "zero"},
        {"decay_mode": "l2"},
        {"maximize": True, "lr": 0.005},
        {"optimize_1d": True},
        {"clip": None},
        {"clip_scope": "global", "optimize_1d": True},
        {"foreach": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", [way_2, way_3_official_order, way_3_folded, way_4_sequence])
def test_all_ways_give_one_trajectory_under_options(way, changed):
    assert_same(run(way, **changed), run(way_1, **changed), rtol=0, atol=ROUNDING)


def test_exact_and_approximate_forms_differ():
    task = Softmax()
    optimizer = MARS(task.params, lr=0.05, gamma=0.2, betas=(0.9, 0.99))
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step()
    assert np.abs(task.result()[0] - run(way_1, gamma=0.2)[0]).max() > 1e-3


def test_parameters_inside_are_the_previous_ones_and_come_back_exactly():
    task = Softmax()
    optimizer = optimizer_for(task)
    with optimizer.at_previous_params():
        task.loss(0).backward()
    task.loss(0).backward()
    before = task.result()
    optimizer.step()
    after = task.result()
    optimizer.zero_grad()
    with optimizer.at_previous_params():
        assert_same(task.result(), before, rtol=0, atol=0)
    assert_same(task.result(), after, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["plain step", "fold"])
def test_missing_reference_raises_naming_the_four_ways_and_changes_nothing(way):
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.step()
    before, state = task.result(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"\(1\).*at_previous_params.*\(2\).*\(3\).*\(4\)"):
        optimizer.step() if way == "plain step" else optimizer.fold()
    assert_same(task.result(), before, rtol=0, atol=0)
    assert_state_equal(optimizer.state_dict(), state)


def test_reference_is_used_once():
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.step()
    optimizer.step(prev_grads=[p.grad.clone() for p in task.params])
    with pytest.raises(RuntimeError, match="previous parameters"):
        optimizer.step()


def test_exception_in_the_body_restores_parameters_and_leaves_the_state():
    task = Softmax()
    optimizer = optimizer_for(task)
    for t in range(2):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()
    optimizer.zero_grad()
    before, state = task.result(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(KeyError, match="body"), optimizer.at_previous_params():
        task.loss(2).backward()
        raise KeyError("body")
    assert_same(task.result(), before, rtol=0, atol=0)
    assert_state_equal(optimizer.state_dict(), state)
    assert all(p.grad is None for p in task.params)
    task.loss(2).backward()
    with pytest.raises(RuntimeError, match="the exact form"):
        optimizer.step()


def test_gradients_on_entry_raise():
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    with pytest.raises(RuntimeError, match="None or zero on entry"), optimizer.at_previous_params():
        pass


def test_zeroed_gradients_on_entry_are_kept_in_place():
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.zero_grad(set_to_none=False)
    kept = task.weight.grad
    with optimizer.at_previous_params():
        task.loss(0).backward()
    assert task.weight.grad is kept
    assert not kept.any()


def test_accumulated_backward_calls_add_up_to_the_reference():
    def run_accumulating(parts):
        task = Softmax()
        optimizer = optimizer_for(task)

        def backward(t):
            x, y = task.batches[t]
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = torch.nn.functional.cross_entropy(xs @ task.weight.T + task.bias, ys)
                (loss / parts).backward()

        for t in range(STEPS):
            optimizer.zero_grad()
            with optimizer.at_previous_params():
                backward(t)
            backward(t)
            optimizer.step()
        return task.result()

    assert_same(run_accumulating(4), run_accumulating(1), rtol=0, atol=ROUNDING)


def test_entering_without_stored_parameters_raises_until_the_correction_is_reset():
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no previous parameters"), optimizer.at_previous_params():
        pass
    optimizer.reset_correction()
    for t in (1, 2):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()


@pytest.mark.parametrize("call", ["at_previous_params", "record_next_batch_grad", "fold", "prev_grads"])
def test_exact_calls_need_the_exact_form(call):
    task = Softmax()
    optimizer = MARS(task.params)
    task.loss(0).backward()
    with pytest.raises(RuntimeError, match="is_approx=False"):
        if call == "prev_grads":
            optimizer.step(prev_grads=[p.grad for p in task.params])
        elif call == "at_previous_params":
            with optimizer.at_previous_params():
                pass
        else:
            getattr(optimizer, call)()


@pytest.mark.parametrize(("is_approx", "expected"), [(True, [1, 1, 1]), (False, [1, 2, 2])])
def test_closure_is_called_twice_only_when_a_reference_is_needed(is_approx, expected):
    task = Softmax()
    optimizer = MARS(task.params, is_approx=is_approx)
    calls = []
    for t in range(3):
        losses = []

        def closure(t=t, losses=losses):
            optimizer.zero_grad()
            losses.append(task.loss(t))
            losses[-1].backward()
            return losses[-1]

        assert optimizer.step(closure) is losses[-1]
        calls.append(len(losses))
    assert calls == expected


def test_folding_twice_and_folding_without_the_gradient_it_needs_raise():
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.fold()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.fold()
    for changed in ({"second_moment": "grad"}, {"cautious": True}):
        task = Softmax()
        optimizer = optimizer_for(task, **changed)
        task.loss(0).backward()
        with pytest.raises(RuntimeError, match="need g_t"):
            optimizer.fold()


def test_folded_step_ignores_tensors_that_only_the_next_batch_used():
    weight, other = (torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(2))
    optimizer = MARS([weight, other], is_approx=False)
    weight.sum().backward()
    optimizer.fold()
    optimizer.zero_grad()
    (weight.sum() + other.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(other.detach(), torch.ones_like(other), rtol=0, atol=0)
    assert "step" not in optimizer.state[other]


PREV_GRADS_ERRORS = {
    "too few": (lambda _w, _b: [torch.zeros(3, 5).double()], r"one entry per parameter \(2\), got 1"),
    "missing": (lambda _w, b: {b: torch.zeros(3).double()}, "for parameter #0, got none"),
    "shape": (
        lambda _w, _b: [torch.zeros(5, 3).double(), None],
        r"#0 must have shape \(3, 5\), got \(5, 3\)",
    ),
    "dtype": (
        lambda _w, _b: [torch.zeros(3, 5), None],
        "#0 must have dtype torch.float64, got torch.float32",
    ),
    "device": (
        lambda _w, _b: [torch.zeros(3, 5, dtype=torch.float64, device="meta"), None],
        "#0 must have device cpu, got meta",
    ),
    "unknown name": (lambda _w, _b: {"bias": torch.zeros(3).double()}, "names as keys, got 'bias'"),
    "unknown tensor": (lambda _w, _b: {torch.zeros(3): torch.zeros(3)}, "a tensor that is not a parameter"),
}


@pytest.mark.parametrize("case", PREV_GRADS_ERRORS)
def test_prev_grads_that_do_not_fit_raise(case):
    make, message = PREV_GRADS_ERRORS[case]
    task = Softmax()
    optimizer = optimizer_for(task)
    task.loss(0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        optimizer.step(prev_grads=make(task.weight, task.bias))


def test_prev_grads_by_name_use_the_names_of_named_parameters():
    results = []
    for by_name in (True, False):
        task = Softmax()
        optimizer = MARS([("w", task.weight), ("b", task.bias)], is_approx=False, lr=0.1, gamma=1.0)
        task.loss(0).backward()
        optimizer.step()
        h = torch.ones_like(task.weight)
        optimizer.step(prev_grads={"w": h} if by_name else {task.weight: h})
        results.append(task.result())
    assert_same(results[0], results[1], rtol=0, atol=0)


def test_look_ahead_works_with_a_closure_that_is_called_once():
    results = []
    for with_closure in (True, False):
        task, calls = Softmax(), []
        optimizer = optimizer_for(task)
        for t in range(5):
            optimizer.zero_grad()
            task.loss(t + 1).backward()
            optimizer.record_next_batch_grad()

            def closure(t=t, calls=calls, task=task, optimizer=optimizer):
                calls.append(t)
                optimizer.zero_grad()
                loss = task.loss(t)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert calls == [0, 1, 2, 3, 4]
        results.append(task.result())
    assert_same(results[0], results[1], rtol=0, atol=0)


def test_skipped_tensor_stands_still_in_the_next_previous_point():
    first, second = (torch.nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))
    optimizer = MARS([first, second], is_approx=False)
    for used in ([first, second], [first, second], [first]):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            sum(p.square().sum() for p in used).backward()
        sum(p.square().sum() for p in used).backward()
        optimizer.step()
    now = [p.detach().clone() for p in (first, second)]
    optimizer.zero_grad()
    with optimizer.at_previous_params():
        assert not torch.equal(first.detach(), now[0])
        assert torch.equal(second.detach(), now[1])
