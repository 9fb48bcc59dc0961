"""Newton-Schulz and the polar factor in JAX: the specification's numbers, shapes, degenerate matrices."""

import numpy as np
import pytest
import reference
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax import experimental  # noqa: E402

from mars_optim.jax import newton_schulz, polar_factor  # noqa: E402

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64


@pytest.fixture(autouse=True)
def x64():
    with enable_x64(True):
        yield


def test_newton_schulz_gives_the_numbers_of_the_specification():
    # eps=0 still divides by the Frobenius norm, so diag(1, 0.5) starts at (0.894..., 0.447...).
    factor = newton_schulz(jnp.diag(jnp.array([1.0, 0.5])), eps=0.0)
    np.testing.assert_allclose(jnp.diag(factor), (0.688762771057, 1.114164004692), atol=1e-12)
    np.testing.assert_allclose(newton_schulz(jnp.ones((1, 1)), eps=0.0), 0.696436409470, atol=1e-12)


def test_newton_schulz_maps_small_singular_values_by_the_quintic():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    values = np.array([np.sqrt(1 - 0.01**2 - 0.003**2), 0.01, 0.003])  # a Frobenius norm of 1
    factor = u.T @ newton_schulz(jnp.asarray(u * values @ v), eps=0.0) @ v.T
    np.testing.assert_allclose(np.diag(factor)[1:], (0.698917063322, 1.110357319921), atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 4), (7, 1)])
def test_both_factors_equal_the_numpy_reference(shape):
    matrix = np.random.default_rng(1).normal(size=shape)
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(matrix), eps=1e-7), reference.newton_schulz(matrix, eps=1e-7), atol=1e-13
    )
    np.testing.assert_allclose(polar_factor(jnp.asarray(matrix)), reference.polar(matrix), atol=1e-13)


def test_a_stack_of_matrices_gives_the_factor_of_each():
    stack = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 6, 4)))
    for factor in (newton_schulz, polar_factor):
        for i in range(2):
            for j in range(3):
                np.testing.assert_allclose(factor(stack)[i, j], factor(stack[i, j]), atol=1e-13)


@pytest.mark.parametrize("factor", [newton_schulz, polar_factor])
def test_zero_and_empty_matrices_give_zero_and_empty_and_nan_stays_nan(factor):
    np.testing.assert_array_equal(factor(jnp.zeros((3, 2))), 0.0)
    assert factor(jnp.zeros((0, 4))).shape == (0, 4)
    assert factor(jnp.zeros((4, 0))).shape == (4, 0)
    assert np.isnan(factor(jnp.full((3, 2), jnp.nan))).any()


def test_zero_matrix_gives_zero_even_without_eps():
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((3, 2)), eps=0.0), 0.0)


def test_polar_factor_of_a_rank_deficient_matrix_leaves_its_null_space_alone():
    matrix = jnp.outer(jnp.array([3.0, 4.0, 0.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(polar_factor(matrix), matrix / 5, atol=1e-15)


def test_number_of_steps_may_be_traced():
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(6, 4)))
    traced = jax.jit(lambda m, steps: newton_schulz(m, steps=steps))
    for steps in (0, 1, 5):
        np.testing.assert_allclose(traced(matrix, steps), newton_schulz(matrix, steps=steps), atol=1e-13)


def test_shapes_of_the_signatures_hold_at_run_time():
    for function in (newton_schulz, polar_factor):
        checked = jaxtyped(typechecker=beartype)(function)
        assert checked(jnp.eye(3, 2)).shape == (3, 2)
        with pytest.raises(TypeCheckError):
            checked(jnp.ones(3))
