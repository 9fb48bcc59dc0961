"""The command `limit`: the infinite-width trajectory of a small data set, as a table or a file."""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from . import _files

# two samples in two dimensions, so that the command shows something without data
EXAMPLE = {"X": [[1.0, 0.5], [-0.3, 0.8]], "y": [1.0, -0.5]}


def limit(options: Any) -> Iterator[str]:
    """Lines to print.

    Args:
        options: of the command line.

    Raises:
        ValueError: for bad data or settings.
        ImportError: without jax.
    """
    X, y = _data(options.data)
    if options.output and Path(options.output).suffix not in (".npz", ".json"):
        raise ValueError(f"--output must end in .npz or .json, got {options.output!r}")
    try:
        import jax
    except ModuleNotFoundError as error:
        raise ImportError('limit needs jax: pip install "mup-features[jax]"', name="jax") from error
    with _float64():
        from .jax.limit import InfiniteWidthMLP

        model = InfiniteWidthMLP(
            depth=options.depth,
            activation=options.activation,
            input_dim=X.shape[1],
            output_dim=1 if y.ndim == 1 else y.shape[1],
            parametrization=options.parametrization,
            reduction=options.reduction,
            lr=options.lr,
            samples=options.samples,
            replicas=options.replicas,
            method=options.method,
            key=jax.random.key(options.seed),
        )
        trajectory = model.fit(X, y, options.steps, every=options.every)
    found = _measured(trajectory)
    if options.output:
        _write(Path(options.output), found)
        yield f"wrote {options.output}: {', '.join(found)}"
        return
    yield "| step | loss | its standard error | f of the first sample | its standard error |"
    yield "|---|---|---|---|---|"
    for t, step in enumerate(found["steps"]):
        numbers = (found["loss"][t], found["loss_stderr"][t], found["f"][t, 0, 0], found["f_stderr"][t, 0, 0])
        yield f"| {int(step)} | " + " | ".join(f"{number:.6g}" for number in numbers) + " |"


def _data(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    if path is None:
        return np.array(EXAMPLE["X"]), np.array(EXAMPLE["y"])
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name], np.float64) for name in ("X", "y")}
    except (KeyError, ValueError) as error:
        raise ValueError(f"--data must be an npz file with arrays X and y, got {path!r} ({error})") from None
    if found["X"].ndim != 2 or found["y"].ndim not in (1, 2):
        shapes = f"{found['X'].shape} and {found['y'].shape}"
        raise ValueError(f"--data must hold X of shape (n, d) and y of shape (n,) or (n, C), got {shapes}")
    return found["X"], found["y"]


def _measured(trajectory: Any) -> dict[str, np.ndarray]:
    """Means and standard errors of what was recorded."""
    found = {"steps": np.asarray(trajectory.steps)}
    for name in ("f", "loss", "K_pre", "K_post", "G", "change"):
        if name in trajectory.replicas:
            found[name] = np.asarray(trajectory.mean(name))
            found[f"{name}_stderr"] = np.asarray(trajectory.stderr(name))
    return found


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    if path.suffix == ".json":
        _files.write_json(path, {name: values.tolist() for name, values in found.items()})
        return
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **found)
    _files.write_bytes(path, buffer.getvalue())


def _float64() -> AbstractContextManager[Any]:
    """The limit needs float64; the block leaves the setting of whoever called as it was."""
    import jax

    if not hasattr(jax, "enable_x64"):  # jax < 0.8
        from jax import experimental

        return experimental.enable_x64(True)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.enable_x64(True)
