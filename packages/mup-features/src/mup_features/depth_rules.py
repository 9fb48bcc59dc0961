"""What the number of residual blocks does to branches, rates and Adam's epsilon.

    depth = "sqrt":    branches times sqrt(L0/L); rates of the blocks' parameters times sqrt(L0/L), but SGD's
    depth = "linear":  branches times L0/L; Adam's rates and decay as they are, epsilon times L0/L, SGD's rate
                       times L/L0

L blocks, each scaled by s, add up L s times the effect of an update of fixed size, or L s^2 times that of a
gradient, which is smaller by s itself. "linear" makes the former one without any change of rates, and
epsilon follows the gradients. At the base depth L0 all factors are 1.

Source: Yang et al. 2023 (arXiv 2310.02244), depth-muP; Dey et al. 2025 (arXiv 2505.01618), CompleteP.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import sqrt
from typing import Literal

from .roles import Role
from .width_rules import Alignment, DecayMode, Form, Optimizer, WidthScales, width_scales

Depth = Literal["sqrt", "linear"]

WITH_EPSILON: tuple[Optimizer, ...] = ("adam", "adamw", "muon")
"""Families of updates in which an epsilon stands; under "muon" for what is not orthogonalised."""

__all__ = [
    "WITH_EPSILON",
    "Depth",
    "blocks_and_ratio",
    "depth_factors",
    "is_orthogonalised",
    "residual_scale",
    "scales_with_depth",
]


def residual_scale(depth: int, base_depth: int, mode: Depth = "sqrt") -> float:
    """Multiplier of residual branches: sqrt(L0/L), or L0/L for `linear`.

    `param_groups` (torch) and `mup_transform` (flax) have the rates that belong to it, as `depth`.

        h = h + residual_scale(len(self.blocks), 4) * block(h)

    Args:
        depth: number L of residual blocks, >= 1.
        base_depth: that of the base model, >= 1.
        mode: "sqrt" or "linear".

    Raises:
        ValueError: if a value is out of range.

    Source: Yang et al. 2023 (arXiv 2310.02244); Dey et al. 2025 (arXiv 2505.01618).
    """
    for name, value in (("depth", depth), ("base_depth", base_depth)):
        if not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    if mode not in ("sqrt", "linear"):
        raise ValueError(f"mode must be 'sqrt' or 'linear', got {mode!r}")
    ratio = base_depth / depth
    return ratio if mode == "linear" else sqrt(ratio)


def blocks_and_ratio(
    roles: Mapping[str, Role],
    depth: Depth | None,
    layers: int | None,
    base_layers: int | None,
    blocks: str | Sequence[str] | None,
) -> tuple[set[str], float]:
    """Names of the parameters inside residual blocks, and L0/L.

    Args:
        roles: name -> role.
        depth: "sqrt", "linear", or None for no scaling by depth.
        layers: number L of blocks, >= 1; None without depth.
        base_layers: number L0 in the base model, >= 1; None without depth.
        blocks: name patterns; None takes the hidden weights.

    Raises:
        ValueError: if the settings do not fit together or a number is below 1.
    """
    if depth is None:
        if not (layers is None and base_layers is None and blocks is None):
            raise ValueError("depth must be 'sqrt' or 'linear' where layers, base_layers or blocks are given")
        return set(), 1.0
    if depth not in ("sqrt", "linear"):
        raise ValueError(f"depth must be 'sqrt', 'linear' or None, got {depth!r}")
    if layers is None or base_layers is None or not (layers >= 1 and base_layers >= 1):
        raise ValueError(
            f"layers and base_layers must be >= 1 with depth, got {layers!r} and {base_layers!r}"
        )
    ratio = base_layers / layers
    if blocks is None:
        return {name for name, role in roles.items() if role.kind == "hidden"}, ratio
    inside = _matching(roles, [blocks] if isinstance(blocks, str) else blocks)
    if not inside:
        raise ValueError(f"blocks must match some parameter, got {blocks!r}")
    return inside, ratio


def depth_factors(depth: Depth | None, ratio: float, optimizer: Optimizer) -> tuple[float, float]:
    """Factors of rate and epsilon for a parameter in a block.

    Args:
        depth: as in `blocks_and_ratio`.
        ratio: L0/L > 0.
        optimizer: the family of the updates.
    """
    if depth == "sqrt":
        return (1.0 if optimizer == "sgd" else sqrt(ratio)), 1.0
    if depth == "linear":
        return (1.0 / ratio if optimizer == "sgd" else 1.0), ratio
    return 1.0, 1.0


def is_orthogonalised(role: Role, optimizer: Optimizer) -> bool:
    """Whether the optimizer orthogonalises the updates of such a parameter: muon, hidden matrices."""
    return optimizer == "muon" and role.kind == "hidden" and role.matrix


def scales_with_depth(
    role: Role,
    depth: Depth | None,
    ratio: float,
    *,
    optimizer: Optimizer,
    form: Form,
    alignment: Alignment | tuple[Alignment, Alignment],
    weight_decay_mode: DecayMode,
    eps_scaling: bool,
) -> WidthScales:
    """Factors of width and depth together; that of epsilon is 1 where none is asked for or none exists.

    Args:
        role: what the parameter is.
        depth: as in `blocks_and_ratio`.
        ratio: L0/L for a parameter in a block, 1 for others.
        optimizer: the family of the updates.
        form: as in `width_scales`.
        alignment: one for all, or one for hidden layers and one for the readout.
        weight_decay_mode: as in `width_scales`.
        eps_scaling: whether epsilon follows the width.
    """
    pair = alignment if isinstance(alignment, tuple) else (alignment, alignment)
    of_width = width_scales(
        role,
        optimizer=optimizer,
        form=form,
        alignment=pair[role.kind == "output"],
        weight_decay_mode=weight_decay_mode,
    )
    lr, eps = depth_factors(depth, ratio, optimizer)
    has_eps = optimizer in WITH_EPSILON and not is_orthogonalised(role, optimizer)
    return replace(
        of_width,
        lr=of_width.lr * lr,
        weight_decay=of_width.weight_decay / (lr if weight_decay_mode == "constant_product" else 1.0),
        eps=(of_width.eps if eps_scaling else 1.0) * eps if has_eps else 1.0,
    )


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
