"""Timing of alternatives side by side: A B C, B C A, C A B, ... in one process.

A machine drifts: clocks, caches, neighbours. Two separate runs compare two machines; interleaved rounds
compare two programs. So every round times each alternative once, in an order that rotates (no one is always
first or always after the same one), and the answer is the paired ratio to a named baseline within the rounds,
with its interval (`stats.paired_ratio`). Medians are given beside it for the scale.

Each timing repeats its call until it lasts `min_time`, with the garbage collector off. On CUDA it is taken by
events on the stream. An alternative that raises is reported with its error; the others go on.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold_tools._comparison import Comparison, Row, environment, write_json, write_text
from tenfold_tools._memory import peak_memory
from tenfold_tools.stats import paired_ratio

__all__ = ["Comparison", "Options", "Row", "compare", "environment", "main", "write_json"]

# Seconds of `count` calls of a function; the last value goes to sync.
Stopwatch = Callable[[Callable[[], Any], int, Callable[[Any], Any] | None], float]


def compare(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    title: str = "",
    repeats: int = 30,
    warmup: int = 3,
    min_time: float = 0.02,
    device: str = "cpu",
    setup: Callable[[], Any] | None = None,
    sync: Callable[[Any], Any] | None = None,
) -> Comparison:
    """Times alternatives interleaved in this process and relates each to a baseline.

    Args:
        alternatives: name -> call without arguments; its value is dropped (but see sync).
        baseline: name of the alternative whose time is 1.
        title: what is compared; by default the names.
        repeats: rounds, >= 3; at least 20 for a figure to be quoted.
        warmup: calls of each alternative before anything is timed, >= 1 (compilation, lazy state).
        min_time: seconds that one timing should last at least; short calls are looped.
        device: "cpu", or a CUDA device of torch, timed by events.
        setup: called before each timing, outside it.
        sync: called inside the timing with the last value, to wait for asynchronous work
            (`jax.block_until_ready`); CUDA devices of torch need none.

    Returns:
        The comparison. A failed alternative has a row with its error and no numbers.

    Raises:
        ValueError: if the baseline is not an alternative, or a number is out of range.
        RuntimeError: if device is a CUDA device and torch sees none.
    """
    _validate(alternatives, baseline, repeats, warmup, min_time)
    stopwatch = _cuda_stopwatch(device) if device.startswith("cuda") else _stopwatch
    circumstances = environment(device)
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    loops: dict[str, int] = {}
    peaks: dict[str, int | None] = {}

    def timing(name: str, count: int) -> float:
        if setup is not None:
            setup()
        return stopwatch(alternatives[name], count, sync)

    def once(name: str) -> None:
        value = alternatives[name]()
        if sync is not None:
            sync(value)

    for name in alternatives:
        with _recorded(name, errors):
            for _ in range(warmup):
                timing(name, 1)
            loops[name] = _calibrate(lambda count, name=name: timing(name, count), min_time)
            if setup is not None:
                setup()
            peaks[name] = peak_memory(lambda name=name: once(name), device)
    for order in _orders(list(alternatives), repeats):
        gc.collect()
        for name in order:
            if name not in errors:
                with _recorded(name, errors):
                    seconds[name].append(timing(name, loops[name]) / loops[name])

    rows = []
    for name in alternatives:
        if name in errors:
            rows.append(Row(name, error=errors[name]))
            continue
        ratio = None if baseline in errors else paired_ratio(seconds[name], seconds[baseline])
        rows.append(Row(name, tuple(seconds[name]), loops[name], ratio, peaks[name]))
    return Comparison(title or " / ".join(alternatives), baseline, tuple(rows), circumstances)


@dataclass(frozen=True)
class Options:
    """What the command line of a benchmark says; `compare` uses it.

    Attributes:
        repeats: rounds.
        warmup: calls before anything is timed.
        min_time: seconds of one timing.
        device: "cpu" or a CUDA device.
    """

    repeats: int = 30
    warmup: int = 3
    min_time: float = 0.02
    device: str = "cpu"

    def compare(
        self,
        alternatives: Mapping[str, Callable[[], Any]],
        *,
        baseline: str,
        title: str = "",
        setup: Callable[[], Any] | None = None,
        sync: Callable[[Any], Any] | None = None,
    ) -> Comparison:
        """The function `compare` of this module with these options."""
        return compare(alternatives, baseline=baseline, title=title, setup=setup, sync=sync, **asdict(self))


def main(
    measure: Callable[[str, Options], Comparison],
    *,
    workloads: Sequence[str],
    default: Sequence[str],
    description: str,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """Command line of a `benchmarks/bench_*.py`: measures workloads, prints tables, writes JSON and markdown.

    A benchmark is then a function of a workload's name, and `sys.exit(main(measure, ...))`. Results are
    written after each workload, so an interrupted run keeps what it has.

    Args:
        measure: (workload, options) -> comparison.
        workloads: names that `--set` accepts.
        default: names measured when `--set` is not given.
        description: what the benchmark measures.
        argv: arguments; those of the process by default.
        parents: parsers (made with add_help=False) of the benchmark's own options, which are accepted and
            shown by --help; the benchmark reads their values itself with `parse_known_args`.

    Returns:
        The exit status: 1 if an alternative failed, else 0. A wrong argument exits with 2 before measuring.
    """
    parser = argparse.ArgumentParser(description=description, parents=parents)
    parser.add_argument("--set", nargs="+", choices=workloads, default=list(default), help="what to measure")
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="rounds (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=Options.warmup, help="untimed calls before")
    parser.add_argument("--min-time", type=float, default=Options.min_time, help="seconds of one timing")
    parser.add_argument("--device", default=Options.device, help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--markdown", type=Path, help="file for the tables, as in RESULTS.md")
    arguments = parser.parse_args(argv)
    options = Options(arguments.repeats, arguments.warmup, arguments.min_time, arguments.device)
    comparisons: list[Comparison] = []
    for workload in arguments.set:
        comparisons.append(measure(workload, options))
        comparisons[-1].print()
        if arguments.json is not None:
            write_json(arguments.json, [comparison.as_dict() for comparison in comparisons])
        if arguments.markdown is not None:
            write_text(arguments.markdown, "\n".join(comparison.markdown() for comparison in comparisons))
    return int(any(row.error for comparison in comparisons for row in comparison.rows))


def _validate(
    alternatives: Mapping[str, Any], baseline: str, repeats: int, warmup: int, min_time: float
) -> None:
    if baseline not in alternatives:
        raise ValueError(f"baseline must be one of {list(alternatives)}, got {baseline!r}")
    if repeats < 3:
        raise ValueError(f"repeats must be >= 3 to give an interval, got {repeats!r}")
    if warmup < 1:
        raise ValueError(f"warmup must be >= 1, got {warmup!r}")
    if not 0 <= min_time < math.inf:
        raise ValueError(f"min_time must be finite and >= 0 seconds, got {min_time!r}")


def _orders(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    # Rotation puts each first equally often; turning every other cycle around changes who follows whom.
    for round_number in range(repeats):
        start = round_number % len(names)
        order = [*names[start:], *names[:start]]
        yield order[::-1] if round_number // len(names) % 2 else order


def _calibrate(timing: Callable[[int], float], min_time: float) -> int:
    # The estimate of a short timing is poor: grow by at most 10 at a time and look again.
    count = 1
    while (elapsed := timing(count)) < min_time:
        growth = min(10.0, 1.2 * min_time / max(elapsed, 1e-9))
        count = max(count + 1, math.ceil(count * growth))
    return count


def _stopwatch(function: Callable[[], Any], count: int, sync: Callable[[Any], Any] | None) -> float:
    value = None
    with _collector_off():
        start = time.perf_counter()
        for _ in range(count):
            value = function()
        if sync is not None:
            sync(value)
        return time.perf_counter() - start


def _cuda_stopwatch(device: str) -> Stopwatch:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device"
        )

    def stopwatch(function: Callable[[], Any], count: int, sync: Callable[[Any], Any] | None) -> float:
        value = None
        with _collector_off(), torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                value = function()
            if sync is not None:
                sync(value)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

    return stopwatch


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _recorded(name: str, errors: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
