"""Learners that are stateful Python objects: how one is made for each run, and how its answers are checked.

The object protocol, for NumPy or scikit-learn style code:

    act(actions: ndarray[A, d], sigma=None) -> int      index of the row to play
    update(x: ndarray[d], reward: float, sigma=None)    the chosen row and its noisy reward
    reset(seed: int)                                    optional: called once before round 0; seed < 2^32
    needs_sigma = "never"                               optional class attribute, as in `Algorithm`

Only rows that may be played are shown, so that no mask is needed, in float64. `sigma` is passed only at the
time that `needs_sigma` declares; an object that never needs it may leave the argument out of its methods.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from .decision_sets import DecisionSet, SignSet
from .environment import AnySet, SigmaTime


@dataclasses.dataclass(frozen=True)
class ObjectLearner:
    """What `play_object` plays: makes one object for each run.

    Args:
        make: a class, or a function that returns a new object.
        settings: keyword arguments of every call of `make`.
        needs_sigma: when the objects are told sigma_k, as in `Algorithm`.
        name: how results and plots call it.
        filled: parameters of `make` that a run fills in: "d" (columns of `actions`), "K" (rounds) and
            "sigma" (the sequence, for `needs_sigma = "upfront"`).
    """

    make: Callable[..., Any]
    settings: Mapping[str, Any]
    needs_sigma: SigmaTime
    name: str
    filled: tuple[str, ...] = ()

    @classmethod
    def of(cls, make: Callable[..., Any], settings: Mapping[str, Any], name: str) -> ObjectLearner:
        """Checks what can be checked before the first object exists.

        Args:
            make: a class, or a function that returns a new object.
            settings: keyword arguments for it.
            name: how results and plots call it.

        Raises:
            TypeError: if `make` is an object instead of its class, lacks `act` or `update`, or does not
                accept the settings.
            ValueError: if its `needs_sigma` is unknown, or "upfront" without a parameter `sigma`.
        """
        if not callable(make):
            raise TypeError(
                "cls must be a class or a function that returns a new learner, because every run has its "
                f"own; got an object of type {type(make).__name__}"
            )
        if isinstance(make, type):
            missing = [method for method in ("act", "update") if not callable(getattr(make, method, None))]
            if missing:
                raise TypeError(
                    f"cls must have the methods act and update, {make.__name__} lacks {missing[0]}"
                )
        time = getattr(make, "needs_sigma", "never")
        if time not in ("never", "after", "before", "upfront"):
            raise ValueError(f'needs_sigma must be "never", "after", "before" or "upfront", got {time!r}')
        filled = _filled(make, settings)
        if time == "upfront" and "sigma" not in filled:
            raise ValueError(
                f'needs_sigma="upfront" hands the sequence to a required parameter sigma, {name} has none'
            )
        if time != "upfront" and "sigma" in filled:
            raise TypeError(f'sigma must be given unless needs_sigma is "upfront", {name} declares {time!r}')
        return cls(make, dict(settings), time, name, filled)

    def new(
        self, run: int, *, d: int, K: int, sigma: Float[np.ndarray, " K"] | None, seed: int
    ) -> ObjectPlayer:
        """A fresh object for one run.

        Args:
            run: number of the run, for messages.
            d: columns of `actions`.
            K: number of rounds.
            sigma: the sequence, for objects that need it upfront.
            seed: for the object's own randomness.

        Raises:
            RuntimeError: if the object cannot be made or reset.
        """
        known = {"d": d, "K": K, "sigma": sigma}
        try:
            made = self.make(**self.settings, **{name: known[name] for name in self.filled})
            reset = getattr(made, "reset", None)
            if reset is not None:
                reset(seed)
        except Exception as error:
            raise RuntimeError(f"{self.name} cannot be made for run {run}: {_said(error)}") from error
        return ObjectPlayer(made, self.name, run, self.needs_sigma)


class ObjectPlayer:
    """One object in one run; its answers are checked and its exceptions say where they happened.

    Args:
        learner: the object.
        name: its name in messages.
        run: number of the run.
        needs_sigma: when it is told sigma_k.
    """

    def __init__(self, learner: Any, name: str, run: int, needs_sigma: SigmaTime) -> None:
        self._learner = learner
        self._name = name
        self._run = run
        self._needs_sigma = needs_sigma

    def choose(self, k: int, actions: Float[np.ndarray, "A d"], sigma: float) -> int:
        """The row that the object plays.

        Args:
            k: the round, from 0.
            actions: the rows that may be played.
            sigma: the standard deviation of the round.

        Raises:
            RuntimeError: if the object raises.
            TypeError: if its answer is no integer.
            ValueError: if its answer is no row.
        """
        told = {"sigma": sigma} if self._needs_sigma in ("before", "upfront") else {}
        try:
            answer = self._learner.act(actions.copy(), **told)
        except Exception as error:
            raise RuntimeError(f"{self._name}.act failed {self._where(k)}: {_said(error)}") from error
        try:
            if isinstance(answer, bool | np.bool_):
                raise TypeError
            index = operator.index(answer)
        except TypeError:
            raise TypeError(
                f"{self._name}.act must return the integer index of a row, got {answer!r} {self._where(k)}"
            ) from None
        if not 0 <= index < len(actions):
            raise ValueError(
                f"{self._name}.act must return an index in [0, {len(actions)}), the rows that may be played, "
                f"got {index} {self._where(k)}"
            )
        return index

    def learn(self, k: int, x: Float[np.ndarray, " d"], reward: float, sigma: float) -> None:
        """Hands the object the outcome of a round.

        Args:
            k: the round, from 0.
            x: features of the chosen row.
            reward: the noisy reward.
            sigma: the standard deviation of the round.

        Raises:
            RuntimeError: if the object raises.
        """
        told = {} if self._needs_sigma == "never" else {"sigma": sigma}
        try:
            self._learner.update(x.copy(), reward, **told)
        except Exception as error:
            raise RuntimeError(f"{self._name}.update failed {self._where(k)}: {_said(error)}") from error

    def _where(self, k: int) -> str:
        return f"in round {k} (from 0) of run {self._run}"


def object_seed(key: Key[Array, ""]) -> UInt32[Array, ""]:
    """The seed for `reset`: below 2^32, which NumPy's older generators require.

    Args:
        key: the key of a run's learner.
    """
    return jax.random.bits(key, dtype=jnp.uint32)


def playable(offered: AnySet) -> DecisionSet:
    """The decision set as a list whose mask leaves out the twins that padded signs make.

    Padded signs of a `SignSet` do not change an action: of such twins the mask keeps the first. A set without
    any active sign is its row 0. (In a round without noise all rows of a scaled hypercube are zero; they
    stay, so that every round of the instance has as many.)

    Args:
        offered: any decision set.

    Raises:
        ValueError: if a sign set is too large to be listed.
    """
    listed = offered.enumerate()
    mask = listed.mask
    if isinstance(offered, SignSet):
        bits = (jnp.arange(mask.shape[0])[:, None] >> jnp.arange(offered.n_signs)) & 1
        mask = mask & ~((bits == 1) & ~offered.active).any(-1)
        mask = mask.at[0].set(mask[0] | ~mask.any())
    return dataclasses.replace(listed, mask=mask)


def rows_of(
    actions: Float[np.ndarray, "A b"],
    block: int,
    n_blocks: int,
    columns: np.ndarray | None,
) -> Float[np.ndarray, "A d"]:
    """Features inside a block as an object sees them: all real coordinates of the problem, float64.

    Args:
        actions: features inside the block.
        block: the block.
        n_blocks: number of blocks.
        columns: columns of the dense view that are no padding; None keeps all.
    """
    count, width = actions.shape
    if n_blocks == 1:
        rows = actions.astype(np.float64)
    else:
        rows = np.zeros((count, n_blocks * width))
        rows[:, block * width : (block + 1) * width] = actions
    return rows if columns is None else rows[:, columns]


def _filled(make: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Required parameters that the run knows; everything else must be in the settings."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # built-in callables have none
        return ()
    missing = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in settings
    }
    filled = tuple(sorted(missing & {"d", "K", "sigma"}))
    signature.bind(**settings, **dict.fromkeys(filled))
    return filled


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
