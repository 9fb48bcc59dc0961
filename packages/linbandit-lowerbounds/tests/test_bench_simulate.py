"""The benchmark runs on a tiny set, counts its work, and names the peers that are not there."""

from pathlib import Path

import pytest

bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_simulate

    return bench_simulate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SAVE .practical.:UserWarning")
def test_every_contender_plays_or_says_why_not(script):
    comparison = script.measure("tiny", bench.Options(repeats=3, warmup=1, min_time=0.0))
    rows = {row.name: row for row in comparison.rows}
    ours = {"OFUL, 1 seed", "OFUL, 4 seeds", "LinTS, 4 seeds", "Weighted OFUL+, 4 seeds"}
    for name in ours | {"SAVE practical, 4 seeds", "NumPy loop, OFUL"}:
        assert rows[name].error is None
        assert float(rows[name].extra["rounds x seeds / s"]) > 0.0
    for name in ("mabwiser LinUCB", "contextualbandits LinUCB", "Vowpal Wabbit RegCB-opt"):
        if name in rows:
            assert rows[name].error is None
        else:
            assert comparison.absent[name].startswith("not installed")


def test_the_rate_counts_rounds_of_all_seeds(script):
    contender, first = script.ours(script.oful(), script.instance("fixed", 2, 3, 8), 4, 8)
    assert contender.work == 32
    assert first > 0.0
    assert contender.play() >= 0.0
