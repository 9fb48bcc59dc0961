"""Shapes at base width, in memory and in files; a file stands in for the base model.

JSON of this package, and the `.bsh` files (YAML) of microsoft/mup, which list per dimension its size at base
width, or null where it is no width.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = ["BaseShape", "base_shape_of", "compare_widths", "load_shapes", "save_shapes"]

_FORMAT = "mup-features shapes"
_VERSION = 1


@dataclass(frozen=True)
class BaseShape:
    """Shape of one parameter at base width.

    Attributes:
        sizes: size of each dimension; None where it is no width and its size was not written down.
        width: the axes that are widths, None if that shows only by comparing with a wider model.
        std: standard deviation of the parameter's entries in the base model, None if unknown.
    """

    sizes: tuple[int | None, ...]
    width: tuple[int, ...] | None = None
    std: float | None = None


def base_shape_of(shape: BaseShape | tuple[int, ...]) -> BaseShape:
    """The same shape as a BaseShape."""
    return shape if isinstance(shape, BaseShape) else BaseShape(tuple(shape))


def compare_widths(
    base: Mapping[str, BaseShape | tuple[int, ...]], other: Mapping[str, tuple[int, ...]]
) -> dict[str, BaseShape]:
    """The base with every axis marked as a width whose size differs in a model of another width.

    Raises:
        ValueError: if the names or the numbers of dimensions differ.
    """
    if set(base) != set(other):
        raise ValueError(
            f"other must hold the parameters of base, differing are {sorted(set(base) ^ set(other))[:5]}"
        )
    marked = {}
    for name, shape in base.items():
        base_shape = base_shape_of(shape)
        if len(base_shape.sizes) != len(other[name]):
            raise ValueError(
                f"parameter {name!r} has shape {tuple(other[name])} in other, {base_shape.sizes} in base"
            )
        pairs = enumerate(zip(base_shape.sizes, other[name], strict=True))
        marked[name] = replace(base_shape, width=tuple(axis for axis, (a, b) in pairs if a != b))
    return marked


def save_shapes(path: str | os.PathLike[str], shapes: Any, other: Any = None) -> None:
    """Write shapes at base width to a JSON file, whole or not at all.

    Args:
        path: the file.
        shapes: dictionary from name to shape (or `BaseShape`), or a torch module.
        other: the same at another width; then the file also says which dimensions are widths.

    Raises:
        ValueError: if the two do not hold the same parameters.
    """
    base = {name: base_shape_of(shape) for name, shape in _shapes(shapes).items()}
    if other is not None:
        plain = {name: base_shape_of(shape).sizes for name, shape in _shapes(other).items()}
        base = compare_widths(base, plain)  # pyright: ignore[reportArgumentType]
    entries = {
        name: {"shape": shape.sizes, "width": shape.width, "std": shape.std} for name, shape in base.items()
    }
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "shapes": entries}, indent=1)
    _write(Path(path), text + "\n")


def load_shapes(path: str | os.PathLike[str]) -> dict[str, BaseShape]:
    """Shapes at base width from a JSON file of `save_shapes`, or from a `.bsh` file of microsoft/mup.

    Raises:
        ValueError: if the file is neither.
        ImportError: for a `.bsh` file without PyYAML.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".bsh", ".yaml", ".yml"):
        return _from_bsh(path, text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} must be a shapes file (JSON, or a .bsh file of microsoft/mup): {error}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} must be a file written by save_shapes, its format is not {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} must have version {_VERSION}, got {content.get('version')!r}: written by a newer release"
        )
    return {name: _entry(path, name, entry) for name, entry in content["shapes"].items()}


def _shapes(shapes: Any) -> Mapping[str, BaseShape | tuple[int, ...]]:
    if isinstance(shapes, Mapping):
        return shapes
    if hasattr(shapes, "named_parameters"):
        from .torch.scaling import base_shapes

        return base_shapes(shapes)
    raise TypeError(
        f"shapes must be a dictionary from name to shape or a torch module, got {type(shapes).__name__}"
    )


def _entry(path: Path, name: str, entry: Any) -> BaseShape:
    try:
        width, std = entry["width"], entry["std"]
        shape = BaseShape(_sizes(entry["shape"]), None if width is None else tuple(map(int, width)), std)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the entry of {name!r} must be shape, width and std, got {entry!r}"
        ) from error
    if std is not None and not (isinstance(std, (int, float)) and isfinite(std) and std >= 0):
        raise ValueError(f"{path}: the std of {name!r} must be finite and >= 0, got {std!r}")
    return shape


def _sizes(sizes: Any) -> tuple[int | None, ...]:
    if any(size is not None and (not isinstance(size, int) or size < 0) for size in sizes):
        raise TypeError(f"sizes must be integers >= 0 or null, got {sizes!r}")
    return tuple(sizes)


def _from_bsh(path: Path, text: str) -> dict[str, BaseShape]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError(
            'reading .bsh files needs PyYAML: pip install "mup-features[bsh]"', name="yaml"
        ) from error
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map parameter names to shapes, got {type(content).__name__}")
    shapes = {}
    for name, entry in content.items():
        try:
            sizes = _sizes(entry)
        except TypeError as error:
            raise ValueError(f"{path}: the shape of {name!r} must be a list, got {entry!r}") from error
        shapes[name] = BaseShape(sizes, tuple(axis for axis, size in enumerate(sizes) if size is not None))
    return shapes


def _write(path: Path, text: str) -> None:
    """Beside the file first, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
