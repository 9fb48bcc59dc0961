"""The CI matrix: which nox session runs for which member on which Python, as JSON for GitHub's `fromJSON`.

    python -m tenfold_tools.matrix [--since REVISION | --all] [--runner cpu|gpu] [--slow]

Standard output is one line, `{"include":[...]}` with one object per row: package, python, session, arguments,
runner. A terminal also gets a table on standard error. A workflow runs a row with

    uv run --python "$PYTHON" noxfile.py -s "$SESSION" -- $ARGUMENTS

Rows on CPU: `tests` on every Python that the package supports, `lowest` and `types` on its oldest, `build` on
its newest. The workshop, named `tools`, is tested and type-checked but has no lower bounds to promise and no
wheel to build. Rows on GPU: the same `tests`, which there include those marked gpu, and one `gpu` row per
package. With --slow the `tests` rows run the tests marked slow as well. `lint` looks at the whole checkout
and is one job outside the matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tenfold_tools import workspace

RUNNERS = ("cpu", "gpu")
"""Kinds of machine; a workflow maps them to its runner labels."""

_EVERY_TEST = "-m not(slow)or(slow)"
# Overrides the marker that `nox -s tests` adds; without blanks, because a workflow splits arguments at them.


@dataclass(frozen=True)
class Row:
    """One CI job.

    Attributes:
        package: the member's name; `tools` for the workshop.
        python: the interpreter that runs nox, and the session unless the session names another.
        session: the nox session.
        arguments: what follows `--`; empty for none.
        runner: one of RUNNERS.
    """

    package: str
    python: str
    session: str
    arguments: str
    runner: str


def rows(members: Iterable[workspace.Package], runner: str = "cpu", *, slow: bool = False) -> list[Row]:
    """All CI jobs of these members.

    Args:
        members: packages and, where it is to be tested, the workshop.
        runner: one of RUNNERS.
        slow: whether the tests rows run the tests marked slow as well.

    Raises:
        ValueError: if runner is unknown or a member supports no Python that CI knows.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner must be one of {', '.join(RUNNERS)}, got {runner!r}")
    return [row for member in members for row in _rows_of(member, runner, slow)]


def to_json(matrix: Sequence[Row]) -> str:
    """The matrix on one line, without spaces so that a workflow can compare it with `{"include":[]}`."""
    return json.dumps({"include": [asdict(row) for row in matrix]}, separators=(",", ":"))


def to_table(matrix: Sequence[Row]) -> str:
    """The matrix for reading, one job a line."""
    if not matrix:
        return "nothing that CI tests has changed"
    lines = [("PACKAGE", "PYTHON", "SESSION", "RUNNER")]
    lines += [
        (row.package, row.python, f"{row.session} {row.arguments}".strip(), row.runner) for row in matrix
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        top = workspace.root() if root is None else root
        chosen = workspace.members(top)
        if options.since is not None:
            chosen = workspace.affected(workspace.changed_files(options.since, top), top)
        matrix = rows(chosen, options.runner, slow=options.slow)
    except ValueError as error:
        sys.stderr.write(f"matrix: {error}\n")
        return 2
    sys.stdout.write(to_json(matrix) + "\n")
    if sys.stderr.isatty():
        sys.stderr.write(to_table(matrix) + "\n")
    return 0


def _rows_of(member: workspace.Package, runner: str, slow: bool) -> list[Row]:
    name, pythons = member.name, member.pythons
    if not pythons:
        known = ", ".join(workspace.PYTHONS)
        raise ValueError(f"{name}: requires-python must admit one of {known}, got {member.requires_python!r}")
    oldest, newest = pythons[0], pythons[-1]
    published = name != workspace.TOOLS

    def row(python: str, session: str, arguments: str = "") -> Row:
        return Row(name, python, session, arguments, runner)

    marker = _EVERY_TEST if slow else ""
    matrix = [row(python, f"tests-{python}({name})", marker) for python in pythons]
    if runner == "gpu":
        return [*matrix, row(newest, "gpu", name)] if published else matrix
    types = row(oldest, f"types({name})")
    if not published:
        return [*matrix, types]
    return [*matrix, row(oldest, f"lowest-{oldest}({name})"), types, row(newest, f"build({name})")]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"matrix: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="matrix", description="Print the CI matrix as JSON.", allow_abbrev=False)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--since", metavar="REVISION", help="only what a change since then can break")
    choice.add_argument("--all", action="store_true", help="every package and the workshop (the default)")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow as well")
    parser.add_argument("--runner", choices=RUNNERS, default="cpu", help="kind of machine (default: cpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
