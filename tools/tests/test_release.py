"""Agreement of tag, version and changelog, and real builds of a tiny package by uv."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold_tools import artefacts, release, workspace

TODAY = datetime.date(2026, 3, 1)
CHANGELOG = """\
# Changelog

## [Unreleased]

- Something for later.

## [1.0.0] - 2026-02-28

### Added

- The optimiser.

## [0.9.0] - 2026-01-01

- A draft.

[1.0.0]: https://example.org/compare
"""
MANIFEST = """\
[project]
name = "tiny-optim"
version = "1.0.0"
description = "Tiny."
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = []

[dependency-groups]
test = ["pytest"]

[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["src/tiny_optim"]

[tool.hatch.build.targets.sdist]
include = ["src", "tests", "README.md", "CHANGELOG.md", "LICENSE"]
"""
FILES = {
    "pyproject.toml": MANIFEST,
    "README.md": "# tiny-optim\n",
    "CHANGELOG.md": CHANGELOG,
    "LICENSE": "Free.\n",
    "src/tiny_optim/__init__.py": '"""Tiny."""\n\n__version__ = "1.0.0"\n',
    "src/tiny_optim/py.typed": "",
    "tests/test_tiny.py": "import tiny_optim\n\n\ndef test_the_wheel_is_imported():\n"
    "    assert 'site-packages' in tiny_optim.__file__\n",
    "experiments/claims.py": "",
}


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / "packages/tiny-optim" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A workspace with the one package tiny-optim, ready to be released."""
    root = tmp_path / "work"
    for name, text in FILES.items():
        path = root / "packages/tiny-optim" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["packages/*"]\n', encoding="utf-8")
    return root.resolve()


def found(root: Path, tag: str | None = None) -> list[str]:
    return release.disagreements(workspace.find("tiny-optim", root), tag=tag, today=TODAY)


def test_a_changelog_is_read_without_unreleased_and_link_definitions():
    assert release.changelog(CHANGELOG) == [
        release.Entry("1.0.0", "2026-02-28", "### Added\n\n- The optimiser."),
        release.Entry("0.9.0", "2026-01-01", "- A draft."),
    ]


@pytest.mark.parametrize(
    ("heading", "entry"),
    [
        ("## 1.0.0 - 2026-02-28", ("1.0.0", "2026-02-28")),
        ("## [1.0.0] - 2026-02-28 [YANKED]", ("1.0.0", "2026-02-28")),
        ("## [1.0.0]", ("1.0.0", "")),
        ("## [1.0.0] 2026-02-28", ("1.0.0", "")),
    ],
)
def test_a_heading_is_read_as_version_and_date(heading: str, entry: tuple[str, str]):
    (parsed,) = release.changelog(f"# Changelog\n\n{heading}\n\n- Text.\n")
    assert (parsed.version, parsed.date) == entry


def test_a_tag_splits_at_the_last_v_before_a_number():
    assert release.split_tag("mu-v-optim-v1.2.0rc1") == ("mu-v-optim", "1.2.0rc1")


@pytest.mark.parametrize("tag", ["v1.0.0", "tiny-optim-1.0.0", "tiny-optim-v", "-v1.0.0", ""])
def test_a_tag_of_another_form_is_refused(tag: str):
    with pytest.raises(ValueError, match="tag must read <distribution>-vX"):
        release.split_tag(tag)


def test_a_package_whose_files_agree_can_be_released(tree: Path):
    assert found(tree) == []
    assert found(tree, "tiny-optim-v1.0.0") == []


@pytest.mark.parametrize(
    ("tag", "complaint"),
    [
        ("tiny-optim-v1.0.1", "tag tiny-optim-v1.0.1: says 1.0.1, pyproject.toml says 1.0.0"),
        ("tiny-optim-v1.0", "tag tiny-optim-v1.0: says 1.0, pyproject.toml says 1.0.0"),
        ("other-v1.0.0", "tag other-v1.0.0: names other, the package is tiny-optim"),
        ("1.0.0", "tag must read <distribution>-vX.Y.Z, got '1.0.0'"),
        ("", "tag must read <distribution>-vX.Y.Z, got ''"),
    ],
)
def test_a_tag_that_disagrees_is_named(tree: Path, tag: str, complaint: str):
    assert found(tree, tag) == [complaint]


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        (
            "src/tiny_optim/__init__.py",
            '"1.0.0"',
            '"1.0.1"',
            "src/tiny_optim/__init__.py: __version__ says 1.0.1, pyproject.toml says 1.0.0",
        ),
        (
            "src/tiny_optim/__init__.py",
            '"1.0.0"',
            "str(1)",
            'src/tiny_optim/__init__.py: must hold the line __version__ = "1.0.0"',
        ),
        (
            "CHANGELOG.md",
            "[1.0.0] -",
            "[1.0.1] -",
            "CHANGELOG.md: topmost is 1.0.1, pyproject.toml says 1.0.0",
        ),
        (
            "CHANGELOG.md",
            "2026-02-28",
            "2026-03-02",
            "CHANGELOG.md: 1.0.0 is dated 2026-03-02, which lies in the future",
        ),
        (
            "CHANGELOG.md",
            "2026-02-28",
            "2026-02-30",
            "CHANGELOG.md: 1.0.0 is dated 2026-02-30, which is no day",
        ),
        (
            "CHANGELOG.md",
            "2026-02-28",
            "20260228",
            "CHANGELOG.md: 1.0.0 must be dated YYYY-MM-DD, got '20260228'",
        ),
        ("CHANGELOG.md", " - 2026-02-28", "", "CHANGELOG.md: 1.0.0 must be dated YYYY-MM-DD, got ''"),
        ("CHANGELOG.md", "- The optimiser.", "", "CHANGELOG.md: 1.0.0 says nothing about what changed"),
        (
            "CHANGELOG.md",
            CHANGELOG,
            "# Changelog\n",
            "CHANGELOG.md: must hold an entry '## [1.0.0] - YYYY-MM-DD'",
        ),
    ],
)
def test_a_file_that_disagrees_is_named(tree: Path, name: str, old: str, new: str, complaint: str):
    edit(tree, name, old, new)
    assert found(tree) == [complaint]


def test_a_changelog_dated_today_is_released_today(tree: Path):
    edit(tree, "CHANGELOG.md", "2026-02-28", TODAY.isoformat())
    assert found(tree) == []


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        ("1.0.0-rc1", "pyproject.toml: version '1.0.0-rc1' is not in normal form, which is '1.0.0rc1'"),
        ("one", "pyproject.toml: version 'one' is no PEP 440 version"),
        ("1.0.0+cpu", "pyproject.toml: version '1.0.0+cpu' is a local version and cannot be published"),
    ],
)
def test_a_version_that_the_index_would_rewrite_or_refuse_is_named(tree: Path, version: str, complaint: str):
    for name in ("pyproject.toml", "src/tiny_optim/__init__.py", "CHANGELOG.md"):
        edit(tree, name, "1.0.0", version)
    assert complaint in found(tree)


def test_every_disagreement_has_its_own_line(tree: Path, capsys: pytest.CaptureFixture[str]):
    edit(tree, "pyproject.toml", "1.0.0", "1.1.0")
    assert release.main(["check", "tiny-optim-v1.0.0"], tree) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "release: tag tiny-optim-v1.0.0: says 1.0.0, pyproject.toml says 1.1.0",
        "release: src/tiny_optim/__init__.py: __version__ says 1.0.0, pyproject.toml says 1.1.0",
        "release: CHANGELOG.md: topmost is 1.0.0, pyproject.toml says 1.1.0",
    ]


def test_check_takes_a_package_or_a_tag(tree: Path, capsys: pytest.CaptureFixture[str]):
    for argument in ("tiny-optim", "tiny-optim-v1.0.0"):
        assert release.main(["check", argument], tree) == 0
        agreed = "tiny-optim-v1.0.0: tag, version, __version__ and changelog agree\n"
        assert capsys.readouterr().out == agreed


def test_notes_are_the_changelog_entry(tree: Path, capsys: pytest.CaptureFixture[str]):
    assert release.main(["notes", "tiny-optim"], tree) == 0
    assert capsys.readouterr().out == "### Added\n\n- The optimiser.\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["check", "tinyoptim"],
            "release: unknown package 'tinyoptim' (did you mean tiny-optim?); accepted: tiny-optim",
        ),
        (["check", "other-v1.0.0"], "release: unknown package 'other'; accepted: tiny-optim"),
        (["build", "tools"], "release: unknown package 'tools'; accepted: tiny-optim"),
        (["rehearse", "tiny-optim", "--tag", "x"], "release: tag must read <distribution>-vX.Y.Z, got 'x'"),
        (
            ["build", "tiny-optim", "--output", "pyproject.toml"],
            "release: output must be a folder, got the file",
        ),
        (["publish"], "release: argument COMMAND: invalid choice: 'publish'"),
        (["check"], "release: the following arguments are required: PACKAGE_OR_TAG"),
        ([], "release: the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_gives_one_line_and_exit_2_and_writes_nothing(
    tree: Path, arguments: list[str], complaint: str
):
    before = sorted(tree.rglob("*"))
    command = [sys.executable, "-m", "tenfold_tools.release", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1
    assert sorted(tree.rglob("*")) == before


def test_a_missing_wheel_is_bad_input(tree: Path, capsys: pytest.CaptureFixture[str]):
    assert release.main(["test", "tiny-optim", "--dist", str(tree)], tree) == 2
    assert "lacks tiny_optim-1.0.0.tar.gz and tiny_optim-1.0.0-py3-none-any.whl" in capsys.readouterr().err


def test_a_build_leaves_one_sdist_and_one_wheel_of_this_version_alone(tree: Path, tmp_path: Path):
    output = tmp_path / "new" / "dist"
    output.mkdir(parents=True)
    stale, stranger = output / "tiny_optim-0.9.0-py3-none-any.whl", output / "other_optim-0.9.0.tar.gz"
    stale.touch()
    stranger.touch()
    package = workspace.find("tiny-optim", tree)
    built = release.build(package, output, tree)
    assert sorted(path.name for path in output.iterdir()) == [
        stranger.name,
        "tiny_optim-1.0.0-py3-none-any.whl",
        "tiny_optim-1.0.0.tar.gz",
    ]
    assert built == artefacts.find(package, output)
    assert not list(tree.rglob("dist"))


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("pyproject.toml", 'packages = ["src/tiny_optim"]', 'only-include = ["src"]', "holds src/tiny_optim"),
        (
            "README.md",
            "# tiny-optim\n",
            "see {root}/notes\n",
            "README.md mentions {root}, a folder of this machine",
        ),
        ("src/tiny_optim/__init__.py", '"""Tiny."""', "import numpy", "No module named 'numpy'"),
        (
            "src/tiny_optim/__init__.py",
            '"1.0.0"',
            '"1.0.1"',
            "metadata and __version__ say ['1.0.0', '1.0.1']",
        ),
        ("pyproject.toml", "hatchling.build", "no.such.backend", "uv build --python failed"),
        ("pyproject.toml", 'version = "1.0.0"', 'version = "1.0.0-rc1"', "uv build made other files"),
    ],
)
def test_a_faulty_package_is_not_handed_out(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: str,
    new: str,
    complaint: str,
):
    edit(tree, name, old, new.replace("{root}", str(tree)))
    output = tmp_path / "dist"
    assert release.main(["build", "tiny-optim", "--output", str(output)], tree) == 1
    assert complaint.replace("{root}", str(tree)) in capsys.readouterr().err
    assert not output.exists()


def test_a_rehearsal_goes_up_to_the_upload_and_leaves_nothing(tree: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(tree.rglob("*"))
    assert release.main(["rehearse", "tiny-optim", "--tag", "tiny-optim-v1.0.0"], tree) == 0
    said = capsys.readouterr().out
    for part in ("check: ", "build: tiny_optim-1.0.0.tar.gz", "- The optimiser.", "nothing uploaded"):
        assert part in said
    assert sorted(tree.rglob("*")) == before


def test_a_rehearsal_with_an_output_folder_keeps_the_artefacts(tree: Path, tmp_path: Path):
    output = tmp_path / "dist"
    assert release.main(["rehearse", "tiny-optim", "--output", str(output)], tree) == 0
    assert len(list(output.iterdir())) == 2


@pytest.fixture
def workshop(tree: Path) -> Path:
    """The same workspace with an empty workshop and constraints, which the tests of a wheel install."""
    (tree / "tools").mkdir()
    text = '[project]\nname = "empty-tools"\nversion = "0"\n[build-system]\nrequires = ["hatchling"]\n'
    text += 'build-backend = "hatchling.build"\n[tool.hatch.build.targets.wheel]\nbypass-selection = true\n'
    (tree / "tools/pyproject.toml").write_text(text, encoding="utf-8")
    (tree / "constraints.txt").touch()
    return tree


@pytest.mark.slow
def test_the_tests_of_a_package_run_against_the_wheel_and_their_failure_counts(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = str(tmp_path / "dist")
    assert release.main(["build", "tiny-optim", "--output", output], workshop) == 0
    assert release.main(["test", "tiny-optim", "--dist", output], workshop) == 0
    edit(workshop, "tests/test_tiny.py", "' in tiny_optim", "' not in tiny_optim")
    assert release.main(["test", "tiny-optim", "--dist", output], workshop) == 1
    assert "its tests fail on Python" in capsys.readouterr().err


def test_a_missing_uv_is_said_plainly(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(release.StepFailed, match="uv is not on the PATH"):
        release.build(workspace.find("tiny-optim", tree), tmp_path / "dist", tree)
