"""Turns on the runtime check of shapes in public modules; float64 for the tests that ask for it."""

import os
from collections.abc import Iterator

# Most of the time of the jax tests is compilation; LLVM without its optimisations halves it and changes no
# program but in speed. Whoever sets XLA_FLAGS keeps them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pytest
from precision import float64


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 inside the test."""
    with float64(True):
        yield
