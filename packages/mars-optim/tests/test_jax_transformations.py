"""MARS inside what JAX users wrap optimisers in: jit, scan, optax's wrappers and flax's nnx.Optimizer."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from mars_optim.jax import mars, mars_correction, mars_value_and_grad, scale_by_mars  # noqa: E402

TYPES = ("adamw", "lion", "shampoo", "m", "sgd")
# jit may fuse multiply-adds: float32 rounding, amplified by Newton-Schulz (up to 3.4 a step) and by Adam's
# division.
FUSED = 1e-4


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "conv": jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32),
        "dense": {
            "bias": jnp.asarray(rng.normal(size=(3,)), jnp.float32),
            "gain": jnp.asarray(rng.normal(), jnp.float32),
        },
        "kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
    }


def pair(seed):
    """One leaf of each kind, where it is not about the kinds: compiling takes its time per leaf."""
    return {"kernel": tree(seed)["kernel"], "bias": tree(seed)["dense"]["bias"]}


def assert_close(left, right, tolerance=FUSED):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def signature(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def step(tx, params, state, g, h=None):
    extra = {} if h is None else {"prev_grads": h}
    updates, state = tx.update(g, state, params, **extra)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("mars_type", "exact"),
    [("adamw", False), ("lion", True), ("shampoo", False), ("m", True), ("sgd", False)],
)
def test_jit_and_scan_equal_eager_steps(mars_type, exact):
    tx = mars(0.05, mars_type, is_approx=not exact, keep_prev_params=True, amsgrad=True)
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), *(tree(seed) for seed in range(5)))
    before = jax.tree.map(lambda g: 0.9 * g, grads) if exact else None

    def body(carry, inputs):
        return step(tx, *carry, *inputs), None

    params = tree(9)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, (grads, before)))((params, tx.init(params)))
    eager = (params, tx.init(params))
    for t in range(5):
        eager = step(tx, *eager, *jax.tree.map(lambda x, t=t: x[t], (grads, before)))
    assert_close(scanned, eager)


@pytest.mark.parametrize("mars_type", TYPES)
def test_updates_keep_structure_shapes_and_dtypes_and_the_state_its_own(mars_type):
    params = tree(0) | {
        "low": jnp.ones((3, 2), jnp.bfloat16),
        "half": jnp.ones((2,), jnp.float16),
        "none": None,
    }
    for tx in (mars(0.1, mars_type), scale_by_mars(mars_type), mars_correction()):
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert signature(updates) == signature(params)
        assert signature(after) == signature(state)


def test_second_step_does_not_compile_again():
    traces = []

    @jax.jit
    def update(g, state, params):
        traces.append(1)
        return tx.update(g, state, params, unexpected_extra_argument=1)

    tx = mars(optax.linear_schedule(0.1, 0.0, 10), gamma=optax.linear_schedule(0.0, 0.1, 10))
    params = {"a": 1.0, "b": jnp.ones((2, 2))}
    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    assert len(traces) == 1
    assert int(state.correction.count) == 3


@pytest.mark.parametrize("mars_type", TYPES)
def test_every_type_minimises_a_quadratic(mars_type):
    target = pair(1)
    tx = mars(
        optax.linear_schedule(0.2, 0.0, 300),
        mars_type,
        gamma=0.1,
        clip=10.0,
        weight_decay=0.0,
        weight_decay_1d=0.0,
    )

    def loss(params):
        return sum(
            jnp.sum((p - t) ** 2)
            for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    @jax.jit
    def train(params):
        carry = params, tx.init(params)
        return jax.lax.scan(lambda c, _: (step(tx, *c, jax.grad(loss)(c[0])), None), carry, None, 300)[0][0]

    start = jax.tree.map(jnp.zeros_like, target)
    assert float(loss(train(start))) < 1e-2 * float(loss(start))


def test_injected_hyperparameters_equal_the_plain_ones_and_can_be_changed():
    injected = optax.inject_hyperparams(mars, static_args=("mars_type",))(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10), mars_type="shampoo", gamma=0.1, weight_decay=0.1
    )
    plain = mars(optax.linear_schedule(0.1, 0.0, 10), "shampoo", gamma=0.1, weight_decay=0.1)
    params, update = pair(0), jax.jit(injected.update)
    left, right = (params, injected.init(params)), (params, plain.init(params))
    for seed in range(4):
        updates, state = update(pair(seed), left[1], left[0])
        left = optax.apply_updates(left[0], updates), state
        right = step(plain, *right, pair(seed))
    assert_close(left[0], right[0])
    left[1].hyperparams["gamma"] = jnp.asarray(0.0)
    without = mars(optax.linear_schedule(0.1, 0.0, 10), "shampoo", gamma=0.0, weight_decay=0.1)
    updates, _ = update(pair(5), left[1], left[0])
    expected, _ = without.update(pair(5), right[1], right[0])
    assert_close(updates, expected)


@pytest.mark.parametrize(
    ("factory", "own", "dtype"),
    [
        (mars, {"learning_rate": 0.1, "mars_type": "adamw"}, jnp.float32),
        (mars, {"learning_rate": 0.1, "mars_type": "shampoo"}, None),
        (scale_by_mars, {"mars_type": "m"}, None),
    ],
)
def test_every_number_can_be_injected_without_naming_what_is_static(factory, own, dtype):
    """As in optax's own contract: strings, bools and None stay, all numbers become state."""
    injected, plain = optax.inject_hyperparams(factory, hyperparam_dtype=dtype)(**own), factory(**own)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    state, expected_state = injected.init(params), plain.init(params)
    assert {"b1", "b2", "eps", "gamma", "clip", "ns_steps"} <= state.hyperparams.keys()
    update = jax.jit(injected.update)
    for scale in (1.0, 2.0):
        g = jax.tree.map(lambda p, scale=scale: scale * p, params)
        updates, state = update(g, state, params)
        expected, expected_state = plain.update(g, expected_state, params)
        assert_close(updates, expected)
    assert signature(state.inner_state) == signature(expected_state)


@pytest.mark.parametrize("mars_type", TYPES)
def test_the_valley_of_rosenbrock_is_descended(mars_type):
    """The second problem of optax's contract: curved, so that no direction stays good."""

    def loss(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    # one row, so that every type moves it by its own rule; a vector would go to AdamW
    tx = mars(optax.linear_schedule(2e-2, 0.0, 2000), mars_type, gamma=0.1, clip=10.0, weight_decay=0.0)
    start = jnp.array([[-1.0, 1.2]])

    @jax.jit
    def train(x):
        gradient = jax.grad(lambda x: loss(x[0]))
        return jax.lax.scan(lambda c, _: (step(tx, *c, gradient(c[0])), None), (x, tx.init(x)), None, 2000)[
            0
        ][0]

    assert float(loss(train(start)[0])) < 0.1 * float(loss(start[0]))


@pytest.mark.parametrize(("exact", "mask_extra"), [(False, False), (True, False), (True, True)])
def test_partition_gives_each_group_its_own_optimiser(exact, mask_extra):
    params = tree(0)
    labels = {"conv": "mars", "dense": "adamw", "kernel": "mars"}
    tx = optax.partition(
        {"mars": mars(0.1, "m", is_approx=not exact), "adamw": optax.adamw(0.01)},
        labels,
        mask_compatible_extra_args=mask_extra,
    )
    alone, other = mars(0.1, "m", is_approx=not exact), optax.adamw(0.01)
    some = {"conv": params["conv"], "kernel": params["kernel"]}
    state, alone_state, other_state = tx.init(params), alone.init(some), other.init(params["dense"])
    update, update_alone, update_other = (jax.jit(t.update) for t in (tx, alone, other))
    for seed in range(3):
        g, h = tree(seed), tree(seed + 10)
        extra = [{"prev_grads": h}, {"prev_grads": {k: h[k] for k in some}}] if exact else [{}, {}]
        updates, state = update(g, state, params, **extra[0])
        expected, alone_state = update_alone({k: g[k] for k in some}, alone_state, some, **extra[1])
        assert_close({k: updates[k] for k in some}, expected)
        expected, other_state = update_other(g["dense"], other_state, params["dense"])
        assert_close(updates["dense"], expected)


def test_partition_hands_each_group_its_own_dimension_numbers():
    params = tree(0)
    numbers = {"conv": (2, (0, 1)), "dense": {"bias": None, "gain": None}, "kernel": (1, 0)}
    labels = {"conv": "mars", "dense": "mars", "kernel": "other"}
    inner = mars(0.1, "shampoo", weight_dimension_numbers=numbers, weight_decay=0.0)
    tx = optax.partition({"mars": inner, "other": optax.set_to_zero()}, labels)
    updates, _ = tx.update(params, tx.init(params), params)
    whole, _ = inner.update(params, inner.init(params), params)
    assert_close(updates, whole | {"kernel": jnp.zeros((5, 3))})


def test_multi_steps_equals_one_step_on_the_mean_gradient():
    params = pair(0)
    for exact in (False, True):
        inner = mars(0.1, is_approx=not exact, keep_prev_params=True)
        tx = optax.MultiSteps(inner, every_k_schedule=2)
        left, right = (params, tx.init(params)), (params, inner.init(params))
        accumulate, apply = (jax.jit(partial(step, t)) for t in (tx, inner))
        for t in range(3):
            halves, references = (pair(2 * t), pair(2 * t + 1)), (pair(2 * t + 20), pair(2 * t + 21))
            mean, h = (jax.tree.map(lambda a, b: (a + b) / 2, *both) for both in (halves, references))
            for g in halves:
                # MultiSteps averages gradients only: in the exact form the caller averages prev_grads.
                left = accumulate(*left, g, h if exact else None)
            right = apply(*right, mean, h if exact else None)
        assert_close(left[0], right[0])
        assert_close(left[1].inner_opt_state, right[1])


def test_skipping_non_finite_updates_leaves_the_whole_state_untouched():
    params = pair(0)
    tx = optax.apply_if_finite(mars(0.1), max_consecutive_errors=5)
    update = jax.jit(tx.update)
    _, state = update(pair(1), tx.init(params), params)
    bad = pair(2) | {"kernel": jnp.full((5, 3), jnp.nan)}
    updates, after = update(bad, state, params)
    assert_close(updates, jax.tree.map(jnp.zeros_like, params), 0)
    assert_close(after.inner_state, state.inner_state, 0)


def test_state_trees_can_be_mapped_over_as_those_of_optax():
    params = tree(0)
    tx = mars(
        0.1,
        amsgrad=True,
        keep_prev_params=True,
        weight_dimension_numbers=lambda p: jax.tree.map(lambda _: None, p),
    )
    state = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(params))
    np.testing.assert_array_equal(state.mu["kernel"], 1.0)
    np.testing.assert_array_equal(state.nu_max["dense"]["bias"], 1.0)
    np.testing.assert_array_equal(state.correction.prev_grad["conv"], 1.0)
    assert int(state.correction.count) == 0


@pytest.mark.parametrize("exact", [False, True])
def test_nnx_optimizer_forwards_the_second_gradients(exact):
    # Before 0.12 nnx.Optimizer cannot hold the masked states of any optax transformation (partition, masked).
    pytest.importorskip("flax", minversion="0.12")
    nnx = pytest.importorskip("flax.nnx")
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32), jnp.arange(8.0)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.first(x)).sum(axis=1)

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    model, before = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    tx = mars(0.05, "shampoo", is_approx=not exact, gamma=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, previous, graphdef = tx.init(params), params, nnx.graphdef(model)

    def pure_loss(params):
        merged = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(merged, params)
        return loss(nnx.merge(graphdef, merged))

    @nnx.jit
    def train_step(model, before, optimizer):
        grads = nnx.grad(loss)(model)
        extra = {"prev_grads": nnx.grad(loss)(before)} if exact else {}
        nnx.update(before, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, **extra)

    @jax.jit
    def pure_step(params, previous, state):
        (_, g), h = mars_value_and_grad(pure_loss)(params, previous)
        moved, state = step(tx, params, state, g, h if exact else None)
        return moved, params, state

    for _ in range(4):
        params, previous, state = pure_step(params, previous, state)
        train_step(model, before, optimizer)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_importing_the_namespace_leaves_jax_in_float32_and_torch_out():
    script = "import sys, mars_optim.jax, jax; print(jax.config.jax_enable_x64, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_importing_the_namespace_without_optax_says_what_to_install():
    script = "import sys; sys.modules['optax'] = None; import mars_optim.jax"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "ImportError: mars_optim.jax needs jax, optax and jaxtyping, and optax is missing" in out.stderr
    assert "pip install 'mars-optim[jax]'" in out.stderr
