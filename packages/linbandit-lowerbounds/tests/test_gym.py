"""Gymnasium's own checker, the rounds of the simulator behind the environments, batches, and bad actions."""

import importlib
import sys

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from linbandit_lowerbounds import gym
from linbandit_lowerbounds.adversaries import CooperativeStrong, Prefixed
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.interop import from_object, play_object

KEY = jax.random.key(3)
# Sums of six terms of size 1 in float32, in programs that were compiled for one run and for two.
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}
K = 6
SIGMA = np.array([1.0, 0.5, 0.0, 0.25, 1.0, 0.75])
IDS = [f"LinBanditLB/{name}-v0" for name in ("Hypercube", "Peeling", "ScaledHypercube", "LeastLoaded")]
SCALED = IDS[2]


class InTurn:
    """The rows 0, 1, 2, .."""

    def __init__(self):
        self.k = 0
        self.rewards = []
        runs.append(self)

    def act(self, actions):
        return self.k % len(actions)

    def update(self, x, reward):
        self.k += 1
        self.rewards.append(reward)


runs: list[InTurn] = []


@pytest.fixture(scope="module")
def played():
    """Regret and rewards of two runs under KEY, from the plain loop."""
    runs.clear()
    result = play_object(
        from_object(InTurn),
        VarianceScaledHypercube(SIGMA, 2),
        key=KEY,
        n_seeds=2,
        record="all",
        progress=False,
    )
    return result, np.array([run.rewards for run in runs])


@pytest.fixture(scope="module")
def single():
    return gymnasium.make(SCALED, sigma=SIGMA, d=2)


@pytest.fixture(scope="module")
def batch():
    return gym.make_vec(SCALED, 2, sigma=SIGMA, d=2)


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker_is_content(env_id):
    env = gymnasium.make(env_id).unwrapped
    check_env(env)  # warnings are errors
    assert env.metadata["render_modes"] == []


def test_an_episode_is_a_run_of_the_simulator(single, played):
    result, rewards = played
    observation, info = single.reset(options={"key": KEY})
    assert info == {"round": 0, "regret": 0.0}
    past = 0.0
    for k in range(K):
        assert observation in single.observation_space
        np.testing.assert_array_equal(observation["mask"], 1)
        np.testing.assert_allclose(observation["sigma"], SIGMA[k])
        np.testing.assert_allclose(np.abs(observation["actions"]), SIGMA[k] ** 2)
        observation, reward, terminated, truncated, info = single.step(k % 4)
        assert (terminated, truncated) == (False, k == K - 1)
        np.testing.assert_allclose(reward, rewards[0, k], **ROUNDING)
        assert (info["round"], info["group"]) == (k + 1, 0 if SIGMA[k] > 0 else -1)  # quiet: no choice
        np.testing.assert_allclose(info["regret"], result.checkpoints.regret[k, 0], **ROUNDING)
        np.testing.assert_allclose(info["regret"] - past, info["best_mean"] - info["mean"], **ROUNDING)
        past = info["regret"]
    assert all((value == 0).all() for value in observation.values())
    with pytest.raises(gymnasium.error.ResetNeeded):
        single.unwrapped.step(0)


def test_a_batch_holds_the_runs_of_the_simulator(batch, played):
    result, rewards = played
    observation, info = batch.reset(options={"key": KEY})
    np.testing.assert_array_equal(info["round"], [0, 0])
    for k in range(K):
        assert observation in batch.observation_space
        observation, reward, terminated, truncated, info = batch.step(np.full(2, k % 4))
        np.testing.assert_allclose(reward, rewards[:, k], **ROUNDING)
        np.testing.assert_allclose(info["regret"], result.checkpoints.regret[k], **ROUNDING)
        np.testing.assert_array_equal(info["_regret"], [True, True])
        assert not terminated.any()
        np.testing.assert_array_equal(truncated, [k == K - 1] * 2)


def test_a_batch_starts_anew_in_the_step_after_truncation(batch):
    # gymnasium 1.0 has no enumeration yet, only this meaning.
    mode = getattr(batch.metadata["autoreset_mode"], "value", batch.metadata["autoreset_mode"])
    assert mode == "NextStep"
    first, _ = batch.reset(seed=5)
    for _ in range(K):
        *_, truncated, info = batch.step(np.zeros(2, int))
    assert truncated.all()
    regret = info["regret"]
    again, reward, terminated, truncated, info = batch.step(np.array([99, 99]))  # ignored
    np.testing.assert_array_equal(again["actions"], first["actions"])
    assert not (reward.any() or terminated.any() or truncated.any())
    np.testing.assert_array_equal(info["regret"], 0.0)
    for _ in range(K):
        *_, info = batch.step(np.zeros(2, int))
    assert (info["regret"] != regret).any()  # another theta
    assert (info["round"] == K).all()


def test_seeds_decide_and_episodes_differ(single):
    def regrets(seed):
        single.reset(seed=seed)
        found = []
        for _ in range(4):
            for k in range(K):
                *_, info = single.step(k % 4)
            found.append(info["regret"])
            single.reset()
        return found

    first = regrets(1)
    assert first == regrets(1)
    assert first != regrets(2)
    assert len(set(first)) > 1


def test_sigma_is_absent_on_request(single):
    env = gym.LinBanditEnv(VarianceScaledHypercube(SIGMA, 2), show_sigma=False)
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"actions", "mask"}
    assert observation in env.observation_space
    assert set(single.observation_space) == {"actions", "mask", "sigma"}


def test_masked_actions_and_other_nonsense_raise_and_play_nothing(single):
    # sigma = 1/K is group 0, whose rounds offer the unit vectors of its two coordinates.
    env = gymnasium.make(IDS[1], sigma=[1 / 4, 1, 1, 1], d=4, dims=[2, 0, 2]).unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["mask"], [0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"mask is 1, got 3 in round 0 \(from 0\), run 0"):
        env.step(3)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"action must be in \[0, 4\), got {wrong}"):
            env.step(wrong)
    for wrong in (1.0, [1], "row"):
        with pytest.raises(ValueError, match="action must be an integer"):
            env.step(wrong)
    *_, info = env.step(1)
    assert (info["round"], info["group"]) == (1, 0)
    assert info["best_mean"] == 1.0
    *_, info = env.step(0)
    assert (info["round"], info["group"]) == (2, 1)
    with pytest.raises(ValueError, match='options may hold "key" only'):
        env.reset(options={"kye": KEY})


def test_strong_adversaries_are_refused_where_decision_sets_depend_on_sigma():
    gym.LinBanditEnv(RandomContexts(2, 3, horizon=4), CooperativeStrong())
    with pytest.raises(ValueError, match="after the decision set"):
        gym.LinBanditEnv(VarianceScaledHypercube(SIGMA, 2), CooperativeStrong())


@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="env_id must be one of"):
        gym.make_vec("CartPole-v1", 2)
    with pytest.raises(ValueError, match="num_envs must be >= 1"):
        gym.make_vec(SCALED, 0)
    with pytest.raises(TypeError, match="gpa"):
        gym.make_env("ScaledHypercube", gpa=0.1)
    with pytest.raises(ValueError, match="family must be one of"):
        gym.make_env("Cube")
    with pytest.raises(ValueError, match="adversary must be given"):
        gym.LinBanditEnv(RandomContexts(2, 3, horizon=4))
    with pytest.raises(TypeError, match="show_sigma"):
        gym.make_env("ScaledHypercube", show_sigma="no")
    with pytest.raises(ValueError, match="not enumerated"):
        gym.LinBanditEnv(VarianceScaledHypercube(SIGMA, 13))


def test_a_missing_gymnasium_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "linbandit_lowerbounds.gym")
    with pytest.raises(ImportError, match=r'pip install "linbandit-lowerbounds\[gym\]"'):
        importlib.import_module("linbandit_lowerbounds.gym")


def test_an_adversary_of_choice_replaces_the_sequence():
    env = gym.make_env("ScaledHypercube", sigma=SIGMA, d=2, adversary=Prefixed(np.full(K, 0.5)))
    observation, _ = env.reset(seed=0)
    assert observation["sigma"] == 0.5
