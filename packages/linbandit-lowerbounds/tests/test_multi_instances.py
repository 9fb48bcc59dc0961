"""Instances for adaptive noise: which block a round goes to, and limits that are known cubes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout import BEST, LEADER, RANDOM, rollout

from linbandit_lowerbounds.adversaries import Switching
from linbandit_lowerbounds.algorithms.oful import linucb
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.multi_instances import CyclicMultiInstance, LeastLoadedInstance
from linbandit_lowerbounds.peeling import groups
from linbandit_lowerbounds.simulate import simulate
from linbandit_lowerbounds.weak import cyclic_layout, least_loaded_layout, required_dimension

KEY = jax.random.key(4)
K = 64
MIXED = np.where(np.arange(K) % 9 == 3, 0.0, np.random.default_rng(2).uniform(0.01, 1.0, K))
D = 2 * required_dimension(K, 0.9, "paper", copies="sharp")
CYCLIC = {"eta": 0.9, "copies": "sharp"}  # few copies: 12 for 49 sub-instances


@pytest.fixture(scope="module")
def traces():
    """Two runs of random and 400 of best play on mixed variances: name -> (instance, trace)."""
    policy = np.repeat([RANDOM, BEST], [2, 400])
    instances = {
        "centered": CyclicMultiInstance(K, D, **CYCLIC),
        "per_block": CyclicMultiInstance(K, D, bias="per_block", **CYCLIC),
        "least loaded": LeastLoadedInstance(K, 8, 0.9, 8.0),
    }
    return {name: (cube, rollout(cube, policy, 402, sigma=MIXED)) for name, cube in instances.items()}


@pytest.mark.parametrize("bias", ["centered", "per_block"])
def test_cyclic_visits_follow_the_paper(bias, traces):
    layout = cyclic_layout(K, D, **CYCLIC)
    L, B = layout.groups, layout.copies
    _, trace = traces[bias]
    peeled = groups(MIXED.astype(np.float32))
    visits = np.zeros(L, int)
    for k, i in enumerate(peeled.index):
        if i == 0:
            assert not trace.regret[k].any()
            assert not trace.mean[k].any()
            assert not trace.reward[k].any()
        else:
            t = visits[i]
            j, v = 1 + t % L, t // L
            assert (trace.block[k] == ((i - 1) * L + (j - 1)) * B + v % B).all()
            assert trace.scale[k, 0] == np.float32(2.0 ** (i - 1) / K) < MIXED[k]
        visits[i] += 1
    np.testing.assert_array_equal(trace.state.visits, np.tile(visits, (402, 1)))
    assert set(peeled.index) >= {0, 3, 4, 5, 6}  # several groups were really visited


def test_cyclic_sizes_and_gaps_are_those_of_the_bound(x64):
    d = 2 * required_dimension(K, 0.9, "paper", copies="sharp") + 5
    instance = CyclicMultiInstance(K, d, **CYCLIC)
    layout = cyclic_layout(K, d, **CYCLIC)
    L, B = layout.groups, layout.copies
    assert (instance.n_signs, instance.block_dim, instance.copies) == (2, 2, B)
    assert instance.n_blocks == (L - 1) * L * B
    assert instance.dim == 2 * instance.n_blocks <= d
    gap = np.asarray(instance.gap).reshape(L - 1, L, B)
    np.testing.assert_array_equal(gap, np.broadcast_to(layout.gaps[:, None], gap.shape))
    theta = np.asarray(instance.init(KEY).theta)
    np.testing.assert_allclose(np.abs(theta), np.asarray(instance.gap)[:, None] * np.ones(2), rtol=1e-15)
    assert 0.4 < (theta > 0).mean() < 0.6


def test_least_loaded_block_gets_the_round_and_none_stays_behind(traces):
    instance, trace = traces["least loaded"]
    M = instance.n_blocks
    load = np.zeros(M, np.float32)
    for k, sigma in enumerate(MIXED.astype(np.float32)):
        block = int(np.argmin(load))
        assert (trace.block[k] == block).all()
        load[block] += sigma**2
        total = load.sum()
        assert load.min() >= total / M - 1
        assert np.ptp(load) <= 1.0
    np.testing.assert_allclose(trace.state.load[0], load, rtol=1e-6)
    assert 1 < M < K / 4  # every block was loaded several times


def test_least_loaded_sizes_and_gaps_are_those_of_the_bound(x64):
    instance = LeastLoadedInstance(2000, 1000, 0.5, 2.0, 0.9)
    layout = least_loaded_layout(2000, 1000, eta=0.5, V1=2.0, x=0.9)
    assert (instance.n_blocks, instance.n_signs) == (layout.blocks, layout.block_dim)
    gap = np.asarray(instance.gap).reshape(layout.guesses, layout.copies)
    np.testing.assert_allclose(
        gap, np.broadcast_to(0.9 / np.sqrt(layout.variances)[:, None], gap.shape), rtol=1e-14
    )
    assert layout.guesses > 1


def test_least_loaded_with_one_block_is_the_scaled_hypercube():
    instance = LeastLoadedInstance(K, 3, 0.99, V1=K / 2)
    assert instance.n_blocks == 1
    plain = VarianceScaledHypercube(MIXED, 3, gap=0.7518 / np.sqrt(K / 2))
    one, two = rollout(instance, LEADER, 16, sigma=MIXED), rollout(plain, LEADER, 16)
    for name in ("choice", "reward", "regret", "theta"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize("name", ["centered", "per_block", "least loaded"])
def test_best_play_has_no_regret_and_rewards_centre_on_their_means(name, traces):
    _, trace = traces[name]
    noisy = trace.scale[:, 0] > 0
    np.testing.assert_allclose(trace.regret[:, 2:], 0.0, atol=1e-6)
    noise = (trace.reward - trace.mean)[noisy] / MIXED[noisy, None]
    # 22 000 terms of variance at most 1: five standard deviations.
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert noise.std() < 1 + 5 / np.sqrt(noise.size)


def test_thousands_of_scalar_blocks_run():
    rounds = 2**12
    instance = CyclicMultiInstance(rounds, required_dimension(rounds, 1 / rounds, "paper"))
    assert (instance.n_blocks, instance.n_signs, instance.copies) == (13728, 1, 88)
    result = simulate(linucb(), instance, Switching(50), key=KEY, n_seeds=2, horizon=64, progress=False)
    np.testing.assert_array_equal(result.variance_sum, 50.0)
    assert (result.regret > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CyclicMultiInstance(2**12, 14871), "d must be >= 14872"),
        (lambda: CyclicMultiInstance(K, 10**5, "many"), "copies must be one of"),
        (lambda: CyclicMultiInstance(K, 10**5, bias="shared"), "bias must be one of"),
        (lambda: LeastLoadedInstance(K, 10**5, 1.5), "eta must be in"),
        (lambda: LeastLoadedInstance(K, 2, 0.1), "d must be >="),
        (lambda: LeastLoadedInstance(K, 10**5, 0.1, -1.0), "V1 must be"),
    ],
)
def test_wrong_arguments_are_refused(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_group_of_a_round_matches_the_peeling_at_exact_thresholds():
    instance = CyclicMultiInstance(8, 10**4, **CYCLIC)
    sigma = jnp.array([0, 0.1, 0.125, 0.13, 0.25, 0.26, 0.5, 1.0])
    assert jax.vmap(instance.group)(sigma).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
