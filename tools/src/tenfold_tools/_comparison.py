"""The outcome of a side-by-side timing: rows with ratios, the circumstances, and how they are shown.

One table, three forms: a terminal (rich), RESULTS.md (markdown) and JSON with every sample.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tenfold_tools._memory import memory_method
from tenfold_tools.stats import Estimate

__all__ = ["Comparison", "Row", "environment", "write_json", "write_text"]

FRAMEWORKS = ("numpy", "torch", "triton", "jax", "optax", "flax")


@dataclass(frozen=True)
class Row:
    """What was measured of one alternative.

    Attributes:
        name: its name in the comparison.
        seconds: time of one call, one number per round.
        loops: calls per timing.
        ratio: time relative to the baseline, paired by round; None when either failed.
        peak_bytes: memory by which one call grew the process at most; None when not measurable.
        error: why there are no numbers; None when there are.
        extra: further columns, title -> text.
    """

    name: str
    seconds: tuple[float, ...] = ()
    loops: int = 0
    ratio: Estimate | None = None
    peak_bytes: int | None = None
    error: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds of one call; NaN when the alternative failed."""
        return statistics.median(self.seconds) if self.seconds else math.nan


@dataclass(frozen=True)
class Comparison:
    """Alternatives measured in one run, with the circumstances.

    Attributes:
        title: what was compared.
        baseline: the alternative whose time is 1.
        rows: the alternatives, in the order given.
        environment: date, device, versions, threads, load.
        absent: alternatives that should be here and could not be tried, each with the reason; no failures.
    """

    title: str
    baseline: str
    rows: tuple[Row, ...]
    environment: Mapping[str, Any]
    absent: Mapping[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The alternative of that name.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no alternative {name!r}, there are {[row.name for row in self.rows]}")

    def with_column(self, title: str, text: Callable[[Row], str]) -> Comparison:
        """The same comparison with one more column, computed from each row that has numbers."""
        rows = (
            row if row.error is not None else replace(row, extra={**row.extra, title: text(row)})
            for row in self.rows
        )
        return replace(self, rows=tuple(rows))

    def with_absent(self, absent: Mapping[str, str]) -> Comparison:
        """The same comparison that also names what is missing from it: alternative -> reason."""
        return replace(self, absent={**self.absent, **absent})

    def markdown(self) -> str:
        """A section for RESULTS.md: title, circumstances, table."""
        head, body = self._cells()
        lines = [f"### {self.title}", "", _circumstances(self.environment), ""]
        lines += [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in body]
        return "\n".join(lines) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Writes the table to a terminal."""
        head, body = self._cells()
        table = Table(title=escape(self.title), caption=_circumstances(self.environment))
        for position, title in enumerate(head):
            table.add_column(title, justify="right" if position else "left")
        for cells in body:
            table.add_row(*map(escape, cells))
        (console or Console()).print(table)

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON: infinite limits become None."""
        rows = []
        for row in self.rows:
            entry = asdict(row)
            entry["median"] = None if row.error else row.median
            if row.ratio is not None:
                entry["ratio"] = {key: _finite_or_none(value) for key, value in asdict(row.ratio).items()}
            rows.append(entry)
        return {
            "title": self.title,
            "baseline": self.baseline,
            "environment": dict(self.environment),
            "rows": rows,
            "absent": dict(self.absent),
        }

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        extra = list(dict.fromkeys(title for row in self.rows for title in row.extra))
        head = ["alternative", "median", f"ratio to {self.baseline}", "95 % interval", "peak memory", *extra]
        body = []
        for row in self.rows:
            if row.error is not None:
                body.append([row.name, f"failed: {row.error}", *[""] * (len(head) - 2)])
                continue
            ratio, interval = "", ""
            if row.ratio is not None:
                ratio = f"{row.ratio.value:.3f}"
                interval = "" if row.name == self.baseline else f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
            cells = [row.name, _duration(row.median), ratio, interval, _size(row.peak_bytes)]
            body.append([*cells, *(row.extra.get(title, "") for title in extra)])
        body += [[name, reason, *[""] * (len(head) - 2)] for name, reason in self.absent.items()]
        return head, body


def environment(device: str = "cpu") -> dict[str, Any]:
    """Circumstances of a measurement: date, device, cores, threads, versions of what is loaded, load.

    Nothing is imported for it, so a framework that is installed and not used is not named.
    """
    torch = sys.modules.get("torch")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if torch and device.startswith("cuda") else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in FRAMEWORKS if name in sys.modules},
        "memory": memory_method(device),
    }


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinities are refused, as they are no JSON."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _circumstances(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    memory = environment["memory"]
    return (
        f"{environment['date']}, {environment['device']}, {environment['cores']} cores, "
        f"{environment['threads']} threads, load {environment['load']}; "
        f"Python {environment['python']}, {versions}; "
        + (f"peak memory of one call: {memory}." if memory else "peak memory is not measurable here.")
    )


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def _size(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.1f} MiB"


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return str(getattr(sys.modules[name], "__version__", "unknown"))
