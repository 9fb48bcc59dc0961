"""The MARS correction and clip as an optax transformation, and the two gradients that its exact form needs.

    c_t  = g_t + a (g_t - h_t),  a = gamma b1 / (1 - b1)
    c~_t = c_t / max(1, ||c_t|| / clip)

g_t is the gradient at the current parameters on the current batch. In the exact form h_t is the gradient at
the PREVIOUS parameters on the CURRENT batch, in the approximate form the previous step's gradient. Only the
exact form reduces variance; the approximate one trades a little noise for less lag behind the gradient.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1, eqs 3.2-3.5 and Remark 3.3.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mars_optim.jax.trees import (
    arrays,
    at_step,
    cast_like,
    check,
    check_state,
    check_switch,
    compute_dtype,
    first_leaf,
    flags,
    is_hole,
    leaves_like,
    scalar,
    state_like,
)


class MarsState(NamedTuple):
    """State of the correction.

    Attributes:
        count: number of updates made.
        prev_grad: the previous step's gradient; None in the exact form, which gets h_t from the caller.
        prev_params: the parameters of the previous update (at first: the initial ones); None unless kept.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    prev_grad: Any
    prev_params: Any


def mars_correction(
    b1: Any = 0.95,
    gamma: Any = 0.025,
    clip: Any = 1.0,
    clip_scope: str = "leaf",
    is_approx: bool = True,
    prev_grad_init: str = "current",
    prev_grad_dtype: Any = None,
    keep_prev_params: bool = False,
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Correction and clip to put in front of any optax transformation that averages gradients with decay b1.

    `optax.chain(mars_correction(b1=0.95), optax.adamw(lr, b1=0.95, b2=0.99))` is `mars(lr, "mars-adamw")` for
    float32 and float64 parameters (for lower precisions `mars` keeps float32 between the two halves).

    Args:
        b1: decay of the average behind it, in [0, 1). a = gamma b1 / (1 - b1) is computed anew at each
            update.
        gamma: strength of the correction, >= 0, or a schedule (callable of the update count, from 0).
        clip: largest norm of the corrected gradient, > 0, or None.
        clip_scope: "leaf" clips each leaf by its own norm, "global" all corrected leaves by their joint norm.
        is_approx: True takes the previous gradient as h_t; False asks for `update(..., prev_grads=h)`.
        prev_grad_init: "current" makes the first correction zero (h_1 = g_1, as in the paper); "zero" starts
            from h_1 = 0, as the authors' code does.
        prev_grad_dtype: dtype that stores the previous gradient; None keeps the parameter's.
        keep_prev_params: keep a copy of the parameters of the previous update in the state, for
            `mars_value_and_grad` (read it with `optax.tree_utils.tree_get(state, "prev_params")`). `update`
            then needs `params`.
        mask: tree of bools like the parameters (or a prefix, or a callable giving one): which leaves are
            corrected and clipped. The others pass unchanged.
        axis_name: inside `shard_map`, the mesh axis (or tuple of axes) over which every leaf is sharded, or a
            tree of `PartitionSpec` like the parameters when some leaves are replicated: squared norms are
            summed over these axes. Leave it None under `jit` with `NamedSharding`, where norms are global
            already.

    Returns:
        A transformation whose `update(grads, state, params=None, *, prev_grads=None)` keeps structure, shapes
        and dtypes of the gradients. Leaves that are None or masked away by optax are skipped and keep their
        state.

    Raises:
        ValueError: for an argument outside its range; from `update`, at trace time, when the exact form gets
            no `prev_grads` or ones of another structure or shape, or `params` is missing and should be kept.
        TypeError: if a gradient is not a real floating-point array, or the state is none of this
            transformation's.

    Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1.
    """
    correction = Correction(
        b1=b1,
        gamma=gamma,
        clip=clip,
        clip_scope=clip_scope,
        is_approx=is_approx,
        prev_grad_init=prev_grad_init,
        prev_grad_dtype=prev_grad_dtype,
        keep_prev_params=keep_prev_params,
        axis_name=axis_name,
    )

    def init(params: optax.Params) -> MarsState:
        return correction.init(params, flags(mask, params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        prev_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MarsState]:
        del extra_args
        check_state(state, MarsState)
        grads, treedef = arrays(updates)
        corrected, state = correction(updates, state, params, prev_grads, flags(mask, updates))
        return treedef.unflatten(map(cast_like, corrected, grads)), state

    return optax.GradientTransformationExtraArgs(init, update)


def mars_value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False, *, vectorize: bool = True
) -> Callable[..., tuple[tuple[Any, Any], Any]]:
    """Value and gradient of a loss, and its gradient at the previous parameters, as one function.

    Both gradients see the same arguments: the same batch and, if a key is among them, the same dropout mask.
    With `vectorize` the two evaluations are one `vmap` over the stacked pair of parameters, which fills an
    accelerator better with small models; without it they are two calls, with the lower peak of memory. Call
    it inside your own `jit`.

    Args:
        loss_fn: loss_fn(params, *args, **kwargs) -> scalar, or (scalar, aux) with `has_aux`.
        has_aux: whether the loss also returns auxiliary data; that of the current parameters is passed on.
        vectorize: evaluate both as one batch of two; False for losses that `vmap` slows down (convolutions).

    Returns:
        A function (params, prev_params, *args, **kwargs) -> ((value, grads), prev_grads), where value is
        (loss, aux) with `has_aux`.

    Raises:
        ValueError: when called with prev_params of another structure, shape or dtype than params.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def both(params: Any, prev_params: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Any]:
        signatures = [
            (jax.tree.structure(p), [(jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(p)])
            for p in (params, prev_params)
        ]
        if signatures[0] != signatures[1]:
            raise ValueError(
                f"prev_params must have the structure, shapes and dtypes of params, {signatures[0]}, "
                f"got {signatures[1]}"
            )
        if not vectorize:
            _, prev_grads = value_and_grad(prev_params, *args, **kwargs)
            return value_and_grad(params, *args, **kwargs), prev_grads
        pair = jax.tree.map(lambda now, before: jnp.stack([now, before]), params, prev_params)
        results = jax.vmap(lambda p: value_and_grad(p, *args, **kwargs))(pair)
        current, (_, prev_grads) = (jax.tree.map(lambda x, i=i: x[i], results) for i in (0, 1))
        return current, prev_grads

    return both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """Validated options of the correction, and its arithmetic on lists of leaves in float32 or float64."""

    b1: Any
    gamma: Any
    clip: Any
    clip_scope: str
    is_approx: bool
    prev_grad_init: str
    prev_grad_dtype: Any
    keep_prev_params: bool
    axis_name: Any

    def __post_init__(self) -> None:
        """Check every option whose value is known before tracing."""
        check("b1", self.b1, "in [0, 1)", lambda x: 0 <= x < 1)
        check("gamma", self.gamma, "finite and >= 0", lambda x: 0 <= x < float("inf"))
        if self.clip is not None:
            check("clip", self.clip, "finite and > 0 (None turns it off)", lambda x: 0 < x < float("inf"))
        for name in ("is_approx", "keep_prev_params"):
            check_switch(name, getattr(self, name))
        for name, options in (("clip_scope", ("leaf", "global")), ("prev_grad_init", ("current", "zero"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        if self.prev_grad_dtype is not None and not jnp.issubdtype(self.prev_grad_dtype, jnp.floating):
            raise ValueError(
                f"prev_grad_dtype must be a floating dtype or None, got {self.prev_grad_dtype!r}"
            )
        if self.is_approx and check("gamma", self.gamma, "", lambda _: True) > 0.2:
            warnings.warn(
                f"gamma={self.gamma} with is_approx=True raises the noise of the momentum instead of "
                "reducing it (39 times the variance at b1=0.95, gamma=1); use is_approx=False above 0.2",
                stacklevel=4,
            )

    def init(self, params: optax.Params, corrected: Sequence[bool]) -> MarsState:
        """Zero previous gradients where they are needed, and a copy of the parameters if it is kept."""
        leaves, treedef = arrays(params)

        def zeros(leaf: Any) -> Any:
            return jnp.zeros_like(leaf, dtype=self.prev_grad_dtype or leaf.dtype)

        prev_grad = [
            leaf if is_hole(leaf) else zeros(leaf) if use else optax.MaskedNode()
            for leaf, use in zip(leaves, corrected, strict=True)
        ]
        return MarsState(
            count=jnp.zeros([], jnp.int32),
            prev_grad=treedef.unflatten(prev_grad) if self.is_approx else None,
            # A copy: donating params and state to one jitted step must not donate a buffer twice.
            prev_params=jax.tree.map(jnp.copy, params) if self.keep_prev_params else None,
        )

    def __call__(
        self,
        updates: optax.Updates,
        state: MarsState,
        params: optax.Params | None,
        prev_grads: optax.Updates | None,
        corrected: Sequence[bool],
        batch_axes: Sequence[tuple[int, ...]] | None = None,
    ) -> tuple[list[Any], MarsState]:
        """Corrected and clipped leaves in the dtype of computation, and the new state.

        `batch_axes` names, leaf by leaf, the axes whose slices are clipped on their own.
        """
        _check_real("gradients", updates)
        grads, treedef = arrays(updates)
        if self.keep_prev_params and params is None:
            raise ValueError("params must be given to update when keep_prev_params=True, got None")
        stored: list[Any] = []
        if self.is_approx:
            if prev_grads is not None:
                warnings.warn("prev_grads is not used when is_approx=True", stacklevel=4)
            stored = state_like("prev_grad", state.prev_grad, updates)
            references = stored
        else:
            references = self._given(updates, prev_grads, corrected)

        first = state.count == 0
        gamma = at_step(self.gamma, state.count)
        strength = gamma * self.b1 / (1 - self.b1)
        out: list[Any] = []
        active: list[int] = []
        for i, (grad, reference, use) in enumerate(zip(grads, references, corrected, strict=True)):
            if is_hole(grad):
                out.append(grad)
                continue
            g = grad.astype(compute_dtype(grad))
            if use:
                active.append(i)
                h = jnp.asarray(reference, g.dtype)
                h_first = g if self.prev_grad_init == "current" else jnp.zeros_like(g)
                h = jnp.where(first, h_first, h)
                g = g + scalar(strength, g) * (g - h)
            out.append(g)
        if self.clip is not None and active:
            self._clip(out, active, treedef, batch_axes or [()] * len(out))

        prev_grad = state.prev_grad
        if self.is_approx:
            for i in active:
                stored[i] = grads[i].astype(stored[i].dtype)
            prev_grad = treedef.unflatten(stored)
        return out, MarsState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            prev_grad=prev_grad,
            prev_params=params if self.keep_prev_params else None,
        )

    def _given(
        self, updates: optax.Updates, prev_grads: optax.Updates | None, corrected: Sequence[bool]
    ) -> list[Any]:
        """The caller's h_t, leaf by leaf, checked against the gradients that it corrects."""
        if prev_grads is None:
            raise ValueError(
                "prev_grads must be given when is_approx=False: update(grads, state, params, prev_grads=h), "
                "with h the gradient at the previous parameters on the current batch (mars_value_and_grad "
                "gives both), got None"
            )
        _check_real("prev_grads", prev_grads)
        references = [first_leaf(subtree) for subtree in leaves_like("prev_grads", prev_grads, updates)]
        grads = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_hole)
        for (path, grad), reference, use in zip(grads, references, corrected, strict=True):
            if not is_hole(grad) and use and (reference is None or jnp.shape(reference) != jnp.shape(grad)):
                raise ValueError(
                    f"prev_grads{jax.tree_util.keystr(path)} must have the gradient's shape "
                    f"{jnp.shape(grad)}, got {None if reference is None else jnp.shape(reference)}"
                )
        return references

    def _clip(
        self, leaves: list[Any], active: list[int], treedef: Any, batch_axes: Sequence[tuple[int, ...]]
    ) -> None:
        """Divide each active leaf of the list by max(1, norm / clip); an infinite norm gives NaN."""
        squares = []
        for i in active:
            summed = tuple(axis for axis in range(leaves[i].ndim) if axis not in batch_axes[i])
            squares.append(jnp.sum(jnp.square(leaves[i]), axis=summed, keepdims=True))
        if self.axis_name is not None:
            names = [mesh_axes(self.axis_name, treedef, i, batch_axes[i]) for i in active]
            squares = sum_over_mesh(squares, names)
        if self.clip_scope == "global":
            squares = [jnp.sum(jnp.stack([jnp.sum(square) for square in squares]))] * len(active)
        for i, square in zip(active, squares, strict=True):
            norm = jnp.sqrt(square.astype(leaves[i].dtype))
            divisor = jnp.maximum(1, norm / scalar(self.clip, norm))
            # Dividing by an infinite norm would be a silent step of zero.
            leaves[i] = leaves[i] / jnp.where(jnp.isinf(norm), jnp.nan, divisor)


def mesh_axes(axis_name: Any, treedef: Any, leaf: int, batch_axes: tuple[int, ...]) -> tuple[str, ...]:
    """Mesh axes over which the norm of one leaf has to be summed."""
    if isinstance(axis_name, str):
        return (axis_name,)
    if isinstance(axis_name, tuple) and all(isinstance(name, str) for name in axis_name):
        return axis_name
    spec = treedef.flatten_up_to(axis_name)[leaf]
    entries = [entry for dim, entry in enumerate(spec or ()) if entry is not None and dim not in batch_axes]
    return tuple(name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,)))


def sum_over_mesh(squares: list[jax.Array], names: list[tuple[str, ...]]) -> list[jax.Array]:
    """Sum each array over its mesh axes, with one collective for all that share the same axes."""
    out = list(squares)
    for axes in sorted(set(names) - {()}):
        members = [i for i, own in enumerate(names) if own == axes]
        total = jax.lax.psum(jnp.concatenate([squares[i].ravel() for i in members]), axes)
        start = 0
        for i in members:
            out[i] = total[start : start + squares[i].size].reshape(squares[i].shape).astype(squares[i].dtype)
            start += squares[i].size
    return out


def _check_real(name: str, tree: optax.Updates) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{name} must be real floating-point arrays, got {jnp.result_type(leaf)} at "
                f"{jax.tree_util.keystr(path)} (optax.contrib.split_real_and_imaginary serves complex ones)"
            )
