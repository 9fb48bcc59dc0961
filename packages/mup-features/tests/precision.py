"""float32 or float64 inside a block, in every supported version of jax."""

import jax

if hasattr(jax, "enable_x64"):
    float64 = jax.enable_x64
else:  # jax < 0.8
    from jax.experimental import enable_x64 as float64

__all__ = ["float64"]
