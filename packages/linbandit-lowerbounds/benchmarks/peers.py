"""The same game played by others: a loop of predict, reward, update over given contexts, one run at a time.

A contender is a function without arguments that plays `rounds` rounds. Contexts and noise are drawn before,
outside the timing. mabwiser, contextualbandits and Vowpal Wabbit do not have the linear bandit with one
shared parameter; what they play instead at the same (d, A) is said with each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Contender(NamedTuple):
    """Somebody's loop.

    Args:
        play: plays all rounds.
        work: rounds of one call.
        note: what it plays.
    """

    play: Callable[[], object]
    work: int
    note: str


class Game(NamedTuple):
    """Contexts, noise and parameter of one run."""

    actions: np.ndarray
    noise: np.ndarray
    theta: np.ndarray


def draw(d: int, A: int, rounds: int) -> Game:
    """A run with unit actions, unit parameter and standard normal noise."""
    generator = np.random.default_rng(0)
    actions = generator.normal(size=(rounds, A, d))
    actions /= np.linalg.norm(actions, axis=-1, keepdims=True)
    theta = generator.normal(size=d)
    return Game(actions, generator.normal(size=rounds), theta / np.linalg.norm(theta))


def peers(d: int, A: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders by name, and those that are not there with the reason."""
    found: dict[str, Contender] = {"NumPy loop, OFUL": Contender(*numpy_oful(draw(d, A, 400)))}
    absent: dict[str, str] = {}
    for name, make, rounds in (
        ("mabwiser LinUCB", mabwiser, 60),
        ("contextualbandits LinUCB", contextualbandits, 40),
        ("Vowpal Wabbit RegCB-opt", vowpal_wabbit, 200),
    ):
        try:
            found[name] = Contender(*make(draw(d, A, rounds)))
        except ImportError as error:
            absent[name] = f"not installed: {error}"
    return found, absent


def numpy_oful(game: Game) -> tuple[Callable[[], object], int, str]:
    """OFUL by rank-one updates, vectorised over the actions: the best plain loop we know."""
    rounds, _, d = game.actions.shape

    def play() -> float:
        inverse, response, log_det, regret = np.eye(d), np.zeros(d), 0.0, 0.0
        for k in range(rounds):
            actions = game.actions[k]
            means = actions @ (inverse @ response)
            norms = np.sqrt(np.einsum("ai,ai->a", actions @ inverse, actions))
            beta = np.sqrt(log_det + 2.0 * np.log(100.0)) + 1.0
            x = actions[np.argmax(means + beta * norms)]
            values = actions @ game.theta
            mean = x @ game.theta
            regret += values.max() - mean
            direction = inverse @ x
            growth = x @ direction
            inverse -= np.outer(direction, direction) / (1.0 + growth)
            response += (mean + game.noise[k]) * x
            log_det += np.log1p(growth)
        return regret

    return play, rounds, "the same algorithm, rank-one updates"


def mabwiser(game: Game) -> tuple[Callable[[], object], int, str]:
    """LinUCB of mabwiser: A independent models of one context of d features."""
    from mabwiser.mab import MAB, LearningPolicy

    rounds, A, d = game.actions.shape
    arms = list(range(A))
    theta = np.random.default_rng(1).normal(size=(A, d)) / np.sqrt(d)

    def play() -> MAB:
        bandit = MAB(arms, LearningPolicy.LinUCB(alpha=1.0, l2_lambda=1.0))
        context = game.actions[:, 0]
        bandit.fit([0], [0.0], context[:1])
        for k in range(rounds):
            arm = bandit.predict(context[k : k + 1])
            reward = theta[arm] @ context[k] + game.noise[k]
            bandit.partial_fit([arm], [reward], context[k : k + 1])
        return bandit

    return play, rounds, "disjoint models, one context"


def contextualbandits(game: Game) -> tuple[Callable[[], object], int, str]:
    """LinUCB of contextualbandits: A independent models of one context of d features."""
    from contextualbandits.online import LinUCB

    rounds, A, d = game.actions.shape
    theta = np.random.default_rng(1).normal(size=(A, d)) / np.sqrt(d)

    def play() -> LinUCB:
        context = game.actions[:, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bandit = LinUCB(nchoices=A, alpha=1.0, random_state=1, njobs=1)
            for k in range(rounds):
                arm = int(bandit.predict(context[k : k + 1])[0])
                reward = np.array([theta[arm] @ context[k] + game.noise[k]])
                bandit.partial_fit(context[k : k + 1], np.array([arm]), reward)
        return bandit

    return play, rounds, "disjoint models, one context"


def vowpal_wabbit(game: Game) -> tuple[Callable[[], object], int, str]:
    """Optimistic RegCB of Vowpal Wabbit: action-dependent features, a shared model, online gradient steps."""
    import vowpalwabbit

    rounds = game.actions.shape[0]
    lines = [
        [" ".join(f"{j}:{value:.6f}" for j, value in enumerate(action)) for action in offered]
        for offered in game.actions
    ]

    def play() -> object:
        options = "--cb_explore_adf --regcbopt --noconstant --quiet"
        bandit = vowpalwabbit.Workspace(options, enable_logging=False)
        for k in range(rounds):
            examples = [f"| {line}" for line in lines[k]]
            chances = bandit.predict(examples)
            arm = int(np.argmax(chances))
            cost = -(game.actions[k, arm] @ game.theta + game.noise[k])
            examples[arm] = f"{arm}:{cost:.6f}:{chances[arm]:.6f} {examples[arm]}"
            bandit.learn(examples)
        bandit.finish()
        return bandit

    return play, rounds, "shared model, gradient steps"
