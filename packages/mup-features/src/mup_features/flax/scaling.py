"""muP for flax nnx models and optax: roles, initialization in place, and a gradient transformation.

    base = nnx.eval_shape(lambda: Transformer(width=64, rngs=nnx.Rngs(0)))
    model = Transformer(width=1024, rngs=nnx.Rngs(0))
    roles = infer_roles(model, base)
    init_rescale(model, roles)
    optimizer = nnx.Optimizer(model, mup_transform(optax.adam(3e-3), roles), wrt=nnx.Param)

Parameters keep their names and shapes and hold no extra state. A forward multiplier is a constant in the
layer's `promote_dtype`, an attribute every layer of flax with a kernel has and calls on its inputs: being
static, it is part of the graph definition and survives split, merge, jit and copies.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mup_features.depth_rules import residual_scale
from mup_features.init_laws import Init, init_growth, laws_of
from mup_features.role_table import format_roles
from mup_features.roles import BaseShape, Layout, Override, Role, at_base_width, roles_from_shapes
from mup_features.shapes import base_shape_of, compare_widths
from mup_features.width_rules import (
    Form,
    Optimizer,
    readout_multiplier,
    tied_readout_multiplier,
    width_scales,
)

from ._init_laws import measured, root_mean_square
from ._layouts import layout_of, node_at, parameters
from .transform import MupState, mup_transform

__all__ = [
    "MupState",
    "attention_fn",
    "base_shapes",
    "infer_roles",
    "init_rescale",
    "mup_transform",
    "readout_multiplier",
    "residual_scale",
    "role_table",
]

_MARK = "mup_features_form"


def infer_roles(
    model: Any, base: Any, other: Any = None, *, overrides: Mapping[str, Override] | None = None
) -> dict[str, Role]:
    """Role of every parameter, by comparing shapes with the model at base width.

    Args:
        model: the model to be trained, or an abstract one from `nnx.eval_shape`.
        base: the same at base width, abstract or not; or a dictionary from `base_shapes` or `load_shapes`.
            One with values also says how large the parameters are there (see `init_rescale`).
        other: a model of a third width, which marks the axes that are widths. Needed where `model` may have
            base width itself.
        overrides: name pattern (`*` for anything) -> "input", "hidden", "output", a Layout or a Role.

    Returns:
        Name -> role; names are paths joined by dots, as "layers.0.kernel". A parameter shared by several
        modules appears once.

    Raises:
        ValueError: if the models hold different parameters, or a role is ambiguous; the message says how to
            override.
        TypeError: if the model is no nnx.Module.

    Warns:
        UserWarning: if no dimension differs from the base's, so that muP changes nothing.
    """
    found = parameters(model)
    shapes = {name: tuple(variable.shape) for name, (_, variable) in found.items()}
    layouts = {
        name: layout_of(node_at(model, path[:-1]), path[-1], shapes[name])
        for name, (path, _) in found.items()
    }
    of_base = base if isinstance(base, Mapping) else base_shapes(base)
    if other is not None:
        of_other = other if isinstance(other, Mapping) else base_shapes(other)
        plain: dict[str, Any] = {name: base_shape_of(shape).sizes for name, shape in of_other.items()}
        of_base = compare_widths(of_base, plain)
    roles = roles_from_shapes(shapes, of_base, layouts, overrides=overrides)
    if at_base_width(roles.values()) and all(
        base_shape_of(shape).width is None for shape in of_base.values()
    ):
        warnings.warn(
            "every width multiplier is 1: the model has the shapes of its base, so muP changes nothing. Pass "
            "the model at base width as base; at base width itself, pass `other` as well",
            UserWarning,
            stacklevel=2,
        )
    return roles


def base_shapes(model: Any) -> dict[str, BaseShape]:
    """Shapes of all parameters, and where the model has values the root mean square of each.

    Args:
        model: the model at base width, abstract or not; `save_shapes` writes the result to a file.

    Raises:
        TypeError: if it is no nnx.Module.
    """
    return {
        name: BaseShape(tuple(variable.shape), std=root_mean_square(variable))
        for name, (_, variable) in parameters(model).items()
    }


def role_table(
    model: Any, roles: Mapping[str, Role], optimizer: Optimizer = "adam", form: Form = "mult"
) -> str:
    """Markdown table of every parameter: shape, role, and the factors of size, multiplier, rate and decay.

    Args:
        model: the model, abstract or not.
        roles: of `infer_roles`.
        optimizer: the family of the updates.
        form: see `init_rescale`.

    Raises:
        ValueError: if the names of roles differ from the model's, for an unknown optimizer or form.
    """
    found = parameters(model)
    _check_names(found, roles)
    shapes = {name: tuple(variable.shape) for name, (_, variable) in found.items()}
    return format_roles(roles, shapes, optimizer=optimizer, form=form)


def init_rescale(
    model: Any,
    roles: Mapping[str, Role],
    form: Form = "mult",
    init: Init = "auto",
    *,
    rescale: bool = True,
    zero_readout: bool = False,
) -> Any:
    """Give a freshly initialised model the muP initialization and multipliers, in place, once.

    Doing it again changes nothing. A checkpoint is loaded into a model that went through here before.

    Args:
        model: the model; its parameters are what its own initializers made.
        roles: of `infer_roles`, one for each parameter.
        form: where the factors of readout and inputs live, see `width_rules`. "mult", the default, and
            "symmetric" put multipliers into layers; "pure" needs none. `nnx.Embed.attend` is a readout with
            the weights of an input: it gets its multiplier in every form.
        init: how the model's own initializers depend on width: "fan_in" (variance one over the fan, as by
            flax's defaults), "fan_out" (orthogonal or Glorot kernels of a first layer), "constant" (one
            standard deviation at every width), or name patterns with one of them. "auto" finds out: by
            comparison with the base where that had values, else by recognising flax's defaults; first layers
            are then taken to be constant.
        rescale: False sets multipliers only, for a model whose values come from a checkpoint.
        zero_readout: start readouts, with their biases, at zero.

    Returns:
        The model.

    Raises:
        TypeError: if the model is no nnx.Module.
        ValueError: for an unknown form, names of roles that differ from the model's, a model that was scaled
            before in another form, an initialization that cannot be told, or a role that asks for a
            multiplier where no layer of flax is. Nothing is changed then.
    """
    found = parameters(model)
    _check_names(found, roles)
    scales = {name: width_scales(role, form=form) for name, role in roles.items()}
    before = getattr(model, _MARK, None)
    if before is not None:
        if before != form:
            raise ValueError(f"form must be {before!r}, in which this model was scaled before, got {form!r}")
        return model
    promotions = _promotions(model, found, roles, form)
    if zero_readout and not any(role.kind == "output" for role in roles.values()):
        raise ValueError("zero_readout needs a parameter of role 'output'; at base width infer with `other`")
    if rescale:
        variables = {name: variable for name, (_, variable) in found.items()}
        layouts = {name: _layout(model, path, variable) for name, (path, variable) in found.items()}
        laws = laws_of(measured(variables, layouts), roles, init)
        for name, (_, variable) in found.items():
            factor = scales[name].init / init_growth(roles[name], laws[name])
            if factor != 1.0:
                variable[...] = variable[...] * factor
    if zero_readout:
        _zero_readouts(found, roles)
    for module, promotion in promotions:
        module.promote_dtype = promotion
    setattr(model, _MARK, form)
    return model


def attention_fn(base_head_dim: int) -> Callable[..., jax.Array]:
    """Attention with logits q.k sqrt(d0) / d, to be given to `nnx.MultiHeadAttention` as `attention_fn`.

    Equal to flax's own at head dimension d0. Needed where the head dimension grows with width.

    Args:
        base_head_dim: d0 >= 1, the head dimension at base width.

    Raises:
        ValueError: if it is below 1.
    """
    if base_head_dim < 1:
        raise ValueError(f"base_head_dim must be >= 1, got {base_head_dim!r}")
    return _Attention(base_head_dim)


@dataclass(frozen=True)
class _Attention:
    """A value, not a closure: models made twice have equal graph definitions, and jit compiles once."""

    base_head_dim: int

    def __call__(self, query: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        # flax divides by the square root of d
        return nnx.dot_product_attention(
            query * sqrt(self.base_head_dim / query.shape[-1]), *arguments, **options
        )


@dataclass(frozen=True)
class _Promotion:
    """A layer's `promote_dtype` that also multiplies the layer's input: the multiplier of its kernel.

    Layers call it with (inputs, kernel, bias), `nnx.Embed` with (embedding,) for a look-up and with
    (query, embedding) in `attend`.
    """

    promote: Callable[..., Any]
    multiplier: float
    attend: float

    def __call__(self, arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        first, *others = self.promote(arrays, **options)
        factor = self.attend if len(arrays) == 2 else self.multiplier
        return (first if factor == 1.0 else first * factor, *others)


def _layout(model: Any, path: tuple[Any, ...], variable: Any) -> Layout:
    return layout_of(node_at(model, path[:-1]), path[-1], tuple(variable.shape))


def _zero_readouts(found: Mapping[str, tuple[tuple[Any, ...], Any]], roles: Mapping[str, Role]) -> None:
    for name, (path, variable) in found.items():
        bias = ".".join(map(str, (*path[:-1], "bias")))
        if roles[name].kind == "output":
            variable[...] = jnp.zeros_like(variable[...])
            if bias in found:
                found[bias][1][...] = jnp.zeros_like(found[bias][1][...])


def _promotions(
    model: Any, found: Mapping[str, tuple[tuple[Any, ...], Any]], roles: Mapping[str, Role], form: Form
) -> list[tuple[Any, _Promotion]]:
    """What each layer with a multiplier will call instead of its `promote_dtype`."""
    needed = []
    for name, (path, _) in found.items():
        role, owner = roles[name], node_at(model, path[:-1])
        multiplier = width_scales(role, form=form).multiplier
        embeds = isinstance(owner, nnx.Embed)
        attend = tied_readout_multiplier(role, form) if embeds else 1.0
        if multiplier == attend == 1.0:
            continue
        if not (embeds or path[-1] == "kernel") or not hasattr(owner, "promote_dtype"):
            raise ValueError(
                f"form {form!r} needs a multiplier in front of {name!r}, and {type(owner).__name__} has no "
                "place for one: use form='pure', or a layer of flax"
            )
        needed.append((owner, _Promotion(owner.promote_dtype, multiplier, attend)))
    return needed


def _check_names(found: Mapping[str, Any], roles: Mapping[str, Role]) -> None:
    if missing := sorted(set(found) - set(roles)):
        raise ValueError(f"roles must hold every parameter of the model, missing: {', '.join(missing)}")
    if unknown := sorted(set(roles) - set(found)):
        raise ValueError(f"roles must hold parameters of the model only, got {', '.join(unknown)}")
