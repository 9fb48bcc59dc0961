"""Both backends against the NumPy truth, on all types, forms, clips and options."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from reference import Options
from test_reference import G1, G2, H2, PRINTED, WORKED_EXAMPLE, X1
from trajectories import TYPES, assert_same, draw, run_mars, run_reference, varying

from mars_optim.torch import MARS, UpdateRule, clip_by_norm, gradient_correction, mars, quasi_hyperbolic

ROUNDING = 1e-12  # 6 steps of float64 arithmetic on numbers of order one: below 1e4 ulp
BASE = Options(lr=0.02, betas=(0.9, 0.95), gamma=0.09, lr_1d_ratio=0.5, reference_lr=0.02)
# gradients of these shapes have norms 2 to 6: clip=4 clips some of them, 0.5 all
CLIPS = {"no clip": None, "mixed": 4.0, "always clipped": 0.5}
FULLY_CROSSED = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "schedule": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "optimize_1d": {"optimize_1d": True, "weight_decay": 0.1},
    "zero start": {"prev_grad_init": "zero"},
}
OTHERS = {
    "independent decay": {"weight_decay": 0.01, "decay_mode": "independent", "weight_decay_1d": 0.02},
    "cautious decay": {"weight_decay": 0.1, "decay_mode": "cautious"},
    "l2 decay": {"weight_decay": 0.1, "decay_mode": "l2"},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "second moment of g": {"second_moment": "grad"},
    "global clip": {"clip_scope": "global"},
    "batch view": {"matrix_view": "batch"},
    "only 2-D": {"matrix_ndim": "==2"},
    "maximize": {"maximize": True, "weight_decay": 0.1},
}
ORTHOGONALISERS = {
    "svd": {"orthogonalize": "svd"},
    "newton": {"orthogonalize": "newton"},
    "cubic": {"orthogonalize": "cubic"},
    "root of the ratio": {"scale": "sqrt_ratio"},
    "rms": {"scale": "rms"},
    "fixed scale": {"scale": 0.7},
    "no scale": {"scale": "none"},
    "other Newton-Schulz": {"ns_steps": 7, "ns_coefficients": (1.9, -1.3, 0.4)},
}
CASES = [
    *(
        (t, a, clip, FULLY_CROSSED, o)
        for t in TYPES
        for a in (True, False)
        for clip in CLIPS
        for o in FULLY_CROSSED
    ),
    *((t, a, "mixed", OTHERS, o) for t in TYPES for a in (True, False) for o in OTHERS),
    *((t, True, "mixed", ORTHOGONALISERS, o) for t in ("shampoo", "m") for o in ORTHOGONALISERS),
]


def name_of(case):
    mars_type, is_approx, clip, _, changed = case
    return f"{mars_type}-{'approx' if is_approx else 'exact'}-{clip}-{changed}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_both_backends_follow_the_reference(case):
    mars_type, is_approx, clip, table, changed = case
    options = replace(BASE, mars_type=mars_type, is_approx=is_approx, clip=CLIPS[clip], **table[changed])
    options = varying(options) if changed == "schedule" else options
    drawn = draw(seed=1)
    expected = run_reference(drawn, options)
    for foreach in (False, True):
        assert_same(run_mars(drawn, options, foreach=foreach), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:gamma=0.5 with is_approx")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", WORKED_EXAMPLE)
def test_worked_example_of_the_specification(case, foreach):
    changed, factor, expected = WORKED_EXAMPLE[case]
    options = Options(lr=0.1, weight_decay=0.1, gamma=0.5, betas=(0.9, 0.99), **changed)
    drawn = [X1], [[factor * G1], [factor * G2]], [[factor * G1], [factor * H2]]
    (actual,) = run_mars(drawn, options, foreach=foreach)
    np.testing.assert_allclose(actual.ravel(), expected, rtol=0, atol=PRINTED)


@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
@pytest.mark.parametrize("mars_type", TYPES)
def test_steps_on_lists_read_nothing_back_from_the_device(mars_type, clip_scope):
    """Tensors of the meta device have no values: whatever looked at one would raise."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (4, 3), (5,))]
    optimizer = MARS(params, mars_type=mars_type, clip_scope=clip_scope, foreach=True, weight_decay=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2, 2]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.stats()  # which says that it waits for the device


@pytest.mark.parametrize("mars_type", TYPES)
def test_backends_agree_in_float32(mars_type):
    options = replace(BASE, mars_type=mars_type, clip=4.0, weight_decay=0.1)
    drawn = draw(seed=2)
    loop = run_mars(drawn, options, dtype=torch.float32, foreach=False)
    lists = run_mars(drawn, options, dtype=torch.float32, foreach=True)
    # a few ulp (1.2e-7) of entries of order one; atol covers entries that have cancelled to small numbers
    assert_same(lists, loop, rtol=1e-6, atol=1e-6)


RULE = UpdateRule(kind="sgd", lr=0.1, beta1=0.9)


def test_mars_changes_parameters_averages_and_steps_in_place_alone():
    param, grad, reference, average = (
        torch.full((2, 2), v, dtype=torch.float64) for v in (1.0, 2.0, 3.0, 0.0)
    )
    step = torch.zeros(())
    divisors = mars(
        [param], [grad], [reference], [average], [], [], [step], replace(RULE, gamma=0.5, clip=1.0)
    )
    c = 2.0 + 0.5 * 9 * (2.0 - 3.0)
    # the norm of c is 5
    torch.testing.assert_close(average, torch.full_like(average, 0.1 * c / 5), rtol=1e-14, atol=0)
    torch.testing.assert_close(param, 1.0 - 0.1 * average, rtol=1e-15, atol=0)
    assert float(step) == 1
    assert (float(grad[0, 0]), float(reference[0, 0])) == (2.0, 3.0)
    assert [float(d) for d in divisors] == [pytest.approx(5.0, rel=1e-14)]


@pytest.mark.parametrize(
    "name", ["grads", "references", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"]
)
def test_lists_of_unequal_length_raise(name):
    names = ("grads", "references", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
    lists = {n: [torch.zeros(2, 2)] if n != "steps" else [torch.zeros(())] for n in names}
    lists[name] = []
    rule = replace(RULE, kind="adamw", amsgrad=True)
    with pytest.raises(ValueError, match=rf"{name} must have one tensor per parameter \(1\), got 0"):
        mars([torch.zeros(2, 2)], *lists.values(), rule)


@pytest.mark.parametrize("foreach", [False, True])
def test_no_tensors_are_no_work(foreach):
    assert mars([], [], None, [], [], [], [], RULE, foreach=foreach) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: gradient_correction(t, t, beta1=1.0, gamma=0.1), r"beta1 must be in \[0, 1\), got 1.0"),
        (lambda t: gradient_correction(t, t, beta1=0.9, gamma=-0.1), "gamma must be >= 0, got -0.1"),
        (lambda t: clip_by_norm(t, 0.0), "max_norm must be > 0, got 0.0"),
    ],
)
def test_bad_numbers_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2))


def test_shapes_that_differ_raise_with_and_without_the_runtime_check():
    g, h = torch.ones(2, 2), torch.ones(2, 1)
    with pytest.raises(TypeError, match="shape"):
        gradient_correction(g, h, beta1=0.9, gamma=0.1)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"the same shape, got \(2, 2\) and \(2, 1\)"):
            gradient_correction(g, h, beta1=0.9, gamma=0.1)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_clipping_by_slices_leaves_small_slices_alone():
    tensor = torch.stack([torch.full((2, 2), 3.0), torch.full((2, 2), 0.1)])
    expected = torch.stack([torch.full((2, 2), 0.5), torch.full((2, 2), 0.1)])
    torch.testing.assert_close(clip_by_norm(tensor, 1.0, batched=True), expected)


def test_quasi_hyperbolic_momentum_lies_between_average_and_gradient():
    gradient, average = torch.tensor([4.0]), torch.tensor([2.0])
    assert float(quasi_hyperbolic(gradient, average, 0.0)) == 2.0
    assert float(quasi_hyperbolic(gradient, average, 1.0)) == 4.0
    assert float(quasi_hyperbolic(gradient, average, 0.25)) == 2.5
