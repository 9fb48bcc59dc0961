"""The CI matrix, and its command line on a real git repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold_tools import matrix, workspace


def member(name: str, pythons: tuple[str, ...] = workspace.PYTHONS) -> workspace.Package:
    return workspace.Package(name, name.replace("-", "_"), Path(name), "1.0", (), ">=3.11", pythons)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A committed workspace of two packages and the workshop; the first commit is tagged `start`."""
    for name, place in (("alpha", "packages/alpha"), ("beta", "packages/beta"), ("tenfold-tools", "tools")):
        (tmp_path / place).mkdir(parents=True)
        text = f'[project]\nname = "{name}"\nversion = "1.0"\nrequires-python = ">=3.11"\n'
        (tmp_path / place / "pyproject.toml").write_text(text)
    (tmp_path / "pyproject.toml").write_text("[tool.uv.workspace]\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Start")
    git(tmp_path, "tag", "start")
    return tmp_path


def sessions(text: str) -> list[str]:
    return [row["session"] for row in json.loads(text)["include"]]


def test_a_package_is_tested_on_every_python_and_built_on_the_newest():
    found = [(row.python, row.session) for row in matrix.rows([member("alpha")])]
    assert found == [
        ("3.11", "tests-3.11(alpha)"),
        ("3.12", "tests-3.12(alpha)"),
        ("3.13", "tests-3.13(alpha)"),
        ("3.11", "lowest-3.11(alpha)"),
        ("3.11", "types(alpha)"),
        ("3.13", "build(alpha)"),
    ]


def test_a_package_is_not_tested_on_a_python_it_does_not_support():
    found = [row.session for row in matrix.rows([member("alpha", ("3.12", "3.13"))])]
    assert found == [
        "tests-3.12(alpha)",
        "tests-3.13(alpha)",
        "lowest-3.12(alpha)",
        "types(alpha)",
        "build(alpha)",
    ]


def test_the_workshop_is_tested_and_type_checked_but_not_built():
    found = [row.session for row in matrix.rows([member("tools")])]
    assert found == ["tests-3.11(tools)", "tests-3.12(tools)", "tests-3.13(tools)", "types(tools)"]


def test_on_gpu_the_same_tests_run_and_each_package_adds_its_gpu_session():
    found = [(row.session, row.arguments) for row in matrix.rows([member("alpha"), member("tools")], "gpu")]
    tests = [(f"tests-{python}(alpha)", "") for python in workspace.PYTHONS]
    workshop = [(f"tests-{python}(tools)", "") for python in workspace.PYTHONS]
    assert found == [*tests, ("gpu", "alpha"), *workshop]


def test_slow_adds_the_slow_tests_to_the_tests_rows_only():
    found = {
        (row.session.split("-")[0].split("(")[0], row.arguments)
        for row in matrix.rows([member("a")], slow=True)
    }
    assert found == {("tests", "-m not(slow)or(slow)"), ("lowest", ""), ("types", ""), ("build", "")}


def test_pytest_takes_the_slow_argument_for_every_test(tmp_path: Path):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n\n\n@pytest.mark.slow\ndef test_a(): pass\n\n\ndef test_b(): pass\n"
    )
    (row, *_) = matrix.rows([member("a")], slow=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *row.arguments.split(), "."]
    # Without other plugins: some import whole frameworks, which this question does not need.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout


def test_an_unknown_runner_is_refused():
    with pytest.raises(ValueError, match="runner must be one of cpu, gpu, got 'tpu'"):
        matrix.rows([member("alpha")], "tpu")


def test_a_package_that_supports_no_python_of_ci_is_refused():
    with pytest.raises(ValueError, match=r"alpha: requires-python must admit one of 3\.11, 3\.12, 3\.13"):
        matrix.rows([member("alpha", ())])


def test_the_json_is_one_line_that_github_can_include():
    row = matrix.Row("alpha", "3.12", "gpu", "alpha", "gpu")
    assert matrix.to_json([row]) == (
        '{"include":[{"package":"alpha","python":"3.12","session":"gpu","arguments":"alpha","runner":"gpu"}]}'
    )


def test_the_table_aligns_its_columns():
    table = matrix.to_table(matrix.rows([member("alpha"), member("much-longer")]))
    header, *lines = table.splitlines()
    assert len(lines) == 12
    assert {line[header.index("PYTHON")] for line in lines} == {"3"}


def test_without_options_everything_is_selected(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert matrix.main([], repository) == 0
    default = capsys.readouterr().out
    assert matrix.main(["--all"], repository) == 0
    assert capsys.readouterr().out == default
    assert len(sessions(default)) == 6 + 6 + 4


def test_a_change_in_one_package_selects_its_rows_only(repository: Path, capsys: pytest.CaptureFixture[str]):
    (repository / "packages/beta/new.py").touch()
    assert matrix.main(["--since", "start"], repository) == 0
    assert len(sessions(capsys.readouterr().out)) == 6
    rows = matrix.rows([workspace.find("beta", repository)])
    assert matrix.main(["--since", "start"], repository) == 0
    assert capsys.readouterr().out == matrix.to_json(rows) + "\n"


def test_a_change_in_the_workshop_selects_everything(repository: Path, capsys: pytest.CaptureFixture[str]):
    (repository / "tools/new.py").touch()
    assert matrix.main(["--since", "start"], repository) == 0
    assert len(sessions(capsys.readouterr().out)) == 6 + 6 + 4


def test_no_change_gives_the_empty_matrix_that_the_workflow_compares_with(
    repository: Path, capsys: pytest.CaptureFixture[str]
):
    assert matrix.main(["--since", "start"], repository) == 0
    captured = capsys.readouterr()
    assert captured.out == '{"include":[]}\n'
    assert captured.err == ""
    assert matrix.to_table([]) == "nothing that CI tests has changed"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--since", "nowhere"], "matrix: since must be a git revision of this repository, got 'nowhere'\n"),
        (["--since", "start", "--all"], "matrix: argument --all: not allowed with argument --since\n"),
        (["--runner", "tpu"], "matrix: argument --runner: invalid choice: 'tpu'"),
        (["alpha"], "matrix: unrecognized arguments: alpha\n"),
    ],
)
def test_bad_input_gives_one_line_and_exit_2(repository: Path, arguments: list[str], complaint: str):
    command = [sys.executable, "-m", "tenfold_tools.matrix", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1


def test_outside_a_workspace_the_command_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "tenfold_tools.matrix"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("matrix: start must lie in a workspace")
