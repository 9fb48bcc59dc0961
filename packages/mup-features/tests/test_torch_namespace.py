"""The public names of the torch namespace, and what its absence says."""

import subprocess
import sys

import pytest

import mup_features
import mup_features.torch


def test_every_public_name_is_there():
    for module in (mup_features.torch, mup_features):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'set_base_shapes'"):
        mup_features.torch.set_base_shapes  # noqa: B018


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_without_torch_the_namespace_names_the_extra():
    result = run("import sys; sys.modules['torch'] = None; import mup_features; mup_features.infer_roles")
    assert "ImportError: mup_features.torch needs torch" in result.stderr
    assert 'pip install "mup-features[torch]"' in result.stderr


def test_roles_and_parametrizations_need_no_framework():
    code = "import sys, mup_features as m; m.Parametrization('mup').classify(); m.Role('input')"
    result = run(
        f"{code}; print(sorted({{'torch', 'jax', 'flax', 'yaml', 'matplotlib'}} & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr
