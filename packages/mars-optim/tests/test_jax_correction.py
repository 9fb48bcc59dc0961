"""The correction alone: its formula, its two forms, what it refuses and what it leaves out; properties."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax import experimental  # noqa: E402

from mars_optim.jax import (  # noqa: E402
    MarsState,
    mars,
    mars_correction,
    mars_value_and_grad,
    scale_by_mars,
)

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64

SINGLE = 1e-6  # a few float32 roundings of numbers of order one


def arrays(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def test_first_corrected_gradient_is_the_gradient_whatever_the_form_and_the_reference():
    g, other = arrays(0, (3, 2), (3, 2))
    for is_approx in (True, False):
        tx = mars_correction(clip=None, is_approx=is_approx)
        extra = {} if is_approx else {"prev_grads": other}
        c, state = tx.update(g, tx.init(g), **extra)
        np.testing.assert_array_equal(c, g)
        assert isinstance(state, MarsState)
        assert int(state.count) == 1


def test_second_corrected_gradient_follows_the_formula_with_the_reference_of_each_form():
    g1, g2, h2 = arrays(1, (3, 2), (3, 2), (3, 2))
    a = 0.1 * 0.9 / (1 - 0.9)
    for is_approx, h in ((True, g1), (False, h2)):
        tx = mars_correction(b1=0.9, gamma=0.1, clip=None, is_approx=is_approx)
        extra = {} if is_approx else {"prev_grads": h2}
        _, state = tx.update(g1, tx.init(g1), **extra)
        c, _ = tx.update(g2, state, **extra)
        np.testing.assert_allclose(c, g2 + a * (g2 - h), rtol=SINGLE, atol=SINGLE)


def test_zero_start_multiplies_the_first_gradient_by_one_plus_a():
    (g,) = arrays(2, (3, 2))
    for is_approx in (True, False):
        tx = mars_correction(b1=0.9, gamma=0.1, clip=None, is_approx=is_approx, prev_grad_init="zero")
        extra = {} if is_approx else {"prev_grads": g}
        c, _ = tx.update(g, tx.init(g), **extra)
        np.testing.assert_allclose(c, 1.9 * g, rtol=SINGLE)


def test_exact_form_without_the_second_gradient_is_refused_when_it_is_traced():
    params = [jnp.ones((3, 2))]
    for tx in (mars_correction(is_approx=False), scale_by_mars(is_approx=False), mars(1e-3, is_approx=False)):
        state = tx.init(params)
        with pytest.raises(ValueError, match="prev_grads must be given when is_approx=False"):
            jax.eval_shape(tx.update, params, state, params)


def test_second_gradients_of_another_shape_or_structure_are_refused_by_name():
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": jnp.ones(3)}
    tx = mars_correction(is_approx=False)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"prev_grads\['a'\]\['kernel'\] must have .*\(3, 2\), got \(2, 3\)"):
        tx.update(params, state, prev_grads={"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"prev_grads\['b'\] must have .*\(3,\), got None"):
        tx.update(params, state, prev_grads={"a": {"kernel": jnp.ones((3, 2))}, "b": None})
    with pytest.raises(ValueError, match="prev_grads must have the structure of the gradients"):
        tx.update(params, state, prev_grads={"a": {"kernel": jnp.ones((3, 2))}})


def test_second_gradients_in_the_approximate_form_warn_that_they_are_not_used():
    (g,) = arrays(3, (3, 2))
    tx = mars_correction()
    with pytest.warns(UserWarning, match="prev_grads is not used when is_approx=True"):
        c, _ = tx.update(g, tx.init(g), prev_grads=2 * g)
    np.testing.assert_allclose(c, g / max(1, np.linalg.norm(g)), rtol=SINGLE)


def test_gradients_that_are_not_real_floats_are_refused():
    tx = mars_correction()
    for bad in (jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.int32)):
        with pytest.raises(
            TypeError, match=r"must be real floating-point arrays, got (complex64|int32) at \['x'\]"
        ):
            tx.update({"x": bad}, tx.init({"x": jnp.ones(2)}))


def test_leaf_clip_bounds_each_leaf_and_global_clip_bounds_them_together():
    tree = [jnp.full((2, 2), 3.0), jnp.full((4,), 0.25)]
    leaf, _ = mars_correction().update(tree, mars_correction().init(tree))
    np.testing.assert_allclose(leaf[0], 0.5, rtol=SINGLE)
    np.testing.assert_array_equal(leaf[1], tree[1])
    tx = mars_correction(clip_scope="global")
    both, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([both[0].ravel(), both[1]])), 1.0, rtol=SINGLE)
    np.testing.assert_allclose(both[0].ravel() / both[1], 12.0, rtol=SINGLE)


def test_a_norm_of_exactly_the_clip_leaves_the_gradient_untouched():
    g = jnp.array([0.6, 0.8, 0.0]) * 5
    norm = float(jnp.sqrt(jnp.sum(jnp.square(g))))
    tx = mars_correction(clip=norm)
    c, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(c, g)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_norm_that_is_not_finite_gives_nan_and_no_silent_zero_step(bad):
    g = jnp.array([[1.0, 2.0], [bad, 3.0]])
    c, _ = mars_correction().update(g, mars_correction().init(g))
    assert np.isnan(np.asarray(c)).all()


def test_float16_gradients_do_not_overflow_in_the_correction():
    tx = mars_correction(b1=0.9, gamma=1.0, clip=1.0, is_approx=False)
    g = jnp.full((2, 2), 50000.0, jnp.float16)
    _, state = tx.update(g, tx.init(g), prev_grads=g)
    # c = 50000 + 9 * 100000 is far above what float16 holds; clipped to norm 1 it is 1/2
    c, _ = tx.update(g, state, prev_grads=-g)
    assert c.dtype == jnp.float16
    np.testing.assert_array_equal(c, 0.5)


@pytest.mark.parametrize("clip_scope", ["leaf", "global"])
def test_norms_are_summed_over_a_named_axis(clip_scope):
    """The slices of a vmap are shards to psum, as those of shard_map are, which the slow tests run."""
    grads = [dict(zip("ab", arrays(seed, (4, 3), (6,)), strict=True)) for seed in (10, 11)]
    one = mars_correction(clip=0.3, clip_scope=clip_scope)
    split = mars_correction(clip=0.3, clip_scope=clip_scope, axis_name="d")
    on_halves = jax.jit(jax.vmap(split.update, axis_name="d"))

    def halves(tree):
        return {name: x.reshape(2, -1, *x.shape[1:]) for name, x in tree.items()}

    state, states = one.init(grads[0]), jax.vmap(split.init)(halves(grads[0]))
    for g in grads:
        expected, state = jax.jit(one.update)(g, state)
        actual, states = on_halves(halves(g), states)
        for name, c in expected.items():
            np.testing.assert_allclose(actual[name].reshape(c.shape), c, rtol=SINGLE, atol=SINGLE)


def test_masked_leaves_pass_unchanged_and_cost_no_state():
    tree = {"a": jnp.full((2, 2), 3.0), "b": {"c": jnp.full((2,), 7.0), "d": jnp.full((2,), 7.0)}}
    wanted = {"a": True, "b": False}
    for mask in (wanted, lambda _: wanted, {"a": True, "b": {"c": False, "d": False}}):
        tx = mars_correction(mask=mask, keep_prev_params=True)
        state = tx.init(tree)
        assert len(jax.tree.leaves(state.prev_grad)) == 1
        assert len(jax.tree.leaves(state.prev_params)) == 3
        c, state = jax.jit(tx.update)(tree, state, tree)
        np.testing.assert_allclose(c["a"], 0.5, rtol=SINGLE)
        np.testing.assert_array_equal(c["b"]["c"], 7.0)
        assert len(jax.tree.leaves(state.prev_grad)) == 1


def test_leaves_without_a_gradient_stay_none_and_keep_their_state():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    both, one = {"a": params["a"], "b": 3 * params["b"]}, {"a": 2 * params["a"], "b": None}
    for mars_type in ("adamw", "lion", "shampoo", "m", "sgd"):
        tx = mars(0.1, mars_type)
        _, state = tx.update(both, tx.init(params), params)
        updates, after = tx.update(one, state, params)
        assert updates["b"] is None
        assert jax.tree.structure(after) == jax.tree.structure(state)
        np.testing.assert_array_equal(after.correction.prev_grad["b"], state.correction.prev_grad["b"])
        np.testing.assert_array_equal(after.mu["b"], state.mu["b"])
        assert np.any(np.asarray(after.mu["a"]) != np.asarray(state.mu["a"]))


def test_previous_gradient_is_stored_in_the_dtype_asked_for():
    (g,) = arrays(4, (3, 2))
    for dtype in ("bfloat16", jnp.bfloat16, None):
        tx = mars_correction(b1=0.9, gamma=0.1, clip=None, prev_grad_dtype=dtype)
        state = tx.init(g)
        _, state = tx.update(g, state)
        assert state.prev_grad.dtype == (jnp.bfloat16 if dtype else jnp.float32)
        c, _ = tx.update(2 * g, state)
        stored = g.astype(jnp.bfloat16).astype(jnp.float32) if dtype else g
        np.testing.assert_allclose(c, 2 * g + 0.9 * (2 * g - stored), rtol=SINGLE, atol=SINGLE)


def test_previous_parameters_are_those_of_the_last_update_and_at_first_the_initial_ones():
    params, g = arrays(5, (3, 2), (3, 2))
    tx = mars(0.1, keep_prev_params=True)
    state = tx.init(params)
    np.testing.assert_array_equal(optax.tree_utils.tree_get(state, "prev_params"), params)
    updates, state = tx.update(g, state, params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.correction.prev_params, params)
    _, state = tx.update(g, state, moved)
    np.testing.assert_array_equal(state.correction.prev_params, moved)


def test_keeping_previous_parameters_without_parameters_is_refused():
    tx = mars_correction(keep_prev_params=True)
    with pytest.raises(ValueError, match="params must be given to update when keep_prev_params=True"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_parameters_and_state_can_be_donated_together():
    params, g = arrays(6, (3, 2), (3, 2))
    tx = mars(0.1, keep_prev_params=True, amsgrad=True)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    expected = step(params, tx.init(params), g)[0]
    donated = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    params, state = donated(params, state, g)
    np.testing.assert_allclose(params, expected, rtol=SINGLE)
    jax.block_until_ready(donated(params, state, g))


def softmax_regression(params, batch, key=None):
    x, y = batch
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.5, x.shape)
    logits = x @ params["w"] + params["b"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_value_and_both_gradients_equal_two_plain_evaluations(vectorize):
    x, w, w_before = arrays(7, (8, 5), (5, 3), (5, 3))
    batch, b = (x, jnp.arange(8) % 3), jnp.zeros(3)
    params, before = {"w": w, "b": b}, {"w": w_before, "b": b + 1}
    key = jax.random.key(0)
    plain = jax.jit(jax.value_and_grad(softmax_regression))
    both = jax.jit(mars_value_and_grad(softmax_regression, vectorize=vectorize))
    for extra in ({}, {"key": key}):
        (value, grads), prev_grads = both(params, before, batch, **extra)
        expected_value, expected = plain(params, batch, **extra)
        np.testing.assert_allclose(value, expected_value, rtol=SINGLE)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=SINGLE, atol=SINGLE), grads, expected)
        expected = plain(before, batch, **extra)[1]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=SINGLE, atol=SINGLE), prev_grads, expected
        )


@pytest.mark.parametrize("vectorize", [True, False])
def test_auxiliary_data_is_that_of_the_current_parameters(vectorize):
    def loss(params):
        return jnp.sum(params**2), {"mean": jnp.mean(params)}

    both = mars_value_and_grad(loss, has_aux=True, vectorize=vectorize)
    ((value, aux), grads), prev_grads = both(jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0]))
    assert (float(value), float(aux["mean"])) == (5.0, 1.5)
    np.testing.assert_array_equal(grads, [2.0, 4.0])
    np.testing.assert_array_equal(prev_grads, [6.0, 10.0])


def test_previous_parameters_unlike_the_parameters_are_refused():
    both = mars_value_and_grad(jnp.sum)
    for before in (jnp.ones(3), jnp.ones(2, jnp.bfloat16), [jnp.ones(2)]):
        with pytest.raises(
            ValueError, match="prev_params must have the structure, shapes and dtypes of params"
        ):
            both(jnp.ones(2), before)


def test_exact_correction_vanishes_with_dropout_as_long_as_parameters_stand_still():
    x, w = arrays(8, (8, 5), (5, 3))
    params, batch = {"w": w, "b": jnp.zeros(3)}, (x, jnp.arange(8) % 3)
    tx = mars_correction(gamma=1.0, clip=None, is_approx=False, keep_prev_params=True)
    both, state = jax.jit(mars_value_and_grad(softmax_regression)), tx.init(params)
    for seed in range(3):
        (_, grads), prev_grads = both(params, state.prev_params, batch, jax.random.key(seed))
        c, state = tx.update(grads, state, params, prev_grads=prev_grads)
        jax.tree.map(np.testing.assert_array_equal, c, grads)


def test_exact_loop_on_softmax_regression_equals_the_numpy_reference():
    rng = np.random.default_rng(9)
    start = {"b": np.zeros(3), "w": rng.normal(size=(5, 3))}
    batches = [(rng.normal(size=(8, 5)), rng.integers(0, 3, 8)) for _ in range(15)]
    tx = mars(0.1, gamma=0.5, is_approx=False, keep_prev_params=True, optimize_1d=True)
    both = jax.jit(mars_value_and_grad(softmax_regression))
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), start)
    state = tx.init(params)
    truth, before = reference.Mars([start["b"], start["w"]]), None
    for x, y in batches:
        batch = (jnp.asarray(x, jnp.float32), jnp.asarray(y))
        (_, grads), prev_grads = both(params, state.correction.prev_params, batch)
        updates, state = tx.update(grads, state, params, prev_grads=prev_grads)
        params = optax.apply_updates(params, updates)
        now = list(truth.parameters)
        g, h = numpy_gradient(now, x, y), numpy_gradient(before or now, x, y)
        options = reference.Options(lr=0.1, gamma=0.5, is_approx=False, optimize_1d=True)
        truth.step(g, options, h)
        before = now
    # 15 steps of 0.1 in float32 against float64; Adam's division amplifies a gradient's rounding near zero.
    np.testing.assert_allclose(params["w"], truth.parameters[1], atol=1e-4)
    np.testing.assert_allclose(params["b"], truth.parameters[0], atol=1e-4)


def numpy_gradient(params, x, y):
    b, w = params
    logits = x @ w + b
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return [p.mean(axis=0), x.T @ p / len(y)]


# --- properties -------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
few = settings(max_examples=10, deadline=None)


def directions(tx, stream):
    state, out = tx.init(stream[0]), []
    for g in stream:
        d, state = tx.update(g, state)
        out.append(d)
    return out


@few
@given(seed=seeds, power=st.integers(-8, 8), mars_type=st.sampled_from(["adamw", "lion", "shampoo", "m"]))
def test_directions_do_not_depend_on_the_scale_of_the_gradients_without_clip_and_eps(seed, power, mars_type):
    # mars-m keeps an eps of 1e-7 in Newton-Schulz: the exact polar factor has none.
    solver = "svd" if mars_type == "m" else "newton_schulz"
    tx = scale_by_mars(mars_type, clip=None, eps=0.0, orthogonalize=solver)
    with enable_x64(True):
        stream = arrays(seed, *[(4, 3)] * 4, dtype=jnp.float64)
        scaled = directions(tx, [g * 2.0**power for g in stream])
        for left, right in zip(directions(tx, stream), scaled, strict=True):
            # Powers of two scale exactly; only svd rounds differently, amplified by a condition number < 1e6.
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-9 if solver == "svd" else 0)


@few
@given(seed=seeds, mars_type=st.sampled_from(["adamw", "lion", "shampoo", "m", "sgd"]))
def test_permuting_rows_permutes_the_directions(seed, mars_type):
    stream = arrays(seed, *[(4, 3)] * 4)
    order = np.random.default_rng(seed).permutation(4)
    tx = scale_by_mars(mars_type)
    turned = directions(tx, [g[order] for g in stream])
    for left, right in zip(directions(tx, stream), turned, strict=True):
        # Sums over rows in another order round differently; Newton-Schulz amplifies by up to 3.4 a step.
        np.testing.assert_allclose(left[order], right, rtol=1e-4, atol=1e-4)


@few
@given(seed=seeds)
def test_rotating_gradients_rotates_the_directions_of_exact_polar_factors(seed):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    tx = scale_by_mars("shampoo", orthogonalize="svd")
    with enable_x64(True):
        stream = arrays(seed, *[(4, 3)] * 4, dtype=jnp.float64)
        turned = directions(tx, [left @ g @ right for g in stream])
        for straight, rotated in zip(directions(tx, stream), turned, strict=True):
            # float64 rounding, amplified by a condition number < 1e6.
            np.testing.assert_allclose(left @ straight @ right, rotated, rtol=0, atol=1e-9)


@few
@given(seed=seeds, gamma=st.floats(0, 2), scale=st.floats(1e-3, 1e3))
def test_momentum_never_exceeds_the_clip(seed, gamma, scale):
    stream = [scale * g for g in arrays(seed, *[(4, 3)] * 6)]
    tx = scale_by_mars("sgd", gamma=lambda _: gamma)
    for d in directions(tx, stream):
        assert float(jnp.linalg.norm(d)) <= 1 + SINGLE


@few
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_clipping_twice_is_clipping_once(seed, scale):
    g = scale * arrays(seed, (4, 3))[0]
    tx = mars_correction(gamma=0.0)
    once, _ = tx.update(g, tx.init(g))
    twice, _ = tx.update(once, tx.init(g))
    np.testing.assert_allclose(once, twice, rtol=SINGLE)


@few
@given(seed=seeds, lr=st.floats(1e-4, 1.0), decay=st.floats(0, 1))
def test_a_lion_step_is_bounded_by_the_rate_and_the_decay(seed, lr, decay):
    params, g = arrays(seed, (4, 3), (4, 3))
    tx = mars(lr, "lion", weight_decay=decay)
    updates, _ = tx.update(g, tx.init(params), params)
    bound = lr * (1 + decay * np.abs(params))
    assert (np.abs(updates) <= bound * (1 + SINGLE)).all()
