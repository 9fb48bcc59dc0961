"""Turns on the runtime check of the annotations of `mars_optim.torch` where shapes occur, before its import."""

import jaxtyping

CHECKED = ("correction", "diagnostics", "functional", "orthogonalize")

jaxtyping.install_import_hook([f"mars_optim.torch.{name}" for name in CHECKED], "beartype.beartype")
