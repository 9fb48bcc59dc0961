"""Streams of gradients for optimisers of JAX, their trajectories op by op, and float64 to run them in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import experimental

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64

SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 3, 2), (1, 4), (7, 1))
STEPS = 6  # every branch has been taken by the third; eager steps are slow
ROUNDING = 1e-12  # float64 rounding over a few steps of O(1) numbers


def gradients(rng, shapes=SHAPES, steps=STEPS):
    """Gradients and references whose norms lie on both sides of 1, correlated as real ones are."""
    out = []
    for _ in range(steps):
        g = [rng.normal(size=s) * rng.choice([0.05, 0.3, 2.0]) for s in shapes]
        h = [x + 0.3 * np.std(x) * rng.normal(size=x.shape) for x in g]
        out.append((g, h))
    return out


def run(tx, params, stream, *, exact=False):
    """Trajectory of all parameters, op by op: compiled ops serve all tests, a jitted step only its own."""
    params = [jnp.asarray(p) for p in params]
    state, trajectory = tx.init(params), []
    for g, h in stream:
        extra = {"prev_grads": [jnp.asarray(x) for x in h]} if exact else {}
        updates, state = tx.update([jnp.asarray(x) for x in g], state, params, **extra)
        params = optax.apply_updates(params, updates)
        trajectory.append([np.asarray(p) for p in params])
    return trajectory


def assert_same(left, right, tolerance=ROUNDING):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
