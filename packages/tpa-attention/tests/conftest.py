"""Turns on the runtime check of annotations, shapes above all, in the reference modules."""

import jaxtyping

CHECKED = (
    "reference",
    "reference_accounting",
    "reference_baselines",
    "reference_conversion",
    "reference_layer",
    "reference_rope",
)

jaxtyping.install_import_hook(list(CHECKED), "beartype.beartype")
