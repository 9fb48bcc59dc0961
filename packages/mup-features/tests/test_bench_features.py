"""The benchmark of recording runs on a tiny network, and asks a peer in a process of its own."""

import sys
from pathlib import Path

import pytest

bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")
pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPTIONS = {"repeats": 3, "warmup": 1, "min_time": 0.0}


@pytest.fixture
def script(monkeypatch, x64):
    """bench_features.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_features

    return bench_features


def test_recording_is_timed_beside_the_forward_pass(script):
    comparison = script.measure("tiny", bench.Options(**OPTIONS))
    rows = {row.name: row for row in comparison.rows}
    assert set(rows) == {"forward pass", "forward pass and Gram"}
    assert all(row.error is None for row in rows.values())
    work = [float(rows[name].extra["Gflop"]) for name in ("forward pass", "forward pass and Gram")]
    assert 0 < work[0] < work[1]


def test_without_an_environment_for_it_the_peer_is_named_absent(script, monkeypatch):
    monkeypatch.delenv("NEURAL_TANGENTS_PYTHON", raising=False)
    comparison = script.measure_ntk(6, 2, bench.Options(**OPTIONS))
    assert [row.error for row in comparison.rows] == [None]
    assert "neural-tangents" in comparison.absent


def test_the_times_of_the_peers_process_are_read(script, monkeypatch):
    monkeypatch.setenv("NEURAL_TANGENTS_PYTHON", sys.executable)
    monkeypatch.setattr(
        script,
        "NT_SCRIPT",
        "import sys\nfor t in (1, 2, 3): print(t)\nassert sys.argv[1:] == ['6', '2', '3']",
    )
    comparison = script.measure_ntk(6, 2, bench.Options(**OPTIONS))
    shown = comparison.rows[0].extra["neural-tangents in its own process"]
    assert shown.startswith("2 s, ")
