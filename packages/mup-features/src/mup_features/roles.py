"""What each parameter is to the width of a model: its role, found by comparing shapes with a base model's.

Framework-free: models come in as dictionaries from parameter name to shape. A framework adds one `Layout` per
parameter, which says which axes are fan-in and fan-out; `mup_features.torch` and `mup_features.flax` do. An
axis is a width where its size differs from the base model's (or, if the base was compared with another model
of a different width, where those two differ). With m_in and m_out the growth of fan-in and fan-out:

    only fan-out grows -> input      both grow -> hidden      only fan-in grows -> output

Source: Yang et al. 2022 (arXiv 2203.03466), appendix B.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite, prod
from typing import Literal, get_args

from .shapes import BaseShape, base_shape_of, load_shapes, save_shapes

Kind = Literal["input", "hidden", "output"]
Owner = Literal["linear", "conv", "embedding", "vector", "free"]

__all__ = [
    "BaseShape",
    "Kind",
    "Layout",
    "Override",
    "Role",
    "at_base_width",
    "load_shapes",
    "role_of",
    "roles_from_shapes",
    "save_shapes",
]


@dataclass(frozen=True)
class Role:
    """The place of one parameter.

    Attributes:
        kind: "input" if only the fan-out is a width (also biases, gains, embeddings, and parameters with no
            width at all), "hidden" if both are, "output" if only the fan-in is.
        fan_in_mult: m_in, fan-in over fan-in at base width; 1 where the fan-in is no width.
        fan_out_mult: m_out, fan-out over fan-out at base width; 1 where the fan-out is no width.
        matrix: whether the parameter is one two-dimensional matrix (what Muon may orthogonalise).
        scalable: whether a multiplier can stand in front of it in the forward pass: weights of linear,
            convolution and embedding layers; not biases, gains, free parameters, or weights that their module
            reads without a layer's call (attention, recurrent layers).
        tied: whether it is both the embedding and the readout. Its kind is then "input", and the readout
            layer has a multiplier of its own.
        base_std: standard deviation about zero of the parameter in the base model, None where that was not
            at hand.
        default_fan_mult: growth of what the framework's default initialisation takes the inverse square root
            of; None stands for fan_in_mult. It is the layer's m_in also for the bias of a torch layer, and
            1 where the default does not depend on any width.
    """

    kind: Kind
    fan_in_mult: float = 1.0
    fan_out_mult: float = 1.0
    matrix: bool = True
    scalable: bool = True
    tied: bool = False
    base_std: float | None = None
    default_fan_mult: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("fan_in_mult", "fan_out_mult", "default_fan_mult"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value!r}")
        if self.tied and self.kind != "input":
            raise ValueError(f"kind must be 'input' for a tied embedding, got {self.kind!r}")


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter are what. Axes that are neither fan-in nor fan-out must not change.

    Attributes:
        owner: the layer it belongs to: "linear" and "conv" weights, "embedding" tables, "vector" for biases,
            gains and other tensors that are added or multiplied entry by entry, "free" if nobody knows.
        fan_in: axes summed over in the forward pass. Several count as one dimension, their product.
        fan_out: axes that index the outputs.
        default_fan: what the framework's default initialisation divides by under the square root, as a sum
            of products of axes: ((1,),) is the size of axis 1, ((0,), (1,)) the sum of both, () a constant
            (in overrides of linear and conv weights: the fan-in).
        default_of: name of the parameter whose default_fan applies instead (torch: a bias follows
            its weight).
        scalable: whether a forward multiplier can be put before it; None: linear, conv and embedding weights.
        out_in: for a free parameter, whether the framework stores weights as (out, in), as torch does.
    """

    owner: Owner
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    default_fan: tuple[tuple[int, ...], ...] = ()
    default_of: str | None = None
    scalable: bool | None = None
    out_in: bool = False

    def __post_init__(self) -> None:
        if self.owner not in get_args(Owner):
            raise ValueError(f"owner must be one of {', '.join(get_args(Owner))}, got {self.owner!r}")
        if set(self.fan_in) & set(self.fan_out):
            raise ValueError(f"fan_in {self.fan_in} and fan_out {self.fan_out} must have no axis in common")


Override = Kind | Layout | Role


def roles_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    base: Mapping[str, BaseShape | tuple[int, ...]],
    layouts: Mapping[str, Layout],
    *,
    overrides: Mapping[str, Override] | None = None,
) -> dict[str, Role]:
    """Role of every parameter.

    Args:
        shapes: name -> shape of the model to be trained.
        base: name -> shape at base width; see `load_shapes`, or `BaseShape` to mark the widths by hand.
        layouts: name -> which axes are fan-in and fan-out.
        overrides: name pattern (fnmatch: `*`, `?`) -> "input", "hidden" or "output", or a Layout, or a whole
            Role. The first pattern that matches counts.

    Raises:
        ValueError: if the two dictionaries hold different names, a shape cannot be compared with its base,
            the role of a parameter is ambiguous, or an override matches nothing. The message names the
            parameter, both shapes, and the override to write.
    """
    _same_names(shapes, base)
    chosen = _match_overrides(shapes, overrides or {})
    roles = {}
    for name, shape in shapes.items():
        override = chosen.get(name)
        layout = _overriding(override) if isinstance(override, Layout) else layouts[name]
        if isinstance(override, Role):
            roles[name] = override
            continue
        default = None
        if layout.default_of is not None:
            source = layouts[layout.default_of]
            of = layout.default_of
            default = _fan_ratio(shapes[of], base_shape_of(base[of]), source.default_fan)
        kind = override if isinstance(override, str) else None
        roles[name] = role_of(name, shape, base[name], layout=layout, kind=kind, default_fan_mult=default)
    return roles


def role_of(
    name: str,
    shape: tuple[int, ...],
    base_shape: BaseShape | tuple[int, ...],
    *,
    layout: Layout,
    kind: Kind | None = None,
    default_fan_mult: float | None = None,
) -> Role:
    """Role of one parameter from its shape, its shape at base width, and the meaning of its axes.

    Args:
        name: used in messages.
        shape: shape in the model to be trained.
        base_shape: shape at base width.
        layout: which axes are fan-in and fan-out.
        kind: settles the role where the layout does not: all widths of a free "input" are fan-out, all of a
            free "output" fan-in; a free "hidden" parameter needs two widths that grew equally.
        default_fan_mult: growth of the fan that the default initialisation sees; None computes it from
            `layout.default_fan`.

    Raises:
        ValueError: if the shapes cannot be compared or the role is ambiguous.
    """
    shape, base = tuple(shape), base_shape_of(base_shape)
    widths = _widths(name, shape, base)
    if kind is not None:
        fan_in, fan_out = _axes_of_kind(name, shape, base, layout, kind, widths)
    elif layout.owner == "free":
        fan_in, fan_out = (), _free_widths(name, shape, base, widths, out_in=layout.out_in)
    else:
        fan_in, fan_out = _normal(layout.fan_in, shape), _normal(layout.fan_out, shape)
        fixed = [axis for axis in widths if axis not in fan_in and axis not in fan_out]
        if fixed:
            raise ValueError(
                f"{_both(name, shape, base)}: axis {fixed[0]} of {_article(layout.owner)} parameter is no "
                f"width, yet it differs; compare with a base that differs in width only, or {_how(name)}"
            )
    grown_in = any(axis in fan_in for axis in widths)
    grown_out = any(axis in fan_out for axis in widths)
    if default_fan_mult is None and (layout.owner != "free" or not fan_in):
        default_fan_mult = _fan_ratio(shape, base, layout.default_fan)
    return Role(
        kind=kind or ("hidden" if grown_in and grown_out else "output" if grown_in else "input"),
        fan_in_mult=_fan_ratio(shape, base, (fan_in,)),
        fan_out_mult=_fan_ratio(shape, base, (fan_out,)),
        matrix=len(shape) == 2 and layout.owner in ("linear", "free"),
        scalable=layout.owner in ("linear", "conv", "embedding")
        if layout.scalable is None
        else layout.scalable,
        base_std=base.std,
        default_fan_mult=default_fan_mult,
    )


def at_base_width(roles: Iterable[Role]) -> bool:
    """Whether no multiplier differs from 1, so that muP would change nothing."""
    return all(role.fan_in_mult == role.fan_out_mult == 1.0 for role in roles)


def _widths(name: str, shape: tuple[int, ...], base: BaseShape) -> list[int]:
    """Axes that are widths."""
    if len(shape) != len(base.sizes):
        raise ValueError(
            f"{_both(name, shape, base)}: the numbers of dimensions differ; they are shapes of another model"
        )
    for axis, (size, of_base) in enumerate(zip(shape, base.sizes, strict=True)):
        if size == of_base or of_base is None:
            continue
        if size == 0 or of_base == 0:
            raise ValueError(f"{_both(name, shape, base)}: axis {axis} is empty in one of them")
        if base.width is not None and axis not in base.width:
            raise ValueError(
                f"{_both(name, shape, base)}: axis {axis} is no width where the base shapes were made, "
                f"yet it differs now; the shapes are stale, make them again"
            )
    if base.width is not None:
        return list(base.width)
    return [axis for axis, size in enumerate(shape) if base.sizes[axis] not in (size, None)]


def _free_widths(
    name: str, shape: tuple[int, ...], base: BaseShape, widths: list[int], *, out_in: bool
) -> tuple[int, ...]:
    """A parameter of no known layer is added or multiplied entry by entry if its one width stands last.

    Where weights are stored (out, in) it must also broadcast over its first axis: (positions, width) looks
    like a readout (classes, width) there.
    """
    if len(widths) > 2:
        raise ValueError(
            f"{_both(name, shape, base)}: {len(widths)} dimensions are widths, muP has rules for at most "
            f"two; {_how(name, layout=True)}"
        )
    if len(widths) == 2:
        raise ValueError(
            f"{_both(name, shape, base)}: two dimensions are widths, and nothing says which is the "
            f"fan-in; {_how(name, layout=True)}"
        )
    last = not widths or all(size == 1 for size in shape[widths[0] + 1 :])
    broadcast = not (widths and out_in) or widths[0] == 0 or shape[0] == 1
    if not (last and broadcast):
        raise ValueError(
            f"{_both(name, shape, base)}: axis {widths[0]} is a width, and nothing says whether the layer "
            f"sums over it (output) or not (input); {_how(name)}"
        )
    return tuple(widths)


def _axes_of_kind(
    name: str, shape: tuple[int, ...], base: BaseShape, layout: Layout, kind: Kind, widths: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind not in get_args(Kind):
        raise ValueError(
            f"overrides must map to {', '.join(get_args(Kind))}, a Layout or a Role, got {kind!r} "
            f"for {name!r}"
        )
    if kind == "input":
        return (), tuple(axis for axis in _normal(layout.fan_out, shape) if axis in widths) or tuple(widths)
    if kind == "output":
        return tuple(axis for axis in _normal(layout.fan_in, shape) if axis in widths) or tuple(widths), ()
    if layout.owner != "free":
        return _normal(layout.fan_in, shape), _normal(layout.fan_out, shape)
    growth = {_fan_ratio(shape, base, ((axis,),)) for axis in widths}
    if len(widths) != 2 or len(growth) != 1:
        raise ValueError(
            f"{_both(name, shape, base)}: 'hidden' needs two widths that grew equally, else fan-in and "
            f"fan-out must be told apart; {_how(name, layout=True)}"
        )
    return (widths[1],), (widths[0],)


def _fan_ratio(shape: tuple[int, ...], base: BaseShape, fans: tuple[tuple[int, ...], ...]) -> float:
    """Growth of a sum of products of axes."""
    if not fans:
        return 1.0
    before = [size if of_base is None else of_base for size, of_base in zip(shape, base.sizes, strict=True)]
    now = sum(prod(shape[axis] for axis in axes) for axes in fans)
    return now / sum(prod(before[axis] for axis in axes) for axes in fans)


def _normal(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis % len(shape) for axis in axes)


def _overriding(layout: Layout) -> Layout:
    """Nothing is known of the initialisation of a weight that needs an override; 1/sqrt(fan_in) may be it."""
    if layout.owner in ("linear", "conv") and not layout.default_fan:
        return replace(layout, default_fan=(layout.fan_in,))
    return layout


def _same_names(shapes: Mapping[str, object], base: Mapping[str, object]) -> None:
    missing = sorted(set(shapes) - set(base))
    extra = sorted(set(base) - set(shapes))
    if missing or extra:
        parts = [f"the base lacks {', '.join(map(repr, missing[:5]))}" if missing else ""]
        parts.append(f"the model lacks {', '.join(map(repr, extra[:5]))}" if extra else "")
        raise ValueError(
            f"base must hold the model's parameters, no more and no fewer: {'; '.join(filter(None, parts))} "
            f"({len(missing)} and {len(extra)} in all)"
        )


def _match_overrides(names: Iterable[str], overrides: Mapping[str, Override]) -> dict[str, Override]:
    chosen: dict[str, Override] = {}
    names = list(names)
    for pattern, override in overrides.items():
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(f"overrides holds {pattern!r}, which matches no parameter of the model")
        for name in hits:
            chosen.setdefault(name, override)
    return chosen


def _both(name: str, shape: tuple[int, ...], base: BaseShape) -> str:
    return f"parameter {name!r} has shape {shape}, at base width {base.sizes}"


def _article(owner: str) -> str:
    return f"an {owner}" if owner[0] in "aeiou" else f"a {owner}"


def _how(name: str, *, layout: bool = False) -> str:
    if layout:
        return f"say so by overrides={{{name!r}: Layout('linear', fan_in=(...), fan_out=(...))}}"
    return f"say so by overrides={{{name!r}: 'input'}} (or 'hidden', 'output')"
