"""Claim 4: how far the features of the limit are from linear dependence, and whether that is resolved."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from data_sets import few_digits
from sizes import Diversity

from mup_features import check_independence
from mup_features.jax import InfiniteWidthMLP, Trajectory
from mup_features.jax.precision import float64
from tenfold_tools.claims import Criterion, Number, Run, Verdict

LARGEST_BIAS = 0.5  # by sampling, as a share of lambda_min


@dataclass(frozen=True)
class Found:
    """Of one activation.

    Attributes:
        numbers: for the report.
        criteria: what decides; empty for an activation that is only reported.
        smallest: lambda_min of the last hidden layer's K, [steps + 1, 1].
    """

    numbers: list[Number]
    criteria: list[Criterion]
    smallest: np.ndarray


def measured(run: Run, size: Diversity, activation: str, lr: float, devices: list[Any] | None) -> Found:
    """The limit under one activation."""
    X, Y = few_digits(size.per_class, size.classes)
    made = _limit(run, size, activation, lr, X, Y, devices)
    eigenvalues = {kind: made.min_eig(kind) for kind in ("K_pre", "K_post")}
    report = check_independence(
        made.K_pre,
        made.K_post,
        int(np.linalg.matrix_rank(X)),
        {kind: error for kind, (_, error) in eigenvalues.items()},
    )
    worst = report.smallest
    margin = Number(
        f"smallest lambda_min over its threshold, {activation}", worst.lambda_min / worst.threshold
    )
    spread = made.stderr("f")[-1].max() / np.sqrt((made.f[-1] ** 2).mean())
    numbers = [
        margin,
        Number(f"final loss, {activation}", made.loss[-1]),
        Number(f"largest standard error of f over its size, {activation}", spread),
    ]
    smallest = eigenvalues["K_post"][0]
    if (activation, lr) not in size.judged:
        return Found(numbers, [], smallest[-1][:, None])
    verdict = Verdict.PASS if report.holds else Verdict.FAIL
    if not report.holds and not any(entry.status == "dependent" for entry in report.failures):
        verdict = Verdict.INCONCLUSIVE
    text = f"{activation}: lambda_min > 5 standard errors in every layer at {len(made.steps)} steps"
    coarse = _limit(run, size, activation, lr, X, Y, devices, coarse=True)
    change = coarse.min_eig("K_post")[0][:, -1] / smallest[:, -1] - 1
    bias = Number(f"change of lambda_min by coarser sampling, {activation}", np.abs(change).max())
    criteria = [Criterion(f"{text}; {margin.text(1.0)}", verdict), precise_enough(bias, LARGEST_BIAS)]
    return Found([*numbers, bias], criteria, smallest[-1][:, None])


def _limit(
    run: Run,
    size: Diversity,
    activation: str,
    lr: float,
    X: np.ndarray,
    Y: np.ndarray,
    devices: list | None,
    *,
    coarse: bool = False,
) -> Trajectory:
    with float64(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "the theory asks for an activation", UserWarning
        )  # ReLU is reported
        return InfiniteWidthMLP(
            depth=size.depth,
            activation=activation,
            input_dim=X.shape[1],
            output_dim=Y.shape[1],
            lr=lr,
            samples=size.samples // (2 if coarse else 1),
            replicas=size.replicas // (2 if coarse else 1),
            tol=size.tol,
            devices=devices,
            key=jax.random.key(run.seeds[0]),
        ).fit(X, Y, size.steps, record=("f", "K"), every=size.steps if coarse else 1)


def precise_enough(number: Number, largest: float) -> Criterion:
    """PASS below `largest`; above it the measurement is too coarse for a verdict, which refutes nothing."""
    verdict = Verdict.PASS if number.value < largest else Verdict.INCONCLUSIVE
    return Criterion(f"precise enough: {number.text(largest)} < {largest:g}", verdict)
