"""Choosers of sigma_k: fixed sequences, weak and strong adversaries (He and Gu 2025, Sections 4 and 5)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import checks
from .environment import Adversary, Observation, register


@register(arrays=("sigma",))
class Prefixed(Adversary):
    """A sequence that is fixed before the first round (Section 4).

    Args:
        sigma: standard deviations in [0, 1], one for each round.

    Raises:
        TypeError: if sigma is not numeric.
        ValueError: if it is not of shape (K,) with K >= 2 or leaves [0, 1].
    """

    sees = "nothing"

    def __init__(self, sigma: Any) -> None:
        self.sigma = jnp.asarray(checks.sigmas("sigma", sigma), float)

    def choose(self, state: Any, observation: Observation, draw: Any) -> Float[Array, ""]:
        """The k-th entry."""
        return self.sigma[observation.k]
