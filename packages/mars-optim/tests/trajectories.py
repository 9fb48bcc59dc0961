"""Runs MARS beside the NumPy truth on the same gradients: what most tests of the step are made of."""

from dataclasses import fields, replace

import numpy as np
import torch
from reference import Mars, Options

from mars_optim.torch import MARS

SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 3, 2), (1, 4), (7, 1))
STEPS = 6  # every branch has been taken by the third
TYPES = ("adamw", "lion", "shampoo", "m", "sgd")


def draw(seed, shapes=SHAPES, steps=STEPS, size=1.0):
    """Parameters, and gradients and reference gradients of every step: arrays in float64."""
    rng = np.random.default_rng(seed)
    parameters = [rng.normal(size=shape) for shape in shapes]
    gradients = [[size * rng.normal(size=shape) for shape in shapes] for _ in range(steps)]
    references = [[g + 0.3 * size * rng.normal(size=g.shape) for g in step] for step in gradients]
    return parameters, gradients, references


def run_reference(drawn, options):
    """The truth after all steps; `options` is one Options for all steps or a list with one per step."""
    parameters, gradients, references = drawn
    per_step = options if isinstance(options, list) else [options] * len(gradients)
    truth = Mars(parameters)
    for g, h, o in zip(gradients, references, per_step, strict=True):
        truth.step(g, o, exact=h)
    return truth.parameters


def constructor_arguments(o: Options):
    """The same options as MARS takes them."""
    dropped = {"reference_lr"}  # MARS takes it from lr at construction
    names = [field.name for field in fields(o) if field.name not in dropped]
    return {name: getattr(o, name) for name in names}


def run_mars(drawn, options, *, dtype=torch.float64, **extra):
    """MARS after all steps, as float64 arrays; per-step options change lr, betas and gamma in the groups."""
    parameters, gradients, references = drawn
    per_step = options if isinstance(options, list) else [options] * len(gradients)
    params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in parameters]
    optimizer = MARS(params, **{**constructor_arguments(per_step[0]), **extra})
    for g, h, o in zip(gradients, references, per_step, strict=True):
        for group in optimizer.param_groups:
            group.update(lr=o.lr, betas=o.betas, gamma=o.gamma)
        for param, gradient in zip(params, g, strict=True):
            param.grad = torch.tensor(gradient, dtype=dtype)
        given = None if o.is_approx else [torch.tensor(x, dtype=dtype) for x in h]
        optimizer.step(prev_grads=given)
    return [p.detach().double().numpy() for p in params]


def varying(o: Options, steps=STEPS):
    """A schedule that moves lr, both betas and gamma."""
    return [
        replace(
            o,
            lr=o.lr * (1 + t) / (3 + 0.5 * t * t),
            betas=(o.betas[0] - 0.02 * t, o.betas[1] - 0.005 * t),
            gamma=o.gamma * (1 + 0.1 * t),
            reference_lr=o.lr / 3,
        )
        for t in range(steps)
    ]


def assert_same(actual, expected, *, rtol, atol):
    """Compare two lists of arrays."""
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)
