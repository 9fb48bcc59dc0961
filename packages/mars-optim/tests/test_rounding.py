"""Stochastic rounding of bfloat16 parameters, alone and in the step of every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_optim.torch import MARS
from mars_optim.torch.functional import stochastic_round_

BACKENDS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
# 2^-7 is the spacing of bfloat16 above 1, 2^-8 below
UP, DOWN = 2.0**-7, 2.0**-8


def rounded(value, count=40_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.empty(count, dtype=torch.bfloat16)
    return stochastic_round_(target, torch.full((count,), value), generator).float()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [1 / 16, 1 / 4, 1 / 2, 7 / 8])
def test_each_neighbour_comes_as_often_as_the_value_is_close_to_it(fraction, sign):
    results = rounded(sign * (1 + fraction * UP))
    assert set(results.tolist()) == {sign, sign * (1 + UP)}
    share = (results != sign).float().mean().item()
    # five standard deviations of a binomial share
    assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / len(results)) ** 0.5


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -1.5, 2.0**-133, float("inf"), -float("inf"), float("nan")]
)
def test_what_bfloat16_represents_stays_as_it_is(value):
    results = rounded(value, count=100)
    assert torch.equal(results.isnan(), torch.full((100,), value != value))
    assert value != value or torch.equal(results, torch.full((100,), value))


@settings(deadline=None, max_examples=100)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
def test_every_result_is_a_neighbour_of_the_value(value):
    value = torch.tensor(value).item()
    results = rounded(value, count=20).double()
    nearest = torch.tensor(value).bfloat16().double().item()
    # neighbours lie at most one spacing, 2^-7 of the power of two below, from the value
    assert ((results - value).abs() <= max(abs(nearest), abs(value)) * UP + 2.0**-133).all()
    assert results.unique().numel() <= 2


def test_the_generator_decides():
    assert torch.equal(rounded(1.001, seed=3), rounded(1.001, seed=3))
    assert not torch.equal(rounded(1.001, seed=3), rounded(1.001, seed=4))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float64)])
def test_other_dtypes_are_refused(dtypes):
    target, value = (torch.ones(2, dtype=dtype) for dtype in dtypes)
    with pytest.raises(TypeError, match=f"bfloat16 and float32, got {dtypes[0]} and {dtypes[1]}"):
        stochastic_round_(target, value)


def descend(backend, mars_type, *, stochastic, seed=0, steps=64):
    """Mean movement of ones under steps of 2^-12, which rounding to nearest loses."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    options = {"lr": 2.0**-12, "eps": 1e-8, "stochastic_rounding": stochastic, "scale": 64.0}
    optimizer = MARS([param], mars_type=mars_type, **options, **backend)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        param.grad = torch.eye(64, dtype=torch.bfloat16) if mars_type == "shampoo" else torch.ones_like(param)
        optimizer.step(generator=generator)
    return param.detach().float()


@pytest.mark.parametrize("mars_type", ["adamw", "lion"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_small_steps_add_up(backend, mars_type):
    assert torch.equal(descend(backend, mars_type, stochastic=False), torch.ones(64, 64))
    moved = 1 - descend(backend, mars_type, stochastic=True)
    # 64 steps of 2^-12; each is a Bernoulli variable of size 2^-8 and variance below 2^-20
    expected, error = 64 * 2.0**-12, (64 * 2.0**-20 / moved.numel()) ** 0.5
    assert abs(moved.mean().item() - expected) < 5 * error


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_orthogonalised_types_round_stochastically_too(backend):
    plain = descend(backend, "shampoo", stochastic=False)
    noisy = descend(backend, "shampoo", stochastic=True)
    assert torch.equal(noisy[~torch.eye(64, dtype=bool)], plain[~torch.eye(64, dtype=bool)])
    assert not torch.equal(noisy, plain)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_same_generator_gives_the_same_run(backend):
    runs = [descend(backend, "adamw", stochastic=True, seed=seed, steps=8) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_other_dtypes_of_parameters_are_not_touched_by_the_option(backend):
    results = []
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(4, 4))
        param.grad = torch.ones(4, 4)
        MARS([param], stochastic_rounding=stochastic, **backend).step()
        results.append(param.detach())
    assert torch.equal(*results)
