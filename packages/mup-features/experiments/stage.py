"""Where claims are computed: the accelerators that the full scale needs."""

from __future__ import annotations

from typing import Any

import jax

from tenfold_tools.claims import NotRun, Run


def require_gpu(run: Run, what: str) -> None:
    """Leaves a claim aside that would take days on a CPU.

    Raises:
        NotRun: if the run is on a CPU.
    """
    if run.device == "cpu":
        raise NotRun(f"{what}: needs a GPU, --scale full --device cuda")


def accelerators(at_least: int) -> list[Any]:
    """The jax devices that share a population.

    Raises:
        NotRun: if they are CPUs, or too few.
    """
    found = jax.devices()
    if found[0].platform == "cpu" or len(found) < at_least:
        raise NotRun(
            f"needs {at_least} accelerators that jax can use, found {len(found)} of kind {found[0].platform}"
        )
    return found
