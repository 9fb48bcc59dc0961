"""Claim 5: training under muP to a global minimum, with a certificate at every step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from data_sets import load
from networks import Moment, gram_matrices, side_by_side, train
from sizes import Minimum

from mup_features import global_min_certificate
from tenfold_tools.claims import Run

LR = 4.0


class Descent(NamedTuple):
    """Loss, and the certificate's bound over it (inf where it can certify nothing), each [T, seeds]."""

    loss: np.ndarray
    slack: np.ndarray


def descend(run: Run, size: Minimum) -> dict[int, Descent]:
    """Every step of every seed, for each width."""
    X, Y = load(size.data)

    def steps_of(job: tuple[int, int]) -> np.ndarray:
        width, seed = job
        moments = train(
            "mup", width, X, Y, depth=size.depth, lr=LR, steps=size.steps, seed=seed, device=run.device
        )
        return np.array([(moment.loss, _slack(moment)) for moment in moments])

    # the widest first: what a last core is left with is short
    jobs = [(width, seed) for width in reversed(size.widths) for seed in run.seeds]
    results = side_by_side(steps_of, jobs, run.device)
    made = dict(zip(run.track(jobs, "networks"), results, strict=True))
    return {
        width: Descent(*np.stack([made[width, seed] for seed in run.seeds], axis=-1).swapaxes(0, 1))
        for width in size.widths
    }


def _slack(moment: Moment) -> float:
    made = global_min_certificate(
        gram_matrices(moment.x[-1]), moment.chi.cpu().numpy(), "mean", moment.readout_grad_sq
    )
    return made.bound / made.value if made.certifiable else np.inf
