"""The five MARS instances: moments and direction of every leaf.

c~_t is the corrected and clipped gradient of `correction.py`, m_t = b1 m_{t-1} + (1 - b1) c~_t its
average, and the direction d_t of the step is
    mars-adamw    mhat_t / (sqrt(vhat_t) + eps),  v_t = b2 v_{t-1} + (1 - b2) c~_t^2
    mars-lion     sign(m_t)
    mars-shampoo  sqrt(max(1, rows / cols)) * orthogonalised m_t
    mars-m        0.2 sqrt(max(rows, cols)) * orthogonalised m_t
    mars-sgd      m_t

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithms 2-4; mars-m: Liu et al. 2025 (arXiv 2510.21800).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mars_optim.jax.correction import Correction, MarsState
from mars_optim.jax.orthogonalize import (
    SCALES,
    MatrixView,
    matrix_view,
    newton_schulz,
    polar_factor,
    update_scale,
)
from mars_optim.jax.trees import (
    arrays,
    check,
    check_state,
    check_switch,
    compute_dtype,
    flatten,
    is_hole,
    leaves_like,
    scalar,
    state_like,
)

MARS_TYPES = ("mars-adamw", "mars-lion", "mars-shampoo", "mars-m", "mars-sgd")
ORTHOGONALIZERS = ("newton_schulz", "svd")


class ScaleByMarsState(NamedTuple):
    """State of `scale_by_mars` and `mars`.

    Attributes:
        correction: state of the correction, with the count of updates.
        mu: first moments m_t, in float32 (float64 for float64 parameters).
        nu: second moments v_t of the leaves that an Adam rule moves; `optax.MaskedNode` for the others.
        nu_max: running maxima of the second moments with `amsgrad`, else None.
    """

    correction: MarsState
    mu: Any
    nu: Any
    nu_max: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Moments and direction of every leaf, for the MARS leaves and for those that plain AdamW moves."""

    correction: Correction
    mars_type: str
    b2: Any
    eps: Any
    orthogonalize: str
    ns_steps: Any
    scale: Any
    amsgrad: bool
    weight_dimension_numbers: Any
    optimize_1d: bool = True
    b1_1d: Any = 0.9
    b2_1d: Any = 0.95

    def __post_init__(self) -> None:
        """Check every option whose value is known before tracing."""
        for name in ("b2", "b1_1d", "b2_1d"):
            check(name, getattr(self, name), "in [0, 1)", lambda x: 0 <= x < 1)
        check("eps", self.eps, "finite and >= 0", lambda x: 0 <= x < float("inf"))
        for name in ("amsgrad", "optimize_1d"):
            check_switch(name, getattr(self, name))
        check("ns_steps", self.ns_steps, "an integer >= 0", lambda x: x >= 0 and x == int(x))
        if self.mars_type not in MARS_TYPES:
            raise ValueError(f"mars_type must be one of {MARS_TYPES}, got {self.mars_type!r}")
        if self.orthogonalize not in ORTHOGONALIZERS:
            raise ValueError(f"orthogonalize must be one of {ORTHOGONALIZERS}, got {self.orthogonalize!r}")
        if isinstance(self.scale, str):
            if self.scale not in SCALES:
                raise ValueError(f"scale must be None, a number or one of {SCALES}, got {self.scale!r}")
        elif self.scale is not None:
            check("scale", self.scale, "finite", lambda x: abs(x) < float("inf"))
        if self.is_orthogonal and self.correction.axis_name is not None:
            raise ValueError(
                f"axis_name must be None for {self.mars_type}: inside shard_map only a shard of a matrix is "
                f"there to be orthogonalised (use jit with NamedSharding), got {self.correction.axis_name!r}"
            )

    @property
    def is_orthogonal(self) -> bool:
        """Whether matrices get an orthogonalised update."""
        return self.mars_type in ("mars-shampoo", "mars-m")

    def views(self, tree: Any) -> list[MatrixView | None]:
        """How each leaf is a matrix; None where it is not, and for holes."""
        leaves, _ = flatten(tree)
        specs: list[Any] = [None] * len(leaves)
        numbers = self.weight_dimension_numbers
        if numbers is not None and jax.tree.leaves(tree):
            specs = leaves_like(
                "weight_dimension_numbers", numbers(tree) if callable(numbers) else numbers, tree
            )
        return [
            None if is_hole(leaf) else matrix_view(None if is_hole(spec) else spec, jnp.shape(leaf))
            for leaf, spec in zip(leaves, specs, strict=True)
        ]

    def is_mars(self, tree: Any) -> list[bool]:
        """Which leaves are moved by MARS rather than by plain AdamW."""
        return [self.optimize_1d or view is not None for view in self.views(tree)]

    def _has_nu(self, view: MatrixView | None) -> bool:
        if self.mars_type == "mars-adamw":
            return True
        return view is None and (self.is_orthogonal or not self.optimize_1d)

    def init(self, params: optax.Params, corrected: Sequence[bool]) -> ScaleByMarsState:
        """Zero moments, second ones only where an Adam rule needs them."""
        leaves, treedef = arrays(params)
        mu = [leaf if is_hole(leaf) else jnp.zeros_like(leaf, dtype=compute_dtype(leaf)) for leaf in leaves]
        nu = [
            zeros if is_hole(zeros) or self._has_nu(view) else optax.MaskedNode()
            for zeros, view in zip(mu, self.views(params), strict=True)
        ]
        # Moments of their own buffers: a state with one buffer twice cannot be donated.
        nu = jax.tree.map(jnp.copy, nu)
        nu = treedef.unflatten(nu)
        return ScaleByMarsState(
            correction=self.correction.init(params, corrected),
            mu=treedef.unflatten(mu),
            nu=nu,
            nu_max=jax.tree.map(jnp.copy, nu) if self.amsgrad else None,
        )

    def __call__(
        self,
        updates: optax.Updates,
        state: ScaleByMarsState,
        params: optax.Params | None,
        prev_grads: optax.Updates | None,
        corrected: Sequence[bool],
    ) -> tuple[list[Any], ScaleByMarsState]:
        """Directions in the dtype of computation, and the new state."""
        check_state(state, ScaleByMarsState)
        _, treedef = flatten(updates)
        views = self.views(updates)
        inputs, correction = self.correction(
            updates,
            state.correction,
            params,
            prev_grads,
            corrected,
            [view.batch if view else () for view in views],
        )
        mu, nu = state_like("mu", state.mu, updates), state_like("nu", state.nu, updates)
        nu_max: list[Any] = state_like("nu_max", state.nu_max, updates) if self.amsgrad else []
        directions = []
        for i, (c, view) in enumerate(zip(inputs, views, strict=True)):
            if is_hole(c):
                directions.append(c)
                continue
            plain = view is None and not self.optimize_1d
            b1, b2 = (self.b1_1d, self.b2_1d) if plain else (self.correction.b1, self.b2)
            mu[i] = scalar(b1, c) * mu[i] + scalar(1 - b1, c) * c
            if self._has_nu(view):
                nu[i] = scalar(b2, c) * nu[i] + scalar(1 - b2, c) * jnp.square(c)
                second = nu[i]
                if self.amsgrad:
                    nu_max[i] = second = jnp.maximum(nu_max[i], nu[i])
                directions.append(self._adam(mu[i], second, b1, b2, correction.count))
            elif view is not None and self.is_orthogonal:
                directions.append(self._orthogonal(mu[i], view))
            else:
                directions.append(jnp.sign(mu[i]) if self.mars_type == "mars-lion" else mu[i])
        return directions, ScaleByMarsState(
            correction=correction,
            mu=treedef.unflatten(mu),
            nu=treedef.unflatten(nu),
            nu_max=treedef.unflatten(nu_max) if self.amsgrad else None,
        )

    def _adam(self, mu: jax.Array, nu: jax.Array, b1: Any, b2: Any, count: jax.Array) -> jax.Array:
        """Bias-corrected mhat / (sqrt(vhat) + eps), eqs 3.10-3.12; the count includes this update."""
        t = count.astype(mu.dtype)
        mhat = mu / (1 - scalar(b1, mu) ** t)
        vhat = nu / (1 - scalar(b2, nu) ** t)
        return mhat / (jnp.sqrt(vhat) + scalar(self.eps, mu))

    def _orthogonal(self, mu: jax.Array, view: MatrixView) -> jax.Array:
        """Scaled polar factor of the momentum, or its Newton-Schulz approximation (eqs 3.20-3.21)."""
        matrix = view.to_matrix(mu)
        shampoo = self.mars_type == "mars-shampoo"
        if self.orthogonalize == "svd":
            factor = polar_factor(matrix)
        else:
            # Undoing the (1 - b1) of the average only changes how large eps is beside the norm.
            matrix = matrix / scalar(1 - self.correction.b1, mu) if shampoo else matrix
            factor = newton_schulz(matrix, steps=self.ns_steps, eps=self.eps if shampoo else 1e-7)
        scale = ("sqrt_ratio" if shampoo else "rms") if self.scale is None else self.scale
        return view.from_matrix(scalar(update_scale(scale, *view.shape(mu.shape)), mu) * factor, mu.shape)


def full_name(mars_type: Any) -> Any:
    """The type with its "mars-" prefix if it is one of ours; anything else as it came, to be refused."""
    return f"mars-{mars_type}" if f"mars-{mars_type}" in MARS_TYPES else mars_type
