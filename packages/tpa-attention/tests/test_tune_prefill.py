"""What the tuning script of the prefill kernels would run on a GPU."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which is optional")

from tpa_attention.torch.kernels.prefill_config import choose_plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tune_prefill")


@pytest.mark.parametrize("width", [64, 128])
def test_each_plan_changes_a_tile_or_how_many_heads_are_expanded(tune, width):
    plans = tune.plans(width)
    table = plans.pop("table")
    assert table == choose_plan(2, width, width)
    for name, plan in plans.items():
        changed = {f.name for f in fields(plan) if getattr(plan, f.name) != getattr(table, f.name)}
        assert len(changed) <= 1, name
        assert changed <= {"forward", "grad_q", "grad_kv", "heads"}, name
