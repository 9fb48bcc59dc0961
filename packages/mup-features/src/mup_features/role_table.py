"""Roles as a table that a person can check: shape, place, and every factor relative to base width."""

from collections.abc import Mapping

from .roles import Role
from .width_rules import Form, Optimizer, width_scales

__all__ = ["format_roles"]


def format_roles(
    roles: Mapping[str, Role],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    optimizer: Optimizer = "adam",
    form: Form = "mult",
) -> str:
    """Markdown table with one row per parameter.

    Args:
        roles: name -> role.
        shapes: name -> shape, shown if given.
        optimizer: whose rates to show.
        form: whose sizes and multipliers to show.

    Raises:
        ValueError: for an unknown optimizer or form.
    """
    rows = [["parameter", "shape", "role", "m_in", "m_out", "init std", "multiplier", "lr", "weight decay"]]
    for name, role in roles.items():
        scales = width_scales(role, optimizer=optimizer, form=form)
        shape = "" if shapes is None else "x".join(map(str, shapes[name])) or "1"
        numbers = (
            role.fan_in_mult,
            role.fan_out_mult,
            scales.init,
            scales.multiplier,
            scales.lr,
            scales.weight_decay,
        )
        kind = f"{role.kind}, tied" if role.tied else role.kind
        rows.append([name, shape, kind, *(f"{number:.4g}" for number in numbers)])
    if shapes is None:
        rows = [row[:1] + row[2:] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
