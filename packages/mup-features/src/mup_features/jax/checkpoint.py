"""States of the limit as npz files: written atomically, read without pickle, continued bit for bit."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mup_features._files import written_whole

from .limit_run import POPULATION, LimitState, Run, blocks_of
from .run_plan import Data

FORMAT = 2

__all__ = ["load_state", "save_state"]


def save_state(path: str | Path, run: Run, state: LimitState, description: Mapping[str, Any]) -> None:
    """Write a state with its data.

    Args:
        path: file to write, in a folder that exists.
        run: what the state belongs to.
        state: the state.
        description: settings of the run, which `load_state` compares; JSON.
    """
    records = state.merged()
    about = {
        "format": FORMAT,
        "settings": dict(description),
        "step": state.step,
        "prepared": bool(state.prepared),
        "started": bool(state.starts),
        "blocks": blocks_of(state),
        "recorded": state.recorded,
        "names": sorted(records),
        "record": sorted(run.record),
        "every": run.every,
    }
    data = (run.data.X, run.data.y, run.data.X_test)
    arrays = [records[name] for name in sorted(records)]
    leaves = jax.tree.leaves((data, arrays, state.replicas, state.prepared, state.starts))
    with written_whole(path) as stream:
        np.savez(
            stream,
            description=np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8),
            allow_pickle=False,
            **{f"leaf{number:05d}": np.asarray(leaf) for number, leaf in enumerate(leaves)},
        )


def load_state(
    path: str | Path,
    new_run: Callable[[Data, frozenset[str], int], Run],
    description: Mapping[str, Any],
    sharding: jax.sharding.Sharding | None,
) -> tuple[Run, LimitState]:
    """A saved state, and a run for its data.

    Args:
        path: file to read.
        new_run: makes a run of given data, names to record and number of steps between records.
        description: settings that the saved state must have.
        sharding: how populations lie on devices.

    Raises:
        ValueError: if the file is not a state of a run with these settings.
    """
    about, leaves = _read(path)
    for name, value in description.items():
        if about["settings"].get(name) != value:
            raise ValueError(
                f"path must hold a state with {name} = {value!r}, got {about['settings'].get(name)!r} "
                f"in {str(path)!r}"
            )
    names = about["names"]
    run = new_run(Data(*leaves[:3]), frozenset(about["record"]), about["every"])
    arrays = dict(zip(names, leaves[3 : 3 + len(names)], strict=True))
    kinds, structure = jax.tree.flatten(run.skeleton(about["blocks"], about["prepared"], about["started"]))
    rest = leaves[3 + len(names) :]
    if len(rest) != len(kinds):
        raise ValueError(f"path must hold {len(kinds)} arrays of state, got {len(rest)} in {str(path)!r}")
    placed = [_placed(kind, leaf, sharding) for kind, leaf in zip(kinds, rest, strict=True)]
    replicas, prepared, starts = jax.tree.unflatten(structure, placed)
    records = [
        [{name: arrays[name][replica, t] for name in names} for replica in range(len(replicas))]
        for t in range(len(about["recorded"]))
    ]
    return run, LimitState(about["step"], replicas, prepared, starts, about["recorded"], records)


def _read(path: str | Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["description"].tobytes())
            if about.get("format") == FORMAT:
                return about, [file[name] for name in sorted(file.files) if name.startswith("leaf")]
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"path must be a state saved by mup_features, got {str(path)!r}") from error
    raise ValueError(f"path must hold format {FORMAT}, got {about.get('format')!r} in {str(path)!r}")


def _placed(kind: Any, leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> Any:
    """A leaf as it was before: columns over the population as these lie, a small array, or a number."""
    if kind is POPULATION:
        return jax.device_put(leaf, sharding)
    return leaf if isinstance(kind, np.ndarray) else type(kind)(leaf)
