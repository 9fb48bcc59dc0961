"""Where the experiments run, and how their numbers get intervals.

A claim has one seed: the key of all its simulations. Chance is over the runs that `simulate` vectorises, each
with a hidden theta and noise of its own; intervals are over these runs. Everything is in float64, so that no
verdict hangs on rounding. A GPU, or several through a mesh, is used where the harness was given one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from linbandit_lowerbounds.environment import Adversary, Algorithm, Instance
from linbandit_lowerbounds.intervals import mean_interval, wilson_interval
from linbandit_lowerbounds.results import Result
from linbandit_lowerbounds.simulate import simulate
from tenfold_tools.claims import NotRun, Number, Run

VERDICT, SELECTION = 0, 1
"""Streams of a claim's key: what is chosen (a gap, a learner) is chosen on runs that the verdict ignores."""


@dataclass(frozen=True)
class Stage:
    """The place of a claim's simulations: its key, and the devices that share their runs."""

    scale: str
    seed: int
    devices: tuple[Any, ...]

    def key(self, stream: int = VERDICT) -> jax.Array:
        """The claim's key, or that of the runs that select."""
        return jax.random.fold_in(jax.random.key(self.seed), stream)

    def generator(self) -> np.random.Generator:
        """Source of sequences and bootstrap resamples."""
        return np.random.default_rng(self.seed)

    def play(
        self,
        algorithm: Algorithm,
        instance: Instance,
        adversary: Adversary | None = None,
        *,
        runs: int,
        stream: int = VERDICT,
        **options: Any,
    ) -> Result:
        """Simulates `runs` runs, spread over the devices if their number allows it."""
        count = len(self.devices)
        sharding = None
        if count > 1 and runs % count == 0:
            sharding = NamedSharding(Mesh(np.array(self.devices), ("runs",)), PartitionSpec("runs"))
        return simulate(
            algorithm,
            instance,
            adversary,
            key=self.key(stream),
            n_seeds=runs,
            progress=False,
            sharding=sharding,
            **options,
        )


@contextmanager
def stage(run: Run) -> Iterator[Stage]:
    """Opens the stage: float64, and the device that the harness was given.

    Raises:
        NotRun: for the full scale on a CPU, or if jax does not see the GPU.
    """
    (seed,) = run.seeds
    if run.scale == "full" and run.device == "cpu":
        raise NotRun("10^9 rounds and more need a GPU: --scale full --device cuda")
    devices = _devices(run.device)
    place = jax.default_device(devices[0]) if devices else nullcontext()
    with float64(), place:
        yield Stage(run.scale, seed, devices)


def float64() -> Any:
    """Double precision inside a `with`; older versions of jax keep the switch in `jax.experimental`."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


def _devices(name: str) -> tuple[Any, ...]:
    if name == "cpu":
        return tuple(jax.devices("cpu")[:1])
    try:
        found = jax.devices("gpu")
    except RuntimeError as error:
        raise NotRun(f"jax has no GPU here ({error})") from error
    _, _, number = name.partition(":")
    return (found[int(number)],) if number else tuple(found)


# ---------------------------------------------------------------------------------------------- numbers


def mean(name: str, samples: Any, over: float = 1.0, **options: Any) -> Number:
    """Mean over runs with its 95 % t interval, divided by a positive number."""
    return Number(name, *mean_interval(np.asarray(samples), 0.95).over(float(over)), **options)


def frequency(name: str, hits: Any, **options: Any) -> Number:
    """Share of runs in which something happened, with Wilson's 95 % interval."""
    hits = np.asarray(hits, bool)
    value, low, high = wilson_interval(int(hits.sum()), hits.size, 0.95)
    # With none or all of the runs a limit is the value itself, up to rounding.
    return Number(name, value, min(low, value), max(high, value), **options)


def ratio(name: str, above: Any, below: Any) -> Number:
    """Mean of one set of runs over the mean of another, with a 95 % bootstrap interval over paired runs.

    Run s of both has the same theta, contexts and standardised noise.
    """
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    picks = np.random.default_rng(0).integers(0, top.size, (4000, top.size))
    resampled = top[picks].mean(1) / bottom[picks].mean(1)
    value = float(top.mean() / bottom.mean())
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Number(name, value, min(float(low), value), max(float(high), value))
