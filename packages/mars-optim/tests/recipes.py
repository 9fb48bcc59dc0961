"""Runs the training recipes of experiments/ as a user would, in this process."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
if not EXPERIMENTS.is_dir():
    pytest.skip("the recipes are not part of the source distribution", allow_module_level=True)

from tenfold_tools.run_folder import run_as_script  # noqa: E402


def script(name):
    """The module of a recipe; its folder is on the path, as it is for a script."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.append(str(EXPERIMENTS))
    return import_module(name)


def status(name, argv):
    """Exit status of a recipe."""
    module = script(name)
    return run_as_script(lambda: module.main([str(part) for part in argv]), f"{name}.py")


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_identical(left, right):
    """Two nested structures, equal to the last bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_identical(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right
