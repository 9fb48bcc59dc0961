"""The workspace on real folders and real git repositories below tmp_path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tenfold_tools import workspace


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def manifest(name: str, *, requires: str = ">=3.11") -> str:
    return (
        f'[project]\nname = "{name}"\nversion = "1.2.0"\nrequires-python = "{requires}"\n'
        '[project.optional-dependencies]\ntorch = ["torch"]\njax = ["jax"]\n'
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A workspace of two packages and a workshop, without git."""
    write(tmp_path / "pyproject.toml", '[tool.uv.workspace]\nmembers = ["packages/*", "tools"]\n')
    for name in ("beta-optim", "alpha-optim"):
        write(tmp_path / "packages" / name / "pyproject.toml", manifest(name))
    write(tmp_path / "tools/pyproject.toml", manifest("tenfold-tools"))
    write(tmp_path / "README.md", "hello\n")
    return tmp_path


@pytest.fixture
def repository(tree: Path) -> Path:
    """The same, committed on branch main with the tag `start`."""
    git(tree, "init", "--quiet", "--initial-branch=main")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "Start")
    git(tree, "tag", "start")
    return tree


def names(packages: list[workspace.Package]) -> list[str]:
    return [package.name for package in packages]


def test_the_root_is_found_from_a_folder_deep_inside(tree: Path):
    deep = tree / "packages/beta-optim/src"
    deep.mkdir()
    assert workspace.root(deep) == tree.resolve()


def test_a_package_of_its_own_is_not_mistaken_for_the_root(tree: Path):
    assert workspace.root(tree / "packages/beta-optim") == tree.resolve()


def test_outside_a_workspace_the_root_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="start must lie in a workspace"):
        workspace.root(tmp_path)


def test_packages_are_sorted_and_leave_the_workshop_out(tree: Path):
    assert names(workspace.packages(tree)) == ["alpha-optim", "beta-optim"]


def test_members_end_with_the_workshop_under_the_name_tools(tree: Path):
    last = workspace.members(tree)[-1]
    assert (last.name, last.distribution, last.import_name) == ("tools", "tenfold-tools", "tenfold_tools")


def test_a_package_tells_what_its_manifest_says(tree: Path):
    assert workspace.find("beta-optim", tree) == workspace.Package(
        distribution="beta-optim",
        import_name="beta_optim",
        path=(tree / "packages/beta-optim").resolve(),
        version="1.2.0",
        extras=("jax", "torch"),
        requires_python=">=3.11",
        pythons=("3.11", "3.12", "3.13"),
    )


@pytest.mark.parametrize(
    ("requires", "pythons"),
    [(">=3.12", ("3.12", "3.13")), (">=3.11.4,<3.13", ("3.11", "3.12")), ("==3.13.*", ("3.13",))],
)
def test_only_the_pythons_a_package_admits_are_listed(tree: Path, requires: str, pythons: tuple[str, ...]):
    write(tree / "packages/beta-optim/pyproject.toml", manifest("beta-optim", requires=requires))
    assert workspace.find("beta-optim", tree).pythons == pythons


@pytest.mark.parametrize("spelling", ["beta-optim", "Beta_Optim", "beta.optim"])
def test_a_name_is_found_in_every_spelling_the_index_accepts(tree: Path, spelling: str):
    assert workspace.find(spelling, tree).distribution == "beta-optim"


def test_an_unknown_name_gets_one_line_with_a_suggestion_and_the_accepted_names(tree: Path):
    with pytest.raises(workspace.UnknownPackage) as caught:
        workspace.find("betaoptim", tree)
    assert str(caught.value) == (
        "unknown package 'betaoptim' (did you mean beta-optim?); accepted: alpha-optim, beta-optim"
    )


def test_the_workshop_is_no_package(tree: Path):
    with pytest.raises(workspace.UnknownPackage, match="accepted: alpha-optim, beta-optim"):
        workspace.find("tools", tree)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[project", "must be valid TOML"),
        ('[project]\nname = "beta-optim"\n', r"project\.version must be a string, got None"),
        (manifest("gamma"), "project.name must equal its folder's name 'beta-optim', got 'gamma'"),
        (manifest("beta-optim", requires="three"), "requires-python must be a specifier, got 'three'"),
    ],
)
def test_a_broken_manifest_is_named_with_what_is_wrong(tree: Path, text: str, complaint: str):
    broken = write(tree / "packages/beta-optim/pyproject.toml", text)
    with pytest.raises(ValueError, match=complaint) as caught:
        workspace.packages(tree)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(("name", "place"), [("Beta_Optim", "packages/beta-optim"), ("tools", "tools")])
def test_a_member_is_found_by_name_with_its_extras(tree: Path, name: str, place: str):
    folder = workspace.folder(name, tree)
    assert folder == (tree / place).resolve()
    assert workspace.extras(folder) == ("jax", "torch")


def test_the_folder_of_an_unknown_member_is_an_error(tree: Path):
    with pytest.raises(workspace.UnknownPackage, match="unknown package 'tool'"):
        workspace.folder("tool", tree)


def test_committed_staged_unstaged_and_untracked_changes_all_count(repository: Path):
    write(repository / "committed.txt")
    git(repository, "add", "committed.txt")
    git(repository, "commit", "--quiet", "-m", "Change")
    write(repository / "staged.txt")
    git(repository, "add", "staged.txt")
    write(repository / "README.md", "changed\n")
    write(repository / "packages/beta-optim/new file é.txt")
    assert workspace.changed_files("start", repository) == [
        "README.md",
        "committed.txt",
        "packages/beta-optim/new file é.txt",
        "staged.txt",
    ]


def test_ignored_files_do_not_count(repository: Path):
    write(repository / ".gitignore", "dist/\n")
    write(repository / "dist/wheel.whl")
    assert workspace.changed_files("start", repository) == [".gitignore"]


def test_deleting_and_moving_a_file_count_at_both_places(repository: Path):
    git(repository, "mv", "packages/beta-optim/pyproject.toml", "tools/moved.toml")
    changed = workspace.changed_files("start", repository)
    assert changed == ["packages/beta-optim/pyproject.toml", "tools/moved.toml"]


def test_what_the_other_branch_did_since_is_not_ours(repository: Path):
    git(repository, "switch", "--quiet", "-c", "work")
    write(repository / "packages/beta-optim/mine.py")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "Mine")
    git(repository, "switch", "--quiet", "main")
    write(repository / "tools/theirs.py")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "Theirs")
    git(repository, "switch", "--quiet", "work")
    assert workspace.changed_files("main", repository) == ["packages/beta-optim/mine.py"]


def test_paths_are_relative_to_the_workspace_even_inside_a_larger_repository(tmp_path: Path):
    inner = tmp_path / "inner"
    write(inner / "pyproject.toml", "[tool.uv.workspace]\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Start")
    write(inner / "pyproject.toml", "[tool.uv.workspace]\nmembers = []\n")
    write(inner / "new.txt")
    write(tmp_path / "outside.txt")
    assert workspace.changed_files("HEAD", inner) == ["new.txt", "pyproject.toml"]


@pytest.mark.parametrize("revision", ["no-such-branch", "--all", "", "0" * 40])
def test_an_unknown_revision_is_a_clear_error(repository: Path, revision: str):
    with pytest.raises(ValueError, match="since must be a git revision of this repository, got"):
        workspace.changed_files(revision, repository)


def test_a_revision_without_common_history_is_a_clear_error(repository: Path):
    git(repository, "switch", "--quiet", "--orphan", "other")
    write(repository / "pyproject.toml", "[tool.uv.workspace]\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "Other")
    with pytest.raises(ValueError, match="since must share history with HEAD"):
        workspace.changed_files("main", repository)


def test_a_folder_without_git_is_a_clear_error(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tree.parent.resolve()))
    with pytest.raises(ValueError, match="root must be a git repository"):
        workspace.changed_files("HEAD", tree)


EVERYONE = ["alpha-optim", "beta-optim", "tools"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], []),
        (["packages/beta-optim/src/beta_optim/a.py"], ["beta-optim"]),
        (["packages/beta-optim/README.md"], ["beta-optim"]),
        (["packages/beta-optim/a.py", "packages/alpha-optim/b.py"], ["alpha-optim", "beta-optim"]),
        (["packages/removed/a.py"], []),
        (["packages/stray.txt"], EVERYONE),
        (["README.md", "CONTRIBUTING.md", "LICENSE", "docs/report.png"], []),
        (["README.md", "packages/alpha-optim/b.py"], ["alpha-optim"]),
        (["tools/src/tenfold_tools/stats.py"], EVERYONE),
        (["tools/README.md"], EVERYONE),
        (["pyproject.toml"], EVERYONE),
        (["constraints.txt"], EVERYONE),
        (["noxfile.py"], EVERYONE),
        ([".gitignore"], EVERYONE),
        ([".ci/run"], EVERYONE),
        ([".github/workflows/ci.yml", "packages/beta-optim/a.py"], EVERYONE),
    ],
)
def test_a_change_selects_what_it_can_break(tree: Path, files: list[str], expected: list[str]):
    assert names(workspace.affected(files, tree)) == expected


def test_importing_the_module_needs_nothing_but_packaging(tmp_path: Path):
    code = (
        "import sys; before = set(sys.modules); import tenfold_tools.workspace;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "['packaging', 'tenfold_tools']"
