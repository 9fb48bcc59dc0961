"""Walking trees the way optax does: leaves that are None or masked away stay where they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def is_hole(leaf: Any) -> bool:
    """Whether optax (or the caller) left this place of the tree out."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of a tree, holes being leaves."""
    return jax.tree.flatten(tree, is_leaf=is_hole)


def arrays(tree: Any) -> tuple[list[Any], Any]:
    """`flatten` with Python and NumPy numbers turned into arrays."""
    leaves, treedef = flatten(tree)
    return [leaf if is_hole(leaf) else jnp.asarray(leaf) for leaf in leaves], treedef


def leaves_like(name: str, tree: Any, like: Any) -> list[Any]:
    """Whatever `tree` holds at each leaf (and hole) of `like`.

    Raises:
        ValueError: if the containers of the two trees differ.
    """
    _, treedef = flatten(like)
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name} must have the structure of the gradients, {treedef}: {error}") from error


def state_like(name: str, tree: Any, like: Any) -> list[Any]:
    """What a part of the state holds at each leaf of the gradients.

    Raises:
        ValueError: if the state was made for a tree of another structure.
    """
    _, treedef = flatten(like)
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"state must come from init on a tree of the structure of the gradients, {treedef}, got another "
            f"one in {name}: {error}"
        ) from error


def first_leaf(subtree: Any) -> Any:
    """The only array of a subtree: unwraps boxed values such as nnx variables; None when there is not one."""
    leaves = jax.tree.leaves(subtree)
    return leaves[0] if len(leaves) == 1 else None


def flags(mask: Any, tree: Any) -> list[bool]:
    """One bool per leaf and hole, from a tree of bools, a prefix of it, or a callable giving one.

    Raises:
        ValueError: if the mask is no prefix of the tree.
        TypeError: if it holds something else than bools.
    """
    leaves, _ = flatten(tree)
    if mask is None or not jax.tree.leaves(tree):
        return [True] * len(leaves)
    if callable(mask):
        mask = mask(tree)
    try:
        spread = jax.tree.map(
            lambda flag, subtree: [_flag(flag)] * len(flatten(subtree)[0]), mask, tree, is_leaf=is_hole
        )
    except ValueError as error:
        raise ValueError(f"mask must be a tree like the parameters, or a prefix of it: {error}") from error
    return jax.tree.leaves(spread)


def _flag(flag: Any) -> bool:
    if not (is_hole(flag) or isinstance(flag, bool | np.bool_ | np.ndarray | jax.Array)):
        raise TypeError(f"mask must hold True or False, got {flag!r}")
    return not is_hole(flag) and bool(flag)


def compute_dtype(leaf: jax.Array) -> Any:
    """float64 for float64 leaves, float32 for all others."""
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32


def scalar(value: Any, like: jax.Array) -> jax.Array:
    """A hyperparameter in the dtype of the leaf, so that an injected float32 rate does not promote it."""
    return jnp.asarray(value, like.dtype)


def cast_like(update: Any, grad: Any) -> Any:
    """The update in the dtype of its gradient; holes stay."""
    return update if is_hole(update) else update.astype(grad.dtype)


def at_step(value: Any, count: jax.Array) -> Any:
    """A hyperparameter at this update: schedules are called with the number of updates made before."""
    return value(count) if callable(value) else value


def check_switch(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a bool: "no" and 0.5 would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_state(state: Any, kind: type) -> None:
    """Raise TypeError unless the state has the parts of `kind`, in whatever container."""
    if not all(hasattr(state, part) for part in getattr(kind, "_fields", ())):
        raise TypeError(f"state must be the {kind.__name__} that init returned, got {type(state).__name__}")


def check(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> float:
    """Check a hyperparameter whose value is known; schedules and traced values are taken as they are.

    Returns:
        The value as a float, 0.0 where it is not known yet.

    Raises:
        ValueError: if the rule does not hold.
        TypeError: if the value is not a number at all.
    """
    if callable(value) or isinstance(value, Tracer):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not holds(float(value)):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return float(value)
