"""MARS for JAX: optax transformations with a scaled variance-reduction correction.

`mars` is a whole optimiser, `scale_by_mars` its direction, `mars_correction` the correction and the clip that
go in front of any optax transformation, and `mars_value_and_grad` gives the two gradients that the exact form
asks for. Everything is a pure function on pytrees: it runs inside `jit`, `scan`, `optax.inject_hyperparams`,
`optax.partition`, `optax.MultiSteps` and flax's `nnx.Optimizer`, and under `jit` with sharded arrays as it
is.

Source: Yuan et al. 2025 (arXiv 2411.10438); Liu et al. 2025 (arXiv 2510.21800).
"""

try:
    import jax  # noqa: F401
    import jaxtyping  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"mars_optim.jax needs jax, optax and jaxtyping, and {error.name} is missing: "
        "pip install 'mars-optim[jax]'"
    ) from error

from mars_optim.jax.correction import MarsState, mars_correction, mars_value_and_grad
from mars_optim.jax.instances import ScaleByMarsState
from mars_optim.jax.optimizer import mars, scale_by_mars
from mars_optim.jax.orthogonalize import newton_schulz, polar_factor

__all__ = [
    "MarsState",
    "ScaleByMarsState",
    "mars",
    "mars_correction",
    "mars_value_and_grad",
    "newton_schulz",
    "polar_factor",
    "scale_by_mars",
]
