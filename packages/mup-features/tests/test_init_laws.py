"""How a model's own initialisation depends on width, found out by comparison with the base model."""

from math import sqrt

import pytest

from mup_features.init_laws import Measured, init_growth, laws_of
from mup_features.roles import Role

EMBEDDING = Role("input", 1.0, 4.0, base_std=0.5, default_fan_mult=1.0)
HIDDEN = Role("hidden", 4.0, 4.0, base_std=0.5)


def law_of(role, growth, entries=4096):
    return laws_of({"w": Measured(0.5 * growth, entries)}, {"w": role}, "auto")["w"]


@pytest.mark.parametrize(
    ("role", "growth", "law"),
    [
        (EMBEDDING, 1.0, "constant"),
        (EMBEDDING, 1 / 2, "fan_out"),
        (EMBEDDING, sqrt((16 + 64) / (16 + 256)), "fan_out"),  # Glorot's, 16 inputs and 64 or 256 units
        (HIDDEN, 1.0, "constant"),
        (HIDDEN, 1 / 2, "fan_in"),
    ],
)
def test_the_law_is_the_one_that_fits_the_growth_from_the_base_model(role, growth, law):
    assert law_of(role, growth) == law


def test_only_the_law_told_apart_from_the_others_scales_a_parameter():
    assert [init_growth(EMBEDDING, law) for law in ("fan_in", "fan_out", "constant")] == [1.0, 0.5, 1.0]
    assert [init_growth(HIDDEN, law) for law in ("fan_in", "fan_out", "constant")] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("role", [EMBEDDING, HIDDEN])
def test_a_size_between_or_beyond_the_laws_is_refused(role):
    for growth in (1 / sqrt(2.0), 1.5, 0.25):
        with pytest.raises(ValueError, match=r"init must say how 'w' depends on width: .* fits neither"):
            law_of(role, growth)


def test_large_inputs_do_not_outvote_the_weights_whose_fan_grows():
    measured = {"embed": Measured(0.5, 10**6), "hidden": Measured(0.25, 4096), "small": Measured(0.4, 16)}
    roles = {"embed": EMBEDDING, "hidden": HIDDEN, "small": Role("hidden", 4.0, 1.0, base_std=0.5)}
    assert laws_of(measured, roles, "auto") == {"embed": "constant", "hidden": "fan_in", "small": "fan_in"}


def test_patterns_may_leave_the_rest_to_measurement():
    measured = {"embed": Measured(0.1, 4096), "hidden": Measured(0.5, 4096)}
    roles = {"embed": EMBEDDING, "hidden": HIDDEN}
    assert laws_of(measured, roles, {"emb*": "fan_out", "*": "auto"}) == {
        "embed": "fan_out",
        "hidden": "constant",
    }
