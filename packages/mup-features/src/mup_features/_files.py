"""Files are written beside their place and then renamed: a reader never meets half of one."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file when the block ends; an error in it leaves what was there.

    Args:
        path: where to; its folder must exist.

    Raises:
        OSError: if the folder is missing or refuses.
    """
    target = Path(path)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(beside).replace(target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one step.

    Args:
        path: where to; its folder must exist.
        content: the bytes.

    Raises:
        OSError: if the folder is missing or refuses.
    """
    with written_whole(path) as stream:
        stream.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain data as JSON, in one step.

    Args:
        path: where to; its folder must exist.
        value: dictionaries, lists, strings and numbers; nan and inf become the strings "nan", "inf" and
            "-inf" (`float` reads them), because JSON has none.

    Raises:
        OSError: if the folder is missing or refuses.
    """
    write_bytes(path, (to_json(value) + "\n").encode())


def to_json(value: Any) -> str:
    """JSON text of plain data; see `write_json`.

    Args:
        value: dictionaries, lists, strings and numbers.
    """
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
