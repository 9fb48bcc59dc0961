"""The parts of C8: a fixed decision set, and the learners that meet the same variances in context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zoo
from sizes import Strong
from stage import Stage

from linbandit_lowerbounds.algorithms.explorers import span_explorer
from linbandit_lowerbounds.environment import Algorithm
from linbandit_lowerbounds.results import Result
from tenfold_tools.claims import Number


def fixed_set(on: Stage, actions: int, d: int) -> np.ndarray:
    """Random unit vectors, which span R^d."""
    rows = on.generator().normal(size=(actions, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def learner(name: str) -> Algorithm:
    """The span explorer itself, or a learner of the zoo."""
    return span_explorer() if name == "span explorer" else zoo.learner(name)


def audits(name: str, result: Result, size: Strong) -> Iterator[tuple[Number, float, float]]:
    """What must hold in every run: numbers with the range that they must lie in."""
    off = np.abs(result.variance_sum + result.rounds_stopped - size.K).max()
    yield Number(f"largest regret, {name}", float(result.regret.max())), 0.0, 2.0 * size.d
    yield Number(f"smallest S / K, {name}", float(result.variance_sum.min()) / size.K), 0.5, 1.0
    yield Number(f"most quiet rounds, {name}", int(result.rounds_stopped.max())), 0.0, size.d
    yield Number(f"largest |S + quiet rounds - K|, {name}", float(off)), 0.0, 1e-9 * size.K
