"""Verdicts on activations: the known ones, and the numeric test against them."""

import numpy as np
import pytest
from scipy.special import erf, expit

from mup_features.theory import check_activation

GOOD = {
    "tanh": np.tanh,
    "sigmoid": expit,
    "silu": lambda x: x * expit(x),
    "erf": erf,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "softplus": lambda x: np.logaddexp(0, x),
    "sin": np.sin,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}
NOT_GOOD = {
    "identity": (lambda x: x, "are dependent"),
    "relu": (lambda x: np.maximum(x, 0), "phi' jumps"),
    "leaky_relu": (lambda x: np.maximum(x, 0.1 * x), "phi' jumps"),
    "abs": (np.abs, "phi' jumps"),
    "hardtanh": (lambda x: np.clip(x, -1, 1), "phi' jumps"),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), "phi'' jumps"),
    "selu": (lambda x: 1.0507 * np.where(x > 0, x, 1.67326 * np.expm1(np.minimum(x, 0))), "phi' jumps"),
    "celu": (lambda x: np.where(x > 0, x, 2 * np.expm1(np.minimum(x, 0) / 2)), "phi'' jumps"),
    "square": (np.square, "derivative grows"),
    "cube": (lambda x: x**3, "derivative grows"),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_numeric_test_supports_every_good_activation(name):
    assert check_activation(name).verdict == "good"
    assert check_activation(GOOD[name]).verdict == "supported"


@pytest.mark.parametrize("name", NOT_GOOD)
def test_the_numeric_test_refutes_every_other_activation_for_the_right_reason(name):
    phi, reason = NOT_GOOD[name]
    assert check_activation(name).verdict == "not good"
    report = check_activation(phi)
    assert report.verdict == "refuted"
    assert any(reason in found for found in report.reasons)


def test_a_kink_away_from_zero_and_from_the_grid_is_found():
    assert check_activation(lambda x: np.maximum(x - 0.1234567, 0)).verdict == "refuted"


def test_a_function_with_a_pole_is_refuted_where_it_is():
    report = check_activation(lambda x: 1 / x)
    assert (report.verdict, report.reasons) == ("refuted", ("phi(0) is not finite",))


def test_a_derivative_that_grows_like_a_logarithm_stays_undecided():
    assert check_activation(lambda x: x * np.log1p(x**2)).verdict == "undecided"


def test_what_is_no_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'rleu'"):
        check_activation("rleu")
    with pytest.raises(TypeError, match="must be a name or a function, got int"):
        check_activation(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must return the shape of its argument"):
        check_activation(lambda x: x[:2])
    with pytest.raises(TypeError, match="must take a NumPy float64 array"):
        check_activation(lambda x: x.relu())
