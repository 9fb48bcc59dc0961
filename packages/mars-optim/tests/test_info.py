"""`python -m mars_optim info`, in a process of its own and by its parts."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mars_optim
from mars_optim import __main__ as command_line


def run(*words, prelude=""):
    start = "import runpy; runpy.run_module('mars_optim', run_name='__main__')"
    code = f"{prelude}\nimport sys; sys.argv[1:] = {list(words)!r}\n{start}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def assert_shows_versions_and_backends(done):
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"mars-optim {mars_optim.__version__}, Python 3.")
    assert lines[1].startswith("extra [torch]: torch 2.")
    assert lines[1].endswith(": works")
    assert "backend for-loop on cpu: works" in lines
    assert "backend foreach on cpu: works" in lines


def test_info_shows_versions_extras_and_backends():
    pytest.importorskip("torch", reason="the backends need torch")
    # without jax and transformers, whose import takes seconds
    done = run("info", prelude="import sys; sys.modules.update(jax=None, transformers=None)")
    assert_shows_versions_and_backends(done)
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    for extra in ("jax", "hf"):
        assert "does not work" in lines[f"extra [{extra}]"]
        assert f'pip install "mars-optim[{extra}]"' in lines[f"extra [{extra}]"]


@pytest.mark.slow  # imports every extra there is
def test_the_module_is_a_command_that_looks_at_every_extra():
    pytest.importorskip("torch", reason="the backends need torch")
    command = [sys.executable, "-m", "mars_optim", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert_shows_versions_and_backends(done)
    assert all(f"extra [{extra}]: " in done.stdout for extra in command_line.EXTRAS)


def test_info_without_torch_says_why_and_what_to_install():
    done = run("info", prelude="import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert "does not work" in done.stdout
    assert 'pip install "mars-optim[torch]"' in done.stdout
    assert "backends: none without the extra [torch]" in done.stdout


@pytest.mark.parametrize("words", [["inform"], ["info", "--loud"], []])
def test_bad_words_end_with_status_2_and_name_what_is_accepted(words):
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "info" in done.stderr


def test_a_backend_that_fails_is_reported_with_its_reason():
    pytest.importorskip("torch", reason="the backends need torch")
    problem = command_line._step_problem("abacus", foreach=True, fused=False)
    assert "abacus" in command_line._verdict(problem)
    assert command_line._verdict(problem).startswith("does not work: ")


def test_a_backend_that_falls_back_to_another_is_reported_with_its_reason(monkeypatch):
    pytest.importorskip("torch", reason="the backends need torch")
    from mars_optim.torch import _cpu

    monkeypatch.setattr(_cpu, "why_unavailable", lambda: "no compiler")
    _cpu.available_or_warn.cache_clear()
    try:
        problem = command_line._step_problem("cpu", foreach=False, fused=True)
        assert "no compiler" in command_line._verdict(problem)
    finally:
        _cpu.available_or_warn.cache_clear()


def test_every_extra_of_the_project_is_reported():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(command_line.EXTRAS) == set(extras)
    for extra, modules in command_line.EXTRAS.items():
        requirements = " ".join(extras[extra]).replace("mars-optim[torch]", " ".join(extras["torch"]))
        assert [module for module in modules if module not in requirements] == []
