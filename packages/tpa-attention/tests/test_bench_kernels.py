"""Kernels and tuning of the benchmarks: peers against float64 in the interpreter, which cut wins."""

import importlib
import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs triton, which is optional")
pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")

from tpa_attention.torch.kernels import decode_config  # noqa: E402
from tpa_attention.torch.kernels.decode_config import Cut, padded_rows  # noqa: E402

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROUNDING = 2e-5  # float32 against float64, the bound of claim C5


def imported(name):
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def tuning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("tune_decode")
    yield module
    for name in ("tune_decode", "memory"):
        del sys.modules[name]


def grouped_error(batch, heads, groups, tokens, width):
    kernels, contenders = imported("peer_kernels"), imported("contenders")
    draw = contenders.Random("cpu", torch.float32)
    q, k, v = (
        draw(batch, heads, width),
        draw(batch, groups, tokens, width),
        draw(batch, groups, tokens, width),
    )
    out = kernels.grouped_decode(q, k, v, kernels.Tiles(16, 4, 2, 3))
    errors = []
    for b in range(batch):
        for i in range(heads):
            g = i // (heads // groups)
            truth = contenders.attention(
                q[b, i : i + 1].double(), k[b, g].double(), v[b, g].double(), width**-0.5
            )
            errors.append(float((out[b, i].double() - truth[0]).abs().max()))
    return max(errors)


def latent_error(batch, heads, latent, rotary, tokens):
    kernels, contenders = imported("peer_kernels"), imported("contenders")
    draw = contenders.Random("cpu", torch.float32)
    q, cache = draw(batch, heads, latent + rotary), draw(batch, tokens, latent + rotary)
    out = kernels.latent_decode(q, cache, latent, 0.3, kernels.Tiles(16, 4, 2, 3))
    truths = [
        contenders.attention(q[b].double(), cache[b].double(), cache[b, :, :latent].double(), 0.3)
        for b in range(batch)
    ]
    return float((out.double() - torch.stack(truths)).abs().max())


@pytest.mark.parametrize("sizes", [(2, 6, 3, 70, 8), (1, 4, 4, 33, 12), (1, 8, 1, 64, 16)], ids=str)
def test_the_triton_peer_of_gqa_agrees_with_float64(triton_interpreter, sizes):
    assert triton_interpreter(grouped_error, *sizes) < ROUNDING


@pytest.mark.parametrize("sizes", [(2, 6, 16, 4, 70), (1, 70, 24, 16, 33)], ids=str)
def test_the_triton_peer_of_mla_agrees_with_float64(triton_interpreter, sizes):
    assert triton_interpreter(latent_error, *sizes) < ROUNDING


def test_cuts_to_try_are_distinct_ones_that_the_kernel_can_run(tuning):
    for target in tuning.TARGETS:
        cuts = tuning.candidates(target.shape)
        assert len(cuts) == len(set(cuts)) >= 6
        for cut in cuts:
            assert padded_rows(target.shape) % cut.block_rows == 0
            assert min(cut.block_m, cut.block_rows) >= 16
            assert not (cut.factored and target.shape.q_rank is None)
            assert cut.programs * cut.num_warps * 32 * cut.registers <= 1 << 16


def test_targets_are_the_shapes_that_the_benchmark_times(tuning):
    keys = [target.shape for target in tuning.TARGETS]
    assert len(keys) == len(set(keys))
    assert {(s.heads, s.head_dim) for s in keys if s.long} == {(h, D) for h in (32, 64) for D in (64, 128)}
    assert {s.itemsize for s in keys} == {1, 2}


def test_the_winner_is_the_nearest_to_the_best_of_all_sizes(tuning):
    a, b, c = (Cut(32, 32, False, 2, stages, 4) for stages in (1, 2, 3))
    order = tuning.ranked([{a: 1.0, b: 1.2, c: 9.0}, {a: 2.0, b: 1.0}])
    assert [cut for cut, _ in order] == [b, a]  # c did not run at both sizes
    assert order[0][1] == pytest.approx(math.sqrt(1.2))


def tuned_lines(file, broken):
    tuning = imported("tune_decode")
    from tpa_attention.torch.kernels import decode

    own = decode.decode_triton

    def failing(*args, cut=None, **kwargs):
        out, lse = own(*args, cut=cut, **kwargs)
        if cut == broken:
            out = out * 1.1
        return out, lse

    decode.decode_triton = failing
    target = tuning.Target(3, 16, (2, 1, 1), ((1, 64), (2, 32)), tried=3)
    return list(tuning.tune([target], "cpu", Path(file), rounds=3))


def test_tuning_writes_a_winner_and_leaves_out_what_disagrees(triton_interpreter, tuning, tmp_path):
    file = tmp_path / "tuned.json"
    target = tuning.Target(3, 16, (2, 1, 1), ((1, 64), (2, 32)), tried=3)
    other = {("NVIDIA X", target.shape): Cut(16, 16, False, 1, 2, 4)}
    file.write_text(decode_config.dump_tuned(other))
    broken = tuning.candidates(target.shape)[2]
    lines = triton_interpreter(tuned_lines, str(file), broken)
    assert any("differs by 1.0e-01 from the first cut" in line for line in lines)
    table = decode_config.load_tuned(file)
    assert table["NVIDIA X", target.shape] == other["NVIDIA X", target.shape]
    assert table["cpu", target.shape] in tuning.candidates(target.shape)[:2]


def test_tuning_without_a_gpu_says_so_and_writes_nothing(tuning, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main("cuda", tmp_path / "tuned.json", None, 1.0) == 2
    assert "sees none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
