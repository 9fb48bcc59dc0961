"""Claims 1 to 3: three measures of the last hidden features, for four schemes over width, and over steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import numpy as np
import torch
from data_sets import load
from networks import gram_matrices, side_by_side, train
from sizes import Schemes

from mup_features.jax import InfiniteWidthMLP
from mup_features.jax.precision import float64
from mup_features.similarity import change, relative_frobenius_change
from mup_features.spectra import eigenvalue_floor, lambda_min
from tenfold_tools.claims import Number, Run
from tenfold_tools.stats import loglog_slope

LR = {"sp": 2.0, "ntp": 2.0, "ip": 4.0, "mup": 4.0}
Measured = dict[str, np.ndarray]  # scheme -> [widths, seeds]


@dataclass(frozen=True)
class Course:
    """The last hidden layer over time, each [points, seeds]; of a limit [points, 1].

    Attributes:
        loss: mean over samples of half the squared error.
        change: mean over samples of |h_t - h_0| / |h_0|.
        kernel_change: |K_t - K_0| / |K_0| of the Gram matrix of features.
    """

    loss: np.ndarray
    change: np.ndarray
    kernel_change: np.ndarray


@dataclass(frozen=True)
class Measures:
    """What claims 1 to 3 look at, each [widths, seeds] for each scheme.

    Attributes:
        change: mean over samples of |h_T - h_0| / |h_0|.
        lambda_min: smallest eigenvalue of the Gram matrix of features at T.
        joint: smallest eigenvalue of the Gram matrix of the 2N pre-activations at 0 and T.
        courses: (scheme, width) -> its course.
        steps: [points], the steps of courses.
        limits: measure -> its value for muP at infinite width, as far as computed.
        limit_course: course of muP at infinite width, if computed.
        moved_under_ip: |h_T - h_0| / sqrt(n) under IP at the largest width, mean over samples and seeds.
    """

    change: Measured
    lambda_min: Measured
    joint: Measured
    courses: Mapping[tuple[str, int], Course]
    steps: np.ndarray
    limits: Mapping[str, float]
    limit_course: Course | None
    moved_under_ip: float


@lru_cache(maxsize=2)
def at(run: Run, size: Schemes) -> Measures:
    """The measures of a run; C1, C2 and C3 share them."""
    X, Y = load(size.data)
    # the widest first: what a last core is left with is short
    jobs = [(scheme, width, seed) for width in reversed(size.widths) for scheme in LR for seed in run.seeds]
    made = side_by_side(partial(_network, run, size, X, Y), jobs, run.device)
    networks = dict(zip(run.track(jobs, "networks"), made, strict=True))
    found = {
        (scheme, width): [networks[scheme, width, seed] for seed in run.seeds]
        for width in size.widths
        for scheme in LR
    }
    tables = {
        name: {
            scheme: np.array([[getattr(one, name) for one in found[scheme, w]] for w in size.widths])
            for scheme in LR
        }
        for name in ("change", "lambda_min", "joint")
    }
    courses = {job: Course(*np.stack([one.course for one in same], axis=-1)) for job, same in found.items()}
    limits, limit_course = _limits(run, size, *size.limit, X, Y) if size.limit else ({}, None)
    moved = float(np.mean([one.displacement for one in found["ip", size.widths[-1]]]))
    return Measures(
        **tables,
        courses=courses,
        steps=_points(size),
        limits=limits,
        limit_course=limit_course,
        moved_under_ip=moved,
    )


@dataclass(frozen=True)
class _Network:
    change: float
    displacement: float
    lambda_min: float
    joint: float
    course: np.ndarray  # [3, points]


def _network(run: Run, size: Schemes, X: np.ndarray, Y: np.ndarray, job: tuple[str, int, int]) -> _Network:
    scheme, width, seed = job
    points = set(_points(size).tolist())
    moments = train(
        scheme,
        width,
        X,
        Y,
        depth=size.depth,
        lr=LR[scheme],
        steps=size.steps,
        seed=seed,
        device=run.device,
    )
    kept = [(moment.loss, moment.h[-1], moment.x[-1]) for moment in moments if moment.step in points]
    losses, h, x = zip(*kept, strict=True)
    pre = [features.cpu().numpy() for features in h]
    grams = gram_matrices(torch.stack(x))
    course = [
        losses,
        [change(later, pre[0]) for later in pre],
        [relative_frobenius_change(grams[0], later) for later in grams],
    ]
    return _Network(
        change(pre[-1], pre[0]),
        change(pre[-1], pre[0], relative=False),
        _smallest(grams[-1]),
        _smallest(gram_matrices(torch.cat([h[0], h[-1]]))),
        np.array(course),
    )


def _points(size: Schemes) -> np.ndarray:
    return np.unique([*range(0, size.steps, size.every), size.steps])


def _smallest(K: np.ndarray) -> float:
    """Smallest eigenvalue, or what rounding leaves uncertain if that is larger."""
    return max(lambda_min(K), eigenvalue_floor(K))


def _limits(
    run: Run, size: Schemes, samples: int, replicas: int, tol: float, X: np.ndarray, Y: np.ndarray
) -> tuple[dict[str, float], Course]:
    """The three measures of muP at infinite width, and its course."""
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
        ).fit(X, Y, size.steps, record=("f", "K", "change"), every=size.every)
    K = made.K_post[-1]
    kernel_change = np.array([relative_frobenius_change(K[0], later) for later in K])
    limits = {
        "change": float(made.change[-1][-1]),
        "lambda_min(K)": float(made.min_eig("K_post")[0][-1, -1]),
        "joint lambda_min": float(made.joint_min_eig("pre")[0][-1, -1]),
    }
    return limits, Course(made.loss[:, None], made.change[-1][:, None], kernel_change[:, None])


def slope(name: str, widths: tuple[int, ...], values: np.ndarray) -> Number:
    """Slope of log measure over log width, seed by seed."""
    found = loglog_slope(widths, values.T)
    return Number(name, found.value, found.low, found.high)


def against(measured: Measured, other: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each other scheme's values over those of `other` at the largest width, seed by seed."""
    for name, values in measured.items():
        if name != other:
            yield name, values[-1] / measured[other][-1]


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
