"""The capture of module calls: what it reports, and that it leaves model and classes as they were."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mup_features.flax.capture import capture, named_modules


class Block(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.fc(x))


class Doubled(Block):
    """Calls its base class, which is watched too."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        # flax before 0.12 takes lists of modules as they are.
        self.blocks = getattr(nnx, "List", list)([Block(rngs), Doubled(rngs)])
        self.readout = nnx.Linear(3, 2, rngs=rngs)
        self.tied = self.blocks[0].fc

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


@pytest.fixture
def net():
    return Net(nnx.Rngs(0))


def calls_of(model, x, names=None):
    seen = []
    with capture(model, lambda name, _, args, output: seen.append((name, args[0], output)), names):
        model(x)
    return seen


def test_every_call_is_reported_once_in_order_with_its_input_and_output(net):
    x = jnp.ones((4, 3))
    seen = calls_of(net, x)
    names = ["blocks.0.fc", "blocks.0", "blocks.1.fc", "blocks.1", "readout", ""]
    assert [name for name, _, _ in seen] == names
    outputs = {name: output for name, _, output in seen}
    inputs = {name: value for name, value, _ in seen}
    assert jnp.array_equal(outputs["blocks.1"], 2 * jnp.tanh(outputs["blocks.1.fc"]))
    assert jnp.array_equal(inputs["readout"], outputs["blocks.1"])
    assert jnp.array_equal(outputs[""], net(x))


def test_only_the_named_modules_of_the_given_model_report(net):
    other = Net(nnx.Rngs(1))
    seen = []
    with capture(net, lambda name, *_: seen.append(name), {"readout"}):
        other(jnp.ones((1, 3)))
        net(jnp.ones((1, 3)))
    assert seen == ["readout"]


def test_the_classes_are_restored_even_after_an_error(net):
    before = (Block.__call__, nnx.Linear.__call__, Net.__dict__["__call__"])

    class Inherits(Block):
        pass

    net.blocks[0] = Inherits(nnx.Rngs(2))
    with pytest.raises(RuntimeError), capture(net, lambda *_: None):
        raise RuntimeError
    assert (Block.__call__, nnx.Linear.__call__, Net.__dict__["__call__"]) == before
    assert "__call__" not in vars(Inherits)


def test_values_captured_inside_jit_can_be_returned_from_it(net):
    graph, state = nnx.split(net)

    @jax.jit
    def run(state, x):
        model, seen = nnx.merge(graph, state), {}
        with capture(model, lambda name, _module, _args, output: seen.update({name: output})):
            model(x)
        return seen

    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    found = run(state, x)
    assert set(found) == {name for name, module in named_modules(net).items() if callable(module)}
    # XLA fuses what eager execution does one by one: a few units in the last place of float32.
    assert jnp.allclose(found["readout"], net(x), rtol=1e-5, atol=1e-6)


def test_a_module_inside_a_transform_does_not_report_its_tracers():
    class Rematerialised(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.out = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.remat(lambda fc, x: fc(x))(self.fc, x))

    seen = calls_of(Rematerialised(nnx.Rngs(0)), jnp.ones((2, 3)))
    assert [name for name, _, _ in seen] == ["out", ""]


def test_a_wrong_model_or_name_is_refused_before_anything_is_patched(net):
    before = nnx.Linear.__call__
    with pytest.raises(TypeError, match=r"flax\.nnx\.Module, got int"), capture(3, lambda *_: None):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="'raedout'"), capture(net, lambda *_: None, {"raedout"}):
        pass
    assert nnx.Linear.__call__ is before
