"""Real networks of finite width, a whole set of seeds at once: SGD on an MLP in float64, in any scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mup_features import Parametrization


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
    targets = torch.as_tensor(Y.reshape(len(X), -1), dtype=torch.float64, device=device)
    sizes = [X.shape[1], *[width] * depth, targets.shape[1]]
    weights = []
    for layer, variance in enumerate(table.variances(width, depth)):
        shape = sizes[layer + 1], sizes[layer]
        draws = [
            torch.randn(
                shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + layer)
            )
            for seed in seeds
        ]
        weights.append((variance**0.5 * torch.stack(draws)).to(device).requires_grad_())
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


def outputs(
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
) -> np.ndarray:
    """Outputs at every step, [seeds, steps + 1, N, C]; large networks are trained a few at a time."""
    at_once = max(1, 2**26 // (width * width * depth))
    parts = []
    for start in range(0, len(seeds), at_once):
        moments = train(
            scheme,
            width,
            X,
            Y,
            depth=depth,
            lr=lr,
            steps=steps,
            seeds=seeds[start : start + at_once],
            reduction=reduction,
            device=device,
        )
        parts.append(np.stack([moment.f.cpu().numpy() for moment in moments], axis=1))
    return np.concatenate(parts)
