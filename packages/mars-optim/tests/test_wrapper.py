"""VarianceReduced around torch's optimisers, schedule-free and SOAP: what a step does."""

import copy

import numpy as np
import pytest
import torch
from trajectories import assert_same, draw
from wrapped import MATRICES, ROUNDING, STEPS, assert_same_state, parameters_of, run_wrapped, train

from mars_optim.torch import MARS, GammaScheduler, newton_schulz
from mars_optim.torch.wrapper import VarianceReduced

CLIPS = [None, 3.0, 0.5]  # never, sometimes and always clipping the gradients of `draw`


def run_mars(drawn, *, is_approx=True, **options):
    params = parameters_of(drawn)
    return train(MARS(params, is_approx=is_approx, **options), params, drawn, references=not is_approx)


@pytest.mark.parametrize("prev_grad_init", ["current", "zero"])
@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("is_approx", [True, False])
def test_around_adamw_it_is_mars_adamw(is_approx, clip, clip_scope, prev_grad_init):
    drawn = draw(seed=1, shapes=MATRICES, steps=STEPS)
    shared = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1}
    own = {"gamma": 0.1, "clip": clip, "clip_scope": clip_scope, "prev_grad_init": prev_grad_init}
    expected = run_mars(drawn, is_approx=is_approx, **shared, **own)
    actual = run_wrapped(drawn, lambda p: torch.optim.AdamW(p, **shared), is_approx=is_approx, **own)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("is_approx", [True, False])
def test_around_sgd_with_momentum_it_is_mars_sgd_with_another_unit_of_the_rate(is_approx, clip):
    """torch's momentum sums what the paper averages, so (1 - beta1) of the rate is the same step."""
    drawn = draw(seed=2, shapes=MATRICES, steps=STEPS)
    beta1, lr = 0.9, 0.05
    own = {"gamma": 0.2, "clip": clip, "is_approx": is_approx}
    expected = run_mars(drawn, mars_type="sgd", lr=lr, betas=(beta1, 0.99), **own)
    actual = run_wrapped(drawn, lambda p: torch.optim.SGD(p, lr=lr * (1 - beta1), momentum=beta1), **own)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch >= 2.9")
@pytest.mark.parametrize("is_approx", [True, False])
def test_around_muon_without_nesterov_it_is_mars_shampoo(is_approx, monkeypatch):
    from torch.optim import _muon

    def in_float64(grad, ns_coefficients, ns_steps, eps):
        return newton_schulz(grad, steps=ns_steps, coefficients=tuple(ns_coefficients), eps=eps)

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_float64)
    drawn = draw(seed=3, shapes=MATRICES, steps=STEPS)
    beta1, eps = 0.9, 1e-7
    own = {"gamma": 0.1, "clip": 0.5, "is_approx": is_approx}
    # torch normalises m_t, the paper m_t / (1 - beta1): only the scale of eps differs
    expected = run_mars(
        drawn,
        mars_type="shampoo",
        lr=0.02,
        betas=(beta1, 0.99),
        weight_decay=0.1,
        eps=eps / (1 - beta1),
        **own,
    )
    actual = run_wrapped(
        drawn,
        lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, momentum=beta1, nesterov=False, eps=eps),
        **own,
    )
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "make_base",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.Adamax(p, lr=0.01, maximize=True),
    ],
    ids=["AdamW", "RMSprop", "NAdam", "Adamax"],
)
def test_without_correction_and_clip_the_base_steps_as_if_alone(make_base):
    drawn = draw(seed=4, steps=STEPS)
    alone = parameters_of(drawn)
    expected = train(make_base(alone), alone, drawn)
    assert_same(run_wrapped(drawn, make_base, gamma=0.0, clip=None), expected, rtol=0, atol=0)


class Destructive(torch.optim.SGD):
    """A base that overwrites what it is shown, as schedule-free does, and may fail."""

    fail = False

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.fill_(7.0)
        if self.fail:
            raise KeyError("base")
        return super().step(closure)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("is_approx", [True, False])
def test_gradients_come_back_untouched_whatever_the_base_does(is_approx, clip, fail):
    param, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    base = Destructive([param, unused], lr=0.1, momentum=0.9)
    optimizer = VarianceReduced(base, clip=clip, is_approx=is_approx)
    for size in (1.0, 2.0):
        param.grad = gradient = torch.full((2, 3), size)
        optimizer.step(prev_grads=None if is_approx else [torch.ones(2, 3), None])
        assert param.grad is gradient
        assert torch.equal(gradient, torch.full((2, 3), size))
        assert unused.grad is None
    if fail:
        base.fail = True
        state = copy.deepcopy(optimizer.state_dict()["state"])
        with pytest.raises(KeyError, match="base"):
            optimizer.step(prev_grads=None if is_approx else [torch.ones(2, 3), None])
        assert param.grad is gradient
        assert torch.equal(gradient, torch.full((2, 3), 2.0))
        assert_same_state(optimizer.state_dict(), {"state": state})
    elif is_approx:
        assert torch.equal(optimizer.state[param]["last_grad"], gradient)


@pytest.mark.parametrize("is_approx", [True, False])
def test_last_gradient_is_owned(is_approx):
    """Overwriting .grad in place between the steps changes nothing: the aliasing trap of the release."""

    def run(in_place):
        drawn = draw(seed=5, shapes=MATRICES, steps=STEPS)
        params = parameters_of(drawn)
        optimizer = VarianceReduced(torch.optim.AdamW(params, lr=0.01), gamma=0.2, is_approx=is_approx)
        for g, h in zip(drawn[1], drawn[2], strict=True):
            for param, gradient in zip(params, g, strict=True):
                if in_place and param.grad is not None:
                    param.grad.copy_(torch.tensor(gradient))
                else:
                    param.grad = torch.tensor(gradient)
            optimizer.step(prev_grads=None if is_approx else [torch.tensor(x) for x in h])
        return [p.detach().numpy() for p in params]

    assert_same(run(True), run(False), rtol=0, atol=0)


def test_tensors_without_gradient_are_skipped_and_no_gradient_at_all_is_a_no_op():
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = VarianceReduced(torch.optim.AdamW(params, lr=0.1))
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    params[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(params[1].detach(), torch.ones(2, 2))
    assert not torch.equal(params[0].detach(), torch.ones(2, 2))


def test_sparse_gradients_raise():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = VarianceReduced(torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


def test_beta1_is_read_from_the_groups_at_each_step():
    """OneCycleLR cycles betas[0]; a wrapper told the same values explicitly does the same."""

    def run(read):
        drawn = draw(seed=6, shapes=MATRICES, steps=STEPS)
        params = parameters_of(drawn)
        base = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.99))
        optimizer = VarianceReduced(base, beta1=None if read else 0.9, gamma=0.2, clip=None)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)

        def after_step():
            scheduler.step()
            if not read:
                optimizer.beta1 = optimizer.param_groups[0]["betas"][0]

        if not read:
            optimizer.beta1 = optimizer.param_groups[0]["betas"][0]
        return train(optimizer, params, drawn, after_step=after_step), optimizer

    (actual, optimizer), (expected, _) = run(True), run(False)
    assert_same(actual, expected, rtol=0, atol=0)
    assert optimizer.param_groups[0]["betas"][0] != 0.9  # the schedule did move it


def test_given_beta1_wins_over_that_of_the_base():
    drawn = draw(seed=7, shapes=MATRICES, steps=STEPS)

    def make(p):
        return torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99))

    same = run_wrapped(drawn, make, gamma=0.1, clip=None)
    # gamma beta1 / (1 - beta1) = 0.9 both times
    other = run_wrapped(drawn, make, beta1=0.5, gamma=0.9, clip=None, is_approx=False)
    given = run_wrapped(drawn, make, beta1=0.9, gamma=0.1, clip=None)
    exact = run_wrapped(drawn, make, gamma=0.1, clip=None, is_approx=False)
    assert_same(given, same, rtol=0, atol=0)
    assert_same(other, exact, rtol=0, atol=ROUNDING)


def test_schedulers_attach_to_the_wrapper_and_move_the_base():
    param = torch.nn.Parameter(torch.ones(2, 2))
    base = torch.optim.SGD([param], lr=1.0, momentum=0.0)
    optimizer = VarianceReduced(base, gamma=0.0, clip=None)
    assert isinstance(optimizer, torch.optim.Optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    strength = GammaScheduler(optimizer, lambda step: 0.1 * step)
    for step in range(3):
        assert base.param_groups[0]["lr"] == 0.5**step
        assert base.param_groups[0]["gamma"] == pytest.approx(0.1 * step, rel=1e-15)
        param.grad = torch.zeros(2, 2)
        optimizer.step()
        rate.step()
        strength.step()


def test_groups_may_differ_and_be_added_while_training():
    drawn = draw(seed=8, shapes=MATRICES[:2], steps=STEPS)
    params = parameters_of(drawn)
    base = torch.optim.AdamW([params[0]], lr=0.01, betas=(0.9, 0.99))
    optimizer = VarianceReduced(base, gamma=0.2, clip=1.0)
    optimizer.add_param_group({"params": [params[1]], "gamma": 0.0, "clip": None, "betas": (0.8, 0.99)})
    actual = train(optimizer, params, drawn)

    alone = parameters_of(drawn)
    both = [
        VarianceReduced(torch.optim.AdamW(alone[:1], lr=0.01, betas=(0.9, 0.99)), gamma=0.2),
        torch.optim.AdamW(alone[1:], lr=0.01, betas=(0.8, 0.99)),
    ]
    for i, each in enumerate(both):
        only = slice(i, i + 1)
        train(each, alone[only], [None, [g[only] for g in drawn[1]], [h[only] for h in drawn[2]]])
    assert_same(actual, [p.detach().numpy() for p in alone], rtol=0, atol=0)


def test_half_precision_gradients_are_corrected_in_float32_and_rounded_once():
    param = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    base = torch.optim.SGD([param], lr=1.0, momentum=0.0)
    optimizer = VarianceReduced(base, beta1=0.9, gamma=0.1, clip=1.0)
    g1, g2 = torch.tensor([[3.0, 1.0], [0.3, 2.0]]), torch.tensor([[1.0, 0.7], [0.11, 0.5]])
    g1, g2 = g1.bfloat16(), g2.bfloat16()
    param.grad = g1
    optimizer.step()
    with torch.no_grad():
        param.zero_()
    param.grad = g2
    optimizer.step()
    c = g2.float() + 0.1 * 0.9 / (1 - 0.9) * (g2.float() - g1.float())
    assert torch.equal(param.detach(), -(c / c.norm().clamp_min(1)).bfloat16())


def test_complex_and_zero_dimensional_parameters_are_corrected_by_the_same_formula():
    for value in (torch.tensor([1 + 2j, 3 - 1j]), torch.tensor(2.0)):
        param = torch.nn.Parameter(torch.zeros_like(value))
        base = torch.optim.SGD([param], lr=1.0, momentum=0.0)
        optimizer = VarianceReduced(base, beta1=0.5, gamma=0.1, clip=1.0, prev_grad_init="zero")
        param.grad = value.clone()
        optimizer.step()
        # c = 1.1 g is longer than 1 here, so the step is the unit vector along g
        torch.testing.assert_close(param.detach(), -value / torch.linalg.vector_norm(value))


def test_infinite_gradient_norm_gives_nan_and_no_silent_zero_step():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = VarianceReduced(torch.optim.SGD([param], lr=1.0, momentum=0.9))
    param.grad = torch.tensor([torch.inf, 1.0])
    optimizer.step()
    assert torch.isnan(param).all()


def train_on_shards(rank, world_size, forms):
    """Rows of uneven and empty shards and a plain tensor under one wrapper, in each of the forms."""
    return [train_shards(world_size, **form) for form in forms]


def train_shards(world_size, **form):
    """Whole tensors after training on shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    drawn = draw(seed=13, shapes=SHARDED, steps=4)

    def placed(arrays):
        tensors = [torch.tensor(x) for x in arrays]
        return [distribute_tensor(x, mesh, [Shard(0)]) for x in tensors[:-1]] + tensors[-1:]

    params = [torch.nn.Parameter(x) for x in placed(drawn[0])]
    base = torch.optim.AdamW(params, lr=0.02, betas=(0.9, 0.99), foreach=False)
    optimizer = VarianceReduced(base, gamma=0.2, **form)
    for g, h in zip(drawn[1], drawn[2], strict=True):
        for param, gradient in zip(params, placed(g), strict=True):
            param.grad = gradient
        optimizer.step(prev_grads=None if form["is_approx"] else placed(h))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]
    return [x.detach().numpy() for x in whole]


SHARDED = ((5, 4), (1, 6), (3, 2, 2), (3, 3))


FORMS = [{"clip_scope": scope, "is_approx": form} for scope in ("tensor", "global") for form in (True, False)]


def test_shards_of_two_processes_step_as_whole_tensors_of_one_in_every_form(run_distributed):
    # the limit is for a busy machine
    ranks = run_distributed(train_on_shards, 2, FORMS, timeout=200)
    drawn = draw(seed=13, shapes=SHARDED, steps=4)
    for form, first, second in zip(FORMS, *ranks, strict=True):
        expected = run_wrapped(
            drawn, lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.99)), gamma=0.2, **form
        )
        assert_same(first, expected, rtol=0, atol=ROUNDING)
        assert_same(second, first, rtol=0, atol=0)


def test_around_schedule_free_it_corrects_in_training_mode_and_passes_the_modes_on():
    schedulefree = pytest.importorskip("schedulefree")
    drawn = draw(seed=11, shapes=MATRICES, steps=STEPS)
    correction, clip, beta1 = 0.2, 0.7, 0.9

    def make(params):
        return schedulefree.AdamWScheduleFree(params, lr=0.02, betas=(beta1, 0.99))

    params = parameters_of(drawn)
    optimizer = VarianceReduced(make(params), gamma=correction, clip=clip)
    optimizer.train()
    train(optimizer, params, drawn)
    optimizer.eval()
    assert not optimizer.param_groups[0]["train_mode"]

    by_hand = parameters_of(drawn)
    base = make(by_hand)
    base.train()
    previous = drawn[1][0]
    for g in drawn[1]:
        for param, now, last in zip(by_hand, g, previous, strict=True):
            c = now + correction * beta1 / (1 - beta1) * (now - last)
            param.grad = torch.tensor(c / max(1.0, np.linalg.norm(c) / clip))
        base.step()
        previous = g
    base.eval()
    assert_same(
        [p.detach().numpy() for p in params], [p.detach().numpy() for p in by_hand], rtol=0, atol=ROUNDING
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_around_soap_the_correction_reaches_the_base():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    drawn = draw(seed=12, shapes=((6, 4),), steps=STEPS, size=0.01)

    def make(params):
        return pytorch_optimizer.SOAP(params, lr=0.01, betas=(0.95, 0.95))

    params = parameters_of(drawn)
    actual = train(VarianceReduced(make(params), gamma=0.1, clip=None), params, drawn)
    by_hand = parameters_of(drawn)
    base = make(by_hand)
    previous = drawn[1][0]
    for g in drawn[1]:
        for param, now, last in zip(by_hand, g, previous, strict=True):
            param.grad = torch.tensor(now + 0.1 * 0.95 / (1 - 0.95) * (now - last))
        base.step()
        previous = g
    assert_same(actual, [p.detach().numpy() for p in by_hand], rtol=0, atol=ROUNDING)
