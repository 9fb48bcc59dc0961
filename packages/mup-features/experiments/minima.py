"""Claim 5: training under muP to a global minimum, with a certificate at every step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from data_sets import load
from networks import Moment, side_by_side, train
from sizes import Minimum

from mup_features import global_min_certificate
from mup_features.spectra import gram
from tenfold_tools.claims import Run

LR = 4.0


class Descent(NamedTuple):
    """Loss, and the certificate's bound over it (inf where it can certify nothing), each [T, seeds]."""

    loss: np.ndarray
    slack: np.ndarray


def descend(run: Run, size: Minimum, width: int) -> Descent:
    """Every step of every seed."""
    X, Y = load(size.data)
    loss, slack = [], []
    for group in side_by_side(run.seeds, width, size.depth):
        moments = train(
            "mup",
            width,
            X,
            Y,
            depth=size.depth,
            lr=LR,
            steps=size.steps,
            seeds=group,
            device=run.device,
        )
        found = [
            (moment.loss.cpu().numpy(), _slack(moment, Y)) for moment in run.track(moments, f"width {width}")
        ]
        loss.append(np.stack([one for one, _ in found]))
        slack.append(np.stack([one for _, one in found]))
    return Descent(np.concatenate(loss, axis=1), np.concatenate(slack, axis=1))


def _slack(moment: Moment, Y: np.ndarray) -> np.ndarray:
    found = []
    for seed in range(len(moment.f)):
        K = gram(moment.x[-1][seed].cpu().numpy())
        chi = (moment.f[seed].cpu().numpy() - Y) / len(Y)
        made = global_min_certificate(K, chi, "mean", float(moment.readout_grad_sq[seed]))
        found.append(made.bound / made.value if made.certifiable else np.inf)
    return np.array(found)
