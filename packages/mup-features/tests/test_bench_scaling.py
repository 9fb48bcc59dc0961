"""The benchmark of an optimiser step runs on a tiny transformer and counts its operations."""

from pathlib import Path

import pytest

bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")
pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """bench_scaling.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_scaling

    return bench_scaling


def test_every_optimiser_steps_and_ours_dispatches_what_two_groups_do(script):
    comparison = script.measure("tiny", bench.Options(repeats=3, warmup=1, min_time=0.0))
    rows = {row.name: row for row in comparison.rows}
    assert all(row.error is None for row in rows.values())
    kernels = {name: int(row.extra["kernels"]) for name, row in rows.items()}
    assert kernels["mup-features, AdamW"] == kernels["torch AdamW, 2 groups"] > 0
    theirs = "microsoft/mup, MuAdamW"
    if theirs not in rows:
        assert comparison.absent[theirs] == "not installed: mup"


def test_what_is_not_installed_is_named(script, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(script, "import_module", missing)
    comparison = script.measure("tiny", bench.Options(repeats=3, warmup=1, min_time=0.0))
    assert comparison.absent == {"microsoft/mup, MuAdamW": "not installed: mup"}
