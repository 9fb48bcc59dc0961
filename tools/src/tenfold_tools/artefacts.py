"""What the sdist and the wheel of a package may hold; `release` looks here before it hands them out.

A wheel holds the library alone: every file of src/<import_name>/, the licence and the metadata. An sdist
holds what is needed to build that wheel again and to test it. Neither mentions a folder of the machine it was
built on. The READMEs are Markdown, which an index cannot fail to render, so their presence is checked without
a renderer.
"""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tenfold_tools import workspace

_SDIST_FILES = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
_SDIST_FOLDERS = {"src", "tests"}
_NOT_LIBRARY = {"tests", "experiments", "benchmarks", "conftest.py", "__pycache__"}


def find(package: workspace.Package, folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of this version in a folder, by the names that the index wants.

    Args:
        package: what they were built from.
        folder: where to look, not below it.

    Raises:
        ValueError: if one is missing.
    """
    stem = f"{package.import_name}-{package.version}"
    found = (folder / f"{stem}.tar.gz", folder / f"{stem}-py3-none-any.whl")
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {' and '.join(missing)}")
    return found


def inspect(
    package: workspace.Package, sdist: Path, wheel: Path, *, forbidden: Iterable[str] = ()
) -> list[str]:
    """What is wrong with the artefacts, one line each; empty where they hold what they should.

    Args:
        package: what they were built from.
        sdist: the source archive.
        wheel: the wheel that was built from it.
        forbidden: folders of this machine that no file inside may mention.
    """
    stem = f"{package.import_name}-{package.version}"
    folders = list(forbidden)
    source = {name.removeprefix(f"{stem}/"): data for name, data in _read_sdist(sdist).items()}
    binary = _read_wheel(wheel)
    metadata = binary.get(f"{stem}.dist-info/METADATA", b"")
    in_sdist = _sdist_problems(package, set(source)) + _machine_paths(source, folders)
    in_wheel = [
        *_wheel_problems(package, set(binary), set(source)),
        *(f"METADATA: {line}" for line in _metadata_problems(package, metadata)),
        *_machine_paths(binary, folders),
    ]
    return [*(f"{sdist.name}: {line}" for line in in_sdist), *(f"{wheel.name}: {line}" for line in in_wheel)]


def _sdist_problems(package: workspace.Package, names: set[str]) -> list[str]:
    library = f"src/{package.import_name}"
    required = {f"{library}/__init__.py", f"{library}/py.typed", "CHANGELOG.md", "LICENSE", "README.md"}
    problems = [f"lacks {name}" for name in sorted(required - names)]
    if not any(name.startswith("tests/") for name in names):
        problems.append("lacks tests/")
    strangers = {name for name in names - _SDIST_FILES if name.split("/")[0] not in _SDIST_FOLDERS}
    strangers |= {name for name in names if name.startswith("src/") and not name.startswith(f"{library}/")}
    return problems + [f"holds {name}, which is not part of the package" for name in sorted(strangers)]


def _wheel_problems(package: workspace.Package, names: set[str], sdist_names: set[str]) -> list[str]:
    info = f"{package.import_name}-{package.version}.dist-info/"
    library = {name for name in names if name.startswith(f"{package.import_name}/")}
    sources = {name.removeprefix("src/") for name in sdist_names if name.startswith("src/")}
    missing = (sources - library) | ({f"{info}licenses/LICENSE"} - names)
    strangers = {name for name in names - sources if not name.startswith(info)}
    strangers |= {name for name in library if _NOT_LIBRARY.intersection(name.split("/"))}
    problems = [f"lacks {name}" for name in sorted(missing)]
    return problems + [f"holds {name}, which is not part of the library" for name in sorted(strangers)]


def _metadata_problems(package: workspace.Package, text: bytes) -> list[str]:
    fields = email.message_from_bytes(text)
    facts = [
        ("Name", fields["Name"], package.distribution),
        ("Version", fields["Version"], package.version),
        ("Provides-Extra", sorted(fields.get_all("Provides-Extra", [])), list(package.extras)),
        ("Description-Content-Type", fields["Description-Content-Type"], "text/markdown"),
    ]
    problems = [f"{key} is {found!r}, not {wanted!r}" for key, found, wanted in facts if found != wanted]
    # The build backend orders and spaces the clauses its own way, so the sets are compared and not the text.
    if SpecifierSet(fields["Requires-Python"] or "") != SpecifierSet(package.requires_python):
        problems.append(f"Requires-Python is {fields['Requires-Python']!r}, not {package.requires_python!r}")
    problems += [f"lacks {key}" for key in ("Summary", "License-Expression") if not fields[key]]
    if not str(fields.get_payload()).strip():
        problems.append("the description (README.md) is empty")
    requirements = fields.get_all("Requires-Dist", [])
    return problems + [f"requires a place and not a version: {line}" for line in requirements if "@" in line]


def _machine_paths(files: dict[str, bytes], folders: Iterable[str]) -> list[str]:
    """Files that mention one of these folders as an absolute path; a part of a longer path is no match."""
    problems = []
    for folder in folders:
        mention = re.compile(rb"(?<![\w./~-])" + re.escape(folder.encode()) + rb"(?![\w.-])")
        hits = sorted(name for name, data in files.items() if mention.search(data))
        problems += [f"{name} mentions {folder}, a folder of this machine" for name in hits]
    return problems


def _read_sdist(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        return {member.name: stream.read() for member, stream in members if stream is not None}


def _read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
