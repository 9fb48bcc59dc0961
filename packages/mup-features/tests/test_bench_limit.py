"""The benchmark of the limit runs on a tiny problem and weighs time by the square of the spread."""

from pathlib import Path

import numpy as np
import pytest

bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")
pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, x64):
    """bench_limit.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_limit

    return bench_limit


@pytest.mark.slow  # compiles the limit and the simulator
def test_every_method_runs_and_the_limit_costs_its_own_equal_error(script):
    comparison = script.measure("tiny", bench.Options(repeats=3, warmup=1, min_time=0.0))
    rows = {row.name: row for row in comparison.rows}
    assert set(rows) == {"limit, M 64", "limit, M 32", "torch network, width 16", "WidthSimulator, width 64"}
    assert all(row.error is None for row in rows.values())
    assert float(rows["limit, M 64"].extra["time to equal error"]) == 1.0
    wide = rows["torch network, width 16"]
    assert float(wide.extra["sd of f"]) > float(rows["limit, M 64"].extra["sd of f"])


def test_networks_are_trained_as_the_theory_says(script):
    problem = script.PROBLEMS["tiny"]
    first, again, other = (script.network_run(problem, seed) for seed in (0, 0, 1))
    assert first.shape == (2, 1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_problems_on_digits_have_the_data_of_the_claims(script):
    X, Y, reduction = script.PROBLEMS["digits-32"].data()
    assert X.shape == (32, 64) and Y.shape == (32, 10) and reduction == "mean"
    np.testing.assert_allclose(np.linalg.norm(X, axis=1), 1, rtol=1e-12)
