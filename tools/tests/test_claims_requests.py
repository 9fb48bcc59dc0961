"""Requests that the claims command refuses: one line, exit 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from claims_tree import add_package, make_workspace, passing

from tenfold_tools import claims_runner
from tenfold_tools.claims_runner import main


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty workspace, which is also the current folder."""
    folder = make_workspace(tmp_path / "house")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "unknown package 'nobody'; accepted: alpha, plain"),
        (["plain"], "plain has no experiments/claims.py; accepted: alpha"),
        (["--claims", "three"], "unknown claim three; accepted: alpha: one, two"),
        (["--claims", "one", "nine"], "unknown claim nine; accepted: alpha: one, two"),
        (["--scale", "huge"], "quick"),
        (["--seeds", "0"], "argument --seeds: must be a whole number >= 1, got '0'"),
        (["--seeds", "-3"], "--seeds"),
        (["--seeds", "many"], "argument --seeds: must be a whole number >= 1, got 'many'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:1"], "--device cuda:1 is not here (1 CUDA devices are visible)"),
        (["--output", "pyproject.toml"], "--output must be a folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--scal", "quick"], "--scal"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_2_and_nothing_is_written(
    root, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(claims_runner, "_cuda_devices", lambda: 1)
    add_package(root, "alpha", passing("one", "two"))
    add_package(root, "plain", None)
    assert main(arguments) == 2
    refused(capsys, message)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("def broken(:\n    pass", "SyntaxError: invalid syntax (claims.py, line 6)"),
        ("X = 1\nimport no_such_module", "line 7: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", "line 6: ValueError: two lines"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ('@claim("R1", sentence="", source="T")\ndef f(run): ...', "must not be empty"),
        ("", "must define at least one @claim"),
        (passing("one", "two", "one"), "ids in"),
        (passing("one", "two").replace("two_1", "one_0"), "must be unique, found more than once: one_0"),
    ],
    ids=["syntax", "import", "raises", "exits", "decorator", "empty", "same id", "same function"],
)
def test_a_broken_claims_file_is_one_line_and_exit_2_and_nothing_is_written(root, capsys, claims, message):
    add_package(root, "alpha", passing("one"))
    add_package(root, "beta", claims)
    assert main([]) == 2
    assert "packages/beta/experiments/claims.py" in refused(capsys, message)


def refused(capsys, message: str) -> str:
    output, errors = capsys.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert not Path("reports").exists()
    return errors


def test_a_workspace_without_claims_is_refused(root, capsys):
    add_package(root, "plain", None)
    assert main([]) == 2
    refused(capsys, "no package of")


def test_a_folder_outside_any_workspace_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    refused(capsys, "must lie in a workspace")


def test_an_output_that_cannot_be_made_is_one_line(root, capsys):
    add_package(root, "alpha", passing("one"))
    assert main(["--output", "pyproject.toml/below"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
