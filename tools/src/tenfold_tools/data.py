"""Real data that every machine already has: nothing is downloaded.

- `stdlib_source`: the bytes of the Python standard library's own source. The same on every machine for one
  exact Python version (3.11.7 and 3.11.8 differ): modules in a fixed order, line ends normalised, files that
  platforms or vendors change left out. `ByteText.sha256` tells whether two machines had the same bytes.
- `digits`, `diabetes`: the sets that scikit-learn carries in its wheel.
- `local_text`: a file of the user's.

Everything is a NumPy array; no framework is imported.
"""

import hashlib
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Vendors patch or regenerate these (paths of the installation, its pip, its browsers), so bytes would differ.
CHANGED_BY_VENDORS = frozenset(
    {"site", "sysconfig", "_sysconfigdata", "ensurepip", "distutils", "webbrowser"}
)
# Distributions ship these apart from the rest, so they may be missing.
SHIPPED_APART = frozenset(
    {"idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "turtle", "venv"}
)


@dataclass(frozen=True)
class ByteText:
    """Text as bytes, the end of it held out.

    Attributes:
        train: the bytes before the held-out part.
        test: the held-out bytes, from the end of the text.
        source: where the bytes come from, for a report.
        sha256: hexadecimal digest of train and test together.
    """

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]
    source: str
    sha256: str


class Samples(NamedTuple):
    """A supervised set.

    Attributes:
        inputs: shape (samples, features), float64.
        targets: shape (samples,), int64 classes or float64 values.
    """

    inputs: NDArray[np.float64]
    targets: NDArray[np.int64] | NDArray[np.float64]


def stdlib_source(files: int | None = 120, *, held_out: int = 100_000, size: int | None = None) -> ByteText:
    """Bytes of the Python standard library's source, the last of them held out.

    Order: the single-file modules by name, then the modules inside packages by path.

    Args:
        files: how many files to take from the start of that order, >= 1; None for all.
        held_out: how many bytes at the end are held out, >= 0.
        size: use only the first so many bytes; None for all of them.

    Raises:
        FileNotFoundError: if this Python has no source files (an embedded or zipped standard library).
        ValueError: if a number is out of range, or there are not enough files or bytes.
    """
    if files is not None and files < 1:
        raise ValueError(f"files must be >= 1 or None, got {files!r}")
    paths = _stdlib_files()
    if files is not None and files > len(paths):
        raise ValueError(f"files must be at most {len(paths)}, what this Python has, got {files!r}")
    text = b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in paths[:files])
    return _held_out(text, held_out, size, f"standard library of Python {platform.python_version()}")


def local_text(path: str | Path, *, held_out: int = 100_000, size: int | None = None) -> ByteText:
    """Bytes of a file on this machine, the last of them held out.

    Args:
        path: the file.
        held_out: how many bytes at the end are held out, >= 0.
        size: use only the first so many bytes; None for all of them.

    Raises:
        FileNotFoundError: if path is not a file.
        ValueError: if a number is out of range or there are not enough bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing file, got {str(path)!r}")
    return _held_out(path.read_bytes(), held_out, size, path.name)


def digits() -> Samples:
    """The 1797 handwritten 8 x 8 digits of scikit-learn: grey values x / 16 in [0, 1], classes 0 to 9."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return Samples(np.asarray(inputs, dtype=np.float64) / 16, np.asarray(targets, dtype=np.int64))


def diabetes() -> Samples:
    """The 442 diabetes patients of scikit-learn: 10 features of norm 1 and mean 0, disease progression."""
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    return Samples(np.asarray(inputs, dtype=np.float64), np.asarray(targets, dtype=np.float64))


def split(samples: Samples, held_out: float, generator: np.random.Generator) -> tuple[Samples, Samples]:
    """Shuffle and split into a training and a held-out set.

    Args:
        samples: the set to split.
        held_out: fraction held out, in (0, 1); rounded to at least one sample on each side.
        generator: source of the shuffle.

    Raises:
        ValueError: if held_out is outside (0, 1) or there are fewer than two samples.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out!r}")
    count = len(samples.targets)
    if count < 2:
        raise ValueError(f"samples must hold at least two samples, got {count}")
    order = generator.permutation(count)
    kept = min(max(count - round(held_out * count), 1), count - 1)
    train, test = (Samples(samples.inputs[rows], samples.targets[rows]) for rows in np.split(order, [kept]))
    return train, test


def _stdlib_files() -> list[Path]:
    """Source files of the standard library's modules that are alike everywhere, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = CHANGED_BY_VENDORS | SHIPPED_APART
    paths = [
        path
        for name in sorted(set(sys.stdlib_module_names) - left_out)
        for path in (root / f"{name}.py", *sorted((root / name).rglob("*.py")))
        if path.is_file() and left_out.isdisjoint(path.relative_to(root).parts)
    ]
    if not paths:
        raise FileNotFoundError(f"no source of the standard library in {str(root)!r}: this Python ships none")
    return sorted(paths, key=lambda path: (path.parent != root, path.relative_to(root).parts))


def _held_out(text: bytes, held_out: int, size: int | None, source: str) -> ByteText:
    if held_out < 0:
        raise ValueError(f"held_out must be >= 0, got {held_out!r}")
    if size is not None and size < 1:
        raise ValueError(f"size must be >= 1 or None, got {size!r}")
    if size is not None and size > len(text):
        raise ValueError(f"size must be at most {len(text)}, what {source} has, got {size!r}")
    text = text[:size]
    if held_out >= len(text):
        raise ValueError(f"held_out must be less than the {len(text)} bytes of {source}, got {held_out!r}")
    tokens = np.frombuffer(text, dtype=np.uint8).copy()
    train, test = np.split(tokens, [len(tokens) - held_out])
    return ByteText(train, test, source, hashlib.sha256(text).hexdigest())
