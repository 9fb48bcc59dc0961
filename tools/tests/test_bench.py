import argparse
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tenfold_tools import _memory, bench
from tenfold_tools._comparison import write_text
from tenfold_tools.bench import compare, main, write_json
from tenfold_tools.stats import paired_ratio

MIB = 2**20


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def nothing():
    return None


def failing():
    raise ValueError("no kernel for [/shape]\nand a long story")


class FakeClock:
    """Time that only advances when work is done, so that ratios are exact."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def work(self, seconds):
        def call():
            self.now += seconds

        return call


def test_ratio_and_median_are_those_of_the_work_done(monkeypatch):
    clock = FakeClock(monkeypatch)
    got = compare({"fast": clock.work(0.25), "slow": clock.work(0.75)}, baseline="fast", repeats=5)
    # sums of binary fractions are exact; the ratio goes through logarithms
    assert got.row("slow").median == 0.75
    assert got.row("slow").ratio.value == pytest.approx(3.0, rel=1e-14)
    assert got.row("fast").ratio.value == 1.0
    assert len(got.row("slow").seconds) == 5


def test_short_calls_are_looped_until_a_timing_lasts(monkeypatch):
    clock = FakeClock(monkeypatch)
    got = compare({"short": clock.work(2.0**-20), "long": clock.work(1.0)}, baseline="long", min_time=0.02)
    assert got.row("short").loops * 2.0**-20 >= 0.02
    assert got.row("short").loops * 2.0**-20 < 0.05
    assert got.row("long").loops == 1
    assert got.row("short").median == 2.0**-20


def test_drift_of_the_machine_cancels_in_the_paired_ratio(monkeypatch):
    clock = FakeClock(monkeypatch)
    calls = Counter()

    def slowing(name, seconds):
        def call():
            calls[name] += 1
            clock.now += seconds * 1.1 ** calls[name]

        return call

    got = compare({"a": slowing("a", 1.0), "b": slowing("b", 2.0)}, baseline="a", repeats=20)
    # rounding of 40 powers of 1.1
    assert got.row("b").ratio.low == pytest.approx(2.0, rel=1e-9)
    assert got.row("b").ratio.high == pytest.approx(2.0, rel=1e-9)


def test_the_ratio_is_the_paired_ratio_of_the_samples():
    got = compare({"a": nothing, "b": lambda: sum(range(50))}, baseline="a", repeats=8, min_time=0.0005)
    assert got.row("b").ratio == paired_ratio(got.row("b").seconds, got.row("a").seconds)
    assert got.row("b").ratio.value > 1


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_every_alternative_is_first_equally_often_and_follows_each_neighbour(names):
    rounds = 2 * len(names)
    orders = list(bench._orders(names, rounds))
    assert all(sorted(order) == names for order in orders)
    assert set(Counter(order[0] for order in orders).values()) == {2}
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert all(followed[a, b] == followed[b, a] for a, b in followed)


def test_rounds_are_interleaved(monkeypatch):
    clock = FakeClock(monkeypatch)
    log = []

    def named(name):
        def call():
            log.append(name)
            clock.now += 1.0

        return call

    compare({"a": named("a"), "b": named("b")}, baseline="a", repeats=4, warmup=1)
    assert log[-8:] == ["a", "b", "b", "a", "b", "a", "a", "b"]


def test_setup_runs_before_each_timing_and_outside_it(monkeypatch):
    clock = FakeClock(monkeypatch)
    calls = []

    def setup():
        calls.append(clock.now)
        clock.now += 100.0

    got = compare({"a": clock.work(1.0)}, baseline="a", repeats=3, warmup=2, setup=setup)
    assert got.row("a").seconds == (1.0, 1.0, 1.0)
    # 2 to warm up, 1 to calibrate, 1 for memory, 3 rounds
    assert len(calls) == 7


def test_sync_receives_the_value_and_is_part_of_the_time(monkeypatch):
    clock = FakeClock(monkeypatch)
    waited = []

    def sync(value):
        waited.append(value)
        clock.now += 0.5

    got = compare({"lazy": lambda: "promise"}, baseline="lazy", repeats=3, min_time=0.0, sync=sync)
    assert got.row("lazy").median == 0.5
    assert set(waited) == {"promise"}


def test_the_garbage_collector_is_off_while_timing_and_on_again_after():
    states = []
    compare({"a": lambda: states.append(gc.isenabled())}, baseline="a", repeats=3, warmup=1, min_time=0.0)
    assert states.count(False) == 5
    assert states.count(True) == 1  # the call that measures memory is not timed
    assert gc.isenabled()


def test_a_failing_alternative_is_reported_and_the_others_go_on():
    got = compare(
        {"base": nothing, "bad": failing, "good": nothing}, baseline="base", repeats=3, min_time=0.0
    )
    assert got.row("bad").error == "ValueError: no kernel for [/shape]"
    assert got.row("bad").ratio is None
    assert got.row("good").ratio is not None
    assert "failed: ValueError: no kernel for [/shape]" in got.markdown()


def test_an_alternative_that_fails_late_keeps_no_numbers():
    calls = []

    def tired():
        calls.append(None)
        if len(calls) > 4:
            raise RuntimeError("tired")

    got = compare({"a": tired, "b": nothing}, baseline="b", repeats=5, warmup=1, min_time=0.0)
    assert got.row("a").error == "RuntimeError: tired"
    assert got.row("a").seconds == ()


def test_a_failing_baseline_leaves_times_without_ratios():
    got = compare({"base": failing, "good": nothing}, baseline="base", repeats=3, min_time=0.0)
    assert got.row("good").ratio is None
    assert len(got.row("good").seconds) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "c"}, r"baseline must be one of \['a'\], got 'c'"),
        ({"repeats": 2}, "repeats must be >= 3 to give an interval, got 2"),
        ({"warmup": 0}, "warmup must be >= 1, got 0"),
        ({"min_time": -1.0}, "min_time must be finite and >= 0 seconds, got -1.0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": failing}, **{"baseline": "a", **options})


def test_a_cuda_device_that_is_not_there_is_an_error(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"device 'cuda' was asked for, but torch .* sees no CUDA device"):
        compare({"a": nothing}, baseline="a", device="cuda")


@pytest.mark.gpu
def test_cuda_time_and_memory_are_those_of_the_device():
    import torch

    x = torch.ones(64 * MIB // 4, device="cuda")
    got = compare({"once": lambda: x + 1, "thrice": lambda: x + 1 + 1 + 1}, baseline="once", device="cuda")
    # x + 1 needs one new block of 64 MiB; the chain holds two at a time
    assert got.row("once").peak_bytes == 64 * MIB
    assert got.row("thrice").peak_bytes == 128 * MIB
    # three kernels of equal size; a launch or a clock step may add a fifth
    assert got.row("thrice").ratio.value == pytest.approx(3.0, rel=0.2)


linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")

# Pages of the interpreter and of the C library's bookkeeping come and go by a few MiB.
PAGES = 8 * MIB


@linux
@pytest.mark.parametrize("method", ["high-water mark", "sampled"])
def test_peak_memory_is_that_of_the_pages_touched_in_the_call(monkeypatch, method):
    if method == "sampled":
        monkeypatch.setattr(_memory, "CLEAR_REFS", _memory.STATUS)  # cannot be written
    assert method in _memory.memory_method()

    def touch():
        blocks = [np.ones(8 * MIB, dtype=np.uint8) for _ in range(12)]
        time.sleep(0.02)  # long enough for the sampling thread
        return np.ones(2 * MIB, dtype=np.uint8), len(blocks)

    # The last block stays and keeps the C library from returning the freed ones below it: the last call
    # reuses memory that is resident before it begins.
    kept = [touch() for _ in range(3)]
    assert _memory.peak_memory(touch) == pytest.approx(96 * MIB, abs=PAGES)
    assert _memory.peak_memory(nothing) < PAGES
    del kept


def test_peak_memory_is_none_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(_memory.sys, "platform", "darwin")
    got = compare({"a": nothing}, baseline="a", repeats=3, min_time=0.0)
    assert got.row("a").peak_bytes is None
    assert "not measured" in got.markdown()
    assert "peak memory is not measurable here" in got.markdown()


def test_markdown_holds_circumstances_and_one_line_per_alternative(monkeypatch):
    clock = FakeClock(monkeypatch)
    got = compare({"a": clock.work(0.5), "b": clock.work(1.0)}, baseline="a", title="Steps", repeats=3)
    text = got.with_column("calls | s", lambda row: f"{1 / row.median:.0f}").markdown()
    lines = text.splitlines()
    assert lines[0] == "### Steps"
    assert got.environment["date"] in lines[2]
    assert got.environment["device"] in lines[2]
    assert f"load {got.environment['load']}" in lines[2]
    assert lines[-1].startswith("| b | 1 s | 2.000 | 2.000 to 2.000 |")
    assert lines[-1].endswith("| 1 |")
    assert len({line.count(" | ") for line in lines[-2:]}) == 1


def test_what_is_absent_is_named_with_its_reason_in_every_form():
    got = compare({"a": nothing, "b": nothing}, baseline="a", repeats=3, min_time=0.0)
    got = got.with_absent({"c": "not installed: No module named 'c'"}).with_absent({"d": "needs a GPU"})
    lines = got.markdown().splitlines()
    assert lines[-2] == "| c | not installed: No module named 'c' |  |  |  |"
    assert lines[-1] == "| d | needs a GPU |  |  |  |"
    assert len({line.count(" | ") for line in lines[-3:]}) == 1
    assert got.as_dict()["absent"] == {"c": "not installed: No module named 'c'", "d": "needs a GPU"}
    assert [row.name for row in got.rows] == ["a", "b"]


def test_environment_names_versions_of_loaded_frameworks_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    versions = bench.environment()["versions"]
    assert versions["numpy"] == np.__version__
    assert "jax" not in versions


def measure(workload, options):
    alternatives = {"base": nothing, "other": failing if workload == "broken" else nothing}
    return options.compare(alternatives, baseline="base", title=workload)


def run_main(*argv, parents=()):
    return main(
        measure,
        workloads=["one", "two", "broken"],
        default=["one"],
        description="x",
        argv=[*argv, "--repeats", "3", "--min-time", "0"],
        parents=parents,
    )


def test_main_prints_tables_and_writes_json_and_markdown(tmp_path, capsys):
    target = tmp_path / "new" / "steps.json"
    assert (
        run_main("--set", "one", "two", "--json", str(target), "--markdown", str(tmp_path / "steps.md")) == 0
    )
    saved = json.loads(target.read_text())
    assert [comparison["title"] for comparison in saved] == ["one", "two"]
    assert [row["name"] for row in saved[0]["rows"]] == ["base", "other"]
    assert len(saved[0]["rows"][0]["seconds"]) == 3
    assert (tmp_path / "steps.md").read_text().count("### ") == 2
    assert "other" in capsys.readouterr().out


def test_main_exits_1_when_an_alternative_failed_and_saves_what_went_well(tmp_path):
    target = tmp_path / "steps.json"
    assert run_main("--set", "broken", "--json", str(target)) == 1
    rows = json.loads(target.read_text())[0]["rows"]
    assert rows[1]["error"] == "ValueError: no kernel for [/shape]"
    assert rows[1]["median"] is None


def test_main_accepts_and_explains_the_options_of_the_benchmark_itself(capsys):
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--peer", help="file of another implementation")
    assert run_main("--peer", "x.py", parents=[own]) == 0
    with pytest.raises(SystemExit) as caught:
        run_main("--help", parents=[own])
    assert caught.value.code == 0
    assert "file of another implementation" in capsys.readouterr().out


def test_main_exits_0_when_an_alternative_is_absent(capsys):
    def incomplete(workload, options):
        return measure(workload, options).with_absent({"third": "not installed"})

    options = ["--repeats", "3", "--min-time", "0"]
    assert main(incomplete, workloads=["one"], default=["one"], description="x", argv=options) == 0
    assert "not installed" in capsys.readouterr().out


def test_main_names_the_accepted_sets_and_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_main("--set", "three")
    assert caught.value.code == 2
    assert "'one', 'two', 'broken'" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "steps.json"
    write_json(target, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"new": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert json.loads(target.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_importing_the_module_imports_no_framework():
    command = "import sys, tenfold_tools.bench; print({'torch', 'jax', 'triton'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "set()"
