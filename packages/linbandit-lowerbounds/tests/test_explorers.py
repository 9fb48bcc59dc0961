"""The learners of the proofs against NumPy; Theorem 5.4 and Lemma A.1 at work."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_explorers
from precision import float64
from scripted import initial, play, play_reference, script, spec_of

from linbandit_lowerbounds import linalg
from linbandit_lowerbounds.adversaries import CooperativeStrong
from linbandit_lowerbounds.algorithms.baselines import greedy, oracle, random, worst
from linbandit_lowerbounds.algorithms.explorers import oful_guard, span_explorer
from linbandit_lowerbounds.algorithms.oful import linucb, oful
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.decision_sets import DecisionSet, SignSet
from linbandit_lowerbounds.hypercubes import BernoulliHypercube
from linbandit_lowerbounds.simulate import simulate

ROUNDS = 60
EXPLORER = span_explorer()


def noiseless(rounds):
    return rounds._replace(noise=np.zeros(len(rounds.noise)))


@pytest.fixture(scope="module")
def contexts():
    """Five coordinates, and a first stretch of rounds whose actions span only two of them."""
    rounds = script(3, K=ROUNDS, A=6, d=5, masked=0.3)
    actions = rounds.actions.copy()
    actions[:20, :, 2:] = 0.0
    return noiseless(rounds._replace(actions=actions))


def test_span_explorer_plays_as_the_reference(contexts, x64):
    truth = reference_explorers.SpanExplorer(5)
    expected = play_reference(truth, contexts)
    state, choices, _ = play(EXPLORER, contexts)
    np.testing.assert_array_equal(choices, expected)
    # Sums of five terms in another order: rounding only.
    theta = np.asarray(state.values[0] @ state.vectors[0])
    np.testing.assert_allclose(theta, truth.theta, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(theta, contexts.theta, rtol=1e-10, atol=1e-10)


def test_span_explorer_explores_at_most_d_rounds_and_is_right_in_all_others(contexts, x64):
    state, choices, _ = play(EXPLORER, contexts)
    values = np.where(contexts.mask, contexts.actions @ contexts.theta, -np.inf)
    regret = values.max(1) - values[np.arange(ROUNDS), choices]
    assert int(state.rank[0]) == 5
    # Exact predictions up to rounding: a wrong choice would cost far more than 1e-9.
    assert (regret > 1e-9).sum() <= 5
    assert regret.sum() <= 2 * 5


def test_span_explorer_in_float32_agrees_with_float64(contexts):
    with float64(True):
        _, double, _ = play(EXPLORER, contexts)
    state, single, _ = play(EXPLORER, contexts)
    assert state.values.dtype == jnp.float32
    np.testing.assert_array_equal(single, double)


def test_span_explorer_counts_nearly_parallel_actions_as_inside_by_its_tolerance(x64):
    rounds = noiseless(script(0, K=3, A=1, d=2))
    rounds = rounds._replace(actions=np.array([[[1.0, 0.0]], [[1.0, 9e-5]], [[1.0, 2e-4]]]))
    state, _, _ = play(span_explorer(rtol=1e-4), rounds)
    np.testing.assert_allclose(state.vectors[0], [[1.0, 0.0], [0.0, 1.0]], atol=1e-12)
    # The third action gave the second vector: (reward - value of the first) / 2e-4 is theta_2.
    np.testing.assert_allclose(state.values[0, 1], rounds.theta[1], rtol=1e-10)


def test_a_fixed_set_needs_as_many_quiet_rounds_as_its_rank(contexts, x64):
    """Corollary 5.7: d rounds without noise, then all the noise there is."""
    fixed = contexts.actions[-1]
    rounds = script(9, K=ROUNDS, A=6, d=5, shared=fixed)
    noise = np.where(np.arange(ROUNDS) < 5, 0.0, np.random.default_rng(0).standard_normal(ROUNDS))
    _, choices, _ = play(EXPLORER, rounds._replace(noise=noise))
    values = fixed @ rounds.theta
    assert sorted(choices[:5]) == [0, 1, 2, 3, 4]
    assert (choices[5:] == values.argmax()).all()


def test_against_a_cooperative_strong_adversary_regret_is_at_most_2d():
    """Theorem 5.4: total variance is nearly K, regret is not."""
    instance = RandomContexts(4, 5, horizon=200)
    result = simulate(
        EXPLORER, instance, CooperativeStrong(), key=jax.random.key(5), n_seeds=50, progress=False
    )
    assert (result.rounds_stopped <= 4).all()
    np.testing.assert_array_equal(result.variance_sum, 200 - result.rounds_stopped)
    assert (result.regret <= 2 * 4).all()
    assert result.regret.mean() > 0.5  # exploration is not free


def hypercube(n, *, bias):
    zero = jnp.zeros((), jnp.int32)
    parts = (jnp.asarray(0.5), jnp.ones(n, bool), jnp.asarray(bias), zero, zero, zero, None)
    return SignSet(*parts, 1, n + (bias > 0), True)


@partial(jax.jit, static_argnums=0)
def explore(rounds, offered, theta):
    """Features played, the best value and the final rank when the same set is offered again and again."""

    def step(state, _):
        choice = EXPLORER.act(state, offered, None, ())
        x = offered.features(choice)
        return EXPLORER.update(state, offered, choice, x @ theta, None), x

    state = linalg.span_basis(spec_of(script(0, K=2, A=2, d=offered.features(offered.argmax(theta)).size)))
    state, played = jax.lax.scan(step, state, None, length=rounds)
    return played, offered.best_value(theta), state.rank[0]


def test_span_explorer_on_a_hypercube_plays_as_on_its_list(x64):
    signs = hypercube(3, bias=0.5)
    theta = jnp.asarray([0.3, -0.4, 0.6, 0.5])
    played, best, rank = explore(6, signs, theta)
    listed, _, _ = explore(6, signs.enumerate(), theta)
    np.testing.assert_array_equal(played, listed)
    assert rank == 4
    np.testing.assert_allclose(played[4:] @ theta, best, rtol=1e-12)


def test_span_explorer_learns_forty_signs_in_forty_rounds(x64):
    theta = jnp.where(jnp.arange(40) % 3 == 0, 0.1, -0.1)
    played, best, rank = explore(41, hypercube(40, bias=0.0), theta)
    assert rank == 40
    np.testing.assert_allclose(played[-1] @ theta, best, rtol=1e-12)


@pytest.mark.parametrize(("rtol", "error"), [(0.0, ValueError), (1.5, ValueError), ("a", TypeError)])
def test_span_explorer_refuses_a_bad_tolerance(rtol, error):
    with pytest.raises(error, match="rtol"):
        span_explorer(rtol=rtol)


# ---------------------------------------------------------------------------------------------- the guard

SIZES = {"K": 96, "d": 3, "sigma": 0.5, "delta": 0.1}
GUARD = oful_guard(inner=linucb(alpha=0.5), **SIZES)


@pytest.fixture(scope="module")
def unlucky():
    """Rewards so low that the test of the guard fires half way."""
    rounds = script(5, K=96, A=5, d=4, masked=0.2)
    return rounds._replace(noise=rounds.noise - 0.5)


def test_guard_plays_as_the_reference_before_and_after_it_fires(unlucky, x64):
    inner, fallback = reference.LinUCB(4, alpha=0.5), reference.OFUL(4, delta=0.1)
    truth = reference_explorers.OFULGuard(inner, fallback, **SIZES)
    expected = play_reference(truth, unlucky)
    state, choices, rewards = play(GUARD, unlucky)
    np.testing.assert_array_equal(choices, expected)
    # A sum of 96 terms of size one.
    np.testing.assert_allclose(float(state.pseudo_regret), truth.pseudo_regret, rtol=1e-10)
    fired = int(fallback.k - 1)
    assert 10 < fired < 86
    assert bool(state.switched)
    assert int(state.fallback.rounds) == fired
    assert int(state.inner.rounds) == 96 - fired
    sums = np.cumsum(truth.best_mean - rewards)
    assert int(np.argmax(sums > truth.threshold)) == 96 - fired - 1


def test_guard_starts_oful_afresh(unlucky, x64):
    state, choices, _ = play(GUARD, unlucky)
    start = int(state.inner.rounds)
    rest = unlucky._replace(**{name: getattr(unlucky, name)[start:] for name in unlucky._fields[:4]})
    fresh, expected, _ = play(oful(delta=0.1), rest)
    np.testing.assert_array_equal(choices[start:], expected)
    np.testing.assert_allclose(state.fallback.statistics.inverse, fresh.statistics.inverse, rtol=1e-12)


def test_guard_that_does_not_fire_changes_nothing(x64):
    calm = script(5, K=96, A=5, d=4, masked=0.2)
    calm = calm._replace(noise=calm.noise + 2.0)
    state, choices, _ = play(GUARD, calm)
    _, alone, _ = play(linucb(alpha=0.5), calm)
    np.testing.assert_array_equal(choices, alone)
    assert not bool(state.switched)
    assert int(state.fallback.rounds) == 0


def test_guard_threshold_is_the_lemma_plus_a_deviation_and_scales_with_sigma(x64):
    # d = 3, K = 96, p0 = 1/3: gap 1/96; Lemma 4.3 gives 3 sigma sqrt(96) / (8 sqrt(6)) = 1.5 sigma.
    rounds = script(5, K=96, A=1, d=4)
    for sigma in (0.25, 1.0):
        guard = oful_guard(inner=linucb(alpha=0.5), **{**SIZES, "sigma": sigma})
        limit = sigma * (1.5 + np.sqrt(2 * 96 * np.log(2 * 96 / 0.1)))
        best = sigma * (1 / 3 + 3 / 96)
        fires = int(np.floor(limit / (best + 0.1)) + 1)  # first round with n (best + 0.1) > limit
        fixed = rounds._replace(noise=-0.1 - rounds.actions[:, 0] @ rounds.theta)
        state, _, _ = play(guard, fixed)
        assert int(state.inner.rounds) == fires


def test_guard_without_the_known_mean_subtracts_it_from_its_test(x64):
    rounds = script(5, K=2, A=1, d=4)
    states = [play(oful_guard(inner=linucb(), centered=c, **SIZES), rounds)[0] for c in (False, True)]
    gap = float(states[0].pseudo_regret - states[1].pseudo_regret)
    assert gap == pytest.approx(2 * 0.5 / 3, rel=1e-12)  # two rounds of sigma p0


def test_guard_draws_for_both_learners_and_leaves_the_inner_stream_alone():
    rounds = script(1, K=4, A=3, d=2)
    inner = random()
    guard = oful_guard(inner=inner, K=96, d=3, fallback=random())
    key = jax.random.key(3)
    first, second = guard.draw(key, spec_of(rounds), (5,))
    np.testing.assert_array_equal(first, inner.draw(key, spec_of(rounds), (5,)))
    assert not np.array_equal(first, second)


def test_guard_tells_theta_only_to_a_yardstick():
    assert GUARD.reveal is None
    guard = oful_guard(inner=oracle(), K=96, d=3, fallback=worst())
    state = initial(guard, script(1, K=4, A=3, d=2))
    state = guard.reveal(state, None, jnp.asarray([0.3, -0.4]))
    np.testing.assert_array_equal(state.inner, state.fallback)
    np.testing.assert_allclose(state.inner, [[0.3, -0.4]], rtol=1e-6)


def test_guard_has_the_width_of_the_learner_in_charge(unlucky, x64):
    assert oful_guard(inner=greedy(), K=96, d=3).width is None
    state, _, _ = play(GUARD, unlucky)
    offered = DecisionSet(jnp.asarray(unlucky.actions[0]), jnp.ones(5, bool), jnp.zeros((), jnp.int32), 1)
    expected = oful(delta=0.1).width(state.fallback, offered, 2)
    assert float(GUARD.width(state, offered, 2)) == pytest.approx(float(expected), rel=1e-12)


def test_guard_stops_worst_play_at_its_threshold():
    K, d = 5400, 60  # K = 1.5 d^2; below d = 30 not even the worst learner has enough regret for the test
    guard = oful_guard(inner=worst(), fallback=oracle(), K=K, d=d, delta=0.1)
    result = simulate(guard, BernoulliHypercube(K, d), key=jax.random.key(5), n_seeds=20, progress=False)
    threshold = d * np.sqrt(K) / (8 * np.sqrt(6)) + np.sqrt(2 * K * np.log(2 * K / 0.1))
    most = d * np.sqrt(K) / (2 * np.sqrt(6))
    assert threshold < 0.7 * most
    # Regret and pseudo-regret differ by noise of deviation at most sqrt(K) / 2 in each run.
    assert abs(result.regret.mean() - threshold) < 4 * 0.5 * np.sqrt(K) / np.sqrt(20)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"K": 1}, ValueError, "K must be >= 2"),
        ({"K": 12}, ValueError, r"K must be >= d\^2"),
        ({"d": 0}, ValueError, "d must be"),
        ({"sigma": 2.0}, ValueError, "sigma must be in"),
        ({"sigma": 0.0}, ValueError, "sigma must be"),
        ({"p0": 0.5}, ValueError, "p0 must be in"),
        ({"delta": 1.0}, ValueError, "delta must be in"),
        ({"inner": greedy}, TypeError, "inner must be an Algorithm"),
        ({"centered": 1}, TypeError, "centered must be a bool"),
        ({"fallback": greedy(prior="gap", needs_sigma="after")}, ValueError, "fallback must have"),
    ],
)
def test_guard_refuses_bad_input(wrong, error, message):
    settings = {"inner": greedy(), "K": 96, "d": 3} | wrong
    with pytest.raises(error, match=message):
        oful_guard(**settings)
