"""What the tuning script of the prefill kernels would run on a GPU."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which is optional")

from tpa_attention.torch.kernels.prefill_config import choose_plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = (16, 1024, 47, 64, (6, 2, 2))


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tune_prefill")


def test_plans_change_a_tile_or_what_is_expanded(tune):
    plans = tune.plans(SIZES)
    table = plans.pop("table")
    assert table == choose_plan(2, 64, 64, (6, 2, 2), (1024, 1024))
    for name, plan in plans.items():
        changed = {f.name for f in fields(plan) if getattr(plan, f.name) != getattr(table, f.name)}
        tiles = changed & {"forward", "grad_q", "grad_kv"}
        assert len(tiles) <= 1, name
        assert changed - tiles <= {"expand_q", "expand_kv", "groups"}, name
