"""Checks of arguments that several modules share: one wording for one rule, raised before any work."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def real(name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf) -> float:
    """A finite number in a range.

    Args:
        name: the argument's name.
        value: what was given.
        above: lower limit that is excluded.
        at_least: lower limit that is included.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is not finite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    rule = f" and > {above:g}" if above > -math.inf else ""
    rule += f" and >= {at_least:g}" if at_least > -math.inf else ""
    if not math.isfinite(value) or value <= above or value < at_least:
        raise ValueError(f"{name} must be finite{rule}, got {value!r}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """A number strictly between 0 and 1.

    Args:
        name: the argument's name.
        value: what was given.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is not in (0, 1).
    """
    number = real(name, value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return number


def count(name: str, value: Any, *, at_least: int = 1) -> int:
    """A whole number.

    Args:
        name: the argument's name.
        value: what was given.
        at_least: smallest accepted value.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value!r}")
    return int(value)


def one_of(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """One of a few accepted values.

    Args:
        name: the argument's name.
        value: what was given.
        accepted: what is accepted.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in accepted:
        raise ValueError(f"{name} must be one of {list(accepted)}, got {value!r}")


def random_key(name: str, value: Any) -> None:
    """A single new-style random key.

    Args:
        name: the argument's name.
        value: what was given.

    Raises:
        TypeError: if it was not made by `jax.random.key`.
        ValueError: if it is an array of several keys.
    """
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be made by jax.random.key, got {reprlib.repr(value)}")
    if value.shape != ():
        raise ValueError(f"{name} must be a single key, got keys of shape {value.shape}")


def file_in_folder(name: str, value: str | os.PathLike[str]) -> None:
    """A file whose folder exists, so that hours of work are not lost when it is written.

    Args:
        name: the argument's name.
        value: the path of the file.

    Raises:
        ValueError: if there is no such folder.
    """
    if not Path(value).parent.is_dir():
        raise ValueError(f"{name} must be a file in a folder that exists, got {value!s}")


def reals(name: str, value: Any) -> Float[np.ndarray, "*shape"]:
    """An array of real numbers of any shape, as float64.

    Args:
        name: the argument's name.
        value: what was given.

    Raises:
        TypeError: if it is ragged, or holds texts, complex numbers or other things.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "cSU":  # NumPy would read texts and drop imaginary parts
            return array.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be an array of numbers, got {reprlib.repr(value)}")


def sigmas(name: str, value: Any) -> Float[np.ndarray, " K"]:
    """A sequence of standard deviations in [0, 1], at least two rounds long, as float64.

    Args:
        name: the argument's name.
        value: what was given.

    Raises:
        TypeError: if it is not an array of real numbers.
        ValueError: if it has another shape, fewer than two entries, or entries outside [0, 1].
    """
    array = reals(name, value)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"{name} must have shape (K,) with K >= 2, got shape {array.shape}")
    wrong = ~((array >= 0.0) & (array <= 1.0))
    if wrong.any():
        k = int(np.argmax(wrong))
        raise ValueError(f"{name} must lie in [0, 1], got {float(array[k])!r} in round {k}")
    return array
