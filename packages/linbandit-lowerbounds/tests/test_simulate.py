"""The simulator against a plain loop; causality, common rounds, resumption, sharding, who sees what."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.oful import linucb, oful
from linbandit_lowerbounds.compiled import Sum
from linbandit_lowerbounds.contexts import FixedSet
from linbandit_lowerbounds.environment import Adversary, Algorithm, no_draw, register
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.results import Result
from linbandit_lowerbounds.simulate import checkpoint_rounds, simulate

KEY = jax.random.key(7)
ROUNDS = 40
SIGMA = np.linspace(0.1, 1.0, ROUNDS)
# Actions of different lengths: equal ones would tie in the first round, and rounding decide which is played.
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (6, 3))
ARENA = FixedSet(ACTIONS, horizon=ROUNDS)
play = partial(simulate, oful(), ARENA, Prefixed(SIGMA), key=KEY, n_seeds=5, progress=False)


@register(arrays=())
class HalfAfterTen(Adversary):
    """Weak: one until ten rounds have passed, then a half."""

    sees = "history"

    def init(self, spec):
        return jnp.zeros((), jnp.int32)

    def choose(self, state, observation, draw):
        return jnp.where(state < 10, 1.0, 0.5)

    def update(self, state, transition):
        return state + 1


def same(first: Result, second: Result) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.state.leaves, second.state.leaves, strict=True))


def plain_loop(instance: FixedSet, seed: int) -> tuple[float, float]:
    """OFUL on a fixed set in NumPy, from the draws that the simulator documents."""
    theta = np.asarray(instance.init(jax.random.fold_in(jax.random.fold_in(KEY, 0), seed)))
    actions = np.asarray(instance.actions)
    gram, response, regret = np.eye(3), np.zeros(3), 0.0
    for k in range(ROUNDS):
        drawn = instance.draw(jax.random.fold_in(jax.random.fold_in(KEY, 1), k), (5,))
        beta = np.sqrt(2 * np.log(np.sqrt(np.linalg.det(gram)) / 0.01)) + 1
        inverse = np.linalg.inv(gram)
        widths = np.sqrt(np.einsum("ai,ij,aj->a", actions, inverse, actions))
        x = actions[np.argmax(actions @ inverse @ response + beta * widths)]
        regret += (actions @ theta).max() - x @ theta
        gram += np.outer(x, x)
        response += x * (x @ theta + SIGMA[k] * float(drawn.noise[seed]))
    return regret, float((SIGMA**2).sum())


def test_equals_a_plain_loop_on_the_documented_draws(x64):
    instance = FixedSet(ACTIONS, horizon=ROUNDS)  # in float64
    result = simulate(oful(), instance, Prefixed(SIGMA), key=KEY, n_seeds=5, progress=False)
    for seed in range(5):
        regret, variance = plain_loop(instance, seed)
        # Float64 sums of 40 terms of size 1.
        assert result.regret[seed] == pytest.approx(regret, abs=1e-11)
        assert result.variance_sum[seed] == pytest.approx(variance, abs=1e-12)


def test_a_run_does_not_depend_on_how_many_others_there_are():
    few, many = play(n_seeds=2), play(n_seeds=5)
    # Batched products may round differently for other batch sizes.
    np.testing.assert_allclose(few.regret, many.regret[:2], rtol=2e-5)


def test_one_key_gives_the_same_result_and_another_key_another():
    assert same(play(), play())
    assert not np.allclose(play().regret, play(key=jax.random.key(8)).regret)


def test_two_learners_meet_the_same_theta():
    states = [simulate(a, ARENA, Prefixed(SIGMA), key=KEY, n_seeds=5).state for a in (oful(), linucb())]
    np.testing.assert_array_equal(states[0].leaves[0], states[1].leaves[0])


def test_the_future_noise_does_not_change_the_past():
    other = SIGMA.copy()
    other[20:] = 0.0
    first = play(record="all").checkpoints
    second = simulate(
        oful(), ARENA, Prefixed(other), key=KEY, n_seeds=5, record="all", progress=False
    ).checkpoints
    np.testing.assert_array_equal(first.regret[:21], second.regret[:21])
    assert not np.array_equal(first.regret[22:], second.regret[22:])


@pytest.mark.parametrize("stops", [(1,), (16,), (13, 29)])
def test_a_resumed_simulation_equals_an_uninterrupted_one_bit_for_bit(stops, tmp_path):
    part = None
    for stop in stops:
        part = play(horizon=stop, resume=part, record="all")
        part.save(tmp_path / "part.npz")
        part = Result.load(tmp_path / "part.npz")
    resumed, whole = play(resume=part, record="all"), play(record="all")
    assert same(resumed, whole)
    for a, b in zip(resumed.checkpoints, whole.checkpoints, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_length_of_chunks_changes_nothing(x64, monkeypatch):
    instance = FixedSet(ACTIONS, horizon=ROUNDS)  # in float64
    play_fixed = partial(
        simulate, oful(), instance, Prefixed(SIGMA), key=KEY, n_seeds=5, record="all", progress=False
    )
    whole = play_fixed()
    monkeypatch.setattr("linbandit_lowerbounds.compiled._CHUNK_ROUNDS", (8, 8))
    chunked = play_fixed()
    # Another program for the same rounds: float64 rounding.
    np.testing.assert_allclose(chunked.checkpoints.regret, whole.checkpoints.regret, atol=1e-11)
    np.testing.assert_array_equal(chunked.checkpoints.rounds, whole.checkpoints.rounds)
    assert same(play_fixed(resume=play_fixed(horizon=21)), chunked)


def test_resuming_does_not_consume_the_state():
    part = play(horizon=10)
    assert same(play(resume=part.state), play(resume=part.state))


def test_save_to_holds_the_finished_result(tmp_path):
    result = play(save_to=tmp_path / "run.npz")
    loaded = Result.load(tmp_path / "run.npz")
    assert same(result, loaded)
    np.testing.assert_array_equal(loaded.self_certificate, result.self_certificate)
    assert (loaded.algorithm, loaded.rounds, loaded.sees_theta) == ("OFUL", ROUNDS, False)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.npz"]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": jax.random.key(8)},
        {"n_seeds": 6},
        {"mode": "dense"},
        {"horizon": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_of_another_simulation_is_refused(changes):
    part = play(horizon=10)
    with pytest.raises(ValueError, match=r"resume must come from|horizon must be >= 10"):
        play(resume=part, **changes)


def test_a_state_of_another_learner_or_instance_is_refused():
    part = play(horizon=10)
    with pytest.raises(ValueError, match="resume must come from"):
        simulate(oful(delta=0.02), ARENA, Prefixed(SIGMA), key=KEY, n_seeds=5, resume=part)
    with pytest.raises(ValueError, match="resume must come from"):
        simulate(oful(), ARENA, Prefixed(SIGMA / 2), key=KEY, n_seeds=5, resume=part)


def test_a_file_that_is_no_result_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", regret=np.zeros(3))
    with pytest.raises(ValueError, match=r"file written by Result.save"):
        Result.load(tmp_path / "other.npz")


def test_checkpoints_are_the_full_record_at_rounds_of_a_logarithmic_grid():
    some, every = play(record="checkpoints").checkpoints, play(record="all").checkpoints
    np.testing.assert_array_equal(every.rounds, np.arange(1, ROUNDS + 1))
    np.testing.assert_array_equal(some.rounds, checkpoint_rounds(ROUNDS))
    np.testing.assert_array_equal(some.regret, every.regret[some.rounds - 1])
    np.testing.assert_array_equal(some.regret[-1], play().regret)
    assert some.rounds[0] == 1
    assert some.rounds[-1] == ROUNDS


def test_unrolling_changes_nothing_but_the_program():
    np.testing.assert_allclose(play(unroll=3).regret, play().regret, rtol=2e-5)


def test_dense_and_block_agree_where_there_is_one_block():
    np.testing.assert_array_equal(play(mode="dense").regret, play().regret)


@pytest.mark.slow
def test_a_batch_equals_runs_without_compilation(x64):
    cube = VarianceScaledHypercube(np.linspace(0.2, 1.0, 6), 2)
    compiled = simulate(oful(), cube, key=KEY, n_seeds=2, progress=False)
    with jax.disable_jit():
        plain = simulate(oful(), cube, key=KEY, n_seeds=2, progress=False)
    # Fused and unfused float64 programs differ by rounding.
    np.testing.assert_allclose(compiled.regret, plain.regret, rtol=1e-12)


def test_a_weak_adversary_chooses_from_the_past():
    result = simulate(oful(), ARENA, HalfAfterTen(), key=KEY, n_seeds=3, record="all", progress=False)
    steps = np.diff(result.checkpoints.variance_sum[:, 0], prepend=0.0)
    np.testing.assert_allclose(steps, [1.0] * 10 + [0.25] * 30, rtol=1e-5)


def test_rounds_with_sigma_zero_are_counted():
    sigma = SIGMA.copy()
    sigma[3:9] = 0.0
    result = simulate(oful(), ARENA, Prefixed(sigma), key=KEY, n_seeds=2, progress=False)
    np.testing.assert_array_equal(result.rounds_stopped, [6, 6])


def test_the_certificate_bounds_the_regret_of_an_optimist():
    result = play()
    assert (result.self_certificate >= result.regret).all()
    assert (result.self_certificate <= float(ARENA.reward_range) * ROUNDS).all()


def test_the_instance_brings_its_own_sequence():
    cube = VarianceScaledHypercube(SIGMA, 2)
    result = simulate(oful(), cube, key=KEY, n_seeds=2, progress=False)
    assert result.variance_sum[0] == pytest.approx((SIGMA**2).sum(), rel=1e-6)


# ---------------------------------------------------------------------------------------------- who sees what


def spy(needs_sigma: str, seen: list) -> Algorithm:
    def act(state, decision_set, sigma, draw):
        seen.append(("act", sigma is not None))
        return decision_set.argmax(jnp.zeros(3))

    def update(state, decision_set, choice, reward, sigma):
        seen.append(("update", sigma is not None))
        return state

    def init(key, spec):
        seen.append(("init", spec.sigma is not None))
        return ()

    return Algorithm(init, act, update, needs_sigma, "spy", no_draw)


@pytest.mark.parametrize(
    ("needs_sigma", "expected"),
    [
        ("never", {("init", False), ("act", False), ("update", False)}),
        ("after", {("init", False), ("act", False), ("update", True)}),
        ("before", {("init", False), ("act", True), ("update", True)}),
        ("upfront", {("init", True), ("act", True), ("update", True)}),
    ],
)
def test_a_learner_gets_sigma_only_when_it_says_so(needs_sigma, expected):
    seen: list = []
    simulate(spy(needs_sigma, seen), ARENA, Prefixed(SIGMA), key=KEY, n_seeds=1, horizon=2, progress=False)
    assert set(seen) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_seeds": 0}, "n_seeds must be >= 1, got 0"),
        ({"n_seeds": 1.5}, "n_seeds must be an integer, got 1.5"),
        ({"horizon": ROUNDS + 1}, "horizon must be <= 40, that of the instance, got 41"),
        ({"horizon": 0}, "horizon must be >= 1, got 0"),
        ({"unroll": 0}, "unroll must be >= 1, got 0"),
        ({"record": "some"}, "record must be one of .*, got 'some'"),
        ({"mode": "sparse"}, "mode must be one of .*, got 'sparse'"),
    ],
    ids=lambda case: str(case)[:30],
)
def test_bad_arguments_are_named(unchecked, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        play(**arguments)


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="needs_sigma must be"):
        simulate(spy("always", []), ARENA, Prefixed(SIGMA), key=KEY, n_seeds=1)
    with pytest.raises(ValueError, match="adversary must be given: FixedSet"):
        simulate(oful(), ARENA, key=KEY, n_seeds=1)
    with pytest.raises(ValueError, match="sigma must cover 40 rounds, got 5"):
        simulate(oful(), ARENA, Prefixed(SIGMA[:5]), key=KEY, n_seeds=1)
    with pytest.raises(ValueError, match="only a Prefixed adversary"):
        simulate(spy("upfront", []), ARENA, HalfAfterTen(), key=KEY, n_seeds=1)
    with pytest.raises(ValueError, match=r"2\*\*12 actions"):
        simulate(oful(), VarianceScaledHypercube(SIGMA, 13), key=KEY, n_seeds=1)


def test_float32_is_warned_about_when_it_is_long():
    long = FixedSet(np.eye(2), horizon=600_000)
    with pytest.warns(UserWarning, match="600000 rounds in 2 dimensions in float32"):
        simulate(oful(), long, Prefixed(np.ones(600_000)), key=KEY, n_seeds=1, horizon=2)


def test_compensated_sums_keep_a_million_small_terms():
    plus = jax.jit(lambda s: jax.lax.fori_loop(0, 1_000_000, lambda _, s: s.plus(jnp.float32(0.1)), s))
    total = plus(Sum(jnp.float32(0), jnp.float32(0))).total
    # One rounding of the result, against 1 % lost by plain float32 addition.
    assert float(total) == pytest.approx(1e6 * float(np.float32(0.1)), rel=2e-7)


TWO_DEVICES = """
import jax, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.contexts import FixedSet
from linbandit_lowerbounds.simulate import simulate

assert len(jax.devices()) == 2
spread = NamedSharding(Mesh(np.array(jax.devices()), ("runs",)), PartitionSpec("runs"))
actions = np.random.default_rng(0).uniform(-1, 1, (6, 3))
arena, noise = FixedSet(actions, horizon=40), Prefixed(np.ones(40))
play = partial(simulate, oful(), arena, noise, key=jax.random.key(3))
one, two = (play(n_seeds=6, sharding=where) for where in (None, spread))
np.testing.assert_allclose(one.regret, two.regret, rtol=2e-5)
part = play(n_seeds=6, sharding=spread, horizon=17)
np.testing.assert_array_equal(play(n_seeds=6, sharding=spread, resume=part).regret, two.regret)
try:
    play(n_seeds=5, sharding=spread)
except ValueError as error:
    assert "multiple of its 2 devices" in str(error)
else:
    raise AssertionError("five runs on two devices")
"""


def test_two_devices_equal_one():
    two = "--xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {two}", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", TWO_DEVICES], check=True, env=os.environ | flags, timeout=120)
