"""Real networks of finite width, a whole set of seeds at once: SGD on an MLP in float64, in any scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mup_features import Parametrization

AT_ONCE = 2**26
"""Entries of hidden matrices trained side by side: half a gigabyte, and as much for their gradients."""


@dataclass(frozen=True)
class Moment:
    """Networks at one step; R seeds, N samples.

    Attributes:
        step: updates made.
        h: pre-activations of each hidden layer, [R, N, n].
        x: features of each hidden layer, [R, N, n].
        f: outputs, [R, N, C].
        loss: mean over samples of half the squared error, [R].
        readout_grad_sq: squared norm of the readout's gradient over n, [R].
    """

    step: int
    h: list[torch.Tensor]
    x: list[torch.Tensor]
    f: torch.Tensor
    loss: torch.Tensor
    readout_grad_sq: torch.Tensor


class Paths(NamedTuple):
    """Networks at every step: outputs [R, T, N, C], Gram matrices of the last features [R, T, N, N]."""

    f: np.ndarray
    K: np.ndarray


def train(
    scheme: str,
    width: int,
    X: np.ndarray,
    Y: np.ndarray,
    *,
    depth: int,
    lr: float,
    steps: int,
    seeds: tuple[int, ...],
    reduction: str = "mean",
    device: str = "cpu",
) -> Iterator[Moment]:
    """Every step of full-batch gradient descent on tanh networks, before the update; raw exponents."""
    table = Parametrization(scheme)
    inputs = torch.as_tensor(X, dtype=torch.float64, device=device).expand(len(seeds), *X.shape)
    targets = torch.as_tensor(Y, dtype=torch.float64, device=device)
    weights = _initial(table, [X.shape[1], *[width] * depth, Y.shape[1]], seeds, device)
    count = len(X) if reduction == "mean" else 1
    for step in range(steps + 1):
        h, x = [], [inputs]
        for weight in weights[:-1]:
            h.append(x[-1] @ weight.mT)
            x.append(torch.tanh(h[-1]))
        f = x[-1] @ weights[-1].mT
        losses = 0.5 * ((f - targets) ** 2).sum(dim=(1, 2)) / count
        gradients = torch.autograd.grad(losses.sum(), weights)
        yield Moment(
            step,
            [part.detach() for part in h],
            [part.detach() for part in x[1:]],
            f.detach(),
            losses.detach(),
            (gradients[-1] ** 2).sum(dim=(1, 2)) / width,
        )
        rates = table.rates(width, depth, lr, step=step)
        with torch.no_grad():
            for weight, gradient, rate in zip(weights, gradients, rates, strict=True):
                weight -= rate * gradient


def _initial(
    table: Parametrization, sizes: list[int], seeds: tuple[int, ...], device: str
) -> list[torch.Tensor]:
    """Weights of each layer, [R, out, in]; drawn on the CPU, so that a seed means the same everywhere."""
    weights = []
    for layer, variance in enumerate(table.variances(sizes[1], len(sizes) - 2)):
        generators = [torch.Generator().manual_seed(1000 * seed + layer) for seed in seeds]
        shape = sizes[layer + 1], sizes[layer]
        draws = [torch.randn(shape, dtype=torch.float64, generator=made) for made in generators]
        weights.append((variance**0.5 * torch.stack(draws)).to(device).requires_grad_())
    return weights


def side_by_side(seeds: tuple[int, ...], width: int, depth: int) -> list[tuple[int, ...]]:
    """Seeds in groups that are trained at once; large networks one after another, to bound memory."""
    size = max(1, AT_ONCE // (width * width * depth))
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def paths(
    scheme: str,
    width: int,
    X: np.ndarray,
    Y: np.ndarray,
    *,
    depth: int,
    lr: float,
    steps: int,
    seeds: tuple[int, ...],
    reduction: str,
    device: str,
) -> Paths:
    """Outputs and Gram matrices of every network at every step."""
    outputs, grams = [], []
    for group in side_by_side(seeds, width, depth):
        f, K = [], []
        for moment in train(
            scheme,
            width,
            X,
            Y,
            depth=depth,
            lr=lr,
            steps=steps,
            seeds=group,
            reduction=reduction,
            device=device,
        ):
            features = moment.x[-1]
            f.append(moment.f.cpu().numpy())
            K.append((features @ features.mT / width).cpu().numpy())
        outputs.append(np.stack(f, axis=1))
        grams.append(np.stack(K, axis=1))
    return Paths(np.concatenate(outputs), np.concatenate(grams))
