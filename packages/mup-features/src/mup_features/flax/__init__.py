"""muP and feature diagnostics for flax nnx models with optax (extra `[flax]`)."""
