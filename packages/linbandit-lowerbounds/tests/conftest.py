"""Turns on the runtime check of shapes in public modules; float64 for the tests that ask for it."""

from collections.abc import Iterator

import jax
import jaxtyping
import pytest

CHECKED = ("bounds", "information", "peeling", "simulate", "weak")

jaxtyping.install_import_hook([f"linbandit_lowerbounds.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
