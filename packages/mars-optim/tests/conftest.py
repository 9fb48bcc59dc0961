"""Turns on the runtime check of annotations in the modules of `mars_optim.torch` that speak of shapes."""

import jaxtyping

CHECKED = ("correction", "diagnostics", "functional", "orthogonalize")

jaxtyping.install_import_hook([f"mars_optim.torch.{name}" for name in CHECKED], "beartype.beartype")
