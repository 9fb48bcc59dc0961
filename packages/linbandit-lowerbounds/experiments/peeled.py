"""The sequences of C2, and what each bound of the peeling argument says about them.

Instances are centred (the known part of rewards is subtracted), so that d is exactly the number of signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import zoo
from stage import Stage

from linbandit_lowerbounds.bounds import prefixed_bound
from linbandit_lowerbounds.composites import PeelingInstance

KINDS = ("theorem", "eq42_sharp", "lemma_sum", "tight_sum")
Shape = Literal["constant", "log-uniform", "3-level"]


@dataclass(frozen=True)
class Row:
    """One sequence: its shape, rounds, dimension and how it is shared out, runs, learners."""

    shape: Shape
    K: int
    d: int
    runs: int
    learners: tuple[str, ...]
    dims: Literal["occupied", "equal"] = "occupied"

    @property
    def label(self) -> str:
        """For numbers and figures."""
        return f"{self.shape}, d {self.d}, K {self.K}"

    @property
    def sigma(self) -> np.ndarray:
        """Log-uniform on [1e-3, 1], or 1, 0.1 and 0.01 for a third of the rounds each, or 1."""
        if self.shape == "log-uniform":
            return np.exp(np.random.default_rng(200).uniform(np.log(1e-3), 0.0, self.K))
        if self.shape == "3-level":
            return np.resize(np.repeat([1.0, 0.1, 0.01], -(-self.K // 3)), self.K)
        return np.ones(self.K)


ROWS = {
    "quick": (Row("log-uniform", 4096, 26, 256, ("posterior signs",)),),
    "laptop": (
        Row("constant", 2**14, 30, 128, zoo.LINEAR),
        Row("log-uniform", 2**14, 30, 256, zoo.LINEAR),
        Row("3-level", 2**14, 45, 256, zoo.LINEAR),
        Row("constant", 2**15, 8, 256, ("greedy", "posterior signs", "Bayes-UCB")),
    ),
    "full": (Row("constant", 2**20, 24, 1024, ("posterior signs",), "equal"),),
}


def bounds(row: Row) -> dict[str, float]:
    """Every bound of the peeling argument, 0 where a condition fails."""
    return {kind: prefixed_bound(row.sigma, row.d, dims=row.dims, kind=kind).value for kind in KINDS}


def regret(on: Stage, row: Row, name: str) -> np.ndarray:
    """Regret of a learner in every run."""
    instance = PeelingInstance(row.sigma, row.d, row.dims, bias="centered")
    return on.play(zoo.learner(name), instance, runs=row.runs).regret
