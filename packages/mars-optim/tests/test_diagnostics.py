"""estimator_error: the squared distance of a momentum from the full gradient."""

import pytest

torch = pytest.importorskip("torch", reason="diagnostics need torch")

from mars_optim.torch.diagnostics import estimator_error  # noqa: E402


def test_it_is_the_squared_distance():
    error = estimator_error(torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0]))
    assert error.shape == ()
    assert error.item() == 25.0


def test_it_sums_over_tensors_of_any_shape():
    momenta = [torch.ones(2, 3), torch.tensor(2.0), torch.zeros(0)]
    gradients = [torch.zeros(2, 3), torch.tensor(-1.0), torch.zeros(0)]
    assert estimator_error(momenta, gradients).item() == 6.0 + 9.0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_low_precision_is_summed_in_float32_and_double_in_double(dtype, expected):
    # 1/3 twice, rounded to dtype first: the sum itself must lose nothing
    third = torch.full((4096,), 1 / 3, dtype=dtype)
    error = estimator_error(third, torch.zeros_like(third))
    assert error.dtype == expected
    # a sum of 4096 equal numbers, a power of two, is exact in binary when added pairwise
    assert error.item() == pytest.approx(4096 * third[0].to(expected).square().item(), rel=1e-6)


def test_complex_tensors_count_both_parts():
    assert estimator_error(torch.tensor([3 + 4j]), torch.tensor([0j])).item() == 25.0


def test_it_records_no_gradient():
    m = torch.ones(3, requires_grad=True)
    assert not estimator_error(m, torch.zeros(3)).requires_grad


@pytest.mark.parametrize(
    ("m", "full_grad", "error", "message"),
    [
        (
            torch.ones(2),
            [torch.ones(2)],
            TypeError,
            r"both be sequences of tensors, got \('Tensor', 'list'\)",
        ),
        ([], [], ValueError, "m must hold at least one tensor"),
        ([torch.ones(2)], [torch.ones(2)] * 2, ValueError, "as many tensors as m, got 2 for 1"),
        ([torch.ones(2)], [torch.ones(1)], ValueError, r"got \(1,\) for \(2,\) at position 0"),
    ],
)
def test_bad_arguments_are_named(m, full_grad, error, message):
    with pytest.raises(error, match=message):
        estimator_error(m, full_grad)
