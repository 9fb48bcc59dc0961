"""The hard instances as Gymnasium environments (extra "gym"); importing this module registers them.

    import gymnasium, linbandit_lowerbounds.gym
    env = gymnasium.make("LinBanditLB/ScaledHypercube-v0", d=6)
    batch = linbandit_lowerbounds.gym.make_vec("LinBanditLB/ScaledHypercube-v0", 256, d=6)

An episode is one run: theta is drawn at `reset`, every step is a round, and after K rounds the episode is
truncated. Observations show the decision set, so nothing of theta; `info` tells the regret, which a learner
must not see.

    observation   actions Box[A, d], mask MultiBinary[A], sigma Box[1] (absent with show_sigma=False)
    action        Discrete(A), a row whose mask is 1; another one raises ValueError
    reward        the noisy reward r_k
    info          round (rounds finished), regret, and of the round just played: mean, best_mean, group

`group` counts the groups or blocks that share out the coordinates; -1 is a round without choice. After the
last round the observation is all zeros: there is no decision set to show.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from . import checks
from .adversaries import RandomSigma
from .composites import PeelingInstance
from .decision_sets import check_enumerable
from .environment import Adversary, Instance
from .hypercubes import BernoulliHypercube, VarianceScaledHypercube
from .multi_instances import LeastLoadedInstance
from .rounds import REPLAY, Rounds, Shown
from .simulate import adversary_of, match
from .weak import required_dimension

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError(
        'linbandit_lowerbounds.gym needs gymnasium: pip install "linbandit-lowerbounds[gym]"'
    ) from error

# Gymnasium 1.0 knows only this behaviour and has no name for it.
_NEXT_STEP = getattr(getattr(gymnasium.vector, "AutoresetMode", None), "NEXT_STEP", "NextStep")
_PREFIX = "LinBanditLB/"

Observations = dict[str, np.ndarray]


class LinBanditEnv(gymnasium.Env):
    """One run of an instance.

    Args:
        instance: the environment; sign sets may have at most 12 signs, features at most size 1.
        adversary: who chooses sigma_k; None plays the sequence that the instance was built for. Strong
            adversaries need an instance whose decision sets do not depend on sigma_k.
        show_sigma: whether observations hold sigma_k, as in the paper's setting; without, algorithms must
            not need it.

    Raises:
        ValueError: if there is no adversary, it does not suit the instance, or sign sets are too large.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (an instance variable in the base class)

    def __init__(
        self, instance: Instance, adversary: Adversary | None = None, *, show_sigma: bool = True
    ) -> None:
        self._game = _Game(instance, adversary, show_sigma)
        self.observation_space = self._game.space
        self.action_space = spaces.Discrete(instance.max_actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Draws theta and shows the first decision set.

        Args:
            seed: seeds `np_random`, from which this and the following episodes draw their keys.
            options: {"key": a `jax.random.key`} plays run 0 of `simulate` under that key instead.

        Raises:
            ValueError: if options holds anything else.
        """
        super().reset(seed=seed)
        shown = self._game.start(_key_of(options, self.np_random), 1)
        return self._game.observe(shown, 0), {"round": 0, "regret": 0.0}

    def step(self, action: Any) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Plays a row of the decision set.

        Args:
            action: its index.

        Raises:
            ValueError: if it is no index, or its mask is 0.
            gymnasium.error.ResetNeeded: before the first reset and after the last round.
        """
        shown, outcome, info = self._game.play(np.asarray(action)[None])
        told = {name: value[0].item() for name, value in info.items()}
        return self._game.observe(shown, 0), float(outcome[0]), False, shown is None, told


class LinBanditVectorEnv(VectorEnv):
    """Many runs in one compiled batch; all have the same length, so that they are truncated together.

    Autoreset is Gymnasium's "next step": the step after truncation ignores its actions, starts new episodes
    in all runs and has reward 0.

    Args:
        num_envs: number of runs.
        instance: as for `LinBanditEnv`.
        adversary: as for `LinBanditEnv`.
        show_sigma: as for `LinBanditEnv`.

    Raises:
        TypeError: if num_envs is no integer.
        ValueError: if num_envs < 1, or as `LinBanditEnv`.
    """

    metadata = {"render_modes": [], "autoreset_mode": _NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        instance: Instance,
        adversary: Adversary | None = None,
        *,
        show_sigma: bool = True,
    ) -> None:
        self.num_envs = checks.count("num_envs", num_envs)
        self._game = _Game(instance, adversary, show_sigma)
        self.single_observation_space = self._game.space
        self.single_action_space = spaces.Discrete(instance.max_actions)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Draws theta for all runs and shows their first decision sets.

        Args:
            seed: seeds `np_random`, from which this and the following batches of episodes draw one key each.
            options: {"key": a `jax.random.key`} plays the runs of `simulate` under that key instead.

        Raises:
            ValueError: if options holds anything else.
        """
        super().reset(seed=seed)
        return self._reset(_key_of(options, self.np_random))

    def step(self, actions: Any) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Plays a row in each run, or starts new episodes after the last round.

        Args:
            actions: indices, one for each run.

        Raises:
            ValueError: if they are not as many indices, or a mask is 0; nothing has been played then.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        flags = np.zeros(self.num_envs, bool)
        if self._over:
            observations, info = self._reset(_key_of(None, self.np_random))
            return observations, np.zeros(self.num_envs), flags, flags.copy(), info
        shown, outcome, info = self._game.play(np.asarray(actions))
        self._over = shown is None
        told = _with_masks(info, self.num_envs)
        return self._game.observe(shown), outcome, flags, np.full_like(flags, self._over), told

    def _reset(self, key: Key[Array, ""]) -> tuple[Observations, dict[str, Any]]:
        self._over = False
        shown = self._game.start(key, self.num_envs)
        fresh = {"round": np.zeros(self.num_envs, int), "regret": np.zeros(self.num_envs)}
        return self._game.observe(shown), _with_masks(fresh, self.num_envs)


def make_vec(env_id: str, num_envs: int, **settings: Any) -> VectorEnv:
    """A compiled batch of a registered environment.

    Args:
        env_id: for instance "LinBanditLB/Hypercube-v0".
        num_envs: number of runs.
        settings: arguments of the instance, `adversary` and `show_sigma`.

    Returns:
        A `LinBanditVectorEnv`.

    Raises:
        ValueError: if the id is not one of this module.
        TypeError: if the instance does not accept the settings.
    """
    checks.one_of("env_id", env_id, _IDS)
    return gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **settings)


def make_env(
    family: str, *, adversary: Adversary | None = None, show_sigma: bool = True, **settings: Any
) -> LinBanditEnv:
    """Entry point of the single environments.

    Args:
        family: "Hypercube", "Peeling", "ScaledHypercube" or "LeastLoaded".
        adversary: who chooses sigma_k; None takes the instance's own sequence (for LeastLoaded, which has
            none, sigma_k is log-uniform on [0.1, 1]).
        show_sigma: as for `LinBanditEnv`.
        settings: arguments of the instance; see `_FAMILIES` for the defaults.
    """
    return LinBanditEnv(*_participants(family, adversary, settings), show_sigma=show_sigma)


def make_batch(
    family: str,
    num_envs: int,
    *,
    adversary: Adversary | None = None,
    show_sigma: bool = True,
    **settings: Any,
) -> LinBanditVectorEnv:
    """Entry point of the vector environments.

    Args:
        family: as for `make_env`.
        num_envs: number of runs.
        adversary: as for `make_env`.
        show_sigma: as for `LinBanditEnv`.
        settings: as for `make_env`.
    """
    participants = _participants(family, adversary, settings)
    return LinBanditVectorEnv(num_envs, *participants, show_sigma=show_sigma)


def _hypercube(K: int = 1000, d: int = 4, **settings: Any) -> Instance:
    return BernoulliHypercube(K, d, **settings)


def _peeling(sigma: Any = None, d: int = 6, **settings: Any) -> Instance:
    # Three levels of noise, hence three groups of two signs.
    return PeelingInstance(np.tile([1.0, 0.3, 0.1], 333) if sigma is None else sigma, d, **settings)


def _scaled(sigma: Any = None, d: int = 4, **settings: Any) -> Instance:
    return VarianceScaledHypercube(np.ones(1000) if sigma is None else sigma, d, **settings)


def _least_loaded(K: int = 1000, d: int | None = None, eta: float = 0.1, **settings: Any) -> Instance:
    dim = required_dimension(K, eta, "least_loaded") if d is None else d
    return LeastLoadedInstance(K, dim, eta, **settings)


_FAMILIES = {
    "Hypercube": _hypercube,
    "Peeling": _peeling,
    "ScaledHypercube": _scaled,
    "LeastLoaded": _least_loaded,
}
_IDS = tuple(f"{_PREFIX}{family}-v0" for family in _FAMILIES)


def _participants(
    family: str, adversary: Adversary | None, settings: dict[str, Any]
) -> tuple[Instance, Adversary]:
    checks.one_of("family", family, tuple(_FAMILIES))
    instance = _FAMILIES[family](**settings)
    if adversary is None and instance.prefix is None:
        adversary = RandomSigma(0.1, 1.0)
    return instance, adversary_of(instance, adversary)


class _Game:
    """What single and vector environments share: the rounds in progress and what may be seen of them."""

    def __init__(self, instance: Instance, adversary: Adversary | None, show_sigma: bool) -> None:
        if not isinstance(show_sigma, bool):
            raise TypeError(f"show_sigma must be True or False, got {show_sigma!r}")
        self._instance = instance
        self._adversary = adversary_of(instance, adversary)
        check_enumerable(instance.n_signs)
        match(REPLAY, instance, self._adversary, instance.horizon)
        self._show_sigma = show_sigma
        count = instance.max_actions
        shape = (count, len(instance.columns))
        seen: dict[str, spaces.Space] = {
            "actions": spaces.Box(-1.0, 1.0, shape, np.float32),
            "mask": spaces.MultiBinary(count),
        }
        if show_sigma:
            seen["sigma"] = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.space = spaces.Dict(seen)
        self._count = count
        self._rounds: Rounds | None = None
        self._n_runs = 1
        self._shown: Shown | None = None

    def start(self, key: Key[Array, ""], n_runs: int) -> Shown:
        self._n_runs = n_runs
        self._rounds = Rounds(self._instance, self._adversary, key=key, n_seeds=n_runs)
        self._shown = self._rounds.show()
        return self._shown

    def play(
        self, actions: np.ndarray
    ) -> tuple[Shown | None, Float[np.ndarray, " runs"], dict[str, np.ndarray]]:
        """Plays a round: what comes next (None after the last), rewards, and what `info` tells."""
        rounds, shown = self._rounds, self._shown
        if rounds is None or shown is None:
            raise gymnasium.error.ResetNeeded("step needs a reset before the first and after the last round")
        self._check(actions, shown)
        outcome = rounds.play(actions.astype(np.int32))
        self._shown = rounds.show() if rounds.k < self._instance.horizon else None
        info = {
            "round": np.full(self._n_runs, rounds.k),
            "regret": np.asarray(rounds.carry.regret.total, np.float64),
            "mean": outcome.mean.astype(np.float64),
            "best_mean": outcome.best_mean.astype(np.float64),
            "group": shown.group.astype(int),
        }
        return self._shown, outcome.reward.astype(np.float64), info

    def observe(self, shown: Shown | None, run: int | None = None) -> Observations:
        """The observation of one run, or of all."""
        n_runs, where = (self._n_runs, slice(None)) if run is None else (1, run)
        if shown is None or self._rounds is None:
            empty = {
                name: np.zeros((n_runs, *_shape(space)), space.dtype) for name, space in self.space.items()
            }
            return {name: array[where] for name, array in empty.items()}
        seen = {
            "actions": self._rounds.dense(shown)[where].astype(np.float32),
            "mask": shown.mask[where].astype(np.int8),
        }
        if self._show_sigma:
            seen["sigma"] = shown.sigma[..., None][where].astype(np.float32)
        return seen

    def _check(self, actions: np.ndarray, shown: Shown) -> None:
        count, k = self._count, self._rounds.k if self._rounds is not None else 0
        if actions.shape != (self._n_runs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"action must be an integer for each of {self._n_runs} runs, got shape {actions.shape} of "
                f"{actions.dtype} in round {k} (from 0)"
            )
        for illegal, rule in (
            (lambda: (actions < 0) | (actions >= count), f"in [0, {count})"),
            (lambda: ~shown.mask[np.arange(actions.size), actions], "one whose mask is 1"),
        ):
            found = np.flatnonzero(illegal())
            if found.size:
                run = int(found[0])
                raise ValueError(
                    f"action must be {rule}, got {actions[run]} in round {k} (from 0), run {run}"
                )


def _shape(space: spaces.Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def _key_of(options: dict[str, Any] | None, generator: np.random.Generator) -> Key[Array, ""]:
    unknown = set(options or {}) - {"key"}
    if unknown:
        raise ValueError(f'options may hold "key" only, got {sorted(unknown)}')
    drawn = int(generator.integers(2**31))
    return options["key"] if options else jax.random.key(drawn)


def _with_masks(info: dict[str, np.ndarray], n_runs: int) -> dict[str, np.ndarray]:
    """Gymnasium's form for batches: every entry has a mask of the runs it holds for, here all."""
    return info | {f"_{name}": np.ones(n_runs, bool) for name in info}


for _family, _id in zip(_FAMILIES, _IDS, strict=True):
    if _id not in gymnasium.registry:
        gymnasium.register(
            _id,
            entry_point=f"{__name__}:make_env",
            vector_entry_point=f"{__name__}:make_batch",
            kwargs={"family": _family},
        )
