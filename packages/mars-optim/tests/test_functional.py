"""Both backends against the NumPy truth, on all types, forms, clips and options."""

from dataclasses import replace

import pytest
import torch
from mars_optim.torch import UpdateRule, clip_by_norm, gradient_correction, mars, quasi_hyperbolic
from reference import Options
from trajectories import TYPES, assert_same, draw, run_mars, run_reference, varying

ROUNDING = 1e-12  # 12 steps of float64 arithmetic on numbers of order one: below 1e4 ulp
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


@pytest.mark.parametrize("mars_type", TYPES)
def test_backends_agree_in_float32(mars_type):
    options = replace(BASE, mars_type=mars_type, clip=4.0, weight_decay=0.1)
    drawn = draw(seed=2)
    loop = run_mars(drawn, options, dtype=torch.float32, foreach=False)
    lists = run_mars(drawn, options, dtype=torch.float32, foreach=True)
    # a few ulp (1.2e-7) of entries of order one; atol covers entries that have cancelled to small numbers
    assert_same(lists, loop, rtol=1e-6, atol=1e-6)
