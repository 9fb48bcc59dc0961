"""How a parameter's initial size depends on width: as flax's defaults, or not at all.

A law is either told or found out. Measured sizes only choose between the laws and are never used themselves:
they are noisy, and a model of base width must stay as it is.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import log, prod, sqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mup_features.roles import Layout, Role

from ._layouts import value_of

Law = Literal["fan_in", "constant"]
Init = Literal["auto", "fan_in", "constant"] | Mapping[str, Literal["auto", "fan_in", "constant"]]

__all__ = ["Init", "Law", "by_fan", "init_growths", "root_mean_square"]

# What truncation of a normal law and bfloat16 may do to a root mean square.
_ROUNDING = 0.02


def init_growths(
    found: Mapping[str, Any], roles: Mapping[str, Role], layouts: Mapping[str, Layout], init: Init
) -> dict[str, float]:
    """Standard deviation that each parameter had at base width by its initializer, over the one it has now.

    Args:
        found: name -> variable with its initial values.
        roles: name -> role.
        layouts: name -> axes.
        init: a law, name patterns with laws, or "auto".

    Raises:
        ValueError: if a law is unknown, no pattern matches, or "auto" cannot tell.
    """
    wanted = {name: init if isinstance(init, str) else _matching(name, init) for name in found}
    sizes = {name: root_mean_square(variable) for name, variable in found.items()}
    laws: dict[str, Any] = {}
    for name, law in wanted.items():
        if law not in ("auto", *get_args(Law)):
            raise ValueError(
                f"init must be 'auto', 'fan_in' or 'constant', or name patterns with these, got {law!r}"
            )
        size = sizes[name]
        if not size or by_fan(roles[name]) == 1.0:
            continue
        if law != "auto":
            laws[name] = law
        elif roles[name].base_std:
            laws[name] = _by_base(name, size, found[name], roles[name])
        else:
            laws[name] = _by_default(name, size, found[name], layouts[name])
    known = {law for law in laws.values() if law is not None}
    for name, law in laws.items():
        if law is None and len(known) != 1:
            raise ValueError(
                f"init must say how {name!r} depends on width: it has too few entries to tell by, and the "
                f"others do not agree; pass init={{{name!r}: 'fan_in', '*': 'auto'}}, or 'constant'"
            )
    common = next(iter(known), "constant")
    return {
        name: by_fan(roles[name]) if name in laws and (laws[name] or common) == "fan_in" else 1.0
        for name in found
    }


def by_fan(role: Role) -> float:
    """What `init_growths` gives for an initializer of variance 1/fan.

    Args:
        role: of the parameter.
    """
    return sqrt(role.fan_in_mult if role.default_fan_mult is None else role.default_fan_mult)


def root_mean_square(variable: Any) -> float | None:
    """Root mean square entry; None for an abstract variable and one without entries.

    Args:
        variable: the variable.
    """
    value = value_of(variable)
    if not isinstance(value, jax.Array) or value.size == 0:
        return None
    return float(jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)))))


def _matching(name: str, init: Mapping[str, Any]) -> Any:
    for pattern, law in init.items():
        if fnmatchcase(name, pattern):
            return law
    raise ValueError(f"init has no pattern for parameter {name!r}; end with '*'")


def _by_base(name: str, size: float, variable: Any, role: Role) -> Law | None:
    """The law that fits the ratio to the base, None if both do; N entries leave an error of 1/sqrt(2N)."""
    fewest = variable.size / (role.fan_in_mult * role.fan_out_mult)
    noise = 4.0 * sqrt(0.5 / variable.size + 0.5 / fewest) + _ROUNDING
    ratio = log((role.base_std or size) / size)
    fits: list[Law] = []
    if abs(ratio - log(by_fan(role))) < noise:
        fits.append("fan_in")
    if abs(ratio) < noise:
        fits.append("constant")
    if not fits:
        raise ValueError(
            f"init must say how {name!r} depends on width: its root mean square {size:.3g} over the base "
            f"model's {role.base_std:.3g} fits neither 'fan_in' nor 'constant'; pass "
            f"init={{{name!r}: 'fan_in', '*': 'auto'}}, or 'constant'"
        )
    return fits[0] if len(fits) == 1 else None


def _by_default(name: str, size: float, variable: Any, layout: Layout) -> Law:
    """Flax's default for kernels and embeddings has variance 1/fan."""
    fan = sum(prod(variable.shape[axis] for axis in axes) for axes in layout.default_fan)
    if fan and abs(size * sqrt(fan) - 1.0) < 5.0 * sqrt(0.5 / variable.size) + _ROUNDING:
        return "fan_in"
    raise ValueError(
        f"init must say how {name!r} depends on width: its root mean square {size:.3g} is not that of "
        "flax's default, and the base model has no values (nnx.eval_shape or a file): pass init='constant' "
        "(the same size at every width), init='fan_in', or a base model with values"
    )
