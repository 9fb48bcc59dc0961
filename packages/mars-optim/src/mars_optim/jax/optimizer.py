"""`mars`, the optimiser, and `scale_by_mars`, its direction, as optax transformations.

The mathematics is in `correction.py` (c_t and the clip) and `instances.py` (moments and direction d_t); here
the options get their meaning and the step its form, x_{t+1} = x_t - lr (d_t + weight_decay x_t).

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithms 2-4; mars-m: Liu et al. 2025 (arXiv 2510.21800).
"""

from typing import Any

import jax.numpy as jnp
import optax

from mars_optim.jax.correction import Correction
from mars_optim.jax.instances import Rule, ScaleByMarsState, full_name
from mars_optim.jax.trees import (
    arrays,
    at_step,
    cast_like,
    check,
    check_state,
    flags,
    is_hole,
    leaves_like,
    scalar,
)


def scale_by_mars(
    mars_type: str = "mars-adamw",
    b1: Any = 0.95,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    gamma: Any = 0.025,
    clip: Any = 1.0,
    clip_scope: str = "leaf",
    is_approx: bool = True,
    prev_grad_init: str = "current",
    prev_grad_dtype: Any = None,
    keep_prev_params: bool = False,
    mask: Any = None,
    axis_name: Any = None,
    orthogonalize: str = "newton_schulz",
    ns_steps: Any = 5,
    scale: Any = None,
    *,
    amsgrad: bool = False,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Direction d_t of a MARS step for every leaf; chain it with weight decay and a learning rate.

    The orthogonalised types take leaves with fewer than two axes through the mars-adamw rule, unless
    `weight_dimension_numbers` says that they are matrices.

    Args:
        mars_type: "mars-adamw", "mars-lion", "mars-shampoo", "mars-m" or "mars-sgd"; the prefix may be left
            out.
        b1: decay of m_t, in [0, 1).
        b2: decay of v_t, in [0, 1).
        eps: added to sqrt(vhat), and to the norm in Newton-Schulz (mars-m takes 1e-7 there), >= 0.
        gamma: strength of the correction, >= 0, or a schedule; see `mars_correction`, which also explains the
            options down to `axis_name`. The orthogonalised types refuse `axis_name`.
        clip: largest norm of the corrected gradient, > 0, or None.
        clip_scope: "leaf" or "global".
        is_approx: True takes the previous gradient as h_t, False asks for `prev_grads`.
        prev_grad_init: "current" or "zero".
        prev_grad_dtype: dtype that stores the previous gradient.
        keep_prev_params: keep the previous parameters in the state.
        mask: which leaves are corrected and clipped.
        axis_name: mesh axes for norms inside `shard_map`.
        orthogonalize: "newton_schulz", or "svd" for the exact polar factor.
        ns_steps: Newton-Schulz iterations, >= 0.
        scale: factor of orthogonalised updates: None for the type's own, "none" (1), "sqrt_ratio"
            (sqrt(max(1, rows/cols))), "rms" (0.2 sqrt(max(rows, cols))), or a number.
        amsgrad: divide by the running maximum of v_t.
        weight_dimension_numbers: tree like the parameters (or a callable giving one) with, for each leaf,
            None or (row axes, column axes); axes in neither group index a stack of matrices that are clipped,
            normalised and orthogonalised one by one. None reads axis 0 as rows and the others as columns, as
            torch stores weights; flax stores them the other way round, so say (1, 0) for a Dense kernel and
            (3, (0, 1, 2)) for a Conv kernel to get the `scale` of the torch layout.

    Raises:
        ValueError: for an argument outside its range; see `mars_correction` for those of `update`.
    """
    rule = Rule(
        correction=Correction(
            b1=b1,
            gamma=gamma,
            clip=clip,
            clip_scope=clip_scope,
            is_approx=is_approx,
            prev_grad_init=prev_grad_init,
            prev_grad_dtype=prev_grad_dtype,
            keep_prev_params=keep_prev_params,
            axis_name=axis_name,
        ),
        mars_type=full_name(mars_type),
        b2=b2,
        eps=eps,
        orthogonalize=orthogonalize,
        ns_steps=ns_steps,
        scale=scale,
        amsgrad=amsgrad,
        weight_dimension_numbers=weight_dimension_numbers,
    )

    def init(params: optax.Params) -> ScaleByMarsState:
        return rule.init(params, flags(mask, params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        prev_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMarsState]:
        del extra_args
        directions, state = rule(updates, state, params, prev_grads, flags(mask, updates))
        grads, treedef = arrays(updates)
        return treedef.unflatten(map(cast_like, directions, grads)), state

    return optax.GradientTransformationExtraArgs(init, update)


def mars(
    learning_rate: Any,
    mars_type: str = "mars-adamw",
    b1: Any = 0.95,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    gamma: Any = 0.025,
    clip: Any = 1.0,
    clip_scope: str = "leaf",
    is_approx: bool = True,
    prev_grad_init: str = "current",
    prev_grad_dtype: Any = None,
    keep_prev_params: bool = False,
    axis_name: Any = None,
    orthogonalize: str = "newton_schulz",
    ns_steps: Any = 5,
    scale: Any = None,
    weight_decay: Any = None,
    mask: Any = None,
    optimize_1d: bool = False,
    lr_1d_ratio: Any = 1.0,
    b1_1d: Any = 0.9,
    b2_1d: Any = 0.95,
    weight_decay_1d: Any = 0.1,
    weight_dimension_numbers: Any = None,
    *,
    amsgrad: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The MARS optimiser: x_{t+1} = x_t - lr (d_t + weight_decay x_t); AdamW for leaves that are no matrices.

    Moments and steps are computed in float32 (float64 for float64 parameters). Under
    `optax.inject_hyperparams` with low-precision parameters pass `hyperparam_dtype=jnp.float32`, and name a
    callable `mask` or `weight_dimension_numbers` and a `prev_grad_dtype` among its `static_args`.
    `optax.MultiSteps` averages gradients only: in the exact form hand it the mean of `prev_grads` over the
    accumulated batches.

    Args:
        learning_rate: >= 0, or a schedule (callable of the update count, from 0).
        mars_type: as in `scale_by_mars`, like all options down to `scale`.
        b1: decay of m_t, in [0, 1).
        b2: decay of v_t, in [0, 1).
        eps: added to the denominators, >= 0.
        gamma: strength of the correction, >= 0, or a schedule.
        clip: largest norm of the corrected gradient, > 0, or None.
        clip_scope: "leaf" or "global".
        is_approx: True takes the previous gradient as h_t, False asks for `prev_grads`.
        prev_grad_init: "current" or "zero".
        prev_grad_dtype: dtype that stores the previous gradient.
        keep_prev_params: keep the previous parameters in the state.
        axis_name: mesh axes for norms inside `shard_map`.
        orthogonalize: "newton_schulz" or "svd".
        ns_steps: Newton-Schulz iterations, >= 0.
        scale: factor of orthogonalised updates.
        weight_decay: decay of the MARS leaves, >= 0, or a schedule; None is 0, and 0.1 for mars-m.
        mask: tree of bools (or a prefix, or a callable giving one): which leaves are decayed.
        optimize_1d: give leaves with fewer than two axes MARS too (the mars-adamw rule for orthogonalised
            types) instead of plain AdamW with the options that follow.
        lr_1d_ratio: their learning rate divided by `learning_rate`, >= 0, so that a schedule moves both.
        b1_1d: their decay of m_t, in [0, 1).
        b2_1d: their decay of v_t, in [0, 1).
        weight_decay_1d: their weight decay, >= 0, or a schedule.
        weight_dimension_numbers: which axes of a leaf form its matrix, see `scale_by_mars`. A leaf named here
            counts as a matrix.
        amsgrad: divide by the running maximum of v_t.

    Returns:
        A transformation whose `update(grads, state, params, *, prev_grads=None)` needs the parameters.

    Raises:
        ValueError: for an argument outside its range; see `mars_correction` for those of `update`.

    Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithms 2-4; Liu et al. 2025 (arXiv 2510.21800).
    """
    rule = Rule(
        correction=Correction(
            b1=b1,
            gamma=gamma,
            clip=clip,
            clip_scope=clip_scope,
            is_approx=is_approx,
            prev_grad_init=prev_grad_init,
            prev_grad_dtype=prev_grad_dtype,
            keep_prev_params=keep_prev_params,
            axis_name=axis_name,
        ),
        mars_type=full_name(mars_type),
        b2=b2,
        eps=eps,
        orthogonalize=orthogonalize,
        ns_steps=ns_steps,
        scale=scale,
        amsgrad=amsgrad,
        weight_dimension_numbers=weight_dimension_numbers,
        optimize_1d=optimize_1d,
        b1_1d=b1_1d,
        b2_1d=b2_1d,
    )
    if weight_decay is None:
        weight_decay = 0.1 if rule.mars_type == "mars-m" else 0.0
    for name, value in (
        ("learning_rate", learning_rate),
        ("lr_1d_ratio", lr_1d_ratio),
        ("weight_decay", weight_decay),
        ("weight_decay_1d", weight_decay_1d),
    ):
        check(name, value, "finite and >= 0", lambda x: 0 <= x < float("inf"))

    def init(params: optax.Params) -> ScaleByMarsState:
        return rule.init(params, rule.is_mars(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        prev_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMarsState]:
        del extra_args
        if params is None:
            raise ValueError("params must be given to update: tx.update(grads, state, params), got None")
        check_state(state, ScaleByMarsState)
        count = state.correction.count
        is_mars, decayed = rule.is_mars(updates), flags(mask, updates)
        directions, state = rule(updates, state, params, prev_grads, is_mars)
        grads, treedef = arrays(updates)
        steps = []
        for i, (direction, param) in enumerate(
            zip(directions, leaves_like("params", params, updates), strict=True)
        ):
            if is_hole(direction):
                steps.append(direction)
                continue
            rate = at_step(learning_rate, count) * (1.0 if is_mars[i] else lr_1d_ratio)
            decay = at_step(weight_decay if is_mars[i] else weight_decay_1d, count) if decayed[i] else 0.0
            if not (isinstance(decay, int | float) and decay == 0):
                direction = direction + scalar(decay, direction) * jnp.asarray(param, direction.dtype)
            steps.append(cast_like(-scalar(rate, direction) * direction, grads[i]))
        return treedef.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init, update)
