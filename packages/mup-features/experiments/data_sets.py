"""The data of the claims: few digits, few images of CIFAR-10, and the reference values' two points."""

from __future__ import annotations

import numpy as np
from cifar import cifar_images

from tenfold_tools.data import digits

CLASSES = 10
PER_CLASS, CLASSES_TAKEN = 4, 8  # the 32 samples of claims 1-3, 5 and 7


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, outputs] by name: "two points", "digits" or "cifar".

    Raises:
        NotRun: for CIFAR-10 where it is not.
    """
    if name == "two points":
        return np.array([[1.0, 0.5], [-0.3, 0.8]]), np.array([[1.0], [-0.5]])
    if name == "digits":
        return few_digits(PER_CLASS, CLASSES_TAKEN)
    return first_of_each(*cifar_images(), PER_CLASS, CLASSES_TAKEN)


def few_digits(per_class: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first digits of the first classes, prepared as by `first_of_each`."""
    samples = digits()
    return first_of_each(samples.inputs, np.asarray(samples.targets), per_class, classes)


def first_of_each(
    inputs: np.ndarray, labels: np.ndarray, per_class: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first samples of the first classes, centred and of unit norm, with one-hot targets less 0.1.

    Raises:
        ValueError: if a class has too few samples.
    """
    rows = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(classes)])
    if len(rows) != per_class * classes:
        raise ValueError(
            f"inputs must hold {per_class} samples of {classes} classes, got {len(rows)} of them"
        )
    X = inputs[rows].astype(np.float64)
    X = X - X.mean(axis=0)
    return X / np.linalg.norm(X, axis=1, keepdims=True), np.eye(CLASSES)[labels[rows]] - 0.1
