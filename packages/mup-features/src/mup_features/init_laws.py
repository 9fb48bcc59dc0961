"""How a model's own initialisation depends on width, so that rescaling ends at the size muP asks for.

    fan_in     standard deviation 1/sqrt(fan), the default of the frameworks for weights
    fan_out    1/sqrt(fan-out): embeddings of size 1/sqrt(d), orthogonal or Glorot weights of the first layer
    constant   the same at every width, as GPT-2's 0.02

Which one holds shows by comparing the entries' size with the base model's. For a parameter whose fan grows
the laws are fan_in and constant, for one of which only the fan-out grows fan_out and constant. A law fits a
tensor whose growth is within a quarter of the gap between the two laws, on a log scale, or within four
standard errors; a tensor that both laws fit tells nothing. Measured sizes choose between laws and are never
used themselves: they are noisy, and a model of base width must stay as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import log, sqrt
from typing import Literal, get_args

from .roles import Role

Law = Literal["fan_in", "fan_out", "constant"]
LawOrAuto = Literal["auto"] | Law
Init = LawOrAuto | Mapping[str, LawOrAuto]

__all__ = ["Init", "Law", "Measured", "init_growth", "laws_of"]


@dataclass(frozen=True)
class Measured:
    """A parameter as the model's own initialisation left it.

    Attributes:
        size: root mean square of its entries.
        entries: their number.
        shape: its shape, for messages.
        default: root mean square under the framework's default, None where that depends on no fan.
        is_default: whether the entries look like the framework's default.
    """

    size: float
    entries: int
    shape: tuple[int, ...] = ()
    default: float | None = None
    is_default: bool = False


def init_growth(role: Role, law: Law) -> float:
    """Standard deviation under a law over that at base width."""
    if law == "constant":
        return 1.0
    if law == "fan_out":
        return 1.0 / sqrt(role.fan_out_mult)
    fan = role.fan_in_mult if role.default_fan_mult is None else role.default_fan_mult
    return 1.0 / sqrt(fan)


def laws_of(measured: Mapping[str, Measured], roles: Mapping[str, Role], init: Init) -> dict[str, Law]:
    """The law of every parameter.

    Args:
        measured: name -> size of the parameter as the user's model was initialised.
        roles: name -> role, with base_std where the base model had real entries.
        init: a law for all, or name patterns with laws (the first match counts, all must be covered), or
            "auto", which measures. Tensors of zeros obey all laws; those too small to tell follow the
            others, and are constant where only their fan-out grows. Without the base model's entries such
            inputs are taken to be constant, all else has to be the framework's default.

    Raises:
        ValueError: for an unknown law, if a parameter fits no law, or nothing tells which one holds.
    """
    asked: dict[str, LawOrAuto] = {
        name: _matching(name, init) if isinstance(init, Mapping) else init for name in measured
    }
    known = ("auto", *get_args(Law))
    for name, law in asked.items():
        if law not in known:
            raise ValueError(
                f"init must be {', '.join(map(repr, known))}, or name patterns with these, got {law!r} for "
                f"{name!r}"
            )
    found: dict[str, Law | None] = {}
    for name, law in asked.items():
        found[name] = law if law != "auto" else _fitting(name, measured[name], roles[name])
    by_fan = {name for name in measured if init_growth(roles[name], "fan_in") != 1.0}
    weight = {"fan_in": 0, "constant": 0}
    for name in by_fan:
        if asked[name] == "auto" and (law := found[name]) is not None:
            weight[law] += measured[name].entries
    undecided = [name for name in by_fan if found[name] is None and measured[name].size > 0.0]
    if undecided and not any(weight.values()):
        first = min(undecided)
        raise ValueError(
            f"init must be given: no parameter is large enough to tell the laws apart, e.g. {first!r} of "
            f"shape {measured[first].shape}: 'fan_in' (1/sqrt(fan), the default) or 'constant'"
        )
    majority: Law = "constant" if weight["constant"] > weight["fan_in"] else "fan_in"
    return {name: law or (majority if name in by_fan else "constant") for name, law in found.items()}


def _fitting(name: str, measured: Measured, role: Role) -> Law | None:
    """The law that one parameter fits; None if it is zero, has no width, or is too small to tell.

    The relative error of a measured standard deviation is at most sqrt(1/(2 N)), that of normal entries.
    """
    grown: Law = "fan_in" if init_growth(role, "fan_in") != 1.0 else "fan_out"
    if not measured.entries or init_growth(role, grown) == 1.0:
        return None
    if role.base_std is None:
        return _by_default(name, measured) if grown == "fan_in" else None
    if (measured.size == 0.0) != (role.base_std == 0.0):
        raise ValueError(
            f"parameter {name!r} has root mean square {measured.size:g}, the base model's "
            f"{role.base_std:g}: one is zero; initialise both alike or pass init='fan_in' or 'constant'"
        )
    if measured.size == 0.0:
        return None
    by_law = log(init_growth(role, grown))
    gap, growth = abs(by_law), log(measured.size / role.base_std)
    base_entries = measured.entries / (role.fan_in_mult * role.fan_out_mult)
    tolerance = max(gap / 4.0, 4.0 * sqrt(0.5 / measured.entries + 0.5 / base_entries))
    fits: list[Law] = [grown] if abs(growth - by_law) <= tolerance else []
    if abs(growth) <= tolerance:
        fits.append("constant")
    if fits:
        return fits[0] if len(fits) == 1 else None
    remedy = "" if grown == "fan_in" else "initialise it with one size at every width, as muP does, or "
    raise ValueError(
        f"init must say how {name!r} depends on width: parameter {name!r} has root mean square "
        f"{measured.size:g}, the base model's {role.base_std:g}: it fits neither init={grown!r} (expected "
        f"{role.base_std * init_growth(role, grown):g}) nor 'constant'; {remedy}pass the law of this model, "
        f"also by name pattern: init={{{name!r}: 'constant', '*': 'auto'}}"
    )


def _by_default(name: str, measured: Measured) -> Law | None:
    """Without the base model's entries only the framework's own default can be recognised."""
    if measured.size == 0.0:
        return None
    if measured.is_default:
        return "fan_in"
    expected = "" if measured.default is None else f" ({measured.default:g})"
    raise ValueError(
        f"init must say how {name!r} depends on width: parameter {name!r} has root mean square "
        f"{measured.size:g}, which is not the framework's default{expected}, and the base model's entries "
        f"are not known (an abstract model or a file of shapes): pass init='constant' (same size at every "
        f"width), init='fan_in', or a base model with real entries"
    )


def _matching(name: str, init: Mapping[str, LawOrAuto]) -> LawOrAuto:
    for pattern, law in init.items():
        if fnmatchcase(name, pattern):
            return law
    raise ValueError(f"init has no pattern for parameter {name!r}; end with '*'")
