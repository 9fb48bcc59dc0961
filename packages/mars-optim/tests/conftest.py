"""Turns on the runtime check of the shape and type annotations of `mars_optim.torch`, before it is imported."""

import jaxtyping

# param_groups annotates with a typing.Protocol, which beartype cannot check at run time
CHECKED = ("_foreach", "diagnostics", "functional", "orthogonalize")

jaxtyping.install_import_hook([f"mars_optim.torch.{name}" for name in CHECKED], "beartype.beartype")
