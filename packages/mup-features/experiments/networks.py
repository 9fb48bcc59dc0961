"""Real networks of finite width: full-batch SGD on a tanh MLP in float64, in any scheme.

With f = W^{L+1} x^L, chi the derivative of the loss by f and x^0 the inputs, a step down the layers is

    e^{L+1} = chi,    e^l = (e^{l+1} W^{l+1}) (1 - (x^l)^2),    W^l <- W^l - rate_l e^l' x^{l-1}.

Each update is one product that is added in place: no gradient as large as a hidden matrix is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from mup_features import Parametrization

J = TypeVar("J")
T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """A network at one step; N samples.

    Attributes:
        step: updates made.
        h: pre-activations of each hidden layer, [N, n].
        x: features of each hidden layer, [N, n].
        f: outputs, [N, C].
        chi: derivative of the loss by f, [N, C].
        count: what the loss is divided by, N or 1.
    """

    step: int
    h: list[torch.Tensor]
    x: list[torch.Tensor]
    f: torch.Tensor
    chi: torch.Tensor
    count: int

    @property
    def loss(self) -> float:
        """Half the squared error, its mean or sum over samples."""
        return 0.5 * self.count * float((self.chi**2).sum())

    @property
    def readout_grad_sq(self) -> float:
        """Squared norm of the readout's gradient over n."""
        gradient = self.chi.T @ self.x[-1]
        return float((gradient**2).sum()) / gradient.shape[1]


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
    seed: int,
    reduction: str = "mean",
    device: str = "cpu",
) -> Iterator[Moment]:
    """A network at every step, before the update; raw exponents."""
    table = Parametrization(scheme)
    inputs, targets = (torch.as_tensor(part, dtype=torch.float64, device=device) for part in (X, Y))
    weights = _initial(table, [X.shape[1], *[width] * depth, Y.shape[1]], seed, device)
    count = len(X) if reduction == "mean" else 1
    first, later = (table.rates(width, depth, lr, step=step) for step in (0, 1))
    for step in range(steps + 1):
        h, x = [], [inputs]
        for weight in weights[:-1]:
            h.append(x[-1] @ weight.T)
            x.append(torch.tanh(h[-1]))
        f = x[-1] @ weights[-1].T
        chi = (f - targets) / count
        yield Moment(step, h, x[1:], f, chi, count)
        if step < steps:
            _update(weights, x, chi, later if step else first)


def _initial(table: Parametrization, sizes: list[int], seed: int, device: str) -> list[torch.Tensor]:
    """Weights of each layer, [out, in]; drawn on the CPU, so that a seed means the same everywhere."""
    weights = []
    for layer, variance in enumerate(table.variances(sizes[1], len(sizes) - 2)):
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        draws = torch.randn(sizes[layer + 1], sizes[layer], dtype=torch.float64, generator=generator)
        weights.append(draws.mul_(variance**0.5).to(device))
    return weights


def _update(
    weights: list[torch.Tensor], x: list[torch.Tensor], chi: torch.Tensor, rates: Sequence[float]
) -> None:
    """One step of gradient descent in place; x holds what each layer sees."""
    error = chi
    for layer in reversed(range(len(weights))):
        weight, seen = weights[layer], x[layer]
        below = error @ weight if layer else None  # by the weights before the update; inputs need none
        weight.addmm_(error.T, seen, alpha=-rates[layer])
        if below is not None:
            error = below.mul_(1 - seen * seen)


def side_by_side(measure: Callable[[J], T], jobs: Sequence[J], device: str) -> Iterator[T]:
    """`measure` of every job, in order; on a CPU as many jobs at once as torch has threads.

    Each network keeps one core: torch lets go of the interpreter's lock inside its operations, and products
    of 32 rows lose more by waiting for the other cores than they gain from them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads if device == "cpu" else 1) as pool:
            yield from pool.map(measure, jobs)
    finally:
        torch.set_num_threads(threads)


def gram_matrices(features: torch.Tensor) -> np.ndarray:
    """Gram matrices over n of features [..., N, n]; only they leave the device, not the features."""
    return (features @ features.mT / features.shape[-1]).cpu().numpy()


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

    def path(seed: int) -> tuple[np.ndarray, np.ndarray]:
        moments = train(
            scheme,
            width,
            X,
            Y,
            depth=depth,
            lr=lr,
            steps=steps,
            seed=seed,
            reduction=reduction,
            device=device,
        )
        found = [(moment.f.cpu().numpy(), gram_matrices(moment.x[-1])) for moment in moments]
        f, K = zip(*found, strict=True)
        return np.stack(f), np.stack(K)

    outputs, grams = zip(*side_by_side(path, seeds, device), strict=True)
    return Paths(np.stack(outputs), np.stack(grams))
