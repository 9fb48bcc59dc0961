"""The runs of C4: learners on the variance-scaled hypercube at the two best gaps, over LB_seq."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zoo
from sizes import Tight
from stage import SELECTION, VERDICT, Stage

from linbandit_lowerbounds.bounds import prefixed_bound
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.scaled_bound import END_GAP, SEQ_GAP


@dataclass(frozen=True)
class Job:
    """A dimension, a scaled gap x = gap sqrt(S) and a learner."""

    d: int
    x: float
    learner: str

    @property
    def label(self) -> str:
        """For numbers and figures."""
        return f"{self.learner}, d {self.d}, x {self.x:.3g}"


@dataclass(frozen=True)
class Played:
    """Regret of the judged runs, mean regret of those that choose the best learner, and LB_seq."""

    regret: np.ndarray
    selecting: float
    bound: float


def log_uniform(on: Stage, K: int) -> np.ndarray:
    """K standard deviations, log-uniform in [0.05, 1]."""
    return np.exp(on.generator().uniform(math.log(0.05), 0.0, K))


def jobs(size: Tight) -> list[Job]:
    """Every learner in every dimension that it can play, at the gaps that are best for LB_end and LB_seq."""
    return [
        Job(d, x, name)
        for d in size.dims
        for x in (END_GAP, SEQ_GAP)
        for name, most in size.learners.items()
        if d <= most
    ]


def play(on: Stage, job: Job, sigma: np.ndarray, size: Tight) -> Played:
    """The judged runs, in batches, and the selecting ones."""
    gap = job.x / math.sqrt(float(sigma @ sigma))
    instance, algorithm = VarianceScaledHypercube(sigma, job.d, gap), zoo.learner(job.learner)
    streams = [VERDICT, *range(SELECTION + 1, SELECTION + size.batches)]
    judged = [on.play(algorithm, instance, runs=size.runs, stream=stream).regret for stream in streams]
    selecting = on.play(algorithm, instance, runs=size.runs, stream=SELECTION).regret.mean()
    bound = prefixed_bound(sigma, job.d, kind="scaled_seq", delta=gap).value
    return Played(np.concatenate(judged), float(selecting), bound)


def best_learners(found: Mapping[Job, Played]) -> list[Job]:
    """For each dimension and gap the learner with the least regret in the selecting runs."""
    groups: dict[tuple[int, float], list[Job]] = {}
    for job in found:
        groups.setdefault((job.d, job.x), []).append(job)
    return [min(group, key=lambda job: found[job].selecting) for group in groups.values()]


def configurations(found: Mapping[Job, Played], best: list[Job], sigma: np.ndarray) -> list[dict[str, Any]]:
    """Every setting that was played, and which learner was chosen as the best."""
    S = float(sigma @ sigma)
    return [
        asdict(job) | {"K": sigma.size, "S": S, "runs": played.regret.size, "best": job in best}
        for job, played in found.items()
    ]
