"""The table of roles that a person checks."""

import pytest

from mup_features.role_table import format_roles
from mup_features.roles import Role

ROLES = {
    "fc1.weight": Role("input", fan_out_mult=4.0),
    "fc2.weight": Role("hidden", fan_in_mult=4.0, fan_out_mult=8.0),
    "emb.weight": Role("input", fan_out_mult=2.0, tied=True),
}


def test_the_table_has_one_row_per_parameter_with_all_factors():
    rows = format_roles(
        ROLES, {"fc1.weight": (64, 8), "fc2.weight": (128, 64), "emb.weight": ()}
    ).splitlines()
    assert len(rows) == 5
    assert rows[2] == "| fc1.weight | 64x8 | input | 1 | 4 | 1 | 1 | 1 | 1 |"
    assert rows[3] == "| fc2.weight | 128x64 | hidden | 4 | 8 | 0.5 | 1 | 0.25 | 4 |"
    assert rows[4].startswith("| emb.weight | 1 | input, tied |")


def test_the_table_follows_optimizer_and_form():
    row = format_roles(ROLES, optimizer="sgd", form="symmetric").splitlines()[2]
    assert row == "| fc1.weight | input | 1 | 4 | 0.5 | 2 | 1 | 1 |"
    with pytest.raises(ValueError, match="form must be one of"):
        format_roles(ROLES, form="odd")  # pyright: ignore[reportArgumentType]
