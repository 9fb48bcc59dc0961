"""What `mars_optim.jax.mars` refuses and warns of, with the argument's name, the rule and the value."""

import warnings

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from mars_optim.jax import mars, mars_correction  # noqa: E402


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be finite and >= 0, got -1.0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"b1_1d": 1.5}, r"b1_1d must be in \[0, 1\), got 1.5"),
        ({"b2_1d": 1}, r"b2_1d must be in \[0, 1\), got 1"),
        ({"eps": -1e-8}, r"eps must be finite and >= 0, got -1e-08"),
        ({"gamma": -0.1}, r"gamma must be finite and >= 0, got -0.1"),
        ({"gamma": float("inf")}, r"gamma must be finite and >= 0, got inf"),
        ({"gamma": float("nan")}, r"gamma must be finite and >= 0, got nan"),
        ({"gamma": jnp.asarray(-1.0)}, r"gamma must be finite and >= 0, got Array"),
        ({"clip": 0.0}, r"clip must be finite and > 0 \(None turns it off\), got 0.0"),
        ({"clip": float("inf")}, r"clip must be finite and > 0 \(None turns it off\), got inf"),
        ({"eps": float("inf")}, r"eps must be finite and >= 0, got inf"),
        ({"learning_rate": float("nan")}, r"learning_rate must be finite and >= 0, got nan"),
        ({"weight_decay": float("inf")}, r"weight_decay must be finite and >= 0, got inf"),
        ({"clip_scope": "tensor"}, r"clip_scope must be one of \('leaf', 'global'\), got 'tensor'"),
        ({"prev_grad_init": "zeros"}, r"prev_grad_init must be one of \('current', 'zero'\), got 'zeros'"),
        ({"prev_grad_dtype": jnp.int32}, r"prev_grad_dtype must be a floating dtype or None, got .*int32"),
        ({"mars_type": "muon"}, r"mars_type must be one of \('mars-adamw', .*\), got 'muon'"),
        ({"orthogonalize": "qr"}, r"orthogonalize must be one of \('newton_schulz', 'svd'\), got 'qr'"),
        ({"ns_steps": -1}, r"ns_steps must be an integer >= 0, got -1"),
        ({"ns_steps": 2.5}, r"ns_steps must be an integer >= 0, got 2.5"),
        (
            {"scale": "big"},
            r"scale must be None, a number or one of \('none', 'sqrt_ratio', 'rms'\), got 'big'",
        ),
        ({"scale": float("nan")}, r"scale must be finite, got nan"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0.1"),
        ({"weight_decay_1d": -0.1}, r"weight_decay_1d must be finite and >= 0, got -0.1"),
        ({"lr_1d_ratio": -2}, r"lr_1d_ratio must be finite and >= 0, got -2"),
        ({"mars_type": "m", "axis_name": "d"}, r"axis_name must be None for mars-m: .*, got 'd'"),
    ],
)
def test_options_out_of_range_are_refused_with_name_rule_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        mars(**({"learning_rate": 1e-3} | options))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((0, 2), r"must name axes of the shape \(3, 4\), got \(0, 2\)"),
        ((0, 0), r"needs two disjoint non-empty groups of axes, got \(0, 0\)"),
        (((), 0), r"needs two disjoint non-empty groups of axes, got \(\(\), 0\)"),
        ("rows", r"must hold None or \(row axes, column axes\), got 'rows'"),
        ((0,), r"must hold None or \(row axes, column axes\), got \(0,\)"),
    ],
)
def test_impossible_dimension_numbers_are_refused(spec, message):
    tx = mars(1e-3, "shampoo", weight_dimension_numbers=[spec])
    with pytest.raises(ValueError, match=message):
        tx.init([jnp.ones((3, 4))])


def test_a_number_that_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match=r"b1 must be a number, got '0\.9'"):
        mars(1e-3, b1="0.9")
    with pytest.raises(TypeError, match="eps must be a number, got None"):
        mars(1e-3, eps=None)


@pytest.mark.parametrize("name", ["is_approx", "keep_prev_params", "amsgrad", "optimize_1d"])
def test_a_switch_that_is_neither_true_nor_false_is_a_type_error(unchecked, name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        mars(1e-3, **{name: "no"})


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_second_gradients_that_are_not_real_floats_are_refused(dtype):
    tx, g = mars(1e-3, is_approx=False), {"x": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"prev_grads must be real floating-point arrays, got .* at \['x'\]"):
        tx.update(g, tx.init(g), g, prev_grads={"x": jnp.ones((2, 2), dtype)})


def test_the_state_of_another_optimiser_or_of_other_parameters_is_refused():
    g = {"x": jnp.ones((2, 2))}
    for tx, kind in ((mars(1e-3), "ScaleByMarsState"), (mars_correction(), "MarsState")):
        with pytest.raises(TypeError, match=f"state must be the {kind} that init returned, got tuple"):
            tx.update(g, optax.adam(1e-3).init(g), g)
        with pytest.raises(ValueError, match=r"structure of the gradients, .* got another one in prev_grad"):
            tx.update(g, tx.init({"y": g["x"]}), g)
    exact = mars(1e-3, is_approx=False)
    with pytest.raises(ValueError, match="got another one in mu"):
        exact.update(g, exact.init({"y": g["x"]}), g, prev_grads=g)


def test_a_mask_that_does_not_fit_is_named():
    params = {"x": jnp.ones((2, 2)), "y": jnp.ones(2)}
    for make in (lambda mask: mars(1e-3, mask=mask), lambda mask: mars_correction(mask=mask)):
        tx, state = make({"x": True}), make(None).init(params)
        with pytest.raises(ValueError, match="mask must be a tree like the parameters, or a prefix of it"):
            tx.update(params, state, params)
        with pytest.raises(TypeError, match="mask must hold True or False, got 'x'"):
            make("x").update(params, state, params)


def test_update_without_parameters_is_refused():
    tx = mars(1e-3)
    with pytest.raises(ValueError, match="params must be given to update"):
        tx.update([jnp.ones((2, 2))], tx.init([jnp.ones((2, 2))]))


def test_a_large_gamma_in_the_approximate_form_warns_and_in_the_exact_form_does_not():
    with pytest.warns(UserWarning, match="gamma=0.5 with is_approx=True raises the noise"):
        mars(1e-3, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mars(1e-3, gamma=0.5, is_approx=False)
        mars(1e-3, gamma=0.2)
