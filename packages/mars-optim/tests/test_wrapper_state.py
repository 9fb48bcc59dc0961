"""Checkpoints and arguments of VarianceReduced."""

import copy
import io
import pickle

import pytest
import torch
from trajectories import assert_same, draw
from wrapped import MATRICES, STEPS, parameters_of, train

from mars_optim.torch import MARS
from mars_optim.torch.wrapper import VarianceReduced


def interrupted(is_approx, transfer):
    """Six steps, a transfer into a fresh wrapper, six more."""
    drawn = draw(seed=9, shapes=MATRICES, steps=STEPS)
    half = STEPS // 2

    def fresh(params):
        base = torch.optim.AdamW(params, lr=0.02)
        return VarianceReduced(base, gamma=0.1, is_approx=is_approx)

    first, second = ([None, drawn[1][part], drawn[2][part]] for part in (slice(half), slice(half, None)))
    params = parameters_of(drawn)
    optimizer = fresh(params)
    train(optimizer, params, first, references=not is_approx)
    params, optimizer = transfer(params, optimizer, fresh)
    return train(optimizer, params, second, references=not is_approx)


def by_state_dict(params, optimizer, fresh):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = fresh(params)
    other.load_state_dict(torch.load(file, weights_only=True))
    return params, other


def by_deepcopy(params, optimizer, _fresh):
    return copy.deepcopy((params, optimizer))


def by_pickle(params, optimizer, _fresh):
    return pickle.loads(pickle.dumps((params, optimizer)))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("transfer", [by_state_dict, by_deepcopy, by_pickle])
@pytest.mark.parametrize("is_approx", [True, False])
def test_continuing_equals_uninterrupted_training_bit_for_bit(is_approx, transfer):
    expected = interrupted(is_approx, lambda params, optimizer, _: (params, optimizer))
    assert_same(interrupted(is_approx, transfer), expected, rtol=0, atol=0)


def test_state_dict_keeps_the_dtype_of_the_kept_gradient_and_owns_its_memory():
    param = torch.nn.Parameter(torch.ones(2, 2))

    def fresh():
        return VarianceReduced(torch.optim.AdamW([param]), prev_grad_dtype=torch.bfloat16)

    optimizer = fresh()
    param.grad = torch.ones(2, 2)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "mars_step", "mars_last_grad"}
    other = fresh()
    other.load_state_dict(saved)
    assert other.state[param]["last_grad"].dtype == torch.bfloat16
    other.state[param]["last_grad"].zero_()
    assert torch.equal(optimizer.state[param]["last_grad"], torch.ones(2, 2, dtype=torch.bfloat16))


def test_checkpoint_of_the_bare_base_loads_and_the_correction_starts_afresh():
    drawn = draw(seed=10, shapes=MATRICES, steps=1)
    params = parameters_of(drawn)
    bare = torch.optim.AdamW(params, lr=0.3)
    train(bare, params, drawn)
    optimizer = VarianceReduced(torch.optim.AdamW(params, lr=0.1), gamma=0.1, clip=2.0)
    optimizer.load_state_dict(bare.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["gamma"], group["clip"]) == (0.3, 0.1, 2.0)
    assert optimizer.base.state[params[0]]["step"] == 1
    assert not optimizer.state
    train(optimizer, params, drawn)
    assert optimizer.base.state[params[0]]["step"] == 2


def adamw(**group):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2, 2))], **group}])


ERRORS = {
    "base": (lambda: VarianceReduced("AdamW"), TypeError, "base must be a torch.optim.Optimizer"),
    "closure": (
        lambda: VarianceReduced(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))])),
        ValueError,
        "works without a closure, got LBFGS",
    ),
    "wrapped twice": (lambda: VarianceReduced(VarianceReduced(adamw())), ValueError, "wrapper's names"),
    "MARS": (lambda: VarianceReduced(MARS([torch.nn.Parameter(torch.ones(2))])), ValueError, "gamma"),
    "no momentum": (
        lambda: VarianceReduced(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(2))])),
        ValueError,
        "beta1 must be given.*neither betas nor momentum",
    ),
    "beta1 value": (
        lambda: VarianceReduced(adamw(), beta1=1.0),
        ValueError,
        r"beta1 must be in \[0, 1\), got 1.0",
    ),
    "beta1 type": (lambda: VarianceReduced(adamw(), beta1="0.9"), TypeError, "beta1 must be None or"),
    "gamma": (
        lambda: VarianceReduced(adamw(), gamma=-1.0),
        ValueError,
        "gamma must be finite and >= 0, got -1.0",
    ),
    "gamma nan": (lambda: VarianceReduced(adamw(), gamma=float("nan")), ValueError, "gamma must be finite"),
    "clip zero": (
        lambda: VarianceReduced(adamw(), clip=0),
        ValueError,
        r"clip must be finite and > 0 \(None",
    ),
    "clip sign": (lambda: VarianceReduced(adamw(), clip=-1.0), ValueError, "clip must be finite and >"),
    "is_approx": (
        lambda: VarianceReduced(adamw(), is_approx=1),
        TypeError,
        "is_approx must be True or False",
    ),
    "clip_scope": (
        lambda: VarianceReduced(adamw(), clip_scope="all"),
        ValueError,
        "clip_scope must be one of 'tensor', 'global', got 'all'",
    ),
    "prev_grad_init": (
        lambda: VarianceReduced(adamw(), prev_grad_init="no"),
        ValueError,
        "prev_grad_init must be one of 'current', 'zero', got 'no'",
    ),
    "dtype type": (
        lambda: VarianceReduced(adamw(), prev_grad_dtype="bf16"),
        TypeError,
        "torch.dtype, got 'bf16'",
    ),
    "dtype": (
        lambda: VarianceReduced(adamw(), prev_grad_dtype=torch.int32),
        ValueError,
        "real floating point",
    ),
    "added group": (
        lambda: VarianceReduced(adamw()).add_param_group({"params": [torch.ones(2)], "clip": -1.0}),
        ValueError,
        "clip must be",
    ),
    "added no group": (
        lambda: VarianceReduced(adamw()).add_param_group([1]),
        TypeError,
        "must be a dict, got list",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arguments_out_of_range_raise(case):
    make, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        make()


def test_refused_base_stays_as_it_was():
    base = adamw()
    before = set(base.param_groups[0])
    with pytest.raises(ValueError, match="gamma must be"):
        VarianceReduced(base, gamma=-1.0)
    assert set(base.param_groups[0]) == before


def test_strong_correction_in_the_approximate_form_warns():
    with pytest.warns(UserWarning, match=r"gamma=0.5 with is_approx=True adds noise"):
        VarianceReduced(adamw(), gamma=0.5)


def test_modes_of_a_base_without_modes_do_nothing():
    optimizer = VarianceReduced(adamw())
    optimizer.train()
    optimizer.eval()
