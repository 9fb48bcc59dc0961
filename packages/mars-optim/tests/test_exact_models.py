"""The exact form with what real training brings: dropout, BatchNorm and GradScaler."""

import copy

import pytest
import torch
from exact_ways import (
    ROUNDING,
    Softmax,
    assert_state_equal,
    gradients_at,
    optimizer_for,
    way_3_official_order,
    way_3_own_names,
)
from trajectories import assert_same

from mars_optim.torch import MARS


def dropout_network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 2)).double()


@pytest.mark.parametrize("replay_rng", [True, False])
def test_correction_vanishes_at_lr_zero_exactly_when_dropout_masks_are_replayed(replay_rng):
    model = dropout_network()
    optimizer = MARS(
        model.parameters(), lr=0.0, lr_1d_ratio=1.0, is_approx=False, gamma=1.0, mars_type="sgd", clip=None
    )
    optimizer.stats()
    x = torch.randn(8, 6, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.at_previous_params(replay_rng=replay_rng):
            model(x).square().mean().backward()
        model(x).square().mean().backward()
        optimizer.step()
    ratio = optimizer.stats()["correction_ratio"]
    assert ratio == 0 if replay_rng else ratio > 0


def test_closure_sees_the_same_dropout_mask_twice():
    model = dropout_network()
    optimizer = MARS(model.parameters(), lr=0.0, lr_1d_ratio=1.0, is_approx=False, gamma=1.0)
    optimizer.stats()
    x = torch.randn(8, 6, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.stats()["correction_ratio"] == 0


@pytest.mark.gpu
def test_correction_vanishes_at_lr_zero_with_dropout_on_cuda():
    model = dropout_network().cuda()
    optimizer = MARS(model.parameters(), lr=0.0, lr_1d_ratio=1.0, is_approx=False, gamma=1.0)
    optimizer.stats()
    x = torch.randn(8, 6, dtype=torch.float64, device="cuda")
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.at_previous_params(replay_rng=True):
            model(x).square().mean().backward()
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.stats()["correction_ratio"] == 0


@pytest.mark.parametrize("update_buffers", [False, True])
def test_batch_norm_buffers_are_restored_unless_asked_otherwise(update_buffers):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = MARS(model.parameters(), is_approx=False)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with optimizer.at_previous_params(module=model, update_buffers=update_buffers):
        model(torch.randn(8, 4)).square().mean().backward()
    same = all(torch.equal(before[name], b) for name, b in model.named_buffers())
    assert same is not update_buffers


def run_scaled(scales, way):
    """Way 1 or 3 in float32 with a loss scale that changes from step to step; None: without scaler."""
    task = Softmax()
    for p in task.params:
        p.data = p.data.float()
    task.batches = [(x.float(), y) for x, y in task.batches]
    optimizer = optimizer_for(task)
    for t in range(8):
        scaler = torch.amp.GradScaler("cpu", init_scale=scales[t]) if scales else None
        scale = scaler.scale if scaler else (lambda loss: loss)
        optimizer.zero_grad()
        if way == 1:
            with optimizer.at_previous_params(scaler=scaler):
                scale(task.loss(t)).backward()
        else:
            scale(task.loss(t + 1)).backward()
            optimizer.record_next_batch_grad(scaler=scaler)
            optimizer.zero_grad()
        scale(task.loss(t)).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
    return task.result()


@pytest.mark.parametrize("way", [1, 3])
def test_grad_scaler_with_changing_scale_changes_nothing(way):
    scales = [2.0**k for k in (4, 10, 3, 12, 8, 1, 15, 6)]
    # powers of two scale float32 without rounding
    assert_same(run_scaled(scales, way), run_scaled(None, way), rtol=0, atol=0)


@pytest.mark.parametrize("overflow", ["g", "h"])
def test_overflow_under_grad_scaler_skips_the_step_and_leaves_everything(overflow):
    task = Softmax()
    for p in task.params:
        p.data = p.data.float()
    task.batches = [(x.float(), y) for x, y in task.batches]
    optimizer = optimizer_for(task)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(3):
        optimizer.zero_grad()
        before, state = task.result(), copy.deepcopy(optimizer.state_dict())
        with optimizer.at_previous_params(scaler=scaler):
            scaler.scale(task.loss(t)).backward()
            if t == 2 and overflow == "h":
                task.weight.grad[0, 0] = torch.inf
        scaler.scale(task.loss(t)).backward()
        if t == 2 and overflow == "g":
            task.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert_same(task.result(), before, rtol=0, atol=0)
    assert_state_equal(optimizer.state_dict(), state)


@pytest.mark.parametrize("way", [way_3_official_order, way_3_own_names])
def test_look_ahead_survives_a_step_that_grad_scaler_skips(way):
    """Batch 2 overflows: the others must move as if it had never been drawn."""
    official = way is way_3_official_order
    task, scaler = Softmax(), torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    optimizer = optimizer_for(task)
    for t in range(6):
        optimizer.zero_grad()
        scaler.scale(task.loss(t + 1)).backward()
        optimizer.update_previous_grad() if official else optimizer.record_next_batch_grad(scaler=scaler)
        optimizer.zero_grad()
        scaler.scale(task.loss(t)).backward()
        if t == 2:
            task.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        if official:
            optimizer.update_last_grad()
        scaler.update(1.0)
    expected = Softmax()
    plain = optimizer_for(expected)
    previous = None
    for t in (0, 1, 3, 4, 5):
        # nothing moved at batch 2, so the point before batch 3 is the one that batch 2 was drawn at
        current = [p.detach().clone() for p in expected.params]
        h = None if t == 0 else gradients_at(expected, t, current if t == 3 else previous)
        plain.zero_grad()
        expected.loss(t).backward()
        plain.step(prev_grads=h)
        previous = current
    assert_same(task.result(), expected.result(), rtol=0, atol=ROUNDING)
