"""The protocol of a round: decision set, choice, reward, and who may see what.

Round k of a heteroscedastic linear bandit (He and Gu 2025, Section 3):

    1. the adversary picks the standard deviation sigma_k, from past rounds only (weak) or after the decision
       set as well (strong), and never from the hidden parameter theta;
    2. the instance shows the decision set D_k;
    3. the learner chooses x_k in D_k and sees r_k = <theta, x_k> + eps_k with Var(eps_k) <= sigma_k^2;
    4. the regret grows by max_{x in D_k} <theta, x> - <theta, x_k>.

What a participant may see is decided by what it is handed, not by trust: adversaries get an `Observation` and
`Transition`s, which hold no theta; a learner gets sigma only at the time it declares in `needs_sigma`.

Features live in blocks: an action of block m has zeros outside the `block_dim` coordinates of that block.
Learners that keep one Gram matrix per block are then exact and cost nothing for the other blocks; with a
single block this is an ordinary linear bandit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from .decision_sets import Choice, DecisionSet, SignSet

Class = TypeVar("Class", bound=type)
AnySet = DecisionSet | SignSet
SigmaTime = Literal["never", "after", "before", "upfront"]
Sees = Literal["nothing", "history", "decision_set"]


class Reward(NamedTuple):
    """What a choice brings.

    Args:
        reward: the noisy reward r_k, all that the learner sees.
        mean: <theta, x_k>.
        best_mean: max over the decision set of <theta, x>; regret grows by best_mean - mean.
    """

    reward: Float[Array, ""]
    mean: Float[Array, ""]
    best_mean: Float[Array, ""]


class Observation(NamedTuple):
    """What an adversary sees when it chooses sigma_k; there is no theta in it.

    Args:
        k: the round, from 0.
        variance_sum: sum of sigma_j^2 over the rounds before.
        decision_set: D_k for adversaries with `sees = "decision_set"`, else None.
    """

    k: Int[Array, ""]
    variance_sum: Float[Array, ""]
    decision_set: AnySet | None


class Transition(NamedTuple):
    """A finished round as an adversary sees it.

    Args:
        k: the round.
        decision_set: D_k.
        choice: the learner's choice.
        reward: the noisy reward.
        sigma: the standard deviation of the round.
    """

    k: Int[Array, ""]
    decision_set: AnySet
    choice: Choice
    reward: Float[Array, ""]
    sigma: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spec:
    """What a learner is told before the first round: sizes and public constants, nothing that is drawn.

    Args:
        sigma: the whole sequence for learners with `needs_sigma = "upfront"`, else None.
        gap: the public size |theta_i| of hypercube instances, one for each block (one for each column after
            `in_one_block`); None where there is none.
        dim: number of coordinates of theta that count, d in the radii.
        n_blocks: number of orthogonal blocks, 1 for an ordinary linear bandit.
        block_dim: coordinates of a block, padding included.
        n_actions: actions of a listed decision set; 0 when the sets are `SignSet`s.
        n_signs: signs of a `SignSet`; 0 when the sets are listed.
        horizon: number of rounds K.
    """

    sigma: Float[Array, " K"] | None
    gap: Float[Array, " blocks"] | None
    dim: int = dataclasses.field(metadata={"static": True})
    n_blocks: int = dataclasses.field(metadata={"static": True})
    block_dim: int = dataclasses.field(metadata={"static": True})
    n_actions: int = dataclasses.field(metadata={"static": True})
    n_signs: int = dataclasses.field(metadata={"static": True})
    horizon: int = dataclasses.field(metadata={"static": True})

    def in_one_block(self) -> Spec:
        """The same problem seen without its block structure (mode "dense")."""
        gap = None if self.gap is None else jnp.repeat(self.gap, self.block_dim)
        return dataclasses.replace(self, gap=gap, n_blocks=1, block_dim=self.n_blocks * self.block_dim)


# ---------------------------------------------------------------------------------------------- participants


class Instance:
    """Base of all environments: a pytree of arrays with static sizes, made one by `register`.

    A subclass sets the sizes, draws theta in `init`, everything else that is random in `draw`, and turns both
    into decision sets and rewards without further randomness, so that two learners meet identical rounds.

    Attributes:
        dim: coordinates of theta that count.
        n_blocks: orthogonal blocks.
        block_dim: coordinates of a block, padding included.
        max_actions: most actions of a round, 2^n_signs for sign sets.
        n_signs: signs of a round's `SignSet`, 0 for listed sets.
        horizon: number of rounds the instance is built for.
        uses_sigma: whether decision sets or rewards' scale depend on sigma_k through D_k; strong adversaries,
            who see D_k first, are refused then.
        reward_range: most regret of a round, the cap of a term of the realised certificate.
    """

    dim: int
    n_blocks: int
    block_dim: int
    max_actions: int
    horizon: int
    n_signs: int = 0
    uses_sigma: ClassVar[bool] = False

    @property
    def reward_range(self) -> float | Float[Array, ""]:
        """2, for mean rewards in [-1, 1]; larger where an instance allows larger means."""
        return 2.0

    @property
    def prefix(self) -> Float[Array, " K"] | None:
        """The sequence of sigmas the instance was built for; None if it suits any."""
        return None

    @property
    def gap(self) -> Float[Array, " blocks"] | None:
        """Public size of the coordinates of theta, one for each block; None where there is none."""
        return None

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of the dense view (n_blocks * block_dim wide) that are no padding."""
        return tuple(range(self.n_blocks * self.block_dim))

    def spec(self, sigma: Float[Array, " K"] | None = None) -> Spec:
        """What the instance tells a learner.

        Args:
            sigma: the sequence for learners that need it upfront.
        """
        listed = 0 if self.n_signs else self.max_actions
        sizes = (self.dim, self.n_blocks, self.block_dim, listed, self.n_signs, self.horizon)
        return Spec(sigma, self.gap, *sizes)

    def init(self, key: Key[Array, ""]) -> Any:
        """Draws the hidden parameter of one run."""
        raise NotImplementedError

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Any:
        """Everything random in one round but theta, for `shape` runs at once.

        It must not depend on history; the simulator draws many rounds ahead of the loop. By default keys, one
        for each run; subclasses hand out numbers, which is faster.
        """
        return jax.random.split(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> AnySet:
        """D_k, from the state, the round, sigma_k and what `draw` gave."""
        raise NotImplementedError

    def reward(
        self, state: Any, decision_set: Any, choice: Choice, sigma: Float[Array, ""], draw: Any
    ) -> Reward:
        """The reward of a choice, with the noise that `draw` gave.

        `decision_set` is what `decision_set` returned, of the one type that the instance makes.
        """
        raise NotImplementedError

    def after(self, state: Any, decision_set: Any, sigma: Float[Array, ""]) -> Any:
        """The state after a round (visit counters, loads); by default unchanged."""
        return state


class Adversary:
    """Base of all choosers of sigma_k: a pytree, registered by `register`. It never sees theta.

    Attributes:
        sees: "nothing" (a sequence fixed before), "history" (weak) or "decision_set" (strong).
    """

    sees: ClassVar[Sees] = "nothing"

    def init(self, spec: Spec) -> Any:
        """State before the first round."""
        return ()

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Any:
        """Its own randomness in one round, for `shape` runs at once."""
        return jnp.zeros(shape)

    def choose(self, state: Any, observation: Observation, draw: Any) -> Float[Array, ""]:
        """sigma_k in [0, 1]."""
        raise NotImplementedError

    def update(self, state: Any, transition: Transition) -> Any:
        """State after a finished round; not called when it sees nothing."""
        return state


def split_keys(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Any:
    """One key for each run: what `act` gets when an algorithm does not draw numbers itself."""
    return jax.random.split(key, shape)


def no_draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Any:
    """For algorithms without randomness: nothing is drawn."""
    return ()


class Algorithm(NamedTuple):
    """A learner as pure functions. Factories are cached: equal arguments give the same object, compiled once.

    Args:
        init: (key, spec) -> state before the first round; raises ValueError if the problem does not suit it.
        act: (state, decision_set, sigma or None, draw) -> choice.
        update: (state, decision_set, choice, reward, sigma or None) -> state.
        needs_sigma: when it is told sigma_k: "never", "after" (with the reward), "before" (with the decision
            set), or "upfront" (the whole sequence, in `Spec.sigma`; prefixed adversaries only).
        name: how results and plots call it, preset and radius scale included.
        draw: (key, spec, shape) -> its randomness of one round for `shape` runs; handed to `act`.
        width: (state, decision_set, choice) -> beta ||x||, the half width of its confidence interval; gives
            the realised certificate sum_k min(range, 2 beta ||x_k||). None if it has none.
        reveal: (state, instance, instance_state) -> state. Only yardsticks that are allowed to know theta
            have it (oracle, worst); results say so.
        config: the factory and all its arguments; recognises a simulation that is resumed.
    """

    init: Callable[..., Any]
    act: Callable[..., Any]
    update: Callable[..., Any]
    needs_sigma: SigmaTime
    name: str
    draw: Callable[..., Any] = split_keys
    width: Callable[..., Any] | None = None
    reveal: Callable[..., Any] | None = None
    config: str = ""


def register(*, arrays: tuple[str, ...], static: tuple[str, ...] = ()) -> Callable[[Class], Class]:
    """Makes a class a pytree that is rebuilt without its constructor, which validates concrete values.

    Args:
        arrays: attributes that hold arrays or pytrees.
        static: hashable attributes, part of the compiled program.
    """

    def decorate(cls: Class) -> Class:
        def flatten(self: Any) -> tuple[Any, Any]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in arrays]
            return children, tuple(getattr(self, name) for name in static)

        def unflatten(aux: Any, children: Any) -> Any:
            self = object.__new__(cls)
            for name, value in zip(arrays + static, (*children, *aux), strict=True):
                object.__setattr__(self, name, value)
            return self

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return decorate
