"""Claims 1 to 3: three measures of the last hidden features, for four schemes over width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
from cifar import cifar_images
from digit_sets import few_digits
from networks import Moment, train
from sizes import Schemes
from stage import float64

from mup_features.jax.limit import InfiniteWidthMLP
from mup_features.similarity import change
from mup_features.spectra import eigenvalue_floor, gram, lambda_min
from tenfold_tools.claims import Number, Run
from tenfold_tools.stats import loglog_slope

LR = {"sp": 2.0, "ntp": 2.0, "ip": 4.0, "mup": 4.0}
Measured = dict[str, np.ndarray]  # scheme -> [widths, seeds]


@dataclass(frozen=True)
class Measures:
    """What claims 1 to 3 look at, each [widths, seeds] for each scheme.

    Attributes:
        change: mean over samples of |h_T - h_0| / |h_0|.
        lambda_min: smallest eigenvalue of the Gram matrix of features at T.
        joint: smallest eigenvalue of the Gram matrix of the 2N pre-activations at 0 and T.
        limits: measure -> its value for muP at infinite width, as far as computed.
        moved_under_ip: |h_T - h_0| / sqrt(n) under IP at the largest width, mean over samples and seeds.
    """

    change: Measured
    lambda_min: Measured
    joint: Measured
    limits: Mapping[str, float]
    moved_under_ip: float


def at(run: Run, size: Schemes) -> Measures:
    """The measures of a run; C1, C2 and C3 share them."""
    return _measure(_Key(run), size)


class _Key:
    """A run as a key of the cache: what counts is scale, seeds and device."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple:
        return self.run.scale, self.run.seeds, self.run.device


@lru_cache(maxsize=2)
def _measure(key: _Key, size: Schemes) -> Measures:
    run = key.run
    X, Y = few_digits(4, 8) if run.scale != "full" else cifar_images(per_class=4, classes=8)
    tables: dict[str, Measured] = {
        name: {scheme: np.zeros((len(size.widths), size.seeds)) for scheme in LR}
        for name in ("change", "lambda_min", "joint")
    }
    moved = 0.0
    jobs = [(scheme, row, width) for row, width in enumerate(size.widths) for scheme in LR]
    for scheme, row, width in run.track(jobs, "schemes and widths"):
        # Large networks one after another, to bound memory.
        groups = [run.seeds] if width <= 2048 else [(seed,) for seed in run.seeds]
        for group in groups:
            first, last = _ends(run, scheme, width, X, Y, size, group)
            for own, seed in enumerate(group):
                column = run.seeds.index(seed)
                before, after = (moment.h[-1][own].cpu().numpy() for moment in (first, last))
                tables["change"][scheme][row, column] = change(after, before)
                tables["lambda_min"][scheme][row, column] = _smallest(last.x[-1][own].cpu().numpy())
                tables["joint"][scheme][row, column] = _smallest(np.concatenate([before, after]))
                if scheme == "ip" and row == len(size.widths) - 1:
                    moved += change(after, before, relative=False) / len(run.seeds)
    limits = _limits(run, size, *size.limit, X, Y) if size.limit else {}
    return Measures(tables["change"], tables["lambda_min"], tables["joint"], limits, moved)


def _smallest(features: np.ndarray) -> float:
    """Smallest eigenvalue of the Gram matrix, or what rounding leaves uncertain if that is larger."""
    K = gram(features)
    return max(lambda_min(K), eigenvalue_floor(K))


def _ends(
    run: Run, scheme: str, width: int, X: np.ndarray, Y: np.ndarray, size: Schemes, seeds: tuple[int, ...]
) -> tuple[Moment, Moment]:
    moments = train(
        scheme,
        width,
        X,
        Y,
        depth=size.depth,
        lr=LR[scheme],
        steps=size.steps,
        seeds=seeds,
        device=run.device,
    )
    first = last = next(moments)
    for moment in moments:
        last = moment
    return first, last


def _limits(
    run: Run, size: Schemes, samples: int, replicas: int, tol: float, X: np.ndarray, Y: np.ndarray
) -> dict[str, float]:
    """The three measures of muP at infinite width."""
    with float64():
        made = InfiniteWidthMLP(
            depth=size.depth,
            input_dim=X.shape[1],
            output_dim=Y.shape[1],
            lr=LR["mup"],
            samples=samples,
            replicas=replicas,
            tol=tol,
            key=jax.random.key(run.seeds[0]),
        ).fit(X, Y, size.steps, record=("f", "K", "change"), every=size.steps)
    return {
        "change": float(made.change[-1][-1]),
        "lambda_min(K)": float(made.min_eig("K_post")[0][-1, -1]),
        "joint lambda_min": float(made.joint_min_eig("pre")[0][-1, -1]),
    }


def slope(name: str, widths: tuple[int, ...], values: np.ndarray) -> Number:
    """Slope of log measure over log width, seed by seed."""
    found = loglog_slope(widths, values.T)
    return Number(name, found.value, found.low, found.high)


def against(measured: Measured, other: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each other scheme's values over those of `other` at the largest width, seed by seed."""
    for name, values in measured.items():
        if name != other:
            yield name, values[-1] / measured[other][-1]


def under(measured: Measured, scheme: str) -> Iterator[tuple[str, np.ndarray]]:
    """Values of a scheme over those of each other at the largest width, seed by seed."""
    for name, values in measured.items():
        if name != scheme:
            yield name, measured[scheme][-1] / values[-1]


def log10_ratio(name: str, ratios: np.ndarray) -> Number:
    """Mean over seeds of log10 of ratios."""
    return Number.mean(name, np.log10(ratios))


def numbers(measure: str, widths: tuple[int, ...], measured: Measured) -> list[Number]:
    """Every mean over seeds, by scheme and width."""
    return [
        Number.mean(f"{measure}, {scheme}, width {width}", values[row])
        for scheme, values in measured.items()
        for row, width in enumerate(widths)
    ]
