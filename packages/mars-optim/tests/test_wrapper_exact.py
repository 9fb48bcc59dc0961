"""The exact form of VarianceReduced: all ways one trajectory, closures and gradient scaling."""

import copy

import pytest
import torch
from trajectories import assert_same
from wrapped import ROUNDING, STEPS, Softmax, assert_same_state

from mars_optim.torch.wrapper import VarianceReduced


def way_1(task, optimizer, t):
    with optimizer.at_previous_params():
        task.loss(t).backward()
    task.loss(t).backward()
    optimizer.step()


def way_2(task, optimizer, t):
    def closure():
        optimizer.zero_grad()
        loss = task.loss(t)
        loss.backward()
        return loss

    optimizer.step(closure)


def way_3(task, optimizer, t):
    task.loss(t + 1).backward()
    optimizer.record_next_batch_grad()
    optimizer.zero_grad()
    task.loss(t).backward()
    optimizer.step()


def way_3_folded(task, optimizer, t):
    task.loss(t).backward()
    optimizer.fold()
    optimizer.zero_grad()
    task.loss(t + 1).backward()
    optimizer.step()


def run_way(way, **options):
    task = Softmax()
    base = torch.optim.AdamW(task.params, lr=0.05, betas=(0.9, 0.99))
    optimizer = VarianceReduced(base, is_approx=False, **{"gamma": 0.7, "clip": 0.3, **options})
    for t in range(STEPS):
        optimizer.zero_grad()
        way(task, optimizer, t)
    return task.result()


def run_way_4(**options):
    """Way 4 with the previous parameters kept here, so independent of the package's own copies."""
    task = Softmax()
    base = torch.optim.AdamW(task.params, lr=0.05, betas=(0.9, 0.99))
    optimizer = VarianceReduced(base, is_approx=False, **{"gamma": 0.7, "clip": 0.3, **options})
    previous = None
    for t in range(STEPS):
        now = [p.detach().clone() for p in task.params]
        x, y = task.batches[t]

        def loss(weight, bias, x=x, y=y):
            return torch.nn.functional.cross_entropy(x @ weight.T + bias, y)

        h = None if previous is None else list(torch.func.grad(loss, argnums=(0, 1))(*previous))
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step(prev_grads=h)
        previous = now
    return task.result()


@pytest.mark.parametrize("options", [{}, {"prev_grad_init": "zero"}, {"clip_scope": "global"}], ids=str)
@pytest.mark.parametrize("way", [way_1, way_2, way_3, way_3_folded])
def test_all_ways_of_the_exact_form_give_one_trajectory(way, options):
    assert_same(run_way(way, **options), run_way_4(**options), rtol=0, atol=ROUNDING)


def test_exact_form_without_reference_raises_and_changes_nothing():
    task = Softmax()
    optimizer = VarianceReduced(torch.optim.AdamW(task.params), is_approx=False)
    task.loss(0).backward()
    optimizer.step()
    before, state = task.result(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"\(1\).*at_previous_params.*\(4\)"):
        optimizer.step()
    assert_same(task.result(), before, rtol=0, atol=0)
    assert_same_state(optimizer.state_dict(), state)


def test_reset_correction_restarts_the_exact_form():
    task = Softmax()
    optimizer = VarianceReduced(torch.optim.AdamW(task.params), is_approx=False)
    task.loss(0).backward()
    optimizer.step()
    optimizer.reset_correction()
    optimizer.step()


def test_previous_point_is_the_one_before_a_skipped_tensor_moved_last():
    first, second = (torch.nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))
    optimizer = VarianceReduced(torch.optim.AdamW([first, second]), is_approx=False)
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


@pytest.mark.parametrize("overflow", [None, "g", "h"])
def test_grad_scaler_steps_alike_and_skips_overflow_leaving_everything(overflow):
    def run(scaled):
        task = Softmax(torch.float32)
        optimizer = VarianceReduced(torch.optim.AdamW(task.params, lr=0.01), is_approx=False, gamma=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        scale = scaler.scale if scaler else (lambda loss: loss)
        for t in range(3):
            optimizer.zero_grad()
            before, state = task.result(), copy.deepcopy(optimizer.state_dict())
            with optimizer.at_previous_params(scaler=scaler):
                scale(task.loss(t)).backward()
                if t == 2 and overflow == "h":
                    task.weight.grad[0, 0] = torch.inf
            scale(task.loss(t)).backward()
            if t == 2 and overflow == "g":
                task.weight.grad[0, 0] = torch.inf
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        return task.result(), before, (optimizer.state_dict(), state)

    after, before, states = run(scaled=True)
    if overflow is None:
        # a power of two scales float32 without rounding
        assert_same(after, run(scaled=False)[0], rtol=0, atol=0)
    else:
        assert_same(after, before, rtol=0, atol=0)
        assert_same_state(*states)


@pytest.mark.parametrize("is_approx", [True, False])
def test_closure_gives_its_loss_and_runs_twice_only_for_the_exact_form(is_approx):
    task = Softmax()
    optimizer = VarianceReduced(torch.optim.AdamW(task.params), is_approx=is_approx)
    counts = []
    for t in range(3):
        losses = []

        def closure(t=t, losses=losses):
            optimizer.zero_grad()
            losses.append(task.loss(t))
            losses[-1].backward()
            return losses[-1]

        assert optimizer.step(closure) is losses[-1]
        counts.append(len(losses))
    assert counts == ([1, 1, 1] if is_approx else [1, 2, 2])


def test_exact_form_around_schedule_free_uses_the_points_where_gradients_are_taken():
    schedulefree = pytest.importorskip("schedulefree")
    task = Softmax()
    base = schedulefree.AdamWScheduleFree(task.params, lr=0.05)
    optimizer = VarianceReduced(base, is_approx=False, gamma=0.5)
    optimizer.train()
    points = []
    for t in range(4):
        optimizer.zero_grad()
        points.append(task.result())
        with optimizer.at_previous_params():
            assert_same(task.result(), points[max(t - 1, 0)], rtol=0, atol=0)
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()
