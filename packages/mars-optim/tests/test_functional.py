"""Both backends against the NumPy truth, on all types, forms, clips and options."""

from dataclasses import replace

import pytest
import torch
from mars_optim.torch import UpdateRule, clip_by_norm, gradient_correction, mars, quasi_hyperbolic
from reference import Options
from trajectories import TYPES, assert_same, draw, run_mars, run_reference, varying

ROUNDING = 1e-12  # 12 steps of float64 arithmetic on numbers of order one: below 1e4 ulp
BASE = Options(lr=0.02, betas=(0.9, 0.95), gamma=0.15, lr_1d_ratio=0.5, reference_lr=0.02)
# gradients of these shapes have norms 2 to 6: clip=4 clips some of them, 0.5 all
CLIPS = {"no clip": None, "mixed": 4.0, "always clipped": 0.5}
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "independent decay": {"weight_decay": 0.01, "decay_mode": "independent", "weight_decay_1d": 0.02},
    "cautious decay": {"weight_decay": 0.1, "decay_mode": "cautious"},
    "l2 decay": {"weight_decay": 0.1, "decay_mode": "l2"},
    "amsgrad": {"amsgrad": True},
    "optimize_1d": {"optimize_1d": True, "weight_decay": 0.1},
    "zero start": {"prev_grad_init": "zero"},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "second moment of g": {"second_moment": "grad"},
    "global clip": {"clip_scope": "global"},
    "batch view": {"matrix_view": "batch"},
    "only 2-D": {"matrix_ndim": "==2"},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "svd": {"orthogonalize": "svd"},
    "fixed scale": {"scale": 0.7},
    "seven other Newton-Schulz steps": {"ns_steps": 7, "ns_coefficients": (1.9, -1.3, 0.4)},
}


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("changed", OPTIONS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("is_approx", [True, False], ids=["approx", "exact"])
@pytest.mark.parametrize("mars_type", TYPES)
def test_backends_follow_the_reference(mars_type, is_approx, clip, changed, foreach):
    options = replace(BASE, mars_type=mars_type, is_approx=is_approx, clip=CLIPS[clip], **OPTIONS[changed])
    drawn = draw(seed=1)
    expected = run_reference(drawn, options)
    assert_same(run_mars(drawn, options, foreach=foreach), expected, rtol=ROUNDING, atol=ROUNDING)
