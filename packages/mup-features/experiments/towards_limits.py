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
        with float64():
            for name, theta in kernels.items():
                descent = KernelGD(theta, lr=size.lr / count)
                for network, f in enumerate(made.f):
                    expected = np.asarray(descent.predict(Y, size.steps, f0=f[0]).train)
                    rows[name][row, network] = np.sqrt(((f[-1] - expected) ** 2).mean())
    return rows


def slope_of_rmse(
    widths: tuple[int, ...], rows: np.ndarray, name: str = "slope of log RMSE over log n"
) -> Number:
    """Slope of the root mean square over networks, [widths, networks]; interval by resampling networks.

    Networks of different widths have nothing in common, so that there is no slope of a single seed for a
    t-interval; each width is resampled on its own.
    """
    rng = np.random.default_rng(0)

    def fit(values: np.ndarray) -> float:
        return float(np.polyfit(np.log(widths), 0.5 * np.log((values**2).mean(axis=1)), 1)[0])

    resampled = [
        fit(np.stack([row[rng.integers(0, len(row), len(row))] for row in rows])) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = fit(rows)
    return Number(name, value, min(low, value), max(high, value))
