"""Who sees what: no participant is handed more than the protocol gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linbandit_lowerbounds.adversaries import CooperativeStrong, Prefixed, Switching
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.composites import PeelingInstance
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.environment import (
    Adversary,
    Algorithm,
    Instance,
    Observation,
    Spec,
    Transition,
    no_draw,
    register,
)
from linbandit_lowerbounds.hypercubes import GaussianHypercube, VarianceScaledHypercube
from linbandit_lowerbounds.multi_instances import LeastLoadedInstance
from linbandit_lowerbounds.simulate import match, simulate

KEY = jax.random.key(0)
CONTEXTS = RandomContexts(3, 4, horizon=8)
SCALED = VarianceScaledHypercube(np.ones(8), 2)


@register(arrays=())
class Spying(Adversary):
    """Weak; keeps what it is shown, and asks for more in `extra`."""

    sees = "history"
    seen: tuple = ()

    def __init__(self):
        type(self).seen = ()

    def choose(self, state, observation, draw):
        type(self).seen += (observation,)
        return jnp.ones(())

    def update(self, state, transition):
        type(self).seen += (transition,)
        return state


class StrongSpy(Spying):
    sees = "decision_set"


register(arrays=())(StrongSpy)


def learner(needs_sigma, log):
    """Plays action 0 and logs the sigma that it is handed."""

    def act(_state, shown, sigma, _draw):
        log.append(("act", sigma is not None))
        return shown.choice_of(0)

    def update(state, _shown, _choice, _reward, sigma):
        log.append(("update", sigma is not None))
        return state

    return Algorithm(
        lambda _key, _spec: jnp.zeros(()), act, update, needs_sigma, "logger", no_draw, config=needs_sigma
    )


def test_observations_and_transitions_have_no_room_for_theta():
    assert Observation._fields == ("k", "variance_sum", "decision_set")
    assert Transition._fields == ("k", "decision_set", "choice", "reward", "sigma")
    names = {field.name for field in Spec.__dataclass_fields__.values()}
    assert names == {"sigma", "gap", "dim", "n_blocks", "block_dim", "n_actions", "n_signs", "horizon"}


@pytest.mark.parametrize(("spy", "shown"), [(Spying, False), (StrongSpy, True)])
def test_an_adversary_sees_the_decision_set_only_if_it_is_strong(spy, shown):
    adversary = spy()
    simulate(learner("never", []), CONTEXTS, adversary, key=KEY, n_seeds=2, progress=False)
    observations = [seen for seen in spy.seen if isinstance(seen, Observation)]
    assert observations
    assert all((seen.decision_set is not None) == shown for seen in observations)


@pytest.mark.parametrize(
    ("needs", "act", "update"),
    [("never", False, False), ("after", False, True), ("before", True, True), ("upfront", True, True)],
)
def test_a_learner_is_told_sigma_when_it_declared(needs, act, update):
    log = []
    simulate(learner(needs, log), SCALED, key=KEY, n_seeds=2, progress=False)
    assert set(log) == {("act", act), ("update", update)}


def test_reading_theta_off_an_observation_is_an_error():
    @register(arrays=())
    class Thief(Adversary):
        sees = "history"

        def choose(self, state, observation, draw):
            return jnp.abs(observation.theta).max()

    with pytest.raises(AttributeError, match="theta"):
        simulate(learner("never", []), CONTEXTS, Thief(), key=KEY, n_seeds=2, progress=False)


def test_only_yardsticks_declare_that_they_know_theta():
    result = simulate(learner("never", []), SCALED, key=KEY, n_seeds=2, progress=False)
    assert not result.sees_theta


@pytest.mark.parametrize(
    "instance", [SCALED, LeastLoadedInstance(8, 100, 0.5)], ids=["scaled", "least loaded"]
)
def test_strong_adversaries_are_refused_where_sigma_makes_the_set(instance):
    with pytest.raises(ValueError, match="builds the decision set from sigma"):
        match(oful(), instance, CooperativeStrong(), 8)


@pytest.mark.parametrize(
    "instance",
    [CONTEXTS, GaussianHypercube(8, 2), PeelingInstance(np.ones(8), 2)],
    ids=["contexts", "gaussian", "peeling"],
)
def test_strong_adversaries_play_where_it_does_not(instance):
    spec = match(oful(), instance, CooperativeStrong(), 8)
    assert spec.sigma is None


@pytest.mark.parametrize("sight", ["theta", "everything", None])
def test_an_unknown_sight_is_refused(sight):
    @register(arrays=())
    class Greedy(Adversary):
        sees = sight

    with pytest.raises(ValueError, match="theta is shown to none"):
        match(oful(), CONTEXTS, Greedy(), 8)


def test_an_unknown_time_of_sigma_is_refused():
    with pytest.raises(ValueError, match="needs_sigma must be"):
        match(learner("always", []), CONTEXTS, Switching(2.0), 8)


def test_the_sequence_is_told_upfront_only_if_there_is_one():
    spec = match(learner("upfront", []), CONTEXTS, Prefixed(np.linspace(0, 1, 8)), 8)
    np.testing.assert_allclose(spec.sigma, np.linspace(0, 1, 8), rtol=1e-6)
    with pytest.raises(ValueError, match="before the first round"):
        match(learner("upfront", []), CONTEXTS, Switching(2.0), 8)
    assert match(learner("before", []), CONTEXTS, Prefixed(np.ones(8)), 8).sigma is None


@pytest.mark.parametrize(("horizon", "sigma"), [(9, np.ones(9)), (8, np.ones(7))])
def test_rounds_beyond_instance_or_sequence_are_refused(horizon, sigma):
    with pytest.raises(ValueError, match=r"horizon must be <= 8|sigma must cover 8 rounds"):
        match(oful(), CONTEXTS, Prefixed(sigma), horizon)


def test_registered_classes_are_pytrees_that_keep_their_static_part():
    leaves, structure = jax.tree.flatten(SCALED)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, VarianceScaledHypercube)
    assert (again.n_signs, again.horizon, again.noise, again.block_dim, again.max_actions) == (
        2,
        8,
        "gaussian",
        2,
        4,
    )
    # A transformed instance never runs its constructor, which could not validate traced values.
    doubled = jax.jit(lambda cube: jax.tree.map(lambda leaf: 2 * leaf, cube))(SCALED)
    np.testing.assert_array_equal(doubled.gap, 2 * SCALED.gap)


def test_spec_in_one_block_has_all_coordinates_in_one():
    spec = PeelingInstance([1.0, 0.2] * 6, 4, bias="centered").spec()
    dense = spec.in_one_block()
    assert (spec.n_blocks, dense.n_blocks) == (2, 1)
    assert dense.block_dim == spec.n_blocks * spec.block_dim
    assert (dense.dim, dense.n_signs, dense.horizon) == (spec.dim, spec.n_signs, spec.horizon)


def test_bases_do_nothing_by_themselves():
    instance, adversary = Instance(), Adversary()
    for call in (
        lambda: instance.init(KEY),
        lambda: instance.decision_set(None, jnp.zeros(()), jnp.zeros(()), None),
        lambda: instance.reward(None, None, jnp.zeros(()), jnp.zeros(()), None),
        lambda: adversary.choose((), Observation(jnp.zeros(()), jnp.zeros(()), None), None),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert instance.after("state", None, jnp.zeros(())) == "state"
    assert adversary.update("state", None) == "state"
    assert (instance.prefix, instance.gap) == (None, None)
