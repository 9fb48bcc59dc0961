"""MARS on two host devices: sharded arrays under jit and shards inside shard_map give the trajectory of one.

XLA fixes the number of host devices when it starts, so each check runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from mars_optim.jax import mars  # noqa: E402

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:
    from jax.experimental.shard_map import shard_map

SHAPES = {"rows": (4, 6), "columns": (3, 8), "replicated": (3, 2), "bias": (6,)}
SPECS = {"rows": P("d"), "columns": P(None, "d"), "replicated": P(), "bias": P("d")}
# float64 with another order of summation over the two shards.
ROUNDING = 1e-12


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def train(update, params, state):
    for seed in range(1, 4):
        updates, state = update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING), left, right)


def check_named_sharding():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    assert mesh.size == 2
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    for mars_type in ("adamw", "shampoo"):
        tx = mars(0.05, mars_type, gamma=0.1, weight_decay=0.1)
        params = tree(0)
        expected = train(jax.jit(tx.update), params, tx.init(params))
        sharded = jax.device_put(params, shardings)
        state = tx.init(sharded)
        assert state.mu["rows"].sharding.is_equivalent_to(shardings["rows"], 2)
        assert_same(train(jax.jit(tx.update), sharded, state), expected)


def check_shard_map():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    for clip_scope, mars_type in (("leaf", "adamw"), ("global", "sgd")):
        options = {"gamma": 0.1, "clip": 0.3, "clip_scope": clip_scope, "optimize_1d": True}
        whole, parts = mars(0.05, mars_type, **options), mars(0.05, mars_type, axis_name=SPECS, **options)
        params = tree(0)
        state = whole.init(params)
        expected = train(jax.jit(whole.update), params, state)
        # Placing the state needs a spec for each of its arrays: those of the parameters, () for the count.
        specs = optax.tree_utils.tree_map_params(
            whole,
            lambda x, spec: x if isinstance(x, optax.MaskedNode) else spec,
            state,
            SPECS,
            transform_non_params=lambda _: P(),
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
        update = shard_map(parts.update, mesh=mesh, in_specs=(SPECS, specs, SPECS), out_specs=(SPECS, specs))
        assert_same(train(jax.jit(update), params, state), expected)
        # One collective, however many leaves there are.
        text = str(jax.make_jaxpr(update)(params, state, params))
        assert len(re.findall(r"= psum\w*\[", text)) == 1, text


def check_shard_map_by_axis_name():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    params = tree(0)["rows"]
    for name in ("d", ("d",)):
        whole, parts = mars(0.05, clip=0.3), mars(0.05, clip=0.3, axis_name=name)
        state = whole.init(params)
        specs = jax.tree.map(lambda x: P("d") if x.ndim else P(), state)
        update = shard_map(
            parts.update, mesh=mesh, in_specs=(P("d"), specs, P("d")), out_specs=(P("d"), specs)
        )
        expected, _ = whole.update(params, state, params)
        assert_same(jax.jit(update)(params, state, params)[0], expected)
        # Without the sum each shard would be clipped by its own norm.
        alone = mars(0.05, clip=0.3)
        update = shard_map(
            alone.update, mesh=mesh, in_specs=(P("d"), specs, P("d")), out_specs=(P("d"), specs)
        )
        wrong = jax.jit(update)(params, state, params)[1].mu
        assert np.abs(wrong - whole.update(params, state, params)[1].mu).max() > 1e-3


@pytest.mark.parametrize(
    "check",
    [
        check_named_sharding,
        pytest.param(check_shard_map, marks=pytest.mark.slow),
        pytest.param(check_shard_map_by_axis_name, marks=pytest.mark.slow),
    ],
)
def test_two_devices_give_the_trajectory_of_one(check):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_jax_sharding as t; t.{check.__name__}()"
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
