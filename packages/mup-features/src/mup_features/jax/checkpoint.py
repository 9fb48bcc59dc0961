"""States of the limit as npz files: written atomically, read without pickle, continued bit for bit."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT = 1

__all__ = ["read", "write"]


def write(path: str | Path, tree: Any, description: Mapping[str, Any]) -> None:
    """Save the leaves of a pytree, with a description that `read` compares.

    Args:
        path: file to write, in a folder that exists.
        tree: pytree of arrays and numbers.
        description: what the state belongs to; JSON.
    """
    path = Path(path)
    leaves = {f"leaf{number:05d}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}
    about = np.frombuffer(
        json.dumps({"format": FORMAT, **description}, sort_keys=True).encode(), dtype=np.uint8
    )
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, description=about, allow_pickle=False, **leaves)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def read(path: str | Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Description and leaves of a saved state.

    Raises:
        ValueError: if the file is none of ours or of another format.
    """
    with np.load(path, allow_pickle=False) as file:
        if "description" not in file:
            raise ValueError(
                f"path must be a state saved by mup_features, got {str(path)!r} without description"
            )
        description = json.loads(file["description"].tobytes())
        if description.get("format") != FORMAT:
            raise ValueError(
                f"path must hold format {FORMAT}, got {description.get('format')!r} in {str(path)!r}"
            )
        leaves = [file[name] for name in sorted(name for name in file.files if name.startswith("leaf"))]
    return description, leaves
