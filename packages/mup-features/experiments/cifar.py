"""CIFAR-10 in its binary form, for the full scale: records of one label byte and 3072 bytes of an image."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tenfold_tools.claims import NotRun

RECORD = 3073
VARIABLE = "CIFAR10_DIR"
FILE = "data_batch_1.bin"


def cifar_images() -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3072] with bytes as they are, and labels, of the first file; nothing is unpickled.

    Raises:
        NotRun: if the environment variable CIFAR10_DIR names no folder with that file.
        ValueError: if the file is not a whole number of records, or a label is above 9.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise NotRun(f"needs CIFAR-10 in its binary form: set {VARIABLE} to its folder")
    path = Path(folder) / FILE
    if not path.is_file():
        raise NotRun(f"{VARIABLE} must name a folder with {FILE}, got {folder!r}")
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % RECORD:
        raise ValueError(f"{FILE} must hold records of {RECORD} bytes, got {content.size} bytes")
    records = content.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise ValueError(f"{FILE} must hold labels from 0 to 9, got {labels.max()}")
    return records[:, 1:], labels
