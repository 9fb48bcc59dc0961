"""Softmax regression on the digits, where the full gradient is known: how far each estimator is from it.

The model is W (65 x 10: 64 pixels and a constant), the loss the mean cross-entropy over 1797 images, and the
gradient of one image is x (softmax(x W) - y)^T. All in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mars_optim.torch import estimator_error, gradient_correction
from tenfold_tools import data

GAMMAS = (0.0, 0.025, 0.5, 1.0)
STEPS, LEARNING_RATE, BETA2, EPS = 450, 0.01, 0.99, 1e-8


@dataclass(frozen=True)
class Regression:
    """Pixels with a constant column, and one-hot classes."""

    inputs: Tensor
    targets: Tensor

    def per_sample(self, w: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each chosen image, (rows, 65, 10)."""
        x = self.inputs[rows]
        return x[:, :, None] * (torch.softmax(x @ w, dim=1) - self.targets[rows])[:, None, :]

    def gradient(self, w: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Gradient of the mean loss over the chosen images, (65, 10)."""
        x = self.inputs[rows]
        return x.T @ (torch.softmax(x @ w, dim=1) - self.targets[rows]) / len(x)


def digits_regression() -> Regression:
    pixels, classes = data.digits()
    inputs = torch.from_numpy(pixels)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    return Regression(inputs, torch.eye(10, dtype=torch.float64)[torch.from_numpy(classes)])


@dataclass
class Moment:
    """The present and previous point of the shared trajectory, and the batch drawn there."""

    t: int
    w: Tensor
    previous_w: Tensor
    rows: Tensor
    average: Tensor  # the plain moving average m_t that drives the trajectory


def shared_trajectory(
    problem: Regression, seed: int, beta1: float, batch: int, start: str = "m1=g1", steps: int = STEPS
) -> Iterator[Moment]:
    """The moments of one run of Adam from W = 0 along the plain moving average of the gradients.

    With start "m1=g1" the average begins at the first gradient (STORM's own start) and is used as it is; with
    "m0=0" it begins at zero and its bias is corrected, as Adam does.
    """
    generator = torch.Generator().manual_seed(seed)
    w = previous_w = torch.zeros(65, 10, dtype=torch.float64)
    average = second = torch.zeros_like(w)
    for t in range(1, steps + 1):
        rows = torch.randint(len(problem.inputs), (batch,), generator=generator)
        g = problem.gradient(w, rows)
        average = averaged(average, g, t, beta1, start)
        second = BETA2 * second + (1 - BETA2) * g**2
        yield Moment(t, w, previous_w, rows, average)
        unbiased = average if start == "m1=g1" else average / (1 - beta1**t)
        root = (second / (1 - BETA2**t)).sqrt() + EPS
        previous_w, w = w, w - LEARNING_RATE * unbiased / root


def averaged(m: Tensor, c: Tensor, t: int, beta1: float, start: str) -> Tensor:
    """The estimator m_t from m_{t-1} and c_t."""
    return c if t == 1 and start == "m1=g1" else beta1 * m + (1 - beta1) * c


def error_ratios(seed: int, beta1: float, batch: int, start: str = "m1=g1") -> dict[tuple[str, float], float]:
    """E||m - grad F||^2 of every (form, gamma) over that of the plain moving average, on one trajectory.

    The mean is over the last two thirds of the steps.
    """
    problem = digits_regression()
    keys = [(form, gamma) for form in ("exact", "approx") for gamma in GAMMAS]
    momenta = dict.fromkeys(keys, torch.zeros(65, 10, dtype=torch.float64))
    totals = dict.fromkeys(keys, 0.0)
    previous_g = None
    for moment in shared_trajectory(problem, seed, beta1, batch, start):
        g = problem.gradient(moment.w, moment.rows)
        references = {
            "exact": problem.gradient(moment.previous_w, moment.rows),
            "approx": g if previous_g is None else previous_g,
        }
        previous_g = g
        for form, gamma in keys:
            c = gradient_correction(g, references[form], beta1=beta1, gamma=gamma)
            momenta[form, gamma] = averaged(momenta[form, gamma], c, moment.t, beta1, start)
        if moment.t > STEPS // 3:
            full = problem.gradient(moment.w)
            for key in keys:
                totals[key] += float(estimator_error(momenta[key], full))
    return {key: total / totals["exact", 0.0] for key, total in totals.items()}


def one_step_problem(seed: int, beta1: float, batch: int, moments: tuple[int, ...]) -> list[dict[str, Any]]:
    """Delta_i, grad f_i(x_{t+1}) and eps_t of the finite sum at some moments of a run, as NumPy arrays."""
    problem = digits_regression()
    everything = torch.arange(len(problem.inputs))
    found: list[dict[str, Any]] = []
    error = torch.zeros(65, 10, dtype=torch.float64)
    for moment in shared_trajectory(problem, seed, beta1, batch, steps=max(moments) + 1):
        if moment.t - 1 in moments:  # the step from t to t + 1 is known now
            before = problem.per_sample(moment.previous_w, everything).flatten(1)
            after = problem.per_sample(moment.w, everything).flatten(1)
            arrays = {"delta": after - before, "grad": after, "eps": error.flatten()}
            found.append({"t": moment.t - 1} | {name: array.numpy() for name, array in arrays.items()})
        error = moment.average - problem.gradient(moment.w)
    return found


def approximate_noise_ratios(seed: int, beta1: float, gammas: Sequence[float]) -> list[float]:
    """Var(m) of the approximate form over that of the moving average, on white noise: 4e5 samples of each.

    1e5 independent coordinates, read four times, so far apart that beta1^gap < 1e-2 and the readings are
    nearly independent; the first one when the start has faded to below 1e-4.
    """
    coordinates, readings = 100_000, 4
    burn_in, gap = (math.ceil(math.log(left) / math.log(beta1)) for left in (1e-4, 1e-2))
    generator = torch.Generator().manual_seed(seed)
    zero = torch.zeros(coordinates)
    strengths = [0.0, *gammas]  # gamma = 0 is the plain moving average
    momenta, squares, previous = [zero] * len(strengths), [0.0] * len(strengths), zero
    for step in range(burn_in + (readings - 1) * gap + 1):
        g = torch.randn(coordinates, generator=generator)
        for i, gamma in enumerate(strengths):
            c = gradient_correction(g, previous, beta1=beta1, gamma=gamma)
            momenta[i] = beta1 * momenta[i] + (1 - beta1) * c
            if step >= burn_in and (step - burn_in) % gap == 0:
                squares[i] += float(estimator_error(momenta[i], zero))
        previous = g
    return [square / squares[0] for square in squares[1:]]
