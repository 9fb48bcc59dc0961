"""The runs of a coordinate check, one for each width and seed, put together into a report.

Free of frameworks: how a model is trained for a few steps and measured after each comes in as a function.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from .coordinates import CoordReport, Record, check_grid

MODEL = "(model)"
Patterns = Literal["auto"] | Sequence[str]


class Measured(NamedTuple):
    """One model on one batch of inputs.

    Attributes:
        sizes: module -> size of its activations.
        changes: module -> size of their difference from those at step 0.
        outputs: modules whose activation is the model's output.
    """

    sizes: dict[str, float]
    changes: dict[str, float]
    outputs: tuple[str, ...]


def collect(
    run: Callable[[int, int], Sequence[Measured]],
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    record: Record,
    *,
    progress: bool,
) -> CoordReport:
    """Run every width and seed.

    Args:
        run: of a width and a seed; measures after 0, 1, .., `steps` updates.
        widths: at least two, increasing.
        seeds: distinct.
        steps: updates, >= 1.
        record: what "size" means.
        progress: whether to show a bar; only in a terminal.

    Raises:
        ValueError: for a bad grid or steps < 1, or if models of different widths have different modules.
    """
    check_grid(widths, seeds, record)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}")
    found: list[Sequence[Measured]] = []
    grid = [(width, seed) for width in widths for seed in seeds]
    for width, seed in tqdm(grid, unit="run", disable=None if progress else True, leave=False):
        found.append(run(width, seed))
        if set(found[-1][0].sizes) != set(found[0][0].sizes):
            odd = ", ".join(sorted(set(found[-1][0].sizes) ^ set(found[0][0].sizes)))
            raise ValueError(f"model_fn must give the same modules at every width, {odd} differ at {width}")
    names, outputs = tuple(found[0][0].sizes), found[0][0].outputs
    shape = (len(widths), len(seeds), steps + 1, len(names))
    arrays = [
        np.array([getattr(one, field)[name] for measured in found for one in measured for name in names])
        for field in ("sizes", "changes")
    ]
    sizes, changes = (values.reshape(shape) for values in arrays)
    return CoordReport(tuple(widths), tuple(seeds), names, outputs, sizes, changes, record)


def chosen(names: Sequence[str], automatic: Sequence[str], modules: Patterns) -> list[str]:
    """Names of the modules to record.

    Args:
        names: all modules of the model.
        automatic: those that "auto" means.
        modules: "auto", or patterns in which * stands for anything.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    if modules == "auto":
        return list(automatic)
    patterns = [modules] if isinstance(modules, str) else list(modules)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"modules: pattern {pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
