"""The infinite-width limit against exact values, and what must hold whatever the data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limit_runs import BASE, KEY, assert_within_errors, limit
from precision import float64
from reference import ETA, R1_F, R1_K, X, Y, identity_limit

from mup_features.jax import products, replica
from mup_features.jax.limit import DivergedError, InfiniteWidthMLP
from mup_features.parametrization import Parametrization
from mup_features.theory import covariance_preservation_error

TWO_OUTPUTS = np.stack([Y, [0.3, 0.8]], axis=1)

# R2, section g: f_1.., then E[x_t^2] and E[x_t x_0] of the last layer at the last t.
R2 = {
    1: ([0.4010210353360, 0.6142789201910, 0.7509974538579], 0.5187193291364, 0.3705208903176),
    2: ([0.3458479750486], 0.2985712674847, 0.2205041889330),
    3: ([0.3076859409459], 0.2368717310671, 0.1478372861255),
}
R2_SECOND = {2: 0.53556, 3: 0.48385}  # f_2, good to 1e-5

# R3: f_4 and its error, K_post of the last layer at t = 4.
R3 = {
    ("tanh", 2): ([0.614454, -0.327624], 2e-5, [0.386353, -0.104504, 0.255265]),
    ("tanh", 3): ([0.575830, -0.354445], 2e-5, [0.326826, -0.144243, 0.215817]),
    ("silu", 2): ([0.818629, -0.107057], 2e-5, None),
    ("silu", 3): ([0.417791, -0.030926], 2e-5, None),
    ("relu", 2): ([0.89589, -0.15704], 6e-5, None),
}
UPPER = np.triu_indices(2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_identity_gives_r1_exactly_at_a_small_population(x64, depth):
    run = limit(depth=depth, activation="identity", samples=64).fit(X, Y, 3, record=("K",))
    # The printed digits are 12; every replica is exact.
    for f in run.replicas["f"]:
        np.testing.assert_allclose(f[1:, :, 0], R1_F[depth], atol=2e-12)
    np.testing.assert_allclose(run.K_post[depth - 1, 3][UPPER], R1_K[depth], atol=2e-12)


@pytest.mark.slow
def test_the_identity_is_exact_for_several_outputs_and_every_step(x64):
    run = limit(depth=3, activation="identity", samples=128, output_dim=2, sigma=0.8).fit(X, TWO_OUTPUTS, 3)
    f, K = identity_limit(X, TWO_OUTPUTS, ETA, 3, 3, sigma=0.8)
    np.testing.assert_allclose(run.f, f, atol=1e-12)
    np.testing.assert_allclose(run.K_post[2], K, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_without_the_mean_derivative_r1_fails(x64, monkeypatch, depth):
    derivatives = products._mean_derivatives
    monkeypatch.setattr(products, "_mean_derivatives", lambda far, x: 0 * derivatives(far, x))
    run = limit(depth=depth, activation="identity", samples=64).fit(X, Y, 3, record=())
    assert np.abs(run.f[1:, :, 0] - R1_F[depth]).max(axis=1).min() > 0.01
    # What is left is what the reference gives without it.
    wrong, _ = identity_limit(X, Y[:, None], ETA, depth, 3, zdot=False)
    np.testing.assert_allclose(run.f, wrong, atol=1e-12)


def test_without_the_backward_term_of_the_same_step_the_second_update_is_wrong(x64, monkeypatch):
    """The term is sigma^2 x_t E[dx_t phi''(h_t)], zero at t = 0 only."""
    whole = replica.product
    forward = {}

    def without(matrix, x, *, transpose, **options):
        made = whole(matrix, x, transpose=transpose, **options)
        if not transpose:
            forward.update(x=x, h=made.value)
            return made
        slope = 1 / jnp.cosh(forward["h"]) ** 2
        mean = jnp.mean(x / slope * (-2 * jnp.tanh(forward["h"]) * slope), axis=0)
        return made._replace(value=made.value - forward["x"] * mean)

    def outputs():
        model = limit(samples=8192, replicas=1, input_dim=1, lr=0.5)  # one, as `forward` is shared
        return model.fit([[1.0]], [1.0], 2, record=()).f[1:, 0, 0]

    np.testing.assert_allclose(outputs(), [R2[2][0][0], R2_SECOND[2]], atol=5e-4)
    monkeypatch.setattr(replica, "product", without)
    wrong = outputs()
    assert abs(wrong[0] - R2[2][0][0]) < 5e-4
    assert abs(wrong[1] - R2_SECOND[2]) > 2e-3


@pytest.mark.parametrize(
    "depth", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_r2_is_met_within_small_standard_errors(x64, depth):
    f, square, cross = R2[depth]
    steps = 3 if depth == 1 else 2
    model = limit(depth=depth, input_dim=1, lr=0.5, samples=65536, replicas=4)
    run = model.fit([[1.0]], [1.0], steps, record=("K",))
    last = len(f)
    error = run.stderr("f")[:, 0, 0]
    assert error.max() < 2e-5
    # Four standard errors; of four replicas they are themselves known to a third.
    assert (np.abs(run.f[1 : last + 1, 0, 0] - f) < 4 * error[1 : last + 1] + 2e-6).all()
    for name, expected in (("K_post", square), ("K_post_cross", cross)):
        at = (last, depth - 1, 0, 0)
        assert abs(run.mean(name)[at] - expected) < 4 * run.stderr(name)[at] + 2e-6
    if depth > 1:
        assert abs(run.f[2, 0, 0] - R2_SECOND[depth]) < 4 * np.hypot(error[2], 1e-5)


def check_r3(activation, depth, samples, largest):
    f, printed, K = R3[activation, depth]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the theory asks for")  # ReLU
        model = limit(depth=depth, activation=activation, samples=samples, replicas=4)
    run = model.fit(X, Y, 4, record=("K",), every=4)
    error = np.hypot(run.stderr("f")[-1, :, 0], printed)
    assert run.stderr("f").max() < largest
    assert (np.abs(run.f[-1, :, 0] - f) < 4 * error).all()
    if K is not None:
        error = np.hypot(run.stderr("K_post")[-1, depth - 1], 2e-5)[UPPER]
        assert (np.abs(run.K_post[depth - 1, -1][UPPER] - K) < 4 * error).all()


def test_r3_is_met_by_a_small_population(x64):
    check_r3("tanh", 2, 512, 3e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "depth"), R3)
def test_r3_is_met_by_a_large_population(x64, activation, depth):
    check_r3(activation, depth, 65536, 5e-4 if activation == "relu" else 1e-4)


# ---------------------------------------------------------------- what must hold whatever the data

numbers = st.floats(-1.0, 1.0, width=32)
inputs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=2).map(np.array).filter(
    lambda x: np.linalg.svd(x)[1].min() > 0.05 and abs(np.linalg.svd(x)[1] @ [1, -1]) > 0.05
)  # fmt: skip
targets = st.tuples(numbers, numbers).map(np.array)


def outputs(inputs, y, steps=2, **options):
    return limit(replicas=1, **options).fit(inputs, y, steps, record=()).replicas["f"]


@given(X=inputs, y=targets, angle=st.floats(0.0, 6.28))
@settings(max_examples=8, deadline=None)
def test_rotating_the_inputs_changes_nothing(X, y, angle):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    with float64(True):
        np.testing.assert_allclose(outputs(X @ turn, y), outputs(X, y), atol=1e-9)


@given(X=inputs, y=targets)
@settings(max_examples=8, deadline=None)
def test_permuting_the_samples_permutes_the_outputs(X, y):
    with float64(True):
        np.testing.assert_allclose(outputs(X[::-1], y[::-1]), outputs(X, y)[:, :, ::-1], atol=1e-9)


@pytest.mark.slow
def test_equal_samples_have_equal_outputs_and_are_warned_of(x64):
    model = limit(replicas=1)
    with pytest.warns(UserWarning, match="equal rows"):
        run = model.fit(np.stack([X[0], X[0]]), Y, 3)
    np.testing.assert_allclose(run.f[:, 0], run.f[:, 1], atol=1e-12)
    assert np.abs(run.f[-1]).min() > 0.05
    # A duplicate acts as one sample with the sum of both pulls.
    single = limit(replicas=1, lr=2 * ETA).fit(X[:1], [Y.mean()], 3, record=())
    np.testing.assert_allclose(run.f[:, :1], single.f, atol=1e-9)


@pytest.mark.slow
def test_rotating_the_targets_rotates_the_outputs(x64):
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    both = TWO_OUTPUTS, TWO_OUTPUTS @ turn
    exact = [outputs(X, y, 3, output_dim=2, activation="identity")[0] for y in both]
    np.testing.assert_allclose(exact[1], exact[0] @ turn, atol=1e-12)
    model = limit(output_dim=2, samples=2048, replicas=6)
    straight = model.fit(X, TWO_OUTPUTS, 3, record=())
    turned = model.fit(X, TWO_OUTPUTS @ turn, 3, record=())
    error = np.hypot(turned.stderr("f"), straight.stderr("f")).max()
    assert error < 2e-3
    np.testing.assert_allclose(turned.f, straight.f @ turn, atol=4 * error)


@pytest.mark.slow
def test_an_output_with_zero_target_stays_zero_and_disturbs_no_other(x64):
    with_zero = np.stack([Y, 0 * Y], axis=1)
    run = limit(output_dim=2, samples=2048, replicas=6).fit(X, with_zero, 3, record=())
    alone = limit(samples=2048, replicas=6).fit(X, Y, 3, record=())
    assert (np.abs(run.f[..., 1]) < 4 * run.stderr("f")[..., 1].max()).all()
    error = np.hypot(run.stderr("f")[..., :1], alone.stderr("f")).max()
    assert error < 2e-3
    np.testing.assert_allclose(run.f[..., :1], alone.f, atol=4 * error)


def test_a_batch_of_all_samples_is_full_batch(x64):
    np.testing.assert_array_equal(outputs(X, Y, 3, batch=2), outputs(X, Y, 3))


def test_small_steps_converge_to_a_flow(x64):
    ends = [outputs(X, Y, steps, lr=0.4 / steps, depth=1)[0, -1] for steps in (8, 16, 32)]
    first, second = np.abs(ends[1] - ends[0]).max(), np.abs(ends[2] - ends[1]).max()
    # Euler's method: errors proportional to the step.
    assert 1.8 < first / second < 2.2


def test_an_onlooker_equal_to_a_training_input_has_its_outputs(x64):
    run = limit(depth=3).fit(X, Y, 3, X_test=X[::-1])
    np.testing.assert_allclose(run.replicas["f_test"], run.replicas["f"][:, :, ::-1], atol=1e-11)


def test_onlookers_leave_training_as_it_was(x64):
    plain = limit(depth=3, batch=1).fit(X, Y, 3)
    watched = limit(depth=3, batch=1).fit(X, Y, 3, X_test=[[0.1, -0.2]])
    for name, values in plain.replicas.items():
        np.testing.assert_array_equal(watched.replicas[name], values, err_msg=name)
    dense = limit(depth=3, batch=1).fit(X, Y, 3, record=("G",))
    sparse = limit(depth=3, batch=1).fit(X, Y, 3, record=(), every=3)
    np.testing.assert_array_equal(sparse.replicas["f"], dense.replicas["f"][:, [0, 3]])


@pytest.mark.slow
def test_outputs_beyond_the_span_of_the_training_inputs_are_those_of_the_limit(x64):
    # One training input, and onlookers with a part beyond it: for the identity outputs are linear in x.
    model = limit(depth=2, activation="identity", samples=64)
    run = model.fit([[2.0, 0.0]], [1.0], 3, X_test=[[1.0, 5.0], [0.0, 1.0]], record=())
    np.testing.assert_allclose(run.f_test[:, 0], run.f[:, 0] / 2, atol=1e-11)
    np.testing.assert_allclose(run.f_test[:, 1], 0.0, atol=1e-11)
    # For an activation with a slope that depends on the size of h, what lies beyond matters.
    run = limit(replicas=1).fit([[1.0, 0.0]], [1.0], 2, X_test=[[1.0, 0.0], [1.0, 2.0]], record=())
    np.testing.assert_allclose(run.f_test[:, 0], run.f[:, 0], atol=1e-11)
    assert 0.05 < run.f_test[2, 1, 0] < 0.8 * run.f[2, 0, 0]


def test_outputs_at_new_inputs_are_those_of_the_exact_limit(x64):
    new = np.array([[0.4, -0.9]])
    run = limit(depth=3, activation="identity", samples=64).fit(X, Y, 3, X_test=new, record=())
    # For the identity f(x) is linear in x.
    expected = run.f[..., 0] @ np.linalg.inv(X).T @ new[0]
    np.testing.assert_allclose(run.f_test[:, 0, 0], expected, atol=1e-11)


@pytest.mark.slow
def test_fewer_directions_change_outputs_by_less_than_their_error(x64):
    model = limit(tol=1e-10)
    fine = model.fit(X, Y, 12, record=())
    coarse = limit(tol=1e-3)
    run = coarse.fit(X, Y, 12, record=())
    assert_within_errors(run, fine, floor=fine.stderr("f").mean())
    ranks = [
        sum(side.rank for matrix in state.replicas[0].matrices for side in (matrix.x, matrix.y))
        for state in (model.state, coarse.state)
        if state is not None
    ]
    assert ranks[1] < 0.8 * ranks[0]


def test_gram_matrices_and_changes_are_those_of_the_features(x64):
    run = limit(depth=2, activation="identity", samples=64).fit(X, Y, 2)
    _, K = identity_limit(X, Y[:, None], ETA, 2, 2)
    np.testing.assert_allclose(run.K_pre, run.K_post, atol=1e-14)
    np.testing.assert_allclose(run.K_pre[:, 0], np.stack([X @ X.T] * 2), atol=1e-13)
    np.testing.assert_allclose(np.swapaxes(run.mean("K_pre_cross"), 0, 1)[:, 0], run.K_pre[:, 0], atol=1e-13)
    moved = K[2] - 2 * run.mean("K_pre_cross")[2, 1] + K[0]
    # The mean over samples of a ratio of norms, and G at step 0: chi chi^T E[V^2], for both layers.
    change = np.mean(np.sqrt(np.diag(moved) / np.diag(K[0])))
    np.testing.assert_allclose(run.change[1, 2], change, rtol=1e-12)
    np.testing.assert_allclose(run.G[:, 0], np.stack([np.outer(Y, Y)] * 2), atol=1e-13)
    eigenvalues, errors = run.joint_min_eig()
    assert eigenvalues.shape == errors.shape == (2, 3)
    assert (np.abs(eigenvalues[:, 0]) < 1e-12).all()


def test_steps_by_hand_are_those_of_a_fit(x64):
    model = limit()
    model.fit(X, Y, 1)
    f = [model.step() for _ in range(2)]
    run = limit().fit(X, Y, 3)
    np.testing.assert_array_equal(np.stack(f), run.f[1:3])
    np.testing.assert_array_equal(model.resume(3).replicas["K_post"], run.replicas["K_post"])


# ---------------------------------------------------------------- refusals


def test_divergence_carries_the_trajectory(x64):
    model = limit(activation="identity", samples=64, lr=1e20)
    with pytest.raises(DivergedError, match=r"step \d+: .* not finite \(lr=1e\+20\)") as caught:
        model.fit(X, Y, 30)
    trajectory = caught.value.trajectory
    assert trajectory is not None
    assert len(trajectory.steps) >= 2
    assert np.isfinite(trajectory.f).all()
    with pytest.raises(RuntimeError, match="no state"):
        model.resume(40)


def test_a_rank_above_max_rank_is_refused_with_the_trajectory(x64):
    with pytest.raises(DivergedError, match=r"W\^2 has met 6 directions, more than max_rank=5") as caught:
        limit(max_rank=5).fit(X, Y, 9)
    assert caught.value.trajectory is not None
    assert caught.value.trajectory.steps.tolist() == [0, 1]


def test_too_many_fields_for_the_population_are_warned_of_once_and_then_refused(x64):
    model = limit(samples=32, replicas=1)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(DivergedError, match="32 points"):
        warnings.simplefilter("always")
        model.fit(X, Y, 30, record=())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "samples=32 points holds 10 orthonormal fields" in str(caught[0].message)
    with pytest.raises(ValueError, match="samples must exceed"):
        limit(samples=4, replicas=1).fit(X, Y, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 100}, "samples must be a power of two for Sobol points, got 100"),
        ({"sampler": "halton"}, "sampler must be 'sobol' or 'normal', got 'halton'"),
        ({"method": "exact"}, "method must be 'limit' or 'quadrature', got 'exact'"),
        ({"tol": 0.0}, r"tol must be in \[1e-14, 1\), got 0.0"),
        ({"max_rank": 0}, "max_rank must be an integer >= 1, got 0"),
        ({"qmc_dims": -1}, "qmc_dims must be an integer >= 0, got -1"),
        ({"replicas": 0}, "replicas must be an integer >= 1, got 0"),
        ({"depth": 1.5}, "depth must be an integer >= 1, got 1.5"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"lr": -1.0}, "lr must be finite and > 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"activation": "tan"}, "activation must be one of .*, got 'tan'"),
        ({"activation": ("tanh",)}, "activation must be one or depth = 2 of them, got 1"),
        ({"loss": "hinge"}, "loss must be one of .*, got 'hinge'"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum', got 'max'"),
        ({"parametrization": "mupp"}, "name must be one of .*, got 'mupp'"),
        ({"parametrization": "sp_const"}, "'sp_const'; WidthSimulator takes any"),
        ({"parametrization": Parametrization("mup", base_width=8)}, "base_width=None in the limit, got .*8"),
        ({"parametrization": Parametrization("mup"), "sigma": 2.0}, "sigma must be left to the Parametr"),
        ({"parametrization": "ip_llr", "activation": "sigmoid"}, "'ip_llr', got .'sigmoid'"),
        ({"devices": []}, "samples must be a multiple of the number of devices"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(x64, options, message):
    with pytest.raises(ValueError, match=message):
        limit(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"X": X[:, :1]}, r"X must be \[samples, input_dim = 2\], got shape \(2, 1\)"),
        ({"X": X * np.nan}, "X must be finite"),
        ({"y": Y[:1]}, r"y must be \[2, 1\], got shape \(1, 1\)"),
        ({"y": Y * np.inf}, "y must be finite"),
        ({"X_test": [1.0, 2.0]}, r"X_test must be \[samples, input_dim = 2\], got shape \(2,\)"),
        ({"X_test": [[1.0, np.nan]]}, "X_test must be finite"),
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"record": ("loss",)}, r"record must be among f, K, G, change, got \('loss',\)"),
        ({"save_every": 0}, "save_every must be an integer >= 1, got 0"),
    ],
)
def test_data_of_wrong_shape_or_value_are_refused_by_name(x64, call, message):
    with pytest.raises(ValueError, match=message):
        limit().fit(**({"X": X, "y": Y, "steps": 1} | call))


def test_adam_has_no_limit_here_and_the_message_says_what_to_do(x64):
    with pytest.raises(
        NotImplementedError, match=r"got optimizer 'adam': .* real networks of several widths"
    ):
        limit(parametrization=Parametrization("mup", optimizer="adam"))


def test_activations_with_kinks_are_warned_of(x64):
    with pytest.warns(UserWarning, match="two derivatives; relu has not"):
        limit(activation="relu")


def test_without_float64_there_is_no_limit():
    with float64(False), pytest.raises(ValueError, match="jax_enable_x64 must be on"):
        InfiniteWidthMLP(**BASE, key=KEY)


def test_float64_must_be_on_whenever_a_run_goes_on(x64):
    model = limit()
    model.fit(X, Y, 1, record=())
    for call in (lambda: model.fit(X, Y, 1), lambda: model.resume(2), model.step):
        with float64(False), pytest.raises(ValueError, match="jax_enable_x64 must be on"):
            call()
    assert len(model.resume(2).f) == 3


def test_the_same_key_gives_the_same_numbers_and_another_key_others(x64):
    first, again, other = (
        limit(key=jax.random.key(seed)).fit(X, Y, 1, record=()).replicas["f"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - other)[:, 1] > 1e-8).all()
    assert np.abs(first[0, 1] - first[1, 1]).min() > 1e-8


@pytest.mark.parametrize(("moment_match", "low", "high"), [(True, 0.0, 1e-12), (False, 1e-4, 0.2)])
def test_covariances_of_the_fields_are_preserved_at_all_training_times(x64, moment_match, low, high):
    X, y = np.array([[1.0, 0.5], [-0.3, 0.8]]), np.array([1.0, -0.5])
    model = InfiniteWidthMLP(
        depth=3,
        input_dim=2,
        lr=0.3,
        reduction="sum",
        samples=1024,
        replicas=2,
        moment_match=moment_match,
        key=jax.random.key(0),
    )
    model.fit(X, y, 2, record=("f",))
    errors = covariance_preservation_error(model)
    assert set(errors) == {2, 3}
    assert all(low <= error <= high for error in errors.values())
