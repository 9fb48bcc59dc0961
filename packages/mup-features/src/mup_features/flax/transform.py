"""muP rates in optax: any optimiser, then one constant factor for each parameter.

    mup_transform(optax.adam(3e-3), roles)
    mup_transform(optax.adam(schedule), roles, weight_decay=0.1, learning_rate=schedule)

Decoupled weight decay is an argument: behind `optax.adamw` the factors would scale the decay too, and with
muP's usual convention the product of rate and decay is the same for every parameter.

Adam's epsilon differs between parameters where it follows their gradients (`eps_scaling`, depth="linear").
No transform behind `inner` can change it, but one in front can: with s the factor of epsilon,

    (m/s) / (sqrt(v/s^2) + eps) = m / (sqrt(v) + s eps),

so dividing a parameter's gradient by s before Adam is exactly Adam with epsilon s eps, whoever sets eps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_features.depth_rules import WITH_EPSILON, Depth, blocks_and_ratio, scales_with_depth
from mup_features.roles import Role
from mup_features.width_rules import Alignment, DecayMode, Form, Optimizer, WidthScales

__all__ = ["MupState", "mup_transform"]

Rate = float | jax.Array | Callable[[Any], Any]


class MupState(NamedTuple):
    """State of `mup_transform`.

    Attributes:
        step: updates made, for schedules of the decay's learning rate.
        inner: state of the optimiser inside.
    """

    step: jax.Array
    inner: Any


def mup_transform(
    inner: optax.GradientTransformation,
    roles: Mapping[str, Role],
    optimizer: Optimizer = "adam",
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mode: DecayMode = "constant_product",
    *,
    learning_rate: Rate | None = None,
    form: Form = "mult",
    alignment: Alignment | tuple[Alignment, Alignment] = "full",
    eps_scaling: bool = False,
    depth: Depth | None = None,
    layers: int | None = None,
    base_layers: int | None = None,
    blocks: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax optimiser whose updates are scaled parameter by parameter as muP asks.

    Works on nnx.State (in `nnx.Optimizer(model, .., wrt=nnx.Param)`) and on plain trees whose keys, joined by
    dots, are the names in `roles`; on masked and sharded parameters; within `optax.chain`, schedules and
    `optax.inject_hyperparams`. The factors are constants of the compiled step.

    Args:
        inner: the optimiser with its learning rate, and without weight decay.
        roles: of `infer_roles`. Names that the optimised tree lacks (frozen parameters) are ignored.
        optimizer: the family that `inner` belongs to: "sgd" (also with momentum), "adam", "adamw",
            "adafactor" (update relative to the parameter's size), "sign" or "muon".
        weight_decay: coefficient of a decoupled decay at base width, >= 0: each step subtracts learning rate
            times coefficient times parameter.
        weight_decay_mode: "constant_product" subtracts the same share of every parameter; "raw" scales it
            with the parameter's rate, as AdamW with one coefficient does.
        learning_rate: the number or schedule that `inner` has, which optax does not reveal. Needed for weight
            decay only, and not if `inner` was made by `optax.inject_hyperparams`, which does.
        form: the form given to `init_rescale`.
        alignment: "full", "none" or an exponent in [1/2, 1], or a pair for (hidden, output).
        eps_scaling: divide each gradient by its width factor before `inner`, so that Adam's epsilon means the
            same at every width; for Adam only, which ignores the size of gradients otherwise. Clipping by a
            global norm then belongs in front of this transform, not into `inner`.
        depth: "sqrt" lowers the rate of blocks by sqrt(L0/L), except SGD's, for branches scaled by
            sqrt(L0/L); "linear" leaves rates and decay, multiplies Adam's epsilon by L0/L (as eps_scaling
            does, with the same advice) and SGD's rate by L/L0, for branches scaled by L0/L. The branches
            are scaled in the model, by `residual_scale`.
        layers: number L of residual blocks, with depth.
        base_layers: number L0 in the base model, with depth.
        blocks: name patterns of the parameters inside the blocks ("blocks.*"); default: the hidden weights.

    Raises:
        TypeError: if `inner` is no gradient transformation.
        ValueError: for an unknown optimizer, form, mode or depth, a number out of range, patterns that match
            nothing, eps_scaling with another optimizer than Adam; at `init`, for a parameter without a role;
            at `update`, for weight decay without parameters, or without a learning rate.

    Source: Yang et al. 2022 (arXiv 2203.03466), tables 3 and 8; depth: Yang et al. 2023 (arXiv 2310.02244),
    Dey et al. 2025 (arXiv 2505.01618).
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax.GradientTransformation, got {type(inner).__name__}")
    if isinstance(weight_decay, (int, float)) and not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}")
    if eps_scaling and optimizer not in WITH_EPSILON:
        raise ValueError(f"eps_scaling needs an Adam optimizer, got {optimizer!r}")
    inside, ratio = blocks_and_ratio(roles, depth, layers, base_layers, blocks)
    scales = {
        name: scales_with_depth(
            role,
            depth,
            ratio if name in inside else 1.0,
            optimizer=optimizer,
            form=form,
            alignment=alignment,
            weight_decay_mode=weight_decay_mode,
            eps_scaling=eps_scaling,
        )
        for name, role in roles.items()
    }
    wrapped = optax.with_extra_args_support(inner)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0.0)

    def init(params: Any) -> MupState:
        _of_leaves(params, scales)
        return MupState(jnp.zeros((), jnp.int32), wrapped.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, MupState]:
        of_leaf = _of_leaves(updates, scales)
        updates = _times(updates, [1.0 / scale.eps for scale in of_leaf])
        updates, inner_state = wrapped.update(updates, state.inner, params, **extra)
        updates = _times(updates, [scale.lr for scale in of_leaf])
        if decays:
            if params is None:
                raise ValueError("params must be given to update for weight decay, got None")
            decay = weight_decay * _rate(learning_rate, state.step, inner_state)
            # the rate of a parameter times its coefficient: the same for all, or its rate alone ("raw")
            shares = [scale.lr * scale.weight_decay for scale in of_leaf]
            updates = jax.tree.map(
                lambda u, p: (u - decay * p).astype(u.dtype), updates, _times(params, shares)
            )
        return updates, MupState(state.step + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_leaves(tree: Any, scales: Mapping[str, WidthScales]) -> list[WidthScales]:
    """Factors in the order of the tree's leaves."""
    return [scales[_name(path, scales)] for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path: tuple[Any, ...], scales: Mapping[str, Any]) -> str:
    """Name of a leaf; the value inside an nnx variable has one key more than the variable."""
    parts = [str(part) for part in _parts(path)]
    for name in (".".join(parts), ".".join(parts[:-1])):
        if name in scales:
            return name
    raise ValueError(f"roles must hold every optimised parameter, {'.'.join(parts)!r} has none")


def _parts(path: tuple[Any, ...]) -> Iterator[Any]:
    for key in path:
        # DictKey and FlattenedIndexKey have a key, GetAttrKey a name, SequenceKey an index
        yield next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))


def _times(tree: Any, factors: list[float]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    scaled = [leaf if factor == 1.0 else leaf * factor for leaf, factor in zip(leaves, factors, strict=True)]
    return jax.tree.unflatten(structure, scaled)


def _rate(given: Rate | None, step: jax.Array, inner_state: Any) -> Any:
    if given is not None:
        return given(step) if callable(given) else given
    found = [
        state.hyperparams["learning_rate"]
        for state in jax.tree.leaves(inner_state, is_leaf=lambda node: hasattr(node, "hyperparams"))
        if "learning_rate" in getattr(state, "hyperparams", {})
    ]
    if len(found) != 1:
        raise ValueError(
            "learning_rate must be given for weight decay, the number or schedule that inner has "
            f"(or one inject_hyperparams with a learning_rate within inner, found {len(found)})"
        )
    return found[0]
