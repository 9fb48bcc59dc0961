"""Parameters and their predecessors trade places, by copying or by pointer."""

import weakref

import numpy as np
import pytest
import torch
from trajectories import assert_same
from wrapped import STEPS, Softmax

from mars_optim.torch import MARS
from mars_optim.torch.exchange import copy_all, swap
from mars_optim.torch.wrapper import VarianceReduced


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).clone()


def odd_pairs():
    """Values that arithmetic would not keep, several dtypes, layouts that are not contiguous, no entries."""
    odd = torch.tensor([-0.0, torch.nan, torch.inf, 5e-324, 1.0, -2.0], dtype=torch.float64)
    shapes = [(6, 4), (100,), (3, 5), (0, 2), (1,)]
    firsts = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    firsts += [torch.nn.Parameter(odd.clone()), torch.nn.Parameter(torch.randn(4, 3).bfloat16())]
    firsts += [
        torch.nn.Parameter(torch.randn(5, 4).T),
        torch.nn.Parameter(torch.randn(3, dtype=torch.cfloat)),
    ]
    return [(first, torch.empty_like(first).copy_(first.detach().flip(0))) for first in firsts]


@pytest.mark.parametrize("by_pointer", [False, True])
def test_exchange_keeps_every_bit_and_a_second_one_undoes_it(by_pointer):
    pairs = odd_pairs()
    before = [(bits(first), bits(second)) for first, second in pairs]
    addresses = [first.data_ptr() for first, _ in pairs]
    swap(pairs, by_pointer=by_pointer)
    for (first, second), (was_first, was_second) in zip(pairs, before, strict=True):
        assert torch.equal(bits(first), was_second)
        assert torch.equal(bits(second), was_first)
    moved = [first.data_ptr() != a for (first, _), a in zip(pairs, addresses, strict=True) if first.numel()]
    assert all(moved) if by_pointer else not any(moved)
    swap(pairs, by_pointer=by_pointer)
    for (first, second), (was_first, was_second) in zip(pairs, before, strict=True):
        assert torch.equal(bits(first), was_first)
        assert torch.equal(bits(second), was_second)
    assert [first.data_ptr() for first, _ in pairs] == addresses


def test_nothing_to_exchange_or_copy_is_fine():
    swap([])
    copy_all([], [])


class Scratch(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of entries that were allocated and still alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty_like" in str(func):
            self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(out)]
            self.most = max(self.most, sum(ref().numel() for ref in self.alive))
        return out


def test_copying_needs_room_for_little_more_than_the_largest_tensor():
    pairs = [(torch.randn(n), torch.randn(n)) for n in (10, 20, 30, 100, 60, 30, 30, 1)]
    with Scratch() as scratch:
        swap(pairs)
    # one chunk is let go of when the next one has been allocated
    assert 100 <= scratch.most <= 200


@pytest.mark.parametrize("wrapped", [False, True])
def test_exact_form_by_pointer_is_the_one_by_copying_bit_for_bit(wrapped):
    def run(by_pointer):
        task = Softmax()
        if wrapped:
            base = torch.optim.AdamW(task.params, lr=0.05)
            optimizer = VarianceReduced(base, is_approx=False, gamma=0.5)
        else:
            optimizer = MARS(task.params, lr=0.05, is_approx=False, gamma=0.5, optimize_1d=True)
        addresses = [p.data_ptr() for p in task.params]
        for t in range(STEPS):
            optimizer.zero_grad()
            with optimizer.at_previous_params(by_pointer=by_pointer):
                inside = [p.data_ptr() for p in task.params]
                task.loss(t).backward()
            # x_1 has no predecessor yet
            assert (inside != addresses) == (by_pointer and t > 0)
            assert [p.data_ptr() for p in task.params] == addresses
            task.loss(t).backward()
            optimizer.step()
        return task.result()

    assert_same(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("by_pointer", [False, True])
def test_exception_in_the_body_restores_memory_and_contents(by_pointer):
    task = Softmax()
    optimizer = MARS(task.params, is_approx=False)
    for t in range(2):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()
    optimizer.zero_grad()
    before, addresses = task.result(), [p.data_ptr() for p in task.params]
    with pytest.raises(KeyError, match="body"), optimizer.at_previous_params(by_pointer=by_pointer):
        raise KeyError("body")
    assert_same(task.result(), before, rtol=0, atol=0)
    assert [p.data_ptr() for p in task.params] == addresses


def test_by_default_a_view_held_from_before_sees_the_previous_parameters():
    """A captured graph reads by address, as this NumPy view does."""
    task = Softmax()
    optimizer = MARS(task.params, lr=0.1, is_approx=False)
    view = task.weight.detach().numpy()
    first = view.copy()
    with optimizer.at_previous_params():
        task.loss(0).backward()
    task.loss(0).backward()
    optimizer.step()
    assert not np.array_equal(view, first)
    optimizer.zero_grad()
    with optimizer.at_previous_params():
        assert np.array_equal(view, first)


def test_parameters_inside_a_larger_memory_are_copied_even_when_asked_by_pointer():
    flat = torch.arange(12.0)
    params = [torch.nn.Parameter(part.view(2, 3)) for part in flat.split(6)]
    stored = [torch.full((2, 3), float(i)) for i in range(2)]
    swap(list(zip(params, stored, strict=True)), by_pointer=True)
    assert torch.equal(flat, torch.tensor([0.0] * 6 + [1.0] * 6))
    assert torch.equal(stored[1], torch.arange(6.0, 12.0).view(2, 3))


def test_parameters_of_other_processes_are_copied_even_when_asked_by_pointer():
    shared = torch.nn.Parameter(torch.ones(3)).share_memory_()
    address = shared.data_ptr()
    swap([(shared, torch.zeros(3))], by_pointer=True)
    assert shared.data_ptr() == address
    assert torch.equal(shared.detach(), torch.zeros(3))
