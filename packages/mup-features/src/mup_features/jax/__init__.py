"""The infinite-width limit of SGD and its kernels, in JAX (extra `[jax]`)."""
