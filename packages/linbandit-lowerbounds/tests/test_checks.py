"""Arguments that are no participants of a game, no keys and no files are named before any work."""

import jax
import numpy as np
import pytest

from linbandit_lowerbounds import checks
from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.certify import certify
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.environment import Adversary
from linbandit_lowerbounds.interop import from_object, play_object
from linbandit_lowerbounds.simulate import simulate

KEY = jax.random.key(0)
CONTEXTS = RandomContexts(2, 3, horizon=4)


class First:
    """Plays the first row."""

    def act(self, actions, sigma=None):
        return 0

    def update(self, x, reward, sigma=None):
        pass


class Unregistered(Adversary):
    """No pytree."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"algorithm": oful},
            r"must be an Algorithm, as factories return it \(oful\(\), not oful\)",
        ),
        ({"algorithm": from_object(First)}, "Python objects are played by play_object"),
        ({"instance": None}, "instance must be an Instance, got None"),
        ({"instance": RandomContexts}, "instance must be an Instance"),
        ({"adversary": np.ones(4)}, "adversary must be an Adversary"),
        ({"adversary": Unregistered()}, "decorate Unregistered with @register"),
        ({"key": 0}, "key must be made by jax.random.key, got 0"),
        ({"key": jax.random.PRNGKey(0)}, "key must be made by jax.random.key"),
        ({"key": jax.random.split(KEY)}, r"key must be a single key, got keys of shape \(2,\)"),
        ({"sharding": "gpu"}, "sharding must be a jax.sharding.NamedSharding, got 'gpu'"),
        ({"resume": "result.npz"}, "resume must be a Result or its state, got str"),
        ({"save_to": "no such folder/result.npz"}, "save_to must be a file in a folder that exists"),
    ],
    ids=lambda case: str(case)[:30],
)
def test_what_simulate_cannot_use_is_named(unchecked, arguments, message):
    settings = {"algorithm": oful(), "instance": CONTEXTS, "adversary": Prefixed(np.ones(4)), "key": KEY}
    with pytest.raises((TypeError, ValueError), match=message):
        simulate(**{**settings, "n_seeds": 1, "progress": False, **arguments})


def test_other_players_ask_for_the_same(unchecked):
    with pytest.raises(TypeError, match="key must be made by"):
        certify(oful(), key=0)
    with pytest.raises(TypeError, match="key must be made by"):
        play_object(from_object(First), CONTEXTS, Prefixed(np.ones(4)), key=0, n_seeds=1)
    with pytest.raises(TypeError, match="instance must be an Instance"):
        play_object(from_object(First), 3, key=KEY, n_seeds=1)


@pytest.mark.parametrize("value", ["ab", ["0.5"], [1j], [[1.0], [1.0, 2.0]], object()])
def test_only_real_numbers_are_numbers(value):
    with pytest.raises(TypeError, match="x must be an array of numbers"):
        checks.reals("x", value)


def test_numbers_of_every_width_are_float64():
    for dtype in (bool, np.int8, np.float16, np.float32):
        assert checks.reals("x", np.ones(2, dtype)).dtype == np.float64
    assert checks.reals("x", jax.numpy.ones(2, "bfloat16")).tolist() == [1.0, 1.0]
