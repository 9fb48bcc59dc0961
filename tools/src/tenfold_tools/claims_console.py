"""What the claims command shows: progress while it runs, a table of verdicts at the end.

On a terminal progress is a bar per package and one per loop inside the claim; elsewhere it is a line per
event, so that a log stays readable. The table cuts nothing off: long text wraps, also when it is piped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tenfold_tools.claims import Verdict

T = TypeVar("T")

PIPED_WIDTH = 110
"""Columns of a table that goes to a file or pipe, unless the variable COLUMNS says otherwise."""

QUIET_SECONDS = 10.0
"""Time between two lines about the same loop where there is no terminal."""

_STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.NOT_RUN: "cyan",
    Verdict.ERROR: "bold magenta",
}


def make_console() -> Console:
    """A console on standard output that prints text as it is: no markup, no colour guessed from content."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def verdict_table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """One row per claim: id, verdict, whether it is required, seconds, and the sentence with what decided."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, expand=True)
    for heading, width in (("claim", 5), ("verdict", 12), ("required", 8), ("seconds", 7)):
        table.add_column(heading, overflow="fold", min_width=width)
    table.add_column("what it says, and what was measured", overflow="fold", ratio=1)
    for record in records:
        verdict = Verdict(record["verdict"])
        table.add_row(
            Text(record["id"]),
            Text(verdict, style=_STYLES[verdict]),
            Text("yes" if record["required"] else "no"),
            Text(f"{record['seconds']:.1f}", justify="right"),
            _explanation(record),
        )
    return table


def _explanation(record: Mapping[str, Any]) -> Text:
    text = Text(record["sentence"])
    for criterion in record["criteria"]:
        text.append(f"\n{criterion['verdict']}: {criterion['text']}", style="dim")
    if record["reason"]:
        text.append(f"\n{record['reason']}", style="dim")
    return text


class ClaimsProgress(Protocol):
    """Shows how far the claims of one package are; used as a context manager around them."""

    def __enter__(self) -> ClaimsProgress: ...
    def __exit__(self, *exception: object) -> None: ...

    def begin(self, claim: str) -> None:
        """A claim starts."""

    def skip(self) -> None:
        """A claim need not run, because its stored result is reused."""

    def end(self, record: Mapping[str, Any]) -> None:
        """A claim has ended with this record."""

    def track(self, iterable: Iterable[T], description: str) -> Iterator[T]:
        """Iterates over a loop inside a claim."""
        ...


def progress_for(console: Console, package: str, claims: int) -> ClaimsProgress:
    """Bars on a terminal, lines elsewhere.

    Args:
        console: where to show it.
        package: the distribution.
        claims: how many claims are going to begin or be skipped.
    """
    kind = _Bars if console.is_terminal else _Lines
    return kind(console, package, claims)


class _Bars:
    def __init__(self, console: Console, package: str, claims: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.console = console
        self.package = package
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task(package, total=claims)

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def begin(self, claim: str) -> None:
        self.progress.update(self.task, description=f"{self.package} {claim}")

    def skip(self) -> None:
        self.progress.advance(self.task)

    def end(self, record: Mapping[str, Any]) -> None:
        self.progress.advance(self.task)
        self.console.print(_outcome(self.package, record))

    def track(self, iterable: Iterable[T], description: str) -> Iterator[T]:
        total = len(iterable) if isinstance(iterable, Sized) else None
        task = self.progress.add_task(f"  {description}", total=total)
        try:
            for item in iterable:
                yield item
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)


class _Lines:
    def __init__(self, console: Console, package: str, claims: int) -> None:
        self.console = console
        self.package = package
        self.claims = claims
        self.number = 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin(self, claim: str) -> None:
        self.number += 1
        self.console.print(f"{self.package} {claim} ({self.number} of {self.claims}) ...")

    def skip(self) -> None:
        self.number += 1

    def end(self, record: Mapping[str, Any]) -> None:
        self.console.print(_outcome(self.package, record))

    def track(self, iterable: Iterable[T], description: str) -> Iterator[T]:
        total = f" of {len(iterable)}" if isinstance(iterable, Sized) else ""
        said = time.monotonic()
        for count, item in enumerate(iterable, start=1):
            yield item
            if time.monotonic() - said > QUIET_SECONDS:
                self.console.print(f"  {description}: {count}{total}")
                said = time.monotonic()


def _outcome(package: str, record: Mapping[str, Any]) -> Text:
    verdict = Verdict(record["verdict"])
    return Text.assemble(
        f"{package} {record['id']}: ", (str(verdict), _STYLES[verdict]), f" in {record['seconds']:.1f} s"
    )
