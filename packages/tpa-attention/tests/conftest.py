"""Turns on the runtime check of annotations, shapes above all, where no test expects a message of our own."""

import jaxtyping

REFERENCES = ("", "_accounting", "_baselines", "_conversion", "_layer", "_rope")
CHECKED = (
    "arguments",
    "blockwise",
    "dispatch",
    "factor_maps",
    "factors",
    "flex",
    "functional",
    "inputs",
    "kv_shift",
    "low_rank",
    "masks",
    "reference",
    "rope",
    "rows",
    "sdpa",
)

jaxtyping.install_import_hook(
    [f"reference{name}" for name in REFERENCES] + [f"tpa_attention.torch.{name}" for name in CHECKED],
    "beartype.beartype",
)
