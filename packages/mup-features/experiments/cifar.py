"""CIFAR-10 in its binary form, for the full scale: records of one label byte and 3072 bytes of an image."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tenfold_tools.claims import NotRun

RECORD = 3073
VARIABLE = "CIFAR10_DIR"


def cifar_images(per_class: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the first classes of data_batch_1.bin, centred and of unit norm; one-hot less 0.1.

    Raises:
        NotRun: if the environment variable CIFAR10_DIR names no folder with that file.
        ValueError: if the file is not a whole number of records.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise NotRun(f"needs CIFAR-10 in its binary form: set {VARIABLE} to its folder")
    path = Path(folder) / "data_batch_1.bin"
    if not path.is_file():
        raise NotRun(f"{VARIABLE} must name a folder with data_batch_1.bin, got {folder!r}")
    content = np.fromfile(path, dtype=np.uint8)
    if content.size % RECORD:
        raise ValueError(f"{path.name} must hold records of {RECORD} bytes, got {content.size} bytes")
    records = content.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    rows = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(classes)])
    X = records[rows, 1:].astype(np.float64) / 255.0
    X = X - X.mean(axis=0)
    return X / np.linalg.norm(X, axis=1, keepdims=True), np.eye(10)[labels[rows]] - 0.1
