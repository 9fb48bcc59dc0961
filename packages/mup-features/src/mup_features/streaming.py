"""Grams of features that never exist in memory as a whole: by chunks of features, blocks of samples, shards.

K = (1/n) sum over chunks of A[:, c] A[:, c]', so a Gram takes chunks of features one after another in
O(samples^2 + chunk) memory. The cross product with the features at initialisation and the displacement
||A_i - A0_i||^2 are sums over features as well, so change and joint Gram stream too, when both networks are
evaluated side by side. Products are taken in float64 whatever the type of the chunk: the features' own
rounding perturbs K along its small eigenvectors by the square of their precision (1e-14 in float32), float32
products by the precision itself (1e-7), which would drown the eigenvalues in question.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

# Entries of the float64 copy of a piece of a chunk: 16 MB.
_PIECE = 1 << 21


class StreamingGram:
    """Accumulates the Gram of N samples, and with `reference=True` everything that compares it with another.

    Args:
        samples: N >= 1.
        reference: also take chunks of reference features; then `reference_gram`, `cross` and `displacement`
            are there too.

    Raises:
        ValueError: if samples < 1.
    """

    def __init__(self, samples: int, *, reference: bool = False) -> None:
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples!r}")
        self.samples = samples
        self.features = 0
        self._own = np.zeros((samples, samples))
        self._reference = np.zeros((samples, samples)) if reference else None
        self._cross = np.zeros((samples, samples)) if reference else None
        self._moved = np.zeros(samples) if reference else None

    def update(self, chunk: ArrayLike, reference: ArrayLike | None = None) -> "StreamingGram":
        """Adds some features of all samples.

        Args:
            chunk: real (samples, any number of features >= 0), any float type.
            reference: the same features of the reference network; given exactly if the Gram takes them.

        Raises:
            ValueError: if the shape is wrong or an entry is not finite; nothing has been added then.
        """
        if (reference is None) != (self._reference is None):
            raise ValueError(
                "reference must be given exactly if the Gram was made with reference=True, got "
                f"{'none' if reference is None else 'one'}"
            )
        A = _checked(chunk, "chunk", (self.samples, None))
        A0 = None if reference is None else _checked(reference, "reference", A.shape)
        width = max(1, _PIECE // self.samples)
        for start in range(0, A.shape[1], width):
            a = A[:, start : start + width].astype(np.float64)
            self._own += a @ a.T
            if A0 is not None:
                against = self._needed(self._reference), self._needed(self._cross), self._needed(self._moved)
                a0 = A0[:, start : start + width].astype(np.float64)
                for total, product in zip(
                    against, (a0 @ a0.T, a @ a0.T, ((a - a0) ** 2).sum(1)), strict=True
                ):
                    total += product
        self.features += A.shape[1]
        return self

    def update_by_rows(self, load: Callable[[slice], ArrayLike], block: int = 256) -> "StreamingGram":
        """Adds some features of all samples, of which only two blocks of samples are in memory at once.

        Every pair of blocks is multiplied once, so `load` is called about (samples / block)^2 / 2 times.

        Args:
            load: returns the features (rows, k) of a slice of samples, the same k for every slice.
            block: samples in a block, >= 1.

        Raises:
            ValueError: if a block has the wrong shape or an entry is not finite, or a reference is needed.
        """
        if block < 1:
            raise ValueError(f"block must be >= 1, got {block!r}")
        if self._reference is not None:
            raise ValueError("update_by_rows takes no reference; use update for a Gram with reference=True")
        slices = [slice(s, min(s + block, self.samples)) for s in range(0, self.samples, block)]
        total, width = np.zeros_like(self._own), None
        for i, rows in enumerate(slices):
            a = _checked(load(rows), "load(rows)", (rows.stop - rows.start, width)).astype(np.float64)
            width = a.shape[1]
            total[rows, rows] = a @ a.T
            for columns in slices[:i]:
                shape = (columns.stop - columns.start, width)
                b = _checked(load(columns), "load(rows)", shape).astype(np.float64)
                total[rows, columns] = a @ b.T
                total[columns, rows] = total[rows, columns].T
        self._own += total
        self.features += width or 0
        return self

    def merge(self, other: "StreamingGram") -> "StreamingGram":
        """Adds the features that another accumulator saw: shards of the features of the same samples.

        Raises:
            ValueError: if the two count different samples or only one has a reference.
        """
        if other.samples != self.samples:
            raise ValueError(f"other must have {self.samples} samples, got {other.samples}")
        if (other._reference is None) != (self._reference is None):
            raise ValueError("other must have a reference exactly if this Gram has one")
        for name in ("_own", "_reference", "_cross", "_moved"):
            if getattr(self, name) is not None:
                getattr(self, name).__iadd__(getattr(other, name))
        self.features += other.features
        return self

    def gram(self, *, normalize: bool = True) -> Float[np.ndarray, "samples samples"]:
        """K = A A' / n, or A A'."""
        return self._own / self._divisor(normalize)

    def reference_gram(self, *, normalize: bool = True) -> Float[np.ndarray, "samples samples"]:
        """The Gram of the reference network."""
        return self._needed(self._reference) / self._divisor(normalize)

    def cross(self, *, normalize: bool = True) -> Float[np.ndarray, "samples samples"]:
        """A A0' / n: row i is a sample now, column j one of the reference."""
        return self._needed(self._cross) / self._divisor(normalize)

    def displacement(self, *, normalize: bool = True) -> Float[np.ndarray, " samples"]:
        """||A_i - A0_i||^2 / n, from the differences themselves and not from three large inner products."""
        return self._needed(self._moved) / self._divisor(normalize)

    def _divisor(self, normalize: bool) -> int:
        if not self.features:
            raise ValueError("the Gram has seen no features yet")
        return self.features if normalize else 1

    @staticmethod
    def _needed(value: np.ndarray | None) -> np.ndarray:
        if value is None:
            raise ValueError("this Gram was made without reference=True")
        return value


def _checked(value: ArrayLike, name: str, shape: tuple[int, int | None]) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    rows, columns = shape
    if array.ndim != 2 or array.shape[0] != rows or columns not in (None, array.shape[1]):
        expected = f"({rows}, {'features' if columns is None else columns})"
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {(~np.isfinite(array)).sum()} entries that are not")
    return array
