"""`mars_optim.jax.mars` against the specification's numbers, the NumPy truth, torch and known optimisers."""

import dataclasses
import inspect

import numpy as np
import pytest
import reference

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import SHAPES, STEPS, assert_same, enable_x64, gradients, run  # noqa: E402

from mars_optim.jax import mars, mars_correction, newton_schulz, scale_by_mars  # noqa: E402

TYPES = ("adamw", "lion", "shampoo", "m", "sgd")
LONG = 20  # for methods that are the same at every step


@pytest.fixture(autouse=True)
def x64():
    with enable_x64(True):
        yield


X1 = np.array([[1.0, -2.0], [0.5, 0.25]])
EXAMPLE = [
    ([np.array([[0.1, -0.2], [0.3, 0.4]])], [np.array([[0.1, -0.2], [0.3, 0.4]])]),
    ([np.array([[0.3, 0.1], [-0.2, 0.2]])], [np.array([[0.2, 0.0], [-0.1, 0.3]])]),
]
WORKED = [
    ({}, 1, (0.792228780183, -1.902513715324, 0.436134963202, 0.123350044826)),
    ({"is_approx": False}, 1, (0.797489570004, -1.903617690035, 0.424939945641, 0.122257188937)),
    ({"clip": None}, 1, (0.801558539049, -1.925625354478, 0.456628844666, 0.177374482627)),
    ({"prev_grad_init": "zero"}, 1, (0.785114575130, -1.877601408970, 0.413058344358, 0.103374063290)),
    (
        {"is_approx": False, "prev_grad_init": "zero"},
        1,
        (0.791437089858, -1.879207966270, 0.397369990440, 0.102711156118),
    ),
    ({}, 10, (0.785114575130, -1.877601408970, 0.413058344358, 0.103374063290)),
    ({"mars_type": "lion"}, 1, (0.7811, -1.9612, 0.49105, 0.046025)),
    ({"mars_type": "sgd"}, 1, (0.974421890210, -1.960997299330, 0.492114057489, 0.239674730711)),
    (
        {"mars_type": "sgd", "is_approx": False},
        1,
        (0.971755027756, -1.961153646312, 0.489974309278, 0.239616657415),
    ),
    ({"mars_type": "shampoo"}, 1, (0.861933200969, -1.972333269586, 0.492249559406, 0.127721204994)),
    (
        {"mars_type": "shampoo", "is_approx": False},
        1,
        (0.839682048255, -1.932993022674, 0.472829818900, 0.135841768735),
    ),
    (
        {"mars_type": "shampoo", "orthogonalize": "svd"},
        1,
        (0.848684243010, -1.969117550381, 0.498967550381, 0.113609243010),
    ),
    (
        {"mars_type": "shampoo", "orthogonalize": "svd", "is_approx": False},
        1,
        (0.826712941304, -1.945397823897, 0.475247823897, 0.091637941304),
    ),
    ({"mars_type": "m"}, 1, (0.946677401669, -1.963631776604, 0.490672102203, 0.211846550954)),
]


@pytest.mark.filterwarnings("ignore:gamma=0.5 with is_approx")
@pytest.mark.parametrize(("options", "factor", "expected"), WORKED)
def test_worked_example_of_the_specification(options, factor, expected):
    tx = mars(0.1, b1=0.9, gamma=0.5, weight_decay=0.1, **options)
    stream = [([factor * g[0]], h) for g, h in EXAMPLE]
    last = run(tx, [X1], stream, exact=not options.get("is_approx", True))[-1][0]
    # The table prints 12 decimals: half a unit in the last place, doubled.
    np.testing.assert_allclose(last.ravel(), expected, rtol=0, atol=1e-12)


RATES = 0.05 * (1 - np.arange(STEPS) / 20)
BUNDLES = {
    "plain": {},
    "decay, schedule and zero start": {
        "weight_decay": 0.3,
        "prev_grad_init": "zero",
        "lr_1d_ratio": 0.5,
        "weight_decay_1d": 0.2,
    },
    "amsgrad and optimize_1d": {"amsgrad": True, "optimize_1d": True, "weight_decay": 0.1},
    "global clip, svd and scale": {
        "clip_scope": "global",
        "orthogonalize": "svd",
        "scale": "none",
        "b1_1d": 0.8,
        "b2_1d": 0.9,
    },
}


def in_the_words_of_the_reference(options):
    """The few options that are spelled as in torch there."""
    spelled = {name: value for name, value in options.items() if name not in ("b1_1d", "b2_1d")}
    return spelled | {"betas_1d": (options.get("b1_1d", 0.9), options.get("b2_1d", 0.95))}


# the form decides what h_t is, the rest what is done with it: every value beside every type, each pair once
VARIED = [
    (False, 1.0, "plain"),
    (True, 1.0, "plain"),
    (True, None, "plain"),
    (False, 0.01, "plain"),
    (False, 1.0, "decay, schedule and zero start"),
    (True, 1.0, "amsgrad and optimize_1d"),
    (False, 1.0, "global clip, svd and scale"),
]


@pytest.mark.parametrize(("exact", "clip", "bundle"), VARIED)
@pytest.mark.parametrize("mars_type", TYPES)
def test_trajectory_equals_the_numpy_reference(mars_type, exact, clip, bundle):
    scheduled = "schedule" in bundle
    rng = np.random.default_rng(TYPES.index(mars_type))
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng)

    def schedule(count):
        return jnp.asarray(RATES)[count]

    common = {"gamma": 0.1, "weight_decay": 0.0, "is_approx": not exact, "clip": clip} | BUNDLES[bundle]
    tx = mars(schedule if scheduled else 0.05, mars_type, **common)
    truth = reference.Mars(start)
    options = reference.Options(mars_type=mars_type, **in_the_words_of_the_reference(common))
    expected = []
    for t, (g, h) in enumerate(stream):
        truth.step(g, dataclasses.replace(options, lr=RATES[t] if scheduled else 0.05), h)
        expected.append(list(truth.parameters))
    assert_same(run(tx, start, stream, exact=exact), expected)


def test_gamma_schedule_equals_the_numpy_reference():
    rng = np.random.default_rng(3)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng)
    tx = mars(0.05, "adamw", gamma=lambda count: 0.02 * (count + 1), is_approx=False)
    truth, expected = reference.Mars(start), []
    for t, (g, h) in enumerate(stream):
        truth.step(g, reference.Options(lr=0.05, gamma=0.02 * (t + 1), is_approx=False), h)
        expected.append(list(truth.parameters))
    assert_same(run(tx, start, stream, exact=True), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_correction_before_optax_adamw_is_mars_adamw(exact):
    rng = np.random.default_rng(0)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng, steps=LONG)
    options = {"b1": 0.95, "gamma": 0.1, "is_approx": not exact}
    chained = optax.chain(
        mars_correction(**options), optax.adamw(0.05, b1=0.95, b2=0.99, eps=1e-8, weight_decay=0.1)
    )
    whole = mars(0.05, "mars-adamw", weight_decay=0.1, optimize_1d=True, **options)
    assert_same(run(chained, start, stream, exact=exact), run(whole, start, stream, exact=exact))


def test_scale_by_mars_is_the_direction_of_mars():
    rng = np.random.default_rng(1)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng)
    for mars_type in TYPES:
        chained = optax.chain(
            scale_by_mars(mars_type), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.05)
        )
        whole = mars(0.05, mars_type, weight_decay=0.1, optimize_1d=True)
        assert_same(run(chained, start, stream), run(whole, start, stream))


def test_leaves_that_are_no_matrices_follow_optax_adamw_at_the_scaled_rate():
    rng = np.random.default_rng(2)
    start, stream = [rng.normal(size=s) for s in ((5,), ())], gradients(rng, ((5,), ()))
    ours = mars(
        0.1,
        "lion",
        lr_1d_ratio=0.3,
        b1_1d=0.8,
        b2_1d=0.9,
        weight_decay_1d=0.2,
        weight_decay=0.7,
        is_approx=False,
    )
    theirs = optax.adamw(0.03, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.2)
    assert_same(run(ours, start, stream, exact=True), run(theirs, start, stream))


@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_torch_and_jax_trajectories_agree(mars_type, exact):
    torch = pytest.importorskip("torch")
    MARS = pytest.importorskip("mars_optim.torch").MARS
    rng = np.random.default_rng(4)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng)
    tensors = [torch.tensor(p, requires_grad=True) for p in start]
    # The for-loop backend is the readable truth there, and needs no compiler.
    optimizer = MARS(
        tensors,
        lr=0.05,
        gamma=0.1,
        mars_type=mars_type,
        weight_decay=0.2,
        lr_1d=0.02,
        is_approx=not exact,
        foreach=False,
    )
    expected = []
    for g, h in stream:
        for tensor, grad in zip(tensors, g, strict=True):
            tensor.grad = torch.tensor(grad)
        optimizer.step(**({"prev_grads": [torch.tensor(x) for x in h]} if exact else {}))
        expected.append([tensor.detach().numpy().copy() for tensor in tensors])
    tx = mars(0.05, mars_type, gamma=0.1, weight_decay=0.2, lr_1d_ratio=0.4, is_approx=not exact)
    assert_same(run(tx, start, stream, exact=exact), expected)


# --- reductions to known methods (specification c.7) --------------------------------------------------


def test_without_correction_and_clip_mars_adamw_is_optax_adamw():
    rng = np.random.default_rng(5)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng, steps=LONG)
    ours = mars(0.05, gamma=0.0, clip=None, weight_decay=0.1, optimize_1d=True)
    theirs = optax.adamw(0.05, b1=0.95, b2=0.99, eps=1e-8, weight_decay=0.1)
    assert_same(run(ours, start, stream), run(theirs, start, stream))


def test_mars_lion_is_optax_lion_bit_for_bit():
    rng = np.random.default_rng(6)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng, steps=LONG)
    b1, b2 = 0.9, 0.99
    ours = mars(
        0.05,
        "lion",
        b1=b2,
        gamma=(b2 - b1) / b2,
        clip=None,
        prev_grad_init="zero",
        weight_decay=0.1,
        optimize_1d=True,
    )
    theirs = optax.lion(0.05, b1=b1, b2=b2, weight_decay=0.1)
    for left, right in zip(run(ours, start, stream), run(theirs, start, stream), strict=True):
        for x, y in zip(left, right, strict=True):
            np.testing.assert_array_equal(x, y)


def test_mars_shampoo_is_nesterov_momentum_through_optax_newton_schulz():
    # optax.contrib.muon weighs its Nesterov terms by two bias corrections; Muon itself (and c.7) does not.
    rng = np.random.default_rng(7)
    mu = 0.9
    ours = scale_by_mars("shampoo", b1=mu, gamma=1 - mu, clip=None, prev_grad_init="zero", scale="none")
    polynomial = optax.contrib.scale_by_muon(beta=0.0, eps=1e-8, nesterov=False)
    theirs = optax.chain(optax.trace(mu, nesterov=True), polynomial)
    update = jax.jit(theirs.update)
    for shape in ((6, 4), (3, 8), (4, 4)):
        ours_state, theirs_state = ours.init(jnp.zeros(shape)), theirs.init(jnp.zeros(shape))
        for (g,), _ in gradients(rng, (shape,), steps=LONG):
            left, ours_state = ours.update(jnp.asarray(g), ours_state)
            right, theirs_state = update(jnp.asarray(g), theirs_state)
            # optax 0.2.5 keeps its own scale, sqrt(max(1, columns / rows)), inside: compare directions.
            assert_same([[left / jnp.linalg.norm(left)]], [[right / jnp.linalg.norm(right)]])


def test_newton_schulz_equals_the_polynomial_of_optax():
    contrib = pytest.importorskip("optax.contrib._muon")
    rng = np.random.default_rng(8)
    for shape in ((4, 6), (6, 4), (5, 5)):
        matrix = jnp.asarray(rng.normal(size=shape))
        theirs = contrib.orthogonalize_via_newton_schulz(matrix, jnp.array([3.4445, -4.7750, 2.0315]), 5)
        np.testing.assert_allclose(newton_schulz(matrix, eps=1e-8), theirs, rtol=1e-13, atol=1e-13)


def test_exact_mars_sgd_with_gamma_one_is_storm():
    rng = np.random.default_rng(9)
    stream = gradients(rng, ((4, 3),), steps=LONG)
    b1, lr = 0.9, 0.05
    x, m, previous = np.ones((4, 3)), np.zeros((4, 3)), None
    expected = []
    for (g,), (h,) in stream:
        h = g if previous is None else h
        m, previous = b1 * m + (1 - b1) * g + b1 * (g - h), g
        x = x - lr * m
        expected.append([x])
    tx = mars(lr, "sgd", b1=b1, gamma=1.0, clip=None, is_approx=False)
    assert_same(run(tx, [np.ones((4, 3))], stream, exact=True), expected)


def test_gamma_of_one_minus_beta_is_nesterov_momentum():
    rng = np.random.default_rng(10)
    start, stream = [rng.normal(size=s) for s in SHAPES], gradients(rng, steps=LONG)
    beta = 0.9
    ours = mars(0.05, "sgd", b1=beta, gamma=1 - beta, clip=None, prev_grad_init="zero", optimize_1d=True)
    theirs = optax.sgd(0.05 * (1 - beta), momentum=beta, nesterov=True)
    assert_same(run(ours, start, stream), run(theirs, start, stream))


# --- options -----------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    expected = {
        "mars_type": "mars-adamw",
        "b1": 0.95,
        "b2": 0.99,
        "eps": 1e-8,
        "gamma": 0.025,
        "clip": 1.0,
        "clip_scope": "leaf",
        "is_approx": True,
        "prev_grad_init": "current",
        "prev_grad_dtype": None,
        "keep_prev_params": False,
        "mask": None,
        "axis_name": None,
        "orthogonalize": "newton_schulz",
        "ns_steps": 5,
        "scale": None,
        "amsgrad": False,
        "optimize_1d": False,
        "lr_1d_ratio": 1.0,
        "b1_1d": 0.9,
        "b2_1d": 0.95,
        "weight_decay_1d": 0.1,
    }
    for function in (mars, scale_by_mars, mars_correction):
        found = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        assert {name: value for name, value in expected.items() if name in found} == {
            name: value for name, value in found.items() if name in expected
        }


@pytest.mark.parametrize("mars_type", TYPES)
def test_empty_and_scalar_leaves_take_their_step_beside_others(mars_type):
    rng = np.random.default_rng(15)
    shapes = ((0, 3), (2, 0), (0,), (), (3, 2))
    start, *drawn = ([rng.normal(size=s) for s in shapes] for _ in range(3))
    for options in ({"clip_scope": "global"}, {"optimize_1d": True}):
        tx = mars(0.1, mars_type, **options)
        together = run(tx, start, [(g, g) for g in drawn])
        alone = run(tx, start[3:], [(g[3:], g[3:]) for g in drawn])
        assert [x.shape for x in together[-1]] == list(shapes)
        assert_same([xs[3:] for xs in together], alone)


def test_weight_decay_of_mars_m_defaults_to_a_tenth_and_of_the_others_to_zero():
    zero = [([np.zeros((3, 2))], [np.zeros((3, 2))])]
    for mars_type in TYPES:
        left = run(mars(0.5, mars_type), [np.ones((3, 2))], zero)[-1][0]
        np.testing.assert_allclose(left, 0.95 if mars_type == "m" else 1.0, rtol=1e-15)


def test_mask_chooses_the_decayed_leaves():
    params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones((2,)), "norm": {"bias": jnp.ones((2,))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    wanted = {"kernel": True, "scale": True, "norm": False}
    for mask in (wanted, lambda _: wanted):
        tx = mars(0.5, "sgd", weight_decay=0.2, weight_decay_1d=0.4, mask=mask)
        updates, _ = tx.update(zeros, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-15)
        np.testing.assert_allclose(updates["scale"], -0.2, rtol=1e-15)
        np.testing.assert_array_equal(updates["norm"]["bias"], 0.0)


def test_low_precision_parameters_are_moved_by_float32_arithmetic():
    rng = np.random.default_rng(11)
    grads = [jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16) for _ in range(4)]
    low, high = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((6, 4), jnp.float32)
    for mars_type in TYPES:
        tx = mars(1e-2, mars_type, weight_decay=0.1)
        states = [tx.init(low), tx.init(high)]
        assert states[0].mu.dtype == jnp.float32
        assert states[0].correction.prev_grad.dtype == jnp.bfloat16
        for g in grads:
            update, states[0] = tx.update(g, states[0], low)
            wide, states[1] = tx.update(g.astype(jnp.float32), states[1], high)
            assert update.dtype == jnp.bfloat16
            np.testing.assert_array_equal(update, wide.astype(jnp.bfloat16))


def test_second_moments_exist_only_where_an_adam_rule_needs_them():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))}
    sizes = {t: sum(x.size for x in jax.tree.leaves(mars(1.0, t).init(params).nu)) for t in TYPES}
    assert sizes == {"adamw": 8, "lion": 2, "shampoo": 2, "m": 2, "sgd": 2}
    assert jax.tree.leaves(scale_by_mars("lion").init(params).nu) == []
    assert jax.tree.leaves(mars(1.0, is_approx=False).init(params).correction.prev_grad) == []
