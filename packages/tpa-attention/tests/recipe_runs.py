"""Runs experiments/train_lm.py as a user would, in this process."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
if not EXPERIMENTS.is_dir():
    pytest.skip("the recipe is not part of the source distribution", allow_module_level=True)

from tenfold_tools.run_folder import run_as_script  # noqa: E402


def script(name):
    """A module of the recipe; its folder is on the path, as it is for a script."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.append(str(EXPERIMENTS))
    return import_module(name)


def status(argv):
    """Exit status of the recipe."""
    module = script("train_lm")
    return run_as_script(lambda: module.main([str(part) for part in argv]), "train_lm.py")


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
