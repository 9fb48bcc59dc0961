"""Turns on the runtime check of annotations, shapes above all, in the public modules that have them."""

import jaxtyping

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
