"""The members of the workspace, and which of them a change can break.

A *package* lives in `packages/<distribution>/` and is published. The *workshop* lives in `tools/`, is never
published, and is tested like a package; both are *members*. Everywhere (nox sessions, CI rows, messages) a
member is called by the name of its folder, `Package.name`: the distribution for a package, `tools` for the
workshop.

Only the standard library and `packaging` are imported here, because noxfile.py imports this file before any
environment exists.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

PYTHONS = ("3.11", "3.12", "3.13")
"""The interpreters that CI knows; a package supports those that its requires-python admits."""

TOOLS = "tools"
"""The workshop's name in nox sessions and CI rows."""

_PROSE = frozenset({".md", ".png", ".svg", ".jpg", ".webp"})


class UnknownPackage(ValueError):  # noqa: N818 - says what is wrong, as KeyError does
    """A name that is no package of this workspace; the message lists the accepted ones on one line."""


@dataclass(frozen=True)
class Package:
    """One member of the workspace, as its pyproject.toml describes it.

    Attributes:
        distribution: the name on the package index, `mars-optim`.
        import_name: the folder below src/, `mars_optim`.
        path: the member's folder, absolute.
        version: as written in pyproject.toml.
        extras: names of the optional dependencies, sorted.
        requires_python: the specifier, `>=3.11`; empty where none is given.
        pythons: the entries of PYTHONS that requires_python admits, ascending.
    """

    distribution: str
    import_name: str
    path: Path
    version: str
    extras: tuple[str, ...]
    requires_python: str
    pythons: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name: the distribution of a package, `tools` for the workshop."""
        return self.path.name


def root(start: Path | None = None) -> Path:
    """The workspace's root: the nearest folder whose pyproject.toml has a [tool.uv.workspace] table.

    Args:
        start: a folder or file inside the workspace; default the current directory.

    Raises:
        ValueError: if no folder from start upwards is a workspace root.
    """
    origin = (Path.cwd() if start is None else Path(start)).resolve()
    for folder in (origin, *origin.parents):
        manifest = folder / "pyproject.toml"
        if manifest.is_file() and "workspace" in _read_toml(manifest).get("tool", {}).get("uv", {}):
            return folder
    raise ValueError(
        f"start must lie in a workspace (a pyproject.toml with [tool.uv.workspace]), got {origin}"
    )


def packages(root: Path | None = None) -> list[Package]:
    """The published packages, sorted by distribution.

    Args:
        root: the workspace's root; default the one around the current directory.

    Raises:
        ValueError: if a pyproject.toml is broken or disagrees with its folder's name.
    """
    manifests = sorted(_root(root).glob("packages/*/pyproject.toml"))
    members = [_read_package(manifest) for manifest in manifests]
    for member in members:
        if member.name != member.distribution:
            raise ValueError(
                f"{member.path / 'pyproject.toml'}: project.name must equal its folder's name "
                f"{member.name!r}, got {member.distribution!r}"
            )
    return members


def members(root: Path | None = None) -> list[Package]:
    """The packages and, last, the workshop where the workspace has one: everything that has tests.

    Args:
        root: the workspace's root; default the one around the current directory.

    Raises:
        ValueError: if a pyproject.toml is broken or disagrees with its folder's name.
    """
    top = _root(root)
    manifest = top / TOOLS / "pyproject.toml"
    workshop = [_read_package(manifest)] if manifest.is_file() else []
    return [*packages(top), *workshop]


def find(name: str, root: Path | None = None) -> Package:
    """The package of this name; the workshop is no package.

    Args:
        name: a distribution, in any spelling that the package index takes for the same (`Mars_Optim`).
        root: the workspace's root; default the one around the current directory.

    Raises:
        UnknownPackage: if there is none; the message suggests the nearest and lists all.
    """
    known = {package.distribution: package for package in packages(root)}
    wanted = _normalized(name)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UnknownPackage(f"unknown package {name!r}{hint}; accepted: {', '.join(known) or 'none yet'}")


def folder(name: str, root: Path | None = None) -> Path:
    """The folder of a member: of a package by any spelling of its name, of the workshop by `tools`.

    Args:
        name: a distribution or `tools`.
        root: the workspace's root; default the one around the current directory.

    Raises:
        UnknownPackage: if there is no such member.
    """
    return _root(root) / TOOLS if name == TOOLS else find(name, root).path


def extras(folder: Path) -> tuple[str, ...]:
    """Names of a member's optional dependencies, sorted.

    Args:
        folder: the member's folder, as `folder` gives it.

    Raises:
        ValueError: if its pyproject.toml is broken.
    """
    return _read_package(Path(folder) / "pyproject.toml").extras


def changed_files(since: str, root: Path | None = None) -> list[str]:
    """Files that differ from the point where HEAD left `since`: committed, uncommitted and untracked.

    A renamed file counts under both names, because both places changed.

    Args:
        since: any git revision.
        root: the workspace's root; default the one around the current directory.

    Returns:
        Paths relative to root with forward slashes, sorted.

    Raises:
        ValueError: if this is no git repository, the revision is unknown, or it shares no history with HEAD.
    """
    top = _root(root)
    commit = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{since}^{{commit}}")
    if commit is None:
        if _git(top, "rev-parse", "--git-dir") is None:
            raise ValueError(f"root must be a git repository, got {top}")
        raise ValueError(f"since must be a git revision of this repository, got {since!r}")
    base = _git(top, "merge-base", commit.strip(), "HEAD")
    if base is None:
        raise ValueError(f"since must share history with HEAD (is the clone shallow?), got {since!r}")
    tracked = _git(top, "diff", "--name-only", "--no-renames", "--relative", "-z", base.strip()) or ""
    untracked = _git(top, "ls-files", "--others", "--exclude-standard", "-z") or ""
    return sorted({name for name in (tracked + untracked).split("\0") if name})


def affected(files: list[str], root: Path | None = None) -> list[Package]:
    """The members that a change of these files can break.

    Packages do not import one another, so a file below packages/X/ breaks X alone. Prose and pictures outside
    packages/ and tools/ and the root's LICENSE (each package carries its own) break nothing. Any other file
    is shared: the workshop, root configuration, CI, and .gitignore, which hatchling obeys when it builds.
    A shared file breaks every member, the workshop included.

    Args:
        files: paths relative to root with forward slashes, as `changed_files` gives them.
        root: the workspace's root; default the one around the current directory.
    """
    everyone = members(root)
    owners = {_owner(name) for name in files}
    if None in owners:
        return everyone
    return [member for member in everyone if member.name in owners]


def _owner(file: str) -> str | None:
    """The package that alone owns the file, "" for a file that breaks nothing, None for a shared one."""
    top, *below = file.split("/")
    if top == "packages" and len(below) > 1:
        return below[0]
    if top not in ("packages", TOOLS) and (PurePosixPath(file).suffix in _PROSE or file == "LICENSE"):
        return ""
    return None


def _root(given: Path | None) -> Path:
    return root() if given is None else Path(given).resolve()


def _read_package(manifest: Path) -> Package:
    project = _read_toml(manifest).get("project", {})
    for field in ("name", "version"):
        if not isinstance(project.get(field), str):
            raise ValueError(f"{manifest}: project.{field} must be a string, got {project.get(field)!r}")
    requires = project.get("requires-python", "")
    try:
        admitted = SpecifierSet(requires)
    except InvalidSpecifier:
        raise ValueError(f"{manifest}: requires-python must be a specifier, got {requires!r}") from None
    distribution = _normalized(project["name"])
    return Package(
        distribution=distribution,
        import_name=distribution.replace("-", "_"),
        path=manifest.parent,
        version=project["version"],
        extras=tuple(sorted(project.get("optional-dependencies", {}))),
        requires_python=requires,
        # A bare "3.11" would read as 3.11.0 and fail ">=3.11.4", which a later 3.11 satisfies.
        pythons=tuple(python for python in PYTHONS if admitted.contains(f"{python}.99")),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be valid TOML: {error}") from error


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _git(folder: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None where it fails."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
