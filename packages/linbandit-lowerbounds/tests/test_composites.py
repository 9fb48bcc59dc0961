"""Mixed instances: who owns which coordinates, what a round offers, and limits that are known cubes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout import BEST, LEADER, RANDOM, WORST, rollout
from scipy import stats

from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.bounds import prefixed_bound
from linbandit_lowerbounds.composites import JiaBudgetInstance, PeelingInstance
from linbandit_lowerbounds.hypercubes import BernoulliHypercube
from linbandit_lowerbounds.peeling import groups
from linbandit_lowerbounds.simulate import simulate

KEY = jax.random.key(11)
BIASES = ("shared", "per_block", "centered")
# K = 12: L = 5, groups 0..4 start above 0, 1/12, 2/12, 4/12, 8/12; group 2 is empty.
SIGMA = np.array([0.9, 0.1, 0.02, 0.5, 1.0, 0.7, 0.0, 0.15, 0.4, 0.08, 0.75, 0.6])
GROUP = np.array([4, 1, 0, 3, 4, 4, 0, 1, 3, 0, 4, 3])
DIMS = (2, 1, 1, 0, 3)  # group 3 owns nothing, group 2 owns a coordinate without rounds


@jax.jit
def offer(instance, k, state):
    shown = instance.decision_set(state, k, instance.prefix[k], None)
    rows = shown.enumerate()
    return shown, rows.dense(), rows.mask, shown.best_value(state[shown.block])


def offered(instance, k, state):
    """The decision set of a round, its distinct actions in all coordinates, and the best mean."""
    shown, rows, mask, best = offer(instance, k, state)
    return shown, np.unique(np.asarray(rows)[np.asarray(mask)], axis=0), float(best)


# ---------------------------------------------------------------------------------------------- peeling


@pytest.mark.parametrize("bias", ["shared", "centered"])  # "per_block" is "shared" for a single group
def test_peeling_with_one_occupied_group_is_the_hypercube(bias):
    K, d = 60, 3
    peeled = PeelingInstance(np.ones(K), d, bias=bias)
    plain = BernoulliHypercube(K, d, bias=bias)
    assert (peeled.spec().dim, peeled.spec().block_dim) == (plain.spec().dim, plain.spec().block_dim)
    assert float(peeled.gap[0]) == float(plain.gap[0])
    one, two = (rollout(instance, LEADER, 32) for instance in (peeled, plain))
    for name in ("choice", "reward", "regret", "theta"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize("bias", BIASES)
def test_each_group_plays_on_its_own_columns(bias, x64):
    instance = PeelingInstance(SIGMA, None, DIMS, bias, scale="threshold")
    state = instance.init(KEY)
    assert instance.dim == len(instance.columns) == 7 + {"shared": 1, "per_block": 4, "centered": 0}[bias]
    dense_theta = np.asarray(state).reshape(-1)
    padding = np.setdiff1d(np.arange(dense_theta.size), instance.columns)
    np.testing.assert_array_equal(dense_theta[padding], 0.0)
    used = {}
    for k, group in enumerate(GROUP):
        _, rows, best = offered(instance, k, state)
        columns = np.flatnonzero(np.abs(rows).max(0) > 0)
        assert set(columns) <= set(instance.columns)
        varying = np.flatnonzero(np.ptp(rows, axis=0) > 0)
        constant = np.setdiff1d(columns, varying)
        assert used.setdefault(group, tuple(varying)) == tuple(varying)
        level = 2.0 ** (group - 1) / 12
        if group == 0:
            np.testing.assert_array_equal(np.sort(rows.sum(1)), [1.0, 1.0])
            np.testing.assert_array_equal(np.sort(rows.max(1)), [1.0, 1.0])
        elif group == 3:
            np.testing.assert_array_equal(rows, np.zeros_like(rows[:1]))
        else:
            assert rows.shape[0] == 2 ** DIMS[group]
            np.testing.assert_allclose(np.abs(rows[:, varying]), level, rtol=1e-12)
            np.testing.assert_allclose(rows[:, constant], level, rtol=1e-12)
            assert constant.size == (bias != "centered")
            # Lemma 4.3 needs K_i >= 1.5 d_i^2; here only group 1 has enough rounds.
            gap = 1 / math.sqrt(96 * 2) if group == 1 else 1 / (12 * DIMS[group])
            np.testing.assert_allclose(np.abs(dense_theta[varying]), gap, rtol=1e-12)
        assert best == pytest.approx((rows @ dense_theta).max(), abs=1e-15)
    assert [len(used[i]) for i in (0, 1, 3, 4)] == [2, 1, 0, 3]
    flat = [column for columns in used.values() for column in columns]
    assert len(flat) == len(set(flat))


def test_group_0_pays_one_arm_without_noise(x64):
    instance = PeelingInstance(SIGMA, None, DIMS)
    for seed in range(4):
        state = instance.init(jax.random.key(seed))
        shown, _, best = offered(instance, 2, state)
        units = (1, 2)  # one sign up: the arms of a group with two coordinates
        rewards = [
            instance.reward(state, shown, shown.choice_of(unit), jnp.asarray(0.02), jnp.asarray(0.7))
            for unit in units
        ]
        assert sorted(float(outcome.reward) for outcome in rewards) == [0.0, 1.0]
        assert all(float(outcome.reward) == float(outcome.mean) for outcome in rewards)
        assert best == 1.0


def test_rewarded_arm_of_group_0_is_uniform():
    instance = PeelingInstance(np.zeros(5), 4, bias="centered")
    theta = np.asarray(jax.vmap(instance.init)(jax.random.split(KEY, 2000)))[:, 0]
    np.testing.assert_array_equal(theta.sum(1), 1.0)
    assert stats.chisquare(theta.sum(0)).pvalue > 1e-3  # fixed key


@pytest.mark.parametrize("scale", ["lowest", "threshold"])
def test_rewards_never_vary_more_than_sigma_allows(scale):
    instance = PeelingInstance(SIGMA, None, DIMS, "centered", scale=scale)
    trace = rollout(instance, RANDOM, 4)
    owns = np.isin(GROUP, [1, 4])
    level = trace.scale[:, 0]
    assert (level <= SIGMA.astype(np.float32)).all()
    lowest = np.array([SIGMA[g == GROUP].min() for g in GROUP])
    expected = lowest if scale == "lowest" else 2.0 ** (GROUP - 1) / 12
    np.testing.assert_allclose(level[owns], expected[owns], rtol=1e-6)
    # Values are scale * (1 - p0) and -scale * p0.
    distance = np.where(trace.reward[owns] > 0, 2 / 3, 1 / 3) * level[owns, None]
    np.testing.assert_allclose(np.abs(trace.reward[owns]), distance, rtol=1e-5)


def test_worst_regret_of_peeling_adds_up_over_groups(x64):
    sigma = np.exp(np.random.default_rng(1).uniform(math.log(0.1), 0.0, 60))
    instance = PeelingInstance(sigma, 9)
    peeled = groups(sigma, 9)
    expected = 0.0
    for i in range(1, peeled.L):
        K_i, d_i = int(peeled.counts[i]), int(peeled.dims[i])
        if K_i:
            gap = 1 / math.sqrt(96 * K_i) if K_i >= 1.5 * d_i**2 else 1 / (12 * d_i)
            expected += 2 * d_i * gap * K_i * sigma[peeled.index == i].min()
    policy = np.repeat([WORST, RANDOM, BEST], [1, 62, 1])
    regret = rollout(instance, policy, 64).regret.sum(0)
    assert regret[0] == pytest.approx(expected, rel=1e-12)
    assert regret[-1] == pytest.approx(0.0, abs=1e-12)
    # Random play has half of it; sums of 60 bounded terms, 62 runs, well within 10 %.
    assert regret[1:-1].mean() == pytest.approx(expected / 2, rel=0.1)
    for kind in ("lemma_sum", "tight_sum", "eq42_sharp"):
        assert prefixed_bound(sigma, 9, kind=kind).value < expected / 2


def test_spec_gives_gaps_only_where_blocks_have_one():
    # Groups 1, 3, 4 own 2, 2 and 3 coordinates; all have few rounds, so their gaps differ.
    assert PeelingInstance(SIGMA, 7).gap is None
    assert PeelingInstance(SIGMA, 7, bias="centered").gap.shape == (3,)
    assert PeelingInstance(np.ones(12), 2).gap.shape == (1,)


def test_block_and_dense_mode_agree_on_groups_of_different_size(x64):
    # Random play, so that no tie of equal signs can be broken by rounding; the widths know all statistics.
    watching = oful()._replace(
        act=lambda _state, shown, _sigma, uniforms: shown.pick(uniforms),
        draw=lambda key, spec, shape: jax.random.uniform(key, (*shape, spec.n_signs)),
    )
    instance = PeelingInstance(SIGMA, None, (0, 1, 0, 2, 3), "per_block")
    block, dense = (
        simulate(watching, instance, key=KEY, n_seeds=6, mode=mode, progress=False)
        for mode in ("block", "dense")
    )
    # The same matrices up to zeros; 12 rank-one updates in float64.
    np.testing.assert_allclose(block.regret, dense.regret, atol=1e-12)
    np.testing.assert_allclose(block.self_certificate, dense.self_certificate, atol=1e-10)
    assert np.ptp(block.self_certificate) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 1.5], 2), "sigma must lie in"),
        ((SIGMA, 0), "d must be >= 1"),
        ((SIGMA, 3, "all"), "dims must be one of"),
        ((SIGMA, None, (1, 1)), "one entry for each"),
        ((SIGMA, None), "d must be an integer, got None"),
        ((SIGMA, 3, "equal", "hidden"), "bias must be one of"),
    ],
)
def test_peeling_refuses_wrong_arguments(arguments, message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        PeelingInstance(*arguments)


# ---------------------------------------------------------------------------------------------- Jia's budget


def test_budget_instance_cycles_contexts_and_ends_its_noise():
    instance = JiaBudgetInstance(13, 3, 40, 20.7)
    assert (instance.n_blocks, instance.block_dim, instance.dim, instance.max_actions) == (4, 3, 12, 3)
    np.testing.assert_array_equal(instance.prefix, [1.0] * 20 + [0.0] * 20)
    trace = rollout(instance, RANDOM, 8)
    np.testing.assert_array_equal(trace.block, np.tile(np.arange(40) % 4, (8, 1)).T)
    np.testing.assert_array_equal(trace.reward[20:], trace.mean[20:])
    assert (trace.reward[:20] != trace.mean[:20]).all()


def test_budget_instance_draws_the_prior_of_its_bound(x64):
    A, m, rounds = 4, 2, 21  # 11 and 10 noisy rounds
    instance = JiaBudgetInstance(8, A, 30, rounds)
    theta = np.asarray(jax.vmap(instance.init)(jax.random.split(KEY, 4000)))
    for context, n in enumerate((11, 10)):
        D = math.sqrt((A - 1) / (4 * n))
        scaled = theta[:, context] / D
        np.testing.assert_allclose(scaled[:, 0], 1.0, rtol=1e-12)
        np.testing.assert_allclose(np.sort(scaled[:, 1:], axis=1)[:, :-1], 0.0)
        counts = [(scaled[:, 1:].max(1) == 0).sum(), *((scaled[:, 1:] > 1.5).sum(0))]
        assert (
            stats.chisquare(counts, 4000 * np.array([1 / 2, 1 / 6, 1 / 6, 1 / 6])).pvalue > 1e-3
        )  # fixed key
        assert theta[:, context].max() <= 1.0
        # Bretagnolle-Huber, averaged over the better arm: above the constant 1/27 that the bound states.
        assert n * D / 8 * math.exp(-2 * D**2 * n / (A - 1)) > math.sqrt((A - 1) * n) / 27
    assert m == instance.n_blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 1, 50, 30.0), "A must be >= 2"),
        ((2, 3, 50, 30.0), "d must be >= 3"),
        ((12, 3, 50, 7.9), "floor"),
        ((12, 3, 50, 51.0), "floor"),
        ((12, 3, 50, math.inf), "Lambda must be finite"),
    ],
)
def test_budget_instance_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        JiaBudgetInstance(*arguments)
