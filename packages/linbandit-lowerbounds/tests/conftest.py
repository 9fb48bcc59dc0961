"""Turns on the runtime check of shapes in public modules; float64 for the tests that ask for it."""

import os
from collections.abc import Iterator

# Most of the time is compilation. LLVM without its optimisations halves it and changes no program but in
# speed; whoever sets XLA_FLAGS keeps them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jaxtyping
import pytest
from precision import float64

CHECKED = (
    "bounds",
    "hypercube_bound",
    "information",
    "intervals",
    "peeling",
    "peeling_bound",
    "published_bounds",
    "scaled_bound",
    "simulate",
    "weak",
)

jaxtyping.install_import_hook([f"linbandit_lowerbounds.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 inside the test."""
    with float64(True):
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
