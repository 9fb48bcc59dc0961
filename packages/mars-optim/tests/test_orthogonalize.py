"""Newton-Schulz against the NumPy truth, polar factors against the SVD."""

import numpy as np
import pytest
import reference
import torch

from mars_optim.torch import newton_schulz, orthogonalize, polar

SHAPES = [(6, 4), (3, 8), (5, 5), (1, 4), (7, 1), (2, 3, 4), (2, 2, 5, 3)]
PHI_OF_ONE = 0.696436409470


def random_matrix(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apply_to_slices(function, array):
    if array.ndim == 2:
        return function(array)
    return np.stack([apply_to_slices(function, part) for part in array])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_follows_the_reference(shape):
    matrix = random_matrix(shape)
    expected = apply_to_slices(lambda m: reference.newton_schulz(m, eps=1e-3), matrix.numpy())
    # five float64 polynomials of matrices of norm one
    np.testing.assert_allclose(newton_schulz(matrix, eps=1e-3).numpy(), expected, rtol=0, atol=1e-12)


def test_newton_schulz_of_a_diagonal_matrix_gives_the_printed_values():
    result = newton_schulz(torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)), eps=0.0)
    expected = np.diag([0.688762771057, 1.114164004692])
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-12)  # printed to 12 decimals


def test_newton_schulz_maps_small_singular_values_by_the_quintic():
    u, _ = torch.linalg.qr(random_matrix((3, 3), seed=3))
    v, _ = torch.linalg.qr(random_matrix((3, 3), seed=4))
    s = torch.tensor([(1 - 0.01**2 - 0.003**2) ** 0.5, 0.01, 0.003], dtype=torch.float64)  # norm 1
    factor = u.T @ newton_schulz(u @ torch.diag(s) @ v.T, eps=0.0) @ v
    # printed to 12 decimals; small singular values are known to a few hundred ulp of the large one
    np.testing.assert_allclose(factor.diagonal()[1:], (0.698917063322, 1.110357319921), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_newton_schulz_of_a_vector_is_a_multiple_of_the_unit_vector(shape):
    matrix = random_matrix(shape)
    expected = PHI_OF_ONE * matrix / matrix.norm()
    torch.testing.assert_close(newton_schulz(matrix, eps=0.0), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "product", "slack"),
    [
        (torch.float64, None, 1e-6),  # the interval's ends are printed to six decimals
        (torch.float32, None, 1e-5),
        # bfloat16 keeps 8 bits: each of 5 steps may move a singular value by a few times 2^-8
        (torch.float32, torch.bfloat16, 0.15),
        (torch.bfloat16, None, 0.05),
    ],
)
def test_singular_values_land_in_the_interval_of_the_quintic(dtype, product, slack):
    u, _ = torch.linalg.qr(random_matrix((8, 8), seed=1))
    v, _ = torch.linalg.qr(random_matrix((12, 8), seed=2))
    s = torch.linspace(0.3, 1.0, 8, dtype=torch.float64)  # at least 0.05 after normalisation
    result = newton_schulz((u @ torch.diag(s) @ v.T).to(dtype), dtype=product)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.681831 - slack
    assert values.max() < 1.134358 + slack


@pytest.mark.parametrize("method", ["newton_schulz", "svd", "newton", "cubic"])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (0, 4), (4, 0), (2, 3, 3)], ids=str)
def test_zero_and_empty_matrices_have_zero_factors(method, shape):
    zero = torch.zeros(shape)
    (factor,) = orthogonalize([zero], method, eps=0.0)
    torch.testing.assert_close(factor, zero, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["svd", "newton", "cubic"])
def test_polar_factors_are_isometries_that_leave_a_positive_part(method, shape, dtype):
    matrix = random_matrix(shape, dtype)
    factor = polar(matrix, method)
    tall = shape[-2] >= shape[-1]
    gram = factor.mH @ factor if tall else factor @ factor.mH
    identity = torch.eye(min(shape[-2:]), dtype=dtype).expand_as(gram)
    # a few dozen roundings of the dtype
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(gram, identity, rtol=0, atol=tolerance)
    positive = factor.mH @ matrix if tall else matrix @ factor.mH
    torch.testing.assert_close(positive, positive.mH, rtol=0, atol=tolerance * float(matrix.abs().max()) * 10)
    assert torch.linalg.eigvalsh(positive).min() > 0


@pytest.mark.parametrize("method", ["newton", "cubic"])
def test_iterations_agree_with_the_svd_for_dead_units_and_bad_condition(method):
    matrix = random_matrix((6, 9))
    matrix[2] = 0.0  # the gradient of a dead unit
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.tensor([1.0, 0.3, 1e-1, 1e-2, 1e-3, 0.0], dtype=torch.float64)
    for singular in (matrix, u @ torch.diag(s) @ vh):
        # the noise in place of the zero singular value may keep eps^(1/4), about 1e-4, of a unit direction
        torch.testing.assert_close(polar(singular, method), polar(singular), rtol=0, atol=5e-4)


def test_polar_by_svd_follows_the_reference_for_deficient_rank():
    matrix = torch.outer(random_matrix((6,)), random_matrix((4,), seed=1))
    np.testing.assert_allclose(polar(matrix).numpy(), reference.polar(matrix.numpy()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["newton_schulz", "svd", "newton", "cubic"])
def test_stacked_matrices_get_the_factors_they_get_alone(method):
    matrices = [
        random_matrix(s, seed=i) for i, s in enumerate([(6, 4), (4, 6), (3, 8), (6, 4), (2, 4, 6), (5, 1)])
    ]
    together = orthogonalize(matrices, method)
    for matrix, factor in zip(matrices, together, strict=True):
        (alone,) = orthogonalize([matrix], method)
        # batched and single products may add in another order
        torch.testing.assert_close(factor, alone, rtol=0, atol=1e-12)


def test_equal_shapes_share_one_product(monkeypatch):
    calls = []
    original = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: calls.append(a[0].shape) or original(*a, **k))
    orthogonalize([random_matrix((6, 4)), random_matrix((4, 6)), random_matrix((6, 4))], steps=1)
    assert calls == [(3, 4, 4), (3, 4, 6)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_schulz(torch.ones(3, 3), steps=-1), "steps must be >= 0, got -1"),
        (lambda: newton_schulz(torch.ones(3, 3), eps=-1.0), "eps must be >= 0, got -1.0"),
        (lambda: polar(torch.ones(3, 3), "qr"), "method must be one of 'svd', 'newton', 'cubic', got 'qr'"),
        (lambda: orthogonalize([torch.ones(3)]), r"at least two dimensions, got shape \(3,\)"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
