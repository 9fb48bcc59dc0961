"""The NumPy truth against the worked example and the Newton-Schulz numbers of the specification."""

import numpy as np
import pytest
import reference
from reference import Mars, Options

X1 = np.array([[1.0, -2.0], [0.5, 0.25]])
G1 = np.array([[0.1, -0.2], [0.3, 0.4]])
G2 = np.array([[0.3, 0.1], [-0.2, 0.2]])
H2 = np.array([[0.2, 0.0], [-0.1, 0.3]])
PRINTED = 1e-12  # the table prints 12 decimals: half a unit in the last place, doubled

# (options, factor on every gradient, x_3 row-major)
WORKED_EXAMPLE = {
    "adamw approx": ({}, 1, (0.792228780183, -1.902513715324, 0.436134963202, 0.123350044826)),
    "adamw exact": (
        {"is_approx": False},
        1,
        (0.797489570004, -1.903617690035, 0.424939945641, 0.122257188937),
    ),
    "adamw approx unclipped": (
        {"clip": None},
        1,
        (0.801558539049, -1.925625354478, 0.456628844666, 0.177374482627),
    ),
    "adamw approx zero": (
        {"prev_grad_init": "zero"},
        1,
        (0.785114575130, -1.877601408970, 0.413058344358, 0.103374063290),
    ),
    "adamw exact zero": (
        {"is_approx": False, "prev_grad_init": "zero"},
        1,
        (0.791437089858, -1.879207966270, 0.397369990440, 0.102711156118),
    ),
    "adamw approx gradients x10": ({}, 10, (0.785114575130, -1.877601408970, 0.413058344358, 0.103374063290)),
    "adamw approx cautious decay": (
        {"decay_mode": "cautious"},
        1,
        (0.792228780183, -1.921313715374, 0.440084963235, 0.123350044826),
    ),
    "lion approx": ({"mars_type": "lion"}, 1, (0.7811, -1.9612, 0.49105, 0.046025)),
    "lion approx cautious decay": (
        {"mars_type": "lion", "decay_mode": "cautious"},
        1,
        (0.7811, -1.98, 0.495, 0.046025),
    ),
    "sgd approx": (
        {"mars_type": "sgd"},
        1,
        (0.974421890210, -1.960997299330, 0.492114057489, 0.239674730711),
    ),
    "sgd exact": (
        {"mars_type": "sgd", "is_approx": False},
        1,
        (0.971755027756, -1.961153646312, 0.489974309278, 0.239616657415),
    ),
    "shampoo approx": (
        {"mars_type": "shampoo"},
        1,
        (0.861933200969, -1.972333269586, 0.492249559406, 0.127721204994),
    ),
    "shampoo exact": (
        {"mars_type": "shampoo", "is_approx": False},
        1,
        (0.839682048255, -1.932993022674, 0.472829818900, 0.135841768735),
    ),
    "shampoo approx svd": (
        {"mars_type": "shampoo", "orthogonalize": "svd"},
        1,
        (0.848684243010, -1.969117550381, 0.498967550381, 0.113609243010),
    ),
    "shampoo exact svd": (
        {"mars_type": "shampoo", "is_approx": False, "orthogonalize": "svd"},
        1,
        (0.826712941304, -1.945397823897, 0.475247823897, 0.091637941304),
    ),
    "m approx": (
        {"mars_type": "m"},
        1,
        (0.946677401669, -1.963631776604, 0.490672102203, 0.211846550954),
    ),
}


@pytest.mark.parametrize("case", WORKED_EXAMPLE)
def test_worked_example_reaches_the_printed_x3(case):
    changed, factor, expected = WORKED_EXAMPLE[case]
    options = Options(lr=0.1, weight_decay=0.1, gamma=0.5, betas=(0.9, 0.99), **changed)
    optimizer = Mars([X1])
    optimizer.step([factor * G1], options, exact=[factor * G1])
    optimizer.step([factor * G2], options, exact=[factor * H2])
    np.testing.assert_allclose(optimizer.parameters[0].ravel(), expected, rtol=0, atol=PRINTED)


def test_newton_schulz_of_a_diagonal_matrix_gives_the_printed_values():
    result = reference.newton_schulz(np.diag([1.0, 0.5]))
    np.testing.assert_allclose(np.diag(result), (0.688762771057, 1.114164004692), rtol=0, atol=PRINTED)
    np.testing.assert_allclose(result - np.diag(np.diag(result)), 0.0, rtol=0, atol=0)


def quintic_five_times(s):
    p1, p2, p3 = reference.COEFFICIENTS
    for _ in range(5):
        s = p1 * s + p2 * s**3 + p3 * s**5
    return s


@pytest.mark.parametrize(
    ("singular_value", "expected"), [(0.01, 0.698917063322), (0.003, 1.110357319921), (1.0, 0.696436409470)]
)
def test_quintic_applied_five_times_gives_the_printed_values(singular_value, expected):
    assert quintic_five_times(singular_value) == pytest.approx(expected, rel=0, abs=PRINTED)


def test_quintic_maps_singular_values_above_a_twentieth_into_the_printed_interval():
    image = quintic_five_times(np.linspace(0.05, 1.0, 2_000_001))
    # the interval is printed to 6 decimals
    assert image.min() == pytest.approx(0.681831, abs=1e-6)
    assert image.max() == pytest.approx(1.134358, abs=1e-6)


def test_newton_schulz_acts_on_singular_values_alone():
    rng = np.random.default_rng(0)
    m = rng.normal(size=(7, 4))
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    expected = u @ np.diag(quintic_five_times(s / np.linalg.norm(s))) @ vt
    # five float64 matrix polynomials of norm about one: a few hundred ulp
    np.testing.assert_allclose(reference.newton_schulz(m), expected, rtol=0, atol=1e-13)


def test_polar_factor_of_a_rank_one_matrix_is_its_unit_outer_product():
    m = np.outer([3.0, 0.0, 4.0], [0.0, 2.0])
    np.testing.assert_allclose(reference.polar(m), np.outer([0.6, 0, 0.8], [0, 1]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", [reference.newton_schulz, reference.polar])
def test_zero_matrix_has_a_zero_polar_factor(solver):
    np.testing.assert_array_equal(solver(np.zeros((3, 2))), np.zeros((3, 2)))


def test_first_step_has_no_correction_when_both_points_coincide():
    optimizer, plain = Mars([X1]), Mars([X1])
    optimizer.step([G1], Options(mars_type="sgd", gamma=1.0))
    plain.step([G1], Options(mars_type="sgd", gamma=0.0))
    np.testing.assert_array_equal(optimizer.parameters[0], plain.parameters[0])
