"""Parameters and features spread over two devices, in one process and in two: the numbers of one device.

The tests run this file in processes of its own, since the number of devices is settled when jax starts.
"""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from nnx_models import MLP, drawn
from precision import float64

from mup_features.flax import mup_transform, record_features
from mup_features.roles import Role

X = np.random.default_rng(0).normal(size=(6, 8))
# kernels and biases of neighbouring layers, so that every layer's features are sharded
SPLIT = {
    "enter": (P(None, "model"), P("model")),
    "middle": (P(None, "model"), P("model")),
    "leave": (P("model"), P()),
}


def placed(array, spec, mesh):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def spread(model, mesh):
    for name, (of_kernel, of_bias) in SPLIT.items():
        layer = getattr(model, name)
        layer.kernel[...] = placed(layer.kernel[...], of_kernel, mesh)
        layer.bias[...] = placed(layer.bias[...], of_bias, mesh)


def distance(found, expected):
    return max(np.abs(found.layers[name].gram - layer.gram).max() for name, layer in expected.layers.items())


def gaps_of_features(mesh):
    """Distances of Grams from those on one device, by how they were taken."""
    model = drawn(lambda: MLP(16, nnx.Rngs(0), jnp.float64))
    options = {"when": "both", "layers": "auto"}
    plain = record_features(model, X, **options)
    sketched = record_features(model, X, max_features=10, **options)
    spread(model, mesh)
    assert not model.enter(X).is_fully_replicated
    whole = record_features(model, X, passes=3, **options)
    sketches = record_features(model, placed(X, P("model"), mesh), max_features=10, **options)
    assert np.array_equal(sketches.sample_keys, plain.sample_keys)
    return {"features": distance(whole, plain), "sketch of split samples": distance(sketches, sketched)}


def trained(spec, mesh):
    """Kernel of the first layer after three steps."""
    roles = {"enter.kernel": Role("input", fan_out_mult=4), "leave.kernel": Role("output", fan_in_mult=4)}
    transform = mup_transform(optax.adam(1e-2), roles, weight_decay=0.1, learning_rate=1e-2)
    kernels = {"enter": np.linspace(-1, 1, 24).reshape(3, 8), "leave": np.ones((8, 2))}
    params = {name: {"kernel": placed(kernel, spec, mesh)} for name, kernel in kernels.items()}
    state = transform.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((jnp.ones(3) @ params["enter"]["kernel"] @ params["leave"]["kernel"] - 1) ** 2)

        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    return params["enter"]["kernel"]


def main(port=None, process=0):
    if port is not None:
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    made = {"devices": mesh.size, "processes": jax.process_count()}
    with float64(True):
        made["gaps"] = gaps_of_features(mesh)
        if port is None:
            one, two = (trained(spec, mesh) for spec in (P(), P(None, "model")))
            assert not two.is_fully_replicated
            made["training"] = float(np.abs(np.asarray(two) - np.asarray(one)).max())
    print(json.dumps(made))  # noqa: T201


def started(devices, *arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    changed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | changed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def made_by(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def two_devices():
    with started(2) as process:
        return made_by(process)


def test_sharded_parameters_train_as_on_one_device(two_devices):
    # float64, sums of two halves instead of one
    assert two_devices["devices"] == 2
    assert two_devices["training"] < 1e-12


def test_sharded_features_have_the_grams_of_one_device(two_devices):
    for name, gap in two_devices["gaps"].items():
        assert gap < 1e-12, name  # as above; entries are of order one


@pytest.mark.slow
def test_two_processes_end_with_the_grams_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with started(1, port, "0") as first, started(1, port, "1") as second:
        try:
            for made in (made_by(first), made_by(second)):
                assert (made["devices"], made["processes"]) == (2, 2)
                assert max(made["gaps"].values()) < 1e-12
        finally:
            # one that failed leaves the other waiting
            first.kill()
            second.kill()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
