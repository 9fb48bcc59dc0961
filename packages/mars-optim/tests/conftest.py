"""Turns on the runtime check of annotations, shapes above all, in the public modules that have them."""

import jaxtyping
import pytest

CHECKED = (
    "theory",
    "torch.correction",
    "torch.diagnostics",
    "torch.functional",
    "torch.orthogonalize",
    "torch.param_groups",
    "jax.correction",
    "jax.instances",
    "jax.optimizer",
    "jax.orthogonalize",
)

jaxtyping.install_import_hook([f"mars_optim.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture
def unchecked():
    """Without that check, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
