"""The four ways to supply h_t, on softmax regression and small networks."""

import copy

import numpy as np
import pytest
import torch
from trajectories import TYPES, assert_same

from mars_optim.torch import MARS

STEPS = 15
ROUNDING = 1e-12  # 15 steps of float64 arithmetic; the ways differ in the order of a few additions


class Softmax:
    """Softmax regression on fixed batches: the same data for every way."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (
                torch.randn(8, 5, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (8,), generator=generator),
            )
            for _ in range(STEPS + 1)
        ]
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.params = [self.weight, self.bias]

    def loss(self, t):
        x, y = self.batches[t]
        return torch.nn.functional.cross_entropy(x @ self.weight.T + self.bias, y)

    def result(self):
        return [p.detach().numpy().copy() for p in self.params]


def optimizer_for(task, **changed):
    options = {
        "lr": 0.05,
        "lr_1d": 0.05,
        "betas": (0.9, 0.99),
        "gamma": 0.7,
        "clip": 0.3,
        "weight_decay": 0.1,
    }
    return MARS(task.params, is_approx=False, **{**options, **changed})


def way_1(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()


def way_2(task, optimizer):
    for t in range(STEPS):

        def closure(t=t):
            optimizer.zero_grad()
            loss = task.loss(t)
            loss.backward()
            return loss

        optimizer.step(closure)


def way_3_official_order(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.update_previous_grad()
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step()
        optimizer.update_last_grad()


def way_3_own_names(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.record_next_batch_grad()
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step()


def way_3_folded(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.fold()
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.step()


def way_4_sequence(task, optimizer):
    previous = None
    for t in range(STEPS):
        current = [p.detach().clone() for p in task.params]
        h = None if previous is None else gradients_at(task, t, previous)
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step(prev_grads=h)
        previous = current


def way_4_dict(task, optimizer):
    previous = None
    for t in range(STEPS):
        current = [p.detach().clone() for p in task.params]
        h = None if previous is None else {task.weight: gradients_at(task, t, previous)[0]}
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step(prev_grads=h)
        previous = current


def gradients_at(task, t, values):
    """Gradients of batch t at other parameters, by torch.func and so independently of the package."""
    x, y = task.batches[t]

    def loss(weight, bias):
        return torch.nn.functional.cross_entropy(x @ weight.T + bias, y)

    return list(torch.func.grad(loss, argnums=(0, 1))(*values))


WAYS = [way_2, way_3_official_order, way_3_own_names, way_3_folded, way_4_sequence, way_4_dict]


def run(way, **options):
    task = Softmax()
    way(task, optimizer_for(task, **options))
    return task.result()


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


def assert_state_equal(actual, expected):
    assert actual["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert actual["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            torch.testing.assert_close(actual["state"][key][name], value, rtol=0, atol=0)


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
