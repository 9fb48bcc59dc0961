"""Releases of one package: do tag, version and changelog agree, and does what was built work on its own?

    python -m tenfold_tools.release check PACKAGE_OR_TAG [--tag TAG]
    python -m tenfold_tools.release build PACKAGE [--output dist]
    python -m tenfold_tools.release test PACKAGE [--dist dist] [--python 3.12]
    python -m tenfold_tools.release notes PACKAGE
    python -m tenfold_tools.release rehearse PACKAGE [--tag TAG] [--output DIR]

A tag reads `<distribution>-v<version>`. pyproject.toml states the version; the tag, `__version__` and the
topmost released entry of CHANGELOG.md (Keep a Changelog: `## [1.2.0] - 2026-01-31`) must repeat it. `build`
makes the sdist, the wheel from the sdist, looks inside both (see `artefacts`) and imports the wheel in an
empty environment before anything reaches the output folder. `test` runs the package's tests against a built
wheel. Nothing here uploads.

Exit status: 2 for bad input or a disagreement (one line each, nothing written), 1 where a step fails.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from packaging.version import InvalidVersion, Version

from tenfold_tools import artefacts, workspace

_TAG = re.compile(r"(?P<distribution>.+)-v(?P<version>\d.*)")
_HEADING = re.compile(r"## \[?(?P<version>[^\]\s]+)\]?(?: - (?P<date>\S+))?(?:\s.*)?")


class StepFailed(RuntimeError):  # noqa: N818 - says what happened, as KeyboardInterrupt does
    """A step of the release did not succeed; the message says why, on one or more lines."""


@dataclass(frozen=True)
class Entry:
    """One released version in a changelog: version and date as written, and the text below the heading."""

    version: str
    date: str
    body: str


def tag_of(package: workspace.Package) -> str:
    """The git tag that releases this version of the package."""
    return f"{package.distribution}-v{package.version}"


def split_tag(tag: str) -> tuple[str, str]:
    """Distribution and version of a tag.

    Raises:
        ValueError: if the tag does not read <distribution>-v<version>.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(f"tag must read <distribution>-vX.Y.Z, got {tag!r}")
    return match["distribution"], match["version"]


def changelog(text: str) -> list[Entry]:
    """The released entries of a changelog, in its order; `Unreleased` and link definitions are left out."""
    entries = []
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        heading, _, below = section.partition("\n")
        match = _HEADING.fullmatch(heading.rstrip())
        if match is None or match["version"].lower() == "unreleased":
            continue
        body = re.sub(r"^\[[^\]]+\]:.*\n?", "", below, flags=re.MULTILINE).strip()
        entries.append(Entry(match["version"], match["date"] or "", body))
    return entries


def disagreements(
    package: workspace.Package, *, tag: str | None = None, today: datetime.date | None = None
) -> list[str]:
    """What keeps this package from being released, one line each; empty where all agrees.

    Args:
        package: the package; its pyproject.toml states the version that the others must repeat.
        tag: the git tag, `<distribution>-v<version>`; default the one that the version asks for.
        today: the last day that a changelog may name; default the latest date on earth now (UTC+14).
    """
    furthest_east = datetime.timezone(datetime.timedelta(hours=14))
    return [
        *_version_problems(package.version),
        *_tag_problems(tag_of(package) if tag is None else tag, package),
        *_source_problems(package),
        *_changelog_problems(package, today or datetime.datetime.now(furthest_east).date()),
    ]


def build(package: workspace.Package, output: Path, root: Path) -> tuple[Path, Path]:
    """The package's sdist and wheel, inspected and imported, in the output folder.

    The folder afterwards holds exactly these two of the package; artefacts of its other versions are removed,
    so that an upload of the folder cannot publish them again.

    Args:
        package: what to build.
        output: where to; created where it is missing.
        root: the workspace's root, which no artefact may mention.

    Returns:
        Paths of the sdist and the wheel.

    Raises:
        ValueError: if output is a file.
        StepFailed: if the build, the inspection or the import fails; then the folder is as it was.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    with tempfile.TemporaryDirectory(prefix="tenfold-build-") as scratch:
        _run(["uv", "build", "--python", sys.executable, "--out-dir", scratch, str(package.path)], cwd=root)
        try:
            sdist, wheel = artefacts.find(package, Path(scratch))
        except ValueError as error:
            raise StepFailed(f"uv build made other files: {error}") from None
        machine = (str(root), str(Path.home()), scratch)
        problems = artefacts.inspect(package, sdist, wheel, forbidden=machine)
        if problems:
            raise StepFailed("\n".join(problems))
        smoke(package, wheel)
        output.mkdir(parents=True, exist_ok=True)
        placed = (_place(sdist, output), _place(wheel, output))
    for pattern in (f"{package.import_name}-*.tar.gz", f"{package.import_name}-*.whl"):
        for stale in set(output.glob(pattern)) - set(placed):
            stale.unlink()
    return placed


def smoke(package: workspace.Package, wheel: Path) -> None:
    """Install the wheel and its hard dependencies alone in an empty environment and import it there.

    Raises:
        StepFailed: if it does not install, does not import, or imports with another version.
    """
    code = (
        f"import importlib.metadata, {package.import_name} as package;"
        f"print(importlib.metadata.version({package.distribution!r}), package.__version__)"
    )
    with tempfile.TemporaryDirectory(prefix="tenfold-smoke-") as scratch:
        python = _environment(Path(scratch), sys.executable)
        _run(["uv", "pip", "install", "--python", python, str(wheel)], cwd=Path(scratch))
        # Isolated mode: neither the checkout nor PYTHONPATH may lend what the wheel lacks.
        versions = _run([python, "-I", "-c", code], cwd=Path(scratch)).split()
    if versions != [package.version] * 2:
        raise StepFailed(f"{wheel.name}: metadata and __version__ say {versions}, not {package.version}")


def run_tests(package: workspace.Package, wheel: Path, python: str, root: Path) -> None:
    """Run the package's tests, the slow ones aside, against the wheel in a fresh environment, in plain sight.

    Args:
        package: whose tests.
        wheel: what they import.
        python: an interpreter or a version that uv finds.
        root: the workspace's root, where constraints.txt and the workshop are.

    Raises:
        StepFailed: if the environment cannot be made or a test fails.
    """
    extras = f"[{','.join(package.extras)}]" if package.extras else ""
    group = f"{package.path / 'pyproject.toml'}:test"
    with tempfile.TemporaryDirectory(prefix="tenfold-test-") as scratch:
        interpreter = _environment(Path(scratch), python)
        install = ["uv", "pip", "install", "--python", interpreter, "--constraints", "constraints.txt"]
        _run([*install, f"{wheel}{extras}", "--editable", workspace.TOOLS, "--group", group], cwd=root)
        pytest = [interpreter, "-m", "pytest", str(package.path / "tests"), "-m", "not slow"]
        if subprocess.run(pytest, cwd=root, check=False).returncode != 0:
            raise StepFailed(f"{wheel.name}: its tests fail on Python {python}")


# --- agreement ----------------------------------------------------------------------------------------------


def _version_problems(version: str) -> list[str]:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return [f"pyproject.toml: version {version!r} is no PEP 440 version"]
    if str(parsed) != version:
        return [f"pyproject.toml: version {version!r} is not in normal form, which is {str(parsed)!r}"]
    if parsed.local is not None:
        return [f"pyproject.toml: version {version!r} is a local version and cannot be published"]
    return []


def _tag_problems(tag: str, package: workspace.Package) -> list[str]:
    try:
        distribution, version = split_tag(tag)
    except ValueError as error:
        return [str(error)]
    problems = []
    if distribution != package.distribution:
        problems.append(f"tag {tag}: names {distribution}, the package is {package.distribution}")
    if version != package.version:
        problems.append(f"tag {tag}: says {version}, pyproject.toml says {package.version}")
    return problems


def _source_problems(package: workspace.Package) -> list[str]:
    place = f"src/{package.import_name}/__init__.py"
    try:
        tree = ast.parse((package.path / place).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return [f"{place}: cannot be read: {error}"]
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__version__")], value=ast.Constant(value=found)):
                if found == package.version:
                    return []
                return [f"{place}: __version__ says {found}, pyproject.toml says {package.version}"]
    return [f'{place}: must hold the line __version__ = "{package.version}"']


def _changelog_problems(package: workspace.Package, latest: datetime.date) -> list[str]:
    entries = _entries(package)
    if not entries:
        return [f"CHANGELOG.md: must hold an entry '## [{package.version}] - YYYY-MM-DD'"]
    top = entries[0]
    problems = []
    if top.version != package.version:
        problems.append(f"CHANGELOG.md: topmost is {top.version}, pyproject.toml says {package.version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", top.date):
        problems.append(f"CHANGELOG.md: {top.version} must be dated YYYY-MM-DD, got {top.date!r}")
    else:
        problems += _date_problems(top, latest)
    if not re.search(r"^(?!#).*\w", top.body, flags=re.MULTILINE):
        problems.append(f"CHANGELOG.md: {top.version} says nothing about what changed")
    return problems


def _date_problems(entry: Entry, latest: datetime.date) -> list[str]:
    try:
        date = datetime.date.fromisoformat(entry.date)
    except ValueError:
        return [f"CHANGELOG.md: {entry.version} is dated {entry.date}, which is no day"]
    if date > latest:
        return [f"CHANGELOG.md: {entry.version} is dated {entry.date}, which lies in the future"]
    return []


def _entries(package: workspace.Package) -> list[Entry]:
    path = package.path / "CHANGELOG.md"
    return changelog(path.read_text(encoding="utf-8")) if path.is_file() else []


# --- files and processes ------------------------------------------------------------------------------------


def _place(file: Path, output: Path) -> Path:
    """Copy a file into the output folder so that it is there whole or not at all."""
    beside = output / f".{file.name}.tmp"
    shutil.copyfile(file, beside)
    return beside.replace(output / file.name)


def _environment(folder: Path, python: str) -> str:
    """A new empty virtual environment below folder; returns its interpreter."""
    _run(["uv", "venv", "--quiet", "--python", python, str(folder / "env")], cwd=folder)
    return str(folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def _run(command: Sequence[str], *, cwd: Path) -> str:
    """Standard output of a command; where it fails, StepFailed with what it printed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StepFailed(f"{command[0]} is not on the PATH") from None
    if done.returncode != 0:
        raise StepFailed(f"{' '.join(command[:3])} failed:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout


# --- command line -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return _dispatch(options, workspace.root() if root is None else root.resolve())
    except ValueError as error:
        return _complain([str(error)], 2)
    except StepFailed as error:
        return _complain([str(error)], 1)


def _dispatch(options: argparse.Namespace, root: Path) -> int:
    tag = getattr(options, "tag", None)
    if options.command == "check" and _TAG.fullmatch(options.package):
        tag, options.package = tag or options.package, split_tag(options.package)[0]
    package = workspace.find(options.package, root)
    if options.command in ("check", "notes", "rehearse"):
        problems = disagreements(package, tag=tag)
        if problems:
            return _complain(problems, 2)
    match options.command:
        case "check":
            _say(f"{tag_of(package)}: tag, version, __version__ and changelog agree")
        case "build":
            _build_aloud(package, options.output, root)
        case "test":
            run_tests(package, artefacts.find(package, options.dist.resolve())[1], options.python, root)
        case "notes":
            _say(_entries(package)[0].body)
        case "rehearse":
            _rehearse(package, options.output, root)
    return 0


def _rehearse(package: workspace.Package, output: Path | None, root: Path) -> None:
    """All steps of a release up to the upload, then what the real one would do."""
    _say(f"check: {tag_of(package)}: tag, version, __version__ and changelog agree")
    with tempfile.TemporaryDirectory(prefix="tenfold-rehearsal-") as scratch:
        _build_aloud(package, output or Path(scratch), root)
    _say(f"notes:\n\n{_entries(package)[0].body}\n")
    _say(
        f"Rehearsed, nothing uploaded. Pushing the tag {tag_of(package)} makes release.yml do the same,\n"
        "test the wheel, upload both files by trusted publishing and make the release page with these notes."
    )


def _build_aloud(package: workspace.Package, output: Path, root: Path) -> None:
    for path in build(package, output, root):
        _say(f"build: {path.name}, {path.stat().st_size:,} bytes, inspected and imported on its own")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(lines: Iterable[str], status: int) -> int:
    sys.stderr.writelines(f"release: {line}\n" for line in lines)
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"release: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="release", description="Check, build and rehearse the release of one package.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, package: str = "PACKAGE") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("package", metavar=package)
        return added

    check = command("check", "Do tag, version, __version__ and changelog agree?", "PACKAGE_OR_TAG")
    build_ = command("build", "Sdist and wheel, inspected and imported.")
    test = command("test", "The package's tests against a wheel that was built.")
    command("notes", "The changelog entry of this version.")
    rehearse = command("rehearse", "Everything up to the upload.")
    for each in (check, rehearse):
        each.add_argument("--tag", help="the git tag, <distribution>-vX.Y.Z")
    build_.add_argument("--output", type=Path, default=Path("dist"), help="folder (default: dist)")
    rehearse.add_argument("--output", type=Path, help="keep the artefacts in this folder (default: nowhere)")
    test.add_argument("--dist", type=Path, default=Path("dist"), help="where the wheel is (default: dist)")
    test.add_argument("--python", default=sys.executable, help="interpreter (default: this one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
