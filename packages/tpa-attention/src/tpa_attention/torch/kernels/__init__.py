"""Triton kernels, imported on first use; each is tested against `..reference` in the interpreter."""
