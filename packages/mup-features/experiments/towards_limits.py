"""Claims 6 and 7: distances of finite networks from their limits, and how fast they fall with width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from networks import paths
from sizes import Kernel
from stage import float64

from mup_features.jax import KernelGD
from tenfold_tools.claims import Number, Run

RESAMPLES = 999


def own_seeds(run: Run, row: int, count: int) -> tuple[int, ...]:
    """Seeds of the networks of one width, different from those of the others."""
    first = 10_000 * run.seeds[0] + 1000 * row
    return tuple(range(first, first + count))


def from_kernels(
    run: Run, size: Kernel, scheme: str, kernels: Mapping[str, np.ndarray], X: np.ndarray, Y: np.ndarray
) -> dict[str, np.ndarray]:
    """Distance of each network's outputs at the last step from those of each kernel, [widths, networks].

    Kernel descent starts from the network's own outputs; the distance is the RMS over samples and outputs.
    """
    # The reference values of the two points add up over samples; digits are averaged.
    reduction, count = ("sum", 1) if size.data == "two points" else ("mean", len(Y))
    with float64():
        descents = {name: KernelGD(theta, lr=size.lr / count) for name, theta in kernels.items()}
    rows = {name: np.zeros((len(size.widths), size.seeds)) for name in kernels}
    for row, width in enumerate(run.track(size.widths, scheme)):
        made = paths(
            scheme,
            width,
            X,
            Y,
            depth=size.depth,
            lr=size.lr,
            steps=size.steps,
            seeds=own_seeds(run, row, size.seeds),
            reduction=reduction,
            device=run.device,
        )
        for name, descent in descents.items():
            expected = _descended(descent, Y, size.steps, made.f[:, 0])
            rows[name][row] = np.sqrt(((made.f[:, -1] - expected) ** 2).mean(axis=(1, 2)))
    return rows


def _descended(descent: KernelGD, Y: np.ndarray, steps: int, f0: np.ndarray) -> np.ndarray:
    """Outputs of kernel descent from those of each network, [networks, N, C]."""
    # Outputs do not meet in kernel descent: those of all networks are columns of one problem.
    networks, samples, outputs = f0.shape
    with float64():
        made = descent.predict(np.tile(Y, networks), steps, f0=f0.swapaxes(0, 1).reshape(samples, -1))
    return np.asarray(made.train).reshape(samples, networks, outputs).swapaxes(0, 1)


def slope_of_rmse(
    widths: tuple[int, ...], rows: np.ndarray, name: str = "slope of log RMSE over log n"
) -> Number:
    """Slope of the root mean square over networks, [widths, networks]; interval by resampling networks.

    Networks of different widths have nothing in common, so that there is no slope of a single seed for a
    t-interval; each width is resampled on its own.
    """
    networks, rng = rows.shape[1], np.random.default_rng(0)
    drawn = rng.integers(0, networks, (RESAMPLES, *rows.shape))
    resampled = np.take_along_axis(np.broadcast_to(rows, drawn.shape), drawn, axis=-1)
    low, high = np.quantile(_slopes(widths, resampled), [0.025, 0.975])
    value = float(_slopes(widths, rows[None])[0])
    return Number(name, value, min(low, value), max(high, value))


def _slopes(widths: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    """Slope of log RMSE over log width of each set, [sets, widths, networks]."""
    return np.polyfit(np.log(widths), 0.5 * np.log((rows**2).mean(axis=-1)).T, 1)[0]
