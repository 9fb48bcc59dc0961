"""`python -m tpa_attention info`, by its parts and without frameworks."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tpa_attention
from tpa_attention import _info
from tpa_attention.__main__ import main


def test_info_shows_versions_extras_implementations_and_the_interpreter(capsys):
    pytest.importorskip("torch", reason="the implementations need torch")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"tpa-attention {tpa_attention.__version__}, Python 3.")
    assert [line.partition(":")[0] for line in lines[1:6]] == [f"extra [{name}]" for name in _info.EXTRAS]
    assert lines[1].startswith("extra [torch]: torch 2.")
    assert lines[1].endswith(": works")
    for impl in ("reference", "sdpa"):
        assert f"attention by {impl} on cpu: works" in lines
        assert f"decode by {impl} on cpu: works" in lines
    assert "attention by flex on cpu: not tried, it is compiled first (info --compile)" in lines
    assert any(line.startswith("decode by triton on cpu: ") for line in lines)
    assert any(line.startswith("Triton interpreter: ") for line in lines)


def test_info_without_frameworks_says_why_and_what_to_install():
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'jax', 'flax', 'transformers', 'triton'): sys.modules[name] = None\n"
        "sys.argv[1:] = ['info']; runpy.run_module('tpa_attention', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for extra in _info.EXTRAS:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"extra [{extra}]")]
        assert len(lines) == 1
        assert "does not work: " in lines[0]
        assert lines[0].endswith(f'(pip install "tpa-attention[{extra}]")')
    assert "implementations: none without the extra [torch]" in done.stdout
    assert "Triton interpreter: " in done.stdout


def test_compiled_implementations_are_tried_when_asked(monkeypatch):
    pytest.importorskip("torch", reason="the implementations need torch")
    tried = []
    monkeypatch.setattr(_info, "run_problem", lambda call, impl, _device: tried.append((call, impl)))
    quick = list(_info.implementations(compiled=False))
    assert not any(impl == "flex" for _, impl in tried)
    tried.clear()
    thorough = list(_info.implementations(compiled=True))
    assert ("attention", "flex") in tried
    assert len(quick) == len(thorough)
    assert not any("auto" in line for line in thorough)


def test_an_implementation_that_cannot_run_is_reported_with_its_reason():
    pytest.importorskip("torch", reason="the implementations need torch")
    problem = _info.run_problem("attention", "sdpa", "abacus")
    assert problem is not None
    assert "abacus" in problem
    assert _info.verdict(problem).startswith("does not work: ")


def test_an_implementation_with_wrong_numbers_does_not_work(monkeypatch):
    pytest.importorskip("torch", reason="the implementations need torch")
    right = _info.small_case

    def off(call, impl, device):
        return right(call, impl, device) + (0.1 if impl == "sdpa" else 0.0)

    monkeypatch.setattr(_info, "small_case", off)
    assert _info.run_problem("decode", "sdpa", "cpu") == "its result is off by 1.0e-01"
    assert _info.run_problem("decode", "reference", "cpu") is None


def test_a_fallback_to_another_implementation_is_not_taken_for_success(monkeypatch):
    pytest.importorskip("torch", reason="the implementations need torch")
    import warnings

    right = _info.small_case

    def warned(call, impl, device):
        warnings.warn("sdpa is used instead", stacklevel=1)
        return right(call, impl, device)

    monkeypatch.setattr(_info, "small_case", warned)
    assert _info.run_problem("attention", "reference", "cpu") == "sdpa is used instead"


@pytest.mark.parametrize(
    ("triton", "numpy", "affected"),
    [
        ("3.6.0", "2.4.1", True),
        ("3.6.0", "2.3.5", False),
        ("3.9.0", "2.4.6", False),
        ("3.10.0", "2.4.6", False),
    ],
)
def test_the_pair_of_versions_that_cannot_loop_is_named(monkeypatch, triton, numpy, affected):
    monkeypatch.setattr(_info, "installed_version", {"triton": triton, "numpy": numpy}.__getitem__)
    assert (_info.range_problem() is not None) == affected


def test_every_extra_of_the_project_is_reported():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(_info.EXTRAS) == set(extras)
    for extra, modules in _info.EXTRAS.items():
        requirements = " ".join(extras[extra])
        for other in ("torch", "jax"):
            requirements = requirements.replace(f"tpa-attention[{other}]", " ".join(extras[other]))
        assert [module for module in modules if module not in requirements] == []
