"""Claims 6 and 7: distances of finite networks from their limits, and how fast they fall with width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from networks import side_by_side, train
from sizes import Kernel

from mup_features.jax import KernelGD
from mup_features.jax.precision import float64
from tenfold_tools.claims import Number, Run

RESAMPLES = 999


def own_seeds(run: Run, row: int, count: int) -> tuple[int, ...]:
    """Seeds of the networks of one width, different from those of the others."""
    first = 10_000 * run.seeds[0] + 1000 * row
    return tuple(range(first, first + count))


def from_kernels(
    run: Run, size: Kernel, kernels: Mapping[str, np.ndarray], X: np.ndarray, Y: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Scheme -> kernel -> distance of each network's outputs at the last step, [widths, networks].

    Each scheme is held against its own kernel and those of the others. Kernel descent starts from the
    network's own outputs; the distance is the RMS over samples and outputs.
    """
    # The reference values of the two points add up over samples; digits are averaged.
    reduction, count = ("sum", 1) if size.data == "two points" else ("mean", len(Y))

    def ends(job: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray]:
        scheme, row, seed = job
        moments = train(
            scheme,
            size.widths[row],
            X,
            Y,
            depth=size.depth,
            lr=size.lr,
            steps=size.steps,
            seed=seed,
            reduction=reduction,
            device=run.device,
        )
        f = [moment.f.cpu().numpy() for moment in moments]
        return f[0], f[-1]

    rows = range(len(size.widths))
    jobs = [
        (scheme, row, seed)
        for row in reversed(rows)  # the widest first: what a last core is left with is short
        for scheme in kernels
        for seed in own_seeds(run, row, size.seeds)
    ]
    results = side_by_side(ends, jobs, run.device)
    made = dict(zip(run.track(jobs, "networks"), results, strict=True))
    found = {}
    for scheme in kernels:
        of_scheme = [[made[scheme, row, seed] for seed in own_seeds(run, row, size.seeds)] for row in rows]
        f0, f = np.moveaxis(np.array(of_scheme), 2, 0)  # [widths, networks, N, C]
        found[scheme] = {}
        for name, theta in kernels.items():
            expected = _descended(theta, size.lr / count, Y, size.steps, f0)
            found[scheme][name] = np.sqrt(((f - expected) ** 2).mean(axis=(2, 3)))
    return found


def _descended(theta: np.ndarray, lr: float, Y: np.ndarray, steps: int, f0: np.ndarray) -> np.ndarray:
    """Outputs of kernel descent from those of each network, [widths, networks, N, C]."""
    # Outputs do not meet in kernel descent: those of all networks are columns of one problem.
    columns = f0.transpose(2, 0, 1, 3)
    targets = np.broadcast_to(Y[:, None, None], columns.shape)
    with float64():
        descent = KernelGD(theta, lr=lr)
        made = descent.predict(targets.reshape(len(Y), -1), steps, f0=columns.reshape(len(Y), -1))
    return np.asarray(made.train).reshape(columns.shape).transpose(1, 2, 0, 3)


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
