"""The data of the claims: small sets of scikit-learn's digits, and the two points of the reference values."""

from __future__ import annotations

import numpy as np

from tenfold_tools.data import digits

TWO_POINTS = np.array([[1.0, 0.5], [-0.3, 0.8]]), np.array([1.0, -0.5])
CLASSES = 10


def few_digits(per_class: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first digits of the first classes, centred and of unit norm, with one-hot targets less 0.1."""
    samples = digits()
    labels = np.asarray(samples.targets)
    rows = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(classes)])
    X = np.asarray(samples.inputs, dtype=np.float64).reshape(len(labels), -1)[rows]
    X = X - X.mean(axis=0)
    return X / np.linalg.norm(X, axis=1, keepdims=True), np.eye(CLASSES)[labels[rows]] - 0.1
