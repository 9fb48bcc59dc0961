"""The learners of the paper's proofs: one that explores a basis, one that watches another and takes over.

    span_explorer   Theorem 5.4: play the first action outside the span of what was explored, keep (x, r); if
                    there is none, predict every action by the exact linear combination and play the best
    oful_guard      Lemma A.1: follow a learner until its pseudo-regret

                        sum_i (sigma (p0 + d gap) - r_i),   gap = sqrt(p0 / K) / (4 sqrt(2)),

                    exceeds d sigma sqrt(K p0) / (8 sqrt(2)) + sigma sqrt(2 K ln(2 K / delta)), then start
                    OFUL afresh

At p0 = 1/3 the gap is 1 / sqrt(96 K) and the first term of the threshold d sigma sqrt(K) / (8 sqrt(6)). The
paper forgets the factor sigma in front of p0 + d gap.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, DecisionSet
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from .factories import factory, named
from .oful import oful


class GuardState(NamedTuple):
    """Both learners and the test that decides between them.

    Args:
        inner: state of the learner that is followed.
        fallback: state of the learner that takes over; as at the start until then.
        pseudo_regret: sum of sigma (p0 + d gap) - r_i.
        switched: whether the fallback plays.
    """

    inner: Any
    fallback: Any
    pseudo_regret: Float[Array, ""]
    switched: Bool[Array, ""]


@factory
def span_explorer(*, rtol: float | None = None) -> Algorithm:
    """Learns theta from at most d noiseless rounds: why nothing can be shown against a strong adversary.

    When every round in which it explores is noiseless (`CooperativeStrong`), all its predictions are exact:
    it explores at most rank <= d times and has no regret otherwise, so Regret <= d * (range of the mean
    rewards), which is 2d when |<theta, x>| <= 1. The paper's "<= d" presumes range 1. With noise in the
    rounds of exploration nothing is promised.

    A hypercube of n signs is explored without listing it: all its actions lie in the span of the n + 1 with
    at most one positive sign, and the first action outside a span is always one of these.

    Args:
        rtol: an action lies outside when its distance from the span exceeds rtol times its length; None takes
            1e-8 in float64, 1e-4 in float32.

    Raises:
        TypeError: if rtol is no number.
        ValueError: if it is not in (0, 1).

    Source: He and Gu 2025, Theorem 5.4 and Corollary 5.7.
    """
    if rtol is not None:
        rtol = checks.probability("rtol", rtol)

    def init(key: Any, spec: Spec) -> linalg.SpanBasis:
        return linalg.span_basis(spec)

    def act(state: linalg.SpanBasis, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        block = decision_set.block
        choices, rows, playable = _spanning(decision_set)
        new = linalg.outside(state, block, rows, rtol) & playable
        theta = linalg.at(state.values, block) @ linalg.at(state.vectors, block)
        return jnp.where(new.any(), choices[jnp.argmax(new)], decision_set.argmax(theta))

    def update(
        state: linalg.SpanBasis,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: None,
    ) -> linalg.SpanBasis:
        return linalg.extend(state, decision_set.block, decision_set.features(choice), reward, rtol)

    return Algorithm(init, act, update, "never", named("span explorer", rtol=(rtol, None)), no_draw)


@factory
def oful_guard(
    *,
    inner: Algorithm,
    K: int,
    d: int,
    sigma: float = 1.0,
    delta: float = 0.01,
    p0: float = 1 / 3,
    centered: bool = False,
    fallback: Algorithm | None = None,
) -> Algorithm:
    """Follows `inner`, and starts OFUL afresh once the regret on the Bernoulli hypercube looks too large.

    Lemma A.1 needs it to turn a bound in expectation into one with constant probability, at the cost of a
    logarithm. (The reverse Markov inequality does that without it, see docs/proofs.md; the wrapper is here
    for those who want to run the paper's argument.)

    Args:
        inner: the learner to follow.
        K: rounds of the hypercube, >= d^2 / (2 p0).
        d: hidden signs of the hypercube, >= 1.
        sigma: scale of its rewards, in (0, 1].
        delta: failure probability, in (0, 1), of the test and of OFUL.
        p0: base probability, in (0, 1/3].
        centered: whether rewards come with sigma p0 subtracted, as with `bias="centered"`.
        fallback: the learner that takes over, never told sigma; None takes `oful(delta=delta)`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of its range, or the fallback needs sigma.

    Source: He and Gu 2025, Lemma A.1, with the missing factor sigma.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    sigma, p0 = (checks.real(n, v, above=0.0) for n, v in (("sigma", sigma), ("p0", p0)))
    delta = checks.probability("delta", delta)
    if sigma > 1.0:
        raise ValueError(f"sigma must be in (0, 1], got {sigma!r}")
    if p0 > 1 / 3:
        raise ValueError(f"p0 must be in (0, 1/3], got {p0!r}")
    if d * d > 2.0 * p0 * K:
        raise ValueError(f"K must be >= d^2 / (2 p0) = {d * d / (2.0 * p0):g}, got {K!r}")
    if not isinstance(centered, bool):
        raise TypeError(f"centered must be a bool, got {centered!r}")
    rescue = oful(delta=delta) if fallback is None else fallback
    for name, learner in (("inner", inner), ("fallback", rescue)):
        if not isinstance(learner, Algorithm):
            raise TypeError(f"{name} must be an Algorithm, got {type(learner).__name__}")
    if rescue.needs_sigma != "never":
        raise ValueError(f'fallback must have needs_sigma = "never", got {rescue.needs_sigma!r}')
    gap = math.sqrt(p0 / K) / (4.0 * math.sqrt(2.0))
    best_mean = sigma * (d * gap + (0.0 if centered else p0))
    threshold = d * sigma * math.sqrt(K * p0) / (8.0 * math.sqrt(2.0))
    threshold += sigma * math.sqrt(2.0 * K * math.log(2.0 * K / delta))

    def init(key: Key[Array, ""], spec: Spec) -> GuardState:
        second = rescue.init(_other(key), spec)
        return GuardState(inner.init(key, spec), second, jnp.zeros(()), jnp.zeros((), bool))

    def draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> tuple[Any, Any]:
        return inner.draw(key, spec, shape), rescue.draw(_other(key), spec, shape)

    def act(
        state: GuardState, decision_set: AnySet, sigma: Float[Array, ""] | None, draw: tuple[Any, Any]
    ) -> Choice:
        first = inner.act(state.inner, decision_set, sigma, draw[0])
        second = rescue.act(state.fallback, decision_set, None, draw[1])
        return jnp.where(state.switched, second, first)

    def update(
        state: GuardState,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: Float[Array, ""] | None,
    ) -> GuardState:
        first = inner.update(state.inner, decision_set, choice, reward, sigma)
        second = rescue.update(state.fallback, decision_set, choice, reward, None)
        pseudo_regret = state.pseudo_regret + (best_mean - reward)
        return GuardState(
            _select(state.switched, state.inner, first),
            _select(state.switched, second, state.fallback),
            pseudo_regret,
            state.switched | (pseudo_regret > threshold),
        )

    def width(state: GuardState, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        widths = [
            learner.width(part, decision_set, choice)
            for learner, part in ((inner, state.inner), (rescue, state.fallback))
            if learner.width is not None
        ]
        return jnp.where(state.switched, widths[1], widths[0])

    def reveal(state: GuardState, instance: Any, hidden: Any) -> GuardState:
        parts = [
            part if learner.reveal is None else learner.reveal(part, instance, hidden)
            for learner, part in ((inner, state.inner), (rescue, state.fallback))
        ]
        return state._replace(inner=parts[0], fallback=parts[1])

    return Algorithm(
        init,
        act,
        update,
        inner.needs_sigma,
        f"{inner.name}, guarded by {rescue.name}",
        draw,
        None if inner.width is None or rescue.width is None else width,
        None if inner.reveal is None and rescue.reveal is None else reveal,
    )


def _spanning(decision_set: AnySet) -> tuple[Array, Float[Array, "m b"], Bool[Array, " m"]]:
    """Choices that span the set, the first outside any subspace among them; their features; who may play."""
    if isinstance(decision_set, DecisionSet):
        indices = jnp.arange(decision_set.actions.shape[0], dtype=jnp.int32)
        return indices, decision_set.actions, decision_set.mask
    n = decision_set.n_signs
    positive = jnp.concatenate([jnp.zeros((1, n), bool), jnp.eye(n, dtype=bool)])
    choices = jnp.where(positive, 1.0, -1.0).astype(decision_set.scale.dtype)
    return choices, jax.vmap(decision_set.features)(choices), jnp.ones(n + 1, bool)


def _select(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _other(key: Key[Array, ""]) -> Key[Array, ""]:
    """The fallback's stream; the inner learner keeps the key and so plays as it would without a guard."""
    return jax.random.fold_in(key, 1)
