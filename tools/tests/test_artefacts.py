"""What an sdist and a wheel may hold, on archives written by hand."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from tenfold_tools import artefacts, workspace

PACKAGE = workspace.Package(
    distribution="tiny-optim",
    import_name="tiny_optim",
    path=Path("packages/tiny-optim"),
    version="1.0.0",
    extras=("jax", "torch"),
    requires_python=">=3.11,<4",
    pythons=workspace.PYTHONS,
)
METADATA = """\
Metadata-Version: 2.4
Name: tiny-optim
Version: 1.0.0
Summary: Tiny.
License-Expression: Apache-2.0
Requires-Python: <4,>=3.11
Requires-Dist: numpy>=1.26
Provides-Extra: torch
Provides-Extra: jax
Description-Content-Type: text/markdown

# tiny-optim
"""
INFO = "tiny_optim-1.0.0.dist-info"
SDIST = dict.fromkeys(
    (
        "src/tiny_optim/__init__.py",
        "src/tiny_optim/py.typed",
        "src/tiny_optim/torch/step.py",
        "tests/test_step.py",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    ),
    "",
)
WHEEL = {
    "tiny_optim/__init__.py": "",
    "tiny_optim/py.typed": "",
    "tiny_optim/torch/step.py": "",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": "",
    f"{INFO}/RECORD": "",
    f"{INFO}/licenses/LICENSE": "",
}


def problems(
    folder: Path, sdist: dict[str, str], wheel: dict[str, str], forbidden: tuple[str, ...] = ()
) -> list[str]:
    source, binary = folder / "tiny_optim-1.0.0.tar.gz", folder / "tiny_optim-1.0.0-py3-none-any.whl"
    with tarfile.open(source, "w:gz") as archive:
        for name, text in sdist.items():
            member = tarfile.TarInfo(f"tiny_optim-1.0.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    with zipfile.ZipFile(binary, "w") as archive:
        for name, text in wheel.items():
            archive.writestr(name, text)
    return artefacts.inspect(PACKAGE, source, binary, forbidden=forbidden)


def test_a_library_with_its_metadata_and_nothing_else_is_sound(tmp_path: Path):
    assert problems(tmp_path, SDIST, WHEEL, ("/home/someone",)) == []


@pytest.mark.parametrize(
    "name",
    ["tests/test_step.py", "experiments/claims.py", "other/__init__.py", "tiny_optim/late.py", "setup.cfg"],
)
def test_a_wheel_with_a_file_that_is_not_of_the_library_is_refused(tmp_path: Path, name: str):
    assert problems(tmp_path, SDIST, WHEEL | {name: ""}) == [
        f"tiny_optim-1.0.0-py3-none-any.whl: holds {name}, which is not part of the library"
    ]


@pytest.mark.parametrize("part", ["tests/test_a.py", "benchmarks/b.py", "conftest.py", "__pycache__/a.pyc"])
def test_tests_and_caches_inside_the_library_are_refused_though_the_sdist_has_them(tmp_path: Path, part: str):
    name = f"tiny_optim/{part}"
    assert problems(tmp_path, SDIST | {f"src/{name}": ""}, WHEEL | {name: ""}) == [
        f"tiny_optim-1.0.0-py3-none-any.whl: holds {name}, which is not part of the library"
    ]


@pytest.mark.parametrize(
    "name", ["tiny_optim/torch/step.py", "tiny_optim/py.typed", f"{INFO}/licenses/LICENSE"]
)
def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path, name: str):
    wheel = {key: text for key, text in WHEEL.items() if key != name}
    assert problems(tmp_path, SDIST, wheel) == [f"tiny_optim-1.0.0-py3-none-any.whl: lacks {name}"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("CHANGELOG.md", "CHANGELOG.md"), ("LICENSE", "LICENSE"), ("tests/test_step.py", "tests/")],
)
def test_an_sdist_that_lacks_a_file_is_refused(tmp_path: Path, name: str, told: str):
    sdist = {key: text for key, text in SDIST.items() if key != name}
    assert problems(tmp_path, sdist, WHEEL) == [f"tiny_optim-1.0.0.tar.gz: lacks {told}"]


@pytest.mark.parametrize("name", ["experiments/claims.py", "notes.txt", "README.md.orig"])
def test_an_sdist_with_a_stranger_is_refused(tmp_path: Path, name: str):
    assert problems(tmp_path, SDIST | {name: ""}, WHEEL) == [
        f"tiny_optim-1.0.0.tar.gz: holds {name}, which is not part of the package"
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Name: tiny-optim", "Name: tiny", "Name is 'tiny', not 'tiny-optim'"),
        ("Version: 1.0.0", "Version: 1.0.1", "Version is '1.0.1', not '1.0.0'"),
        ("<4,>=3.11", ">=3.12", "Requires-Python is '>=3.12', not '>=3.11,<4'"),
        ("Provides-Extra: jax\n", "", "Provides-Extra is ['torch'], not ['jax', 'torch']"),
        ("text/markdown", "text/plain", "Description-Content-Type is 'text/plain', not 'text/markdown'"),
        ("Summary: Tiny.\n", "", "lacks Summary"),
        ("License-Expression: Apache-2.0\n", "", "lacks License-Expression"),
        ("# tiny-optim\n", "\n", "the description (README.md) is empty"),
        (
            "numpy>=1.26",
            "numpy @ file:///opt/numpy",
            "requires a place and not a version: numpy @ file:///opt/numpy",
        ),
    ],
)
def test_metadata_that_contradicts_the_package_is_refused(tmp_path: Path, old: str, new: str, complaint: str):
    # Only the field itself: the metadata version also ends in a number.
    changed = (
        METADATA.replace(f"\n{old}", f"\n{new}") if f"\n{old}" in METADATA else METADATA.replace(old, new)
    )
    assert changed != METADATA
    assert problems(tmp_path, SDIST, WHEEL | {f"{INFO}/METADATA": changed}) == [
        f"tiny_optim-1.0.0-py3-none-any.whl: METADATA: {complaint}"
    ]


@pytest.mark.parametrize("text", ["/home/me", "DATA = '/home/me/data'", "file:/home/me/x", "(/home/me)"])
def test_a_path_of_this_machine_is_found_in_both_artefacts(tmp_path: Path, text: str):
    sdist = SDIST | {"src/tiny_optim/__init__.py": text}
    wheel = WHEEL | {"tiny_optim/__init__.py": text}
    mention = "tiny_optim/__init__.py mentions /home/me, a folder of this machine"
    assert problems(tmp_path, sdist, wheel, ("/home/me",)) == [
        f"tiny_optim-1.0.0.tar.gz: src/{mention}",
        f"tiny_optim-1.0.0-py3-none-any.whl: {mention}",
    ]


@pytest.mark.parametrize(
    "text", ["/home/meow", "/opt/home/me", "~/home/me", "example.org/home/me", "/home/me.txt"]
)
def test_a_longer_path_that_contains_the_folder_is_no_mention(tmp_path: Path, text: str):
    sdist = SDIST | {"README.md": text}
    assert problems(tmp_path, sdist, WHEEL, ("/home/me",)) == []


def test_both_artefacts_are_found_by_name(tmp_path: Path):
    names = ("tiny_optim-1.0.0.tar.gz", "tiny_optim-1.0.0-py3-none-any.whl")
    for name in (*names, "tiny_optim-0.9.0.tar.gz"):
        (tmp_path / name).touch()
    assert [path.name for path in artefacts.find(PACKAGE, tmp_path)] == list(names)


def test_a_wheel_for_one_platform_is_not_the_one_that_is_looked_for(tmp_path: Path):
    (tmp_path / "tiny_optim-1.0.0.tar.gz").touch()
    (tmp_path / "tiny_optim-1.0.0-cp311-cp311-linux_x86_64.whl").touch()
    with pytest.raises(ValueError, match=r"lacks tiny_optim-1\.0\.0-py3-none-any\.whl"):
        artefacts.find(PACKAGE, tmp_path)
