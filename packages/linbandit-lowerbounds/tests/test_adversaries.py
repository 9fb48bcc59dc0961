"""Adversaries choose what they promise, from what they are allowed to see."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64
from scipy import stats

from linbandit_lowerbounds.adversaries import (
    CooperativeStrong,
    Luck,
    Prefixed,
    RandomSigma,
    StopWhenLucky,
    Switching,
)
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.environment import Observation, Transition
from linbandit_lowerbounds.hypercubes import BernoulliHypercube, VarianceScaledHypercube

KEY = jax.random.key(2)


def play(adversary, instance, choose, rounds):
    """A plain loop: (sigma of every round, transitions), with `choose(k, decision set)` as the learner."""
    state, theta = adversary.init(instance.spec()), instance.init(KEY)
    of_instance = instance.draw(jax.random.key(5), (rounds,))
    of_adversary = adversary.draw(jax.random.key(6), (rounds,))
    pick, update = jax.jit(adversary.choose), jax.jit(adversary.update)
    offer, pay = jax.jit(instance.decision_set), jax.jit(instance.reward)
    total, sigmas, past = jnp.zeros(()), [], []
    for k in range(rounds):
        draw = jax.tree.map(lambda leaf, k=k: leaf[k], of_instance)
        seen = offer(theta, k, jnp.ones(()), draw) if adversary.sees == "decision_set" else None
        sigma = pick(state, Observation(jnp.asarray(k), total, seen), of_adversary[k])
        shown = offer(theta, k, sigma, draw) if seen is None else seen
        choice = choose(k, shown)
        reward = pay(theta, shown, choice, sigma, draw).reward
        past.append(Transition(jnp.asarray(k), shown, choice, reward, sigma))
        state = update(state, past[-1])
        total = total + sigma**2
        sigmas.append(float(sigma))
    return np.array(sigmas), past, state, np.asarray(theta)


def test_prefixed_plays_its_sequence():
    adversary = Prefixed([0.5, 0.0, 1.0])
    chosen = [
        float(adversary.choose((), Observation(jnp.asarray(k), jnp.zeros(()), None), ())) for k in range(3)
    ]
    assert chosen == [0.5, 0.0, 1.0]


def test_random_sigma_is_log_uniform_between_its_limits():
    adversary = RandomSigma(0.01, 0.5)
    draws = adversary.draw(KEY, (4000,))
    observation = Observation(jnp.asarray(0), jnp.zeros(()), None)
    sigma = np.asarray(jax.vmap(lambda draw: adversary.choose((), observation, draw))(draws))
    assert sigma.min() >= np.float32(0.01)
    assert sigma.max() <= np.float32(0.5)
    law = stats.uniform(math.log(0.01), math.log(50))
    assert stats.kstest(np.log(sigma), law.cdf).pvalue > 1e-3  # fixed key
    ends = [float(RandomSigma(0.3, 0.3).choose((), observation, jnp.asarray(u))) for u in (0.0, 0.999)]
    assert ends == pytest.approx([0.3, 0.3], rel=1e-6)


def test_switching_stops_at_the_first_round_with_enough_variance():
    instance = VarianceScaledHypercube(np.ones(12), 2)
    sigmas, *_ = play(Switching(2.5), instance, lambda _k, shown: shown.choice_of(0), 6)
    assert sigmas.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    sigmas, *_ = play(Switching(3.0), instance, lambda _k, shown: shown.choice_of(0), 6)
    assert sigmas.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def posterior_errors(transitions, gap, d, p0=0.0):
    """Probability of a wrong sign for prior N(0, gap^2) and noise variance sigma_k^2, after every round."""
    precision, response, errors = np.eye(d) / gap**2, np.zeros(d), []
    for past in transitions:
        sigma = float(past.sigma)
        if sigma > 0:
            signs = float(past.decision_set.scale) * np.asarray(past.choice, np.float64)
            reward = float(past.reward) - p0 * float(past.decision_set.bias)
            precision = precision + np.outer(signs, signs) / sigma**2
            response = response + signs * reward / sigma**2
        covariance = np.linalg.inv(precision)
        errors.append(stats.norm.sf(np.abs(covariance @ response) / np.sqrt(np.diag(covariance))))
    return np.array(errors)


def test_stops_when_every_sign_is_known_to_five_percent(x64):
    gap, rounds = 0.4, 60
    instance = VarianceScaledHypercube(np.ones(rounds), 2, gap=gap)
    uniforms = np.random.default_rng(0).random((rounds, 2))
    sigmas, past, state, _ = play(StopWhenLucky(), instance, lambda k, shown: shown.pick(uniforms[k]), rounds)
    errors = posterior_errors(past, gap, 2)
    first = int(np.argmax((errors < 0.05).all(1))) + 1  # decided after that round
    assert 3 < first < rounds - 3
    np.testing.assert_array_equal(sigmas, np.arange(rounds) < first)
    np.testing.assert_allclose(state.error[0], errors[-1], rtol=1e-9)
    assert int(state.uncertain) == 0


def test_known_bias_is_subtracted_before_signs_are_judged(x64):
    rounds = 20
    instance = BernoulliHypercube(rounds, 2)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (rounds, 2))
    _, past, state, _ = play(StopWhenLucky(), instance, lambda k, _shown: jnp.asarray(signs[k]), rounds)
    errors = posterior_errors(past, float(instance.gap[0]), 2, p0=1 / 3)
    np.testing.assert_allclose(state.error[0], [0.0, *errors[-1]], rtol=1e-9)
    assert int(state.uncertain) == 2  # the bias is known, the signs are not


def test_a_rule_of_ones_own_stops_for_good():
    def rule(luck: Luck):
        return luck.rounds == 3  # true once only

    instance = VarianceScaledHypercube(np.ones(12), 2)
    sigmas, _, state, _ = play(StopWhenLucky(rule), instance, lambda _k, shown: shown.choice_of(1), 6)
    assert sigmas.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert (int(state.rounds), float(state.variance_sum), bool(state.stopped)) == (6, 3.0, True)


def test_stop_when_lucky_needs_a_gap():
    with pytest.raises(ValueError, match="one gap for each block"):
        StopWhenLucky().init(RandomContexts(2, 3, horizon=5).spec())


@pytest.mark.parametrize("enable", [False, True], ids=["float32", "float64"])
def test_cooperative_adversary_is_silent_exactly_when_something_is_new(enable):
    with float64(enable):
        # Contexts of a random subspace of growing dimension: the span fills up in steps.
        rng = np.random.default_rng(3)
        instance = RandomContexts(4, 3, horizon=30)
        basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        sets = [rng.normal(size=(3, m)) @ basis[:m] for m in np.repeat([1, 2, 4], 10)]
        adversary = CooperativeStrong()
        state = adversary.init(instance.spec())
        theta = instance.init(KEY)
        played = np.zeros((0, 4))
        for k, actions in enumerate(sets):
            draw = instance.draw(jax.random.key(k), ())._replace(contexts=jnp.asarray(actions, float))
            shown = instance.decision_set(theta, jnp.asarray(k), jnp.ones(()), draw)
            sigma = float(adversary.choose(state, Observation(jnp.asarray(k), jnp.zeros(()), shown), ()))
            rank = np.linalg.matrix_rank(played) if len(played) else 0
            new = any(np.linalg.matrix_rank(np.vstack([played, x]), tol=1e-3) > rank for x in actions)
            assert sigma == (0.0 if new else 1.0)
            choice = jnp.asarray(rng.integers(3))  # need not explore
            past = Transition(jnp.asarray(k), shown, choice, jnp.zeros(()), jnp.asarray(sigma))
            state = adversary.update(state, past)
            played = np.vstack([played, actions[int(choice)]])
            assert int(state.rank[0]) == np.linalg.matrix_rank(played, tol=1e-3)
        assert int(state.rank[0]) == 4


def test_cooperative_adversary_ignores_actions_that_may_not_be_played():
    instance = RandomContexts(2, 2, horizon=5)
    adversary = CooperativeStrong()
    shown = instance.decision_set(instance.init(KEY), jnp.asarray(0), jnp.ones(()), instance.draw(KEY, ()))
    state = adversary.init(instance.spec())
    past = Transition(jnp.asarray(0), shown, jnp.asarray(0), jnp.zeros(()), jnp.zeros(()))
    state = adversary.update(state, past)
    for mask, sigma in (([True, True], 0.0), ([True, False], 1.0)):
        masked = shown.__class__(shown.actions, jnp.asarray(mask), shown.block, 1)
        observation = Observation(jnp.asarray(1), jnp.zeros(()), masked)
        assert float(adversary.choose(state, observation, ())) == sigma


def test_sight_of_every_adversary():
    assert [a.sees for a in (Prefixed, RandomSigma, Switching, StopWhenLucky, CooperativeStrong)] == [
        "nothing",
        "nothing",
        "history",
        "history",
        "decision_set",
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Prefixed([0.5, 1.5]), ValueError, "sigma must lie in"),
        (lambda: Prefixed([0.5]), ValueError, "K >= 2"),
        (lambda: Prefixed("loud"), TypeError, "array of numbers"),
        (lambda: RandomSigma(0.0, 1.0), ValueError, "low must be"),
        (lambda: RandomSigma(0.5, 0.4), ValueError, "low must be <= high"),
        (lambda: RandomSigma(0.5, 1.4), ValueError, "high must lie"),
        (lambda: Switching(0.0), ValueError, "at must be"),
        (lambda: Switching("late"), TypeError, "at must be"),
        (lambda: StopWhenLucky(3), TypeError, "rule must be a function"),
        (lambda: StopWhenLucky(p0=math.nan), ValueError, "p0 must be"),
        (lambda: CooperativeStrong(rtol=0.0), ValueError, "rtol must be"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
