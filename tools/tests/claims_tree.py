"""A small workspace in a temporary folder, with packages whose claims the tests write as text."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

IMPORTS = """
from pathlib import Path
from tenfold_tools.claims import (
    SCALES, Figure, Measurement, NotRun, Number, Run, above, at_least, below, claim, not_above, within,
)
"""

PASSING = """
@claim("{id}", sentence="The sky is {id}.", source="Table 1")
def {function}(run):
    with Path("ran").open("a") as file:
        file.write("{id}\\n")
    return Measurement([Number("x", 1.0)], [below(Number("x", 1.0), 2)])
"""


def passing(*ids: str) -> str:
    """A claims.py whose claims pass and note in the file `ran` (current folder) that they ran."""
    return "\n".join(PASSING.format(id=id_, function=f"{id_}_{n}") for n, id_ in enumerate(ids))


def make_workspace(folder: Path) -> Path:
    """An empty workspace; returns its root."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["packages/*"]\n')
    return folder


def add_package(root: Path, name: str, claims: str | None, version: str = "0.1.0") -> Path:
    """A package with one source file and, unless None, this experiments/claims.py; returns its folder."""
    folder = root / "packages" / name
    source = folder / "src" / name.replace("-", "_")
    source.mkdir(parents=True, exist_ok=True)
    (source / "__init__.py").write_text('"""A package."""\n')
    set_version(folder, version)
    (folder / "README.md").write_text("A package.\n")
    if claims is not None:
        (folder / "experiments").mkdir(exist_ok=True)
        (folder / "experiments" / "claims.py").write_text(IMPORTS + dedent(claims))
    return folder


def set_version(folder: Path, version: str) -> None:
    """Writes the package's pyproject.toml."""
    text = f'[project]\nname = "{folder.name}"\nversion = "{version}"\nrequires-python = ">=3.11"\n'
    (folder / "pyproject.toml").write_text(text)


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The records in a report by id, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    document = json.loads(path.read_text(), parse_constant=refuse)
    return {record["id"]: record for record in document["claims"]}


def ran(root: Path) -> list[str]:
    """The ids of the `passing` claims that ran so far, in order."""
    path = root / "ran"
    return path.read_text().split() if path.exists() else []
