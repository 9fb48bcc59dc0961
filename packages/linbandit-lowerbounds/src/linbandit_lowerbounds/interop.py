"""Learners written elsewhere: objects with `act` and `update`, and mabwiser's bandits.

    from_object(cls, **settings)                  played by `play_object`, a plain Python loop
    from_object(cls, callback=True, **settings)   an `Algorithm` for `simulate`, which calls back to Python
    from_mabwiser(bandit)                         mabwiser's policies, through the same loop

The object protocol is in `objects`. Both ways meet the theta, decision sets and noise that every learner
meets under the same key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Float

from . import checks
from .environment import Algorithm
from .object_callback import embed
from .object_loop import play_object
from .objects import ObjectLearner

__all__ = ["ObjectLearner", "from_mabwiser", "from_object", "play_object"]

Context = Literal["action", "all", "shared"]


@overload
def from_object(
    cls: Callable[..., Any], /, callback: Literal[False] = False, **settings: Any
) -> ObjectLearner: ...
@overload
def from_object(cls: Callable[..., Any], /, callback: Literal[True], **settings: Any) -> Algorithm: ...


def from_object(
    cls: Callable[..., Any], /, callback: bool = False, **settings: Any
) -> ObjectLearner | Algorithm:
    """A learner from a Python class with `act(actions, sigma=None)` and `update(x, reward, sigma=None)`.

    Every run has its own object. Required parameters of the constructor named `d` (columns of `actions`), `K`
    (rounds) and, for `needs_sigma = "upfront"`, `sigma` (the sequence) are filled in by the run unless the
    settings give them, so that one class can be certified on instances of several sizes.

    Args:
        cls: the class, or a function that returns a new object. Its attribute `needs_sigma` ("never" without
            one) declares when the objects are told sigma_k.
        callback: False gives a learner for `play_object`, which says "Python loop" in results. True gives an
            `Algorithm` for `simulate` that calls the objects from the compiled program, for mixed runs: no
            faster, one device, see `object_callback`.
        settings: keyword arguments of the constructor.

    Returns:
        An `ObjectLearner`, or an `Algorithm` with callback=True.

    Raises:
        TypeError: if `cls` is no class or function, lacks a method, or does not accept the settings.
        ValueError: if its `needs_sigma` is unknown.
    """
    if not isinstance(callback, bool):
        raise TypeError(f"callback must be True or False, got {callback!r}")
    name = getattr(cls, "__name__", type(cls).__name__)
    described = ", ".join(
        f"{key} {value}" for key, value in settings.items() if isinstance(value, int | float | str)
    )
    name = f"{name} ({described})" if described else name
    if callback:
        return embed(ObjectLearner.of(cls, settings, name))
    return ObjectLearner.of(cls, settings, f"{name} [Python loop]")


def from_mabwiser(bandit: Any, context: Context = "action") -> ObjectLearner:
    """A learner from mabwiser's settings; every run plays a new, untrained bandit with its own seed.

    mabwiser's contextual policies keep one ridge model for each arm, none that the arms share. So an arm must
    be given a meaning, and a context:

        "action"  arm i is the i-th playable row and its context that row's features: the disjoint LinUCB of
                  Li et al. 2010. With sets that change, arm i learns from whatever stood in row i.
        "all"     arm i is the i-th playable row and its context all rows, one after the other. Every round
                  must have the same number of playable rows.
        "shared"  a single arm, asked about each row in turn: one ridge model for all actions, which is
                  LinUCB as `linucb` plays it. (LinTS draws a parameter and LinGreedy a coin for each row.)

    Policies without context (UCB1, EpsilonGreedy, ...) learn arm i, whatever `context` says.

    Args:
        bandit: a `mabwiser.mab.MAB`. Its learning policy, n_jobs and backend are used; its arms are not:
            there are as many as rows.
        context: see above.

    Returns:
        A learner for `play_object`; its `needs_sigma` is "never".

    Raises:
        ImportError: if mabwiser is not installed.
        TypeError: if `bandit` is no MAB.
        ValueError: if `context` is unknown, or the bandit has a neighborhood policy.
    """
    MAB = _mab()
    if not isinstance(bandit, MAB):
        raise TypeError(f"bandit must be a mabwiser.mab.MAB, got {type(bandit).__name__}")
    checks.one_of("context", context, ("action", "all", "shared"))
    if bandit.neighborhood_policy is not None:
        raise ValueError(
            "bandit must have no neighborhood policy, which cannot choose before it has seen data; got "
            f"{type(bandit.neighborhood_policy).__name__}"
        )
    policy = bandit.learning_policy
    how = f", {context}" if bandit.is_contextual else ""
    name = f"mabwiser {type(policy).__name__.lstrip('_')}{how} [Python loop]"

    def make() -> _Mabwiser:
        return _Mabwiser(policy, bandit.n_jobs, bandit.backend, context if bandit.is_contextual else None)

    return ObjectLearner.of(make, {}, name)


class _Mabwiser:
    """One run of a mabwiser bandit in the object protocol."""

    def __init__(self, policy: Any, n_jobs: int, backend: str | None, context: Context | None) -> None:
        self._settings = {"learning_policy": policy, "n_jobs": n_jobs, "backend": backend}
        self._context = context
        self._seed = 0
        self._bandit: Any = None
        self._last: tuple[list[int], Float[np.ndarray, "1 n"] | None] = ([], None)

    def reset(self, seed: int) -> None:
        """Remembers the seed; the bandit starts with the first round, when its arms are known."""
        self._seed = seed

    def act(self, actions: Float[np.ndarray, "A d"]) -> int:
        """The row with the largest expectation, as mabwiser calls its index."""
        arms = 1 if self._context == "shared" else len(actions)
        contexts = self._contexts(actions)
        self._grow(arms, contexts)
        if contexts is None:
            found = self._bandit.predict_expectations()
            values = [found[arm] for arm in range(arms)]
        else:
            found = self._bandit.predict_expectations(contexts)
            found = found if isinstance(found, list) else [found]
            # "action": arm i is asked about row i; "all": every arm about the only context.
            values = [found[min(i, len(found) - 1)][min(i, arms - 1)] for i in range(len(actions))]
        index = int(np.argmax(values))
        chosen = None if contexts is None else contexts[[min(index, len(contexts) - 1)]]
        self._last = ([min(index, arms - 1)], chosen)
        return index

    def update(self, x: Float[np.ndarray, " d"], reward: float) -> None:
        """One observation for the arm that was played."""
        arm, context = self._last
        self._bandit.partial_fit(arm, [reward], context)

    def _contexts(self, actions: Float[np.ndarray, "A d"]) -> Float[np.ndarray, "n m"] | None:
        if self._context is None:
            return None
        return actions.reshape(1, -1) if self._context == "all" else actions

    def _grow(self, arms: int, contexts: Float[np.ndarray, "n m"] | None) -> None:
        if self._bandit is None:
            self._bandit = _mab()(list(range(arms)), seed=self._seed, **self._settings)
            # An empty history: every arm starts from its prior, none has to be played blindly.
            self._bandit.fit([], [], None if contexts is None else contexts[:0])
        for arm in range(len(self._bandit.arms), arms):
            self._bandit.add_arm(arm)


def _mab() -> Any:
    try:
        from mabwiser.mab import MAB  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("from_mabwiser needs mabwiser: pip install mabwiser") from error
    return MAB
