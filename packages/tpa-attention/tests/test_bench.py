"""The benchmarks run on tiny sets, know what they measure, and name the peers that this machine lacks."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")

from tpa_attention import accounting  # noqa: E402
from tpa_attention.config import preset  # noqa: E402

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FEW = bench.Options(repeats=3, warmup=1, min_time=0.0)
ROUNDING = 2e-5  # float32 against float64, the bound of claim C5


@pytest.fixture
def modules(monkeypatch):
    """The benchmarks as their command lines import them, with a copy bandwidth that costs no seconds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("bench_decode", "bench_cache", "bench_prefill", "contenders", "peers", "memory", "plot_decode")
    loaded = argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(
        loaded.bench_decode, "copy_bandwidth", lambda device: loaded.memory.copy_bandwidth(device, 2**16, 1)
    )
    yield loaded
    for name in names:
        del sys.modules[name]


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.delenv("TPA_AUTHORS", raising=False)
    for name in ("flash_attn", "flashinfer", "flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)


# ---------------------------------------------------------------------------------------------------- decode


def test_every_contender_decodes_and_missing_peers_are_named(modules, no_peers):
    got = modules.bench_decode.measure("tiny", FEW)
    assert {row.name for row in got.rows} == {
        "TPA (16,1,1)",
        "TPA (16,2,2)",
        "TPA KV-only, rank 1",
        "TPA (16,1,1), paged",
        "MHA, SDPA",
        "GQA-2, SDPA",
        "GQA-2, SDPA, groups folded",
        "MQA, SDPA",
        "MQA, SDPA, groups folded",
        "MLA 16+4, SDPA, absorbed",
    }
    assert [row.error for row in got.rows if row.error is not None] == []
    assert set(got.absent) == {"flash-attn", "flashinfer", "FlashMLA", "the authors' FlashTPA"}
    assert all(reason.startswith("not installed: ") for reason in got.absent.values())
    for row in got.rows:
        assert float(row.extra["error"]) < ROUNDING
        assert float(row.extra["share of the bytes floor"]) >= 0


@pytest.mark.parametrize("batch", [1, 3])
def test_every_step_agrees_with_its_float64_truth(modules, batch):
    work = modules.contenders.Workload(150, batch, heads=6, width=8, groups=3, latent=16, rotary=4)
    lineup = modules.contenders.contenders(work, "cpu", torch.float32)
    assert ("TPA (16,1,1), ragged" in lineup) == (batch > 1)
    for name, contender in lineup.items():
        step = contender.build()
        assert step.error() < ROUNDING, name


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_eight_bits_decode_with_the_error_of_rounding_the_cache(modules, kind):
    work = modules.contenders.Workload(150, 2, heads=6, width=8)
    step = modules.contenders.tpa_step(
        work, (16, 1, 1), kind, modules.contenders.Random("cpu", torch.float32)
    )
    # outputs are of size 0.3; int8 rounds to 1/254 of a row's largest number, fp8 to 1/16 of each number
    assert ROUNDING < step.error() < (0.03 if kind == "int8" else 0.1)
    # rows of 14 numbers on 16 bytes and a scale of 4, for K and for V
    assert step.bytes == 2 * 150 * 2 * (16 + 4)


def test_a_wrong_step_shows_in_the_error(modules):
    work = modules.contenders.Workload(150, heads=6, width=8, groups=3, latent=16, rotary=4)
    step = modules.contenders.contenders(work, "cpu", torch.float32)["MHA, SDPA"].build()
    wrong = modules.contenders.Step(lambda: step.call() * 1.01, step.truth, step.bytes)
    assert wrong.error() > ROUNDING


def test_cached_numbers_and_bytes_are_those_of_the_paper(modules):
    work = modules.contenders.Workload(10)
    lineup = modules.contenders.contenders(work, "cpu", torch.float32)
    numbers = {name: contender.numbers for name, contender in lineup.items()}
    assert numbers["TPA (16,1,1)"] == 192 and numbers["TPA (16,2,2)"] == 384
    assert (numbers["MHA, SDPA"], numbers["GQA-4, SDPA"], numbers["MQA, SDPA"]) == (4096, 512, 128)
    assert numbers["MLA 256+32, SDPA, absorbed"] == 288
    for name, contender in lineup.items():
        assert contender.build().bytes == 10 * contender.numbers * 4, name


def test_only_takes_the_named_contenders_and_the_baseline(modules, no_peers):
    got = modules.bench_decode.measure("tiny", FEW, only="^MQA, SDPA$")
    assert {row.name for row in got.rows} == {"TPA (16,1,1)", "MQA, SDPA"}
    assert got.absent == {}


def test_caches_that_do_not_fit_are_left_out_with_the_reason(modules, no_peers, monkeypatch):
    # float32, 96 tokens: MHA's 64 numbers need 24 KiB, all the others together 89 KiB
    monkeypatch.setattr(modules.bench_decode, "free_bytes", lambda _: 100 * 1024)
    work = modules.bench_decode.CPU_SETS["tiny"]
    lineup, absent = modules.bench_decode.chosen(work, "cpu", torch.float32, None)
    assert "MHA, SDPA" not in lineup and "TPA (16,1,1)" in lineup
    assert "does not fit" in absent["MHA, SDPA"]


def test_the_paper_grid_has_its_widths_batches_and_lengths(modules):
    grid = modules.bench_decode.PAPER_GRID.values()
    assert {work.heads * work.width for work in grid} == {1024, 2048, 3072}
    assert {work.batch for work in grid} == {1, 2, 4, 8, 16}
    assert {work.tokens for work in grid} == {2**power for power in range(12, 20)}
    assert len(grid) == 3 * 5 * 8


def test_the_plot_has_a_panel_per_shape_and_skips_what_failed(modules, tmp_path):
    rows = [
        {"name": "TPA (16,1,1)", "error": None, "median": 1e-3},
        {"name": "MHA, SDPA", "error": "OutOfMemoryError", "median": None},
    ]
    titles = [
        "x: B 1, M 64, h 4, D 8, float32",
        "y: B 1, M 32, h 4, D 8, float32",
        "z: B 2, M 64, h 4, D 8, x",
    ]
    comparisons = [{"title": title, "rows": rows} for title in titles]
    lines = modules.plot_decode.lines_of(comparisons)
    assert lines == {
        "h 4, D 8, B 1": {"TPA (16,1,1)": [(64, 1e-3), (32, 1e-3)]},
        "h 4, D 8, B 2": {"TPA (16,1,1)": [(64, 1e-3)]},
    }
    source, target = tmp_path / "decode.json", tmp_path / "decode.svg"
    source.write_text(json.dumps(comparisons))
    assert modules.plot_decode.main([str(source), str(target)]) == 0
    assert "<svg" in target.read_text()
    assert modules.plot_decode.main([]) == 2


@pytest.mark.slow  # a fresh process imports torch
def test_the_command_writes_what_it_measured(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_decode.py"), "--set", "tiny", "--repeats", "3"]
    command += ["--warmup", "1", "--min-time", "0", "--only", "GQA", "--json", str(tmp_path / "decode.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "decode.json").read_text())
    assert table["baseline"] == "TPA (16,1,1)"
    assert len(table["rows"]) == 3


# ----------------------------------------------------------------------------------------------------- peers


def attend(q, k, v, scale=None):
    """(B, 1, h, D) against (B, M, G, D), as the peers lay them out."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    share = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(share, dim=1) for tensor in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


def authors_decode(aq, ak, av, bq, bk, bv):
    """What the authors' kernels are asked for, by einsums; rank-1 factors come without their last axis."""
    ak, av, bk, bv = (x if x.dim() == 4 else x[..., None] for x in (ak, av, bk, bv))
    assert ak.is_contiguous() and aq.shape[:2] == (ak.shape[0], 1) and bq.shape[2] == aq.shape[3] == 16
    q = torch.einsum("bnhr,bnrd->bhd", aq, bq) / 16
    k = torch.einsum("bmhs,bmds->bhmd", ak, bk) / ak.shape[-1]
    v = torch.einsum("bmhs,bmes->bhme", av, bv) / av.shape[-1]
    weights = (torch.einsum("bhd,bhmd->bhm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhm,bhme->bhe", weights, v)[:, None]


class PagedWrapper:
    """What flashinfer's wrapper is asked for, by torch."""

    def __init__(self, *given):
        assert given[1] == "NHD"

    def plan(self, *given, **types):
        indptr, indices, last_page, heads, groups, width, page = given
        assert int(last_page[0]) == page and int(indptr[-1]) == len(indices)
        assert (heads, groups > 0, width) == (4, True, 8) and set(types) == {"q_data_type", "kv_data_type"}
        self.batch = len(last_page)

    def run(self, q, pages):
        k, v = (cache.view(self.batch, -1, *cache.shape[2:]) for cache in pages)
        return attend(q[:, None], k, v)[:, 0]


def flash_mla_with_kvcache(q, paged, table, lens, dv, plan, splits, *, softmax_scale, causal):
    assert plan == "plan" and splits == "splits" and causal
    cache = paged[table.long()].flatten(1, 2)
    assert set(lens.tolist()) == {cache.shape[1]}
    return attend(q, cache, cache[..., :dv], softmax_scale), None


@pytest.fixture
def installed(monkeypatch):
    """The peers' functions, written in torch: what the adapters pass must make sense to them."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=attend))
    flashinfer = SimpleNamespace(
        single_decode_with_kv_cache=lambda q, k, v: attend(q[None, None], k[None], v[None])[0, 0],
        BatchDecodeWithPagedKVCacheWrapper=PagedWrapper,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    flash_mla = SimpleNamespace(
        get_mla_metadata=lambda *_: ("plan", "splits"), flash_mla_with_kvcache=flash_mla_with_kvcache
    )
    monkeypatch.setitem(sys.modules, "flash_mla", flash_mla)
    monkeypatch.setenv("TPA_AUTHORS", "nowhere")
    for name in ("flashtpa_decode_triton", "flashtpa_decode_triton_multi_kvrank"):
        kernel = SimpleNamespace(tpa_decode_parallel_bn_triton=authors_decode)
        monkeypatch.setitem(sys.modules, name, kernel)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["flash_attn", "flashinfer", "flash_mla", "flash_tpa"])
def test_adapters_hand_the_peers_what_they_expect(modules, installed, name, batch):
    work = modules.contenders.Workload(128, batch, heads=4, width=8, groups=2, latent=512, rotary=64)
    lineup = getattr(modules.peers, name)(work, "cpu", torch.float32)
    assert len(lineup) == {"flash_mla": 1, "flash_tpa": 2}.get(name, 3)
    for label, contender in lineup.items():
        step = contender.build()
        assert step.error() < ROUNDING, label
        assert step.bytes == batch * 128 * contender.numbers * 4


def test_installed_peers_are_not_used_without_cuda(modules, installed):
    work = modules.contenders.Workload(128, latent=512, rotary=64)
    lineup, absent = modules.peers.peer_contenders(work, "cpu", torch.float32)
    assert lineup == {}
    assert set(absent.values()) == {"not usable here: it runs on CUDA only"}


def test_flash_mla_says_which_widths_it_lacks(modules, installed):
    _, absent = modules.peers.peer_contenders(modules.contenders.Workload(128), "cuda", torch.float32)
    assert "this set has 256 and 32" in absent["FlashMLA"]


# ------------------------------------------------------------------------------------------ cache and prefill


def test_the_cache_benchmark_times_append_and_step_of_the_family(modules):
    got = modules.bench_cache.measure("tiny", FEW)
    names = {
        f"{m}, {what}" for m in ("mha", "mqa", "gqa", "mla", "kvonly", "tpa") for what in ("append", "step")
    }
    assert {row.name for row in got.rows} == names | {"tpa, append paged", "tpa, append int8"}
    assert [row.error for row in got.rows if row.error is not None] == []
    numbers = {row.name.split(",")[0]: int(row.extra["numbers per token"]) for row in got.rows}
    assert numbers == {"mha": 1536, "mqa": 128, "gqa": 256, "mla": 288, "kvonly": 344, "tpa": 392}
    assert got.row("tpa, step").extra["MHA's over these"] == "3.92"
    assert got.row("mha, step").extra["cache of the model (MiB)"] == f"{12 * 1536 * 24 * 4 / 2**20:.2f}"


def test_a_timed_step_attends_to_the_whole_cache_and_appends_one_token(modules):
    work = modules.bench_cache.Workload("small", 20)
    layer = modules.bench_cache.build(work, "tpa", "cpu", torch.float32)
    with torch.no_grad():
        first = layer.step()
        assert layer.cache.past_length(0) == 21
        layer.cache.crop(20)
        assert torch.equal(layer.step(), first)
        layer.cache.crop(3)
        assert not torch.allclose(layer.step(), first)


@pytest.mark.parametrize("phase", ["forward", "training"])
def test_prefill_counts_what_autograd_keeps(modules, phase):
    got = modules.bench_prefill.measure(f"small-16-{phase}", FEW)
    assert [row.error for row in got.rows if row.error is not None] == []
    assert {"heads alone, SDPA", "TPA, sdpa", "MHA, 12 heads, SDPA"} <= {row.name for row in got.rows}
    assert "TPA, triton" in {row.name for row in got.rows} | set(got.absent)
    kept = accounting.saved_activations(preset("small", "tpa"), materialised=True)
    row = got.row("TPA, sdpa")
    assert row.extra["saved numbers per token"] == str(kept)
    assert row.extra["formula: materialised / factors"] == f"{kept} / 3190"


def test_saved_storages_count_once(modules):
    x = torch.ones(100, requires_grad=True)
    # the product keeps both halves of one storage, exp keeps its result of 50 numbers
    assert modules.bench_prefill.saved_bytes(lambda: (x[:50] * x[50:]).exp()) == 400 + 200
