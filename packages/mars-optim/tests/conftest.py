"""Turns on the runtime check of annotations, shapes above all, in the public modules that have them."""

from importlib.metadata import version
from importlib.util import find_spec

import jaxtyping
import pytest
from packaging.version import Version

TORCH = ("correction", "diagnostics", "functional", "orthogonalize", "param_groups")
JAX = ("correction", "instances", "optimizer", "orthogonalize")


def checked():
    """Modules under the check; trees of older optax are annotated by names that beartype cannot find."""
    yield "mars_optim.theory"
    yield from (f"mars_optim.torch.{name}" for name in TORCH)
    if find_spec("optax") and Version(version("optax")) >= Version("0.2.8"):
        yield from (f"mars_optim.jax.{name}" for name in JAX)


jaxtyping.install_import_hook(list(checked()), "beartype.beartype")


@pytest.fixture
def unchecked():
    """Without that check, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
