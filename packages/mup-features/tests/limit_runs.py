"""Small runs of the limit, of few shapes so that few programs are compiled, and how to compare runs."""

import jax
import numpy as np
from reference import ETA

from mup_features.jax.limit import InfiniteWidthMLP
from mup_features.jax.width import WidthSimulator

BASE = {"depth": 2, "input_dim": 2, "lr": ETA, "reduction": "sum"}
KEY = jax.random.key(5)


def limit(**options) -> InfiniteWidthMLP:
    """A model of the limit on the data of R1."""
    return InfiniteWidthMLP(**(BASE | {"samples": 512, "replicas": 2, "key": KEY} | options))


def wide(**options) -> WidthSimulator:
    """Networks of width 1e5 with the same batches."""
    return WidthSimulator(100_000, **(BASE | {"replicas": 6, "key": KEY} | options))


def assert_within_errors(run, other, name="f", *, errors=4.0, floor=0.0) -> None:
    """Means agree within that many combined standard errors, and a floor for what these cannot see."""
    bound = errors * np.sqrt(run.stderr(name) ** 2 + other.stderr(name) ** 2) + floor
    gap = np.abs(run.mean(name) - other.mean(name))
    assert (gap <= bound).all(), f"{name}: off by {np.max(gap / bound):.2f} of the bound, gap {gap.max():.2e}"
