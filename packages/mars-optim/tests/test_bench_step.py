"""The benchmarks run on small workloads, list every contender that this machine has, and name the others."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
bench = pytest.importorskip("tenfold_tools.bench", reason="the benchmarks run in the monorepo's workshop")

from mars_optim.torch import MARS  # noqa: E402
from tenfold_tools.stats import paired_ratio  # noqa: E402

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FEW = bench.Options(repeats=3, warmup=1, min_time=0.0)

TORCH = {"AdamW foreach", "AdamW for-loop", "AdamW fused"}
OURS = {
    *(f"mars-adamw {backend}, clip=1.0" for backend in ("foreach", "for-loop")),
    *(f"mars-lion {backend}, clip=1.0" for backend in ("foreach", "for-loop")),
    "mars-adamw foreach, clip=None",
    "mars-lion foreach, clip=None, memory_efficient",
    "mars-shampoo foreach",
    "mars-shampoo for-loop",
    "mars-m foreach",
    "mars-m foreach, bfloat16 as Muon",
}
FUSED = {
    "mars-adamw fused, clip=1.0",
    "mars-adamw fused, clip=None",
    "mars-adamw fused, clip=1.0, steal_grad",
    "mars-adamw fused, clip=None, steal_grad",
    "mars-lion fused, clip=1.0",
    "mars-lion fused, clip=None, memory_efficient",
}
JAX_MUON = "optax.contrib.muon jit, adamw on the rest"  # in newer releases of optax
JAX = {
    "optax.adamw jit",
    "mars_optim.jax mars-adamw jit, clip=1.0",
    "mars_optim.jax mars-adamw jit, clip=None",
    "mars_optim.jax mars-lion jit, clip=1.0",
    "mars_optim.jax mars-m jit, adamw on the rest",
    JAX_MUON,
}
PEERS = {  # module -> rows, without version numbers
    "pytorch_optimizer": {"pytorch_optimizer MARS foreach", "pytorch_optimizer MARS for-loop"},
    "timm": {"timm Mars"},
}
MUON = "Muon, AdamW foreach on the rest"
RELEASE = """
import torch

class MARS(torch.optim.SGD):
    def __init__(self, params, lr, betas, eps, gamma, weight_decay, betas_1d{more}):
        super().__init__(params, lr=lr)
"""


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules as its command line imports them: their folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("bench_step", "bench_training", "contenders", "jax_steps", "peers")
    yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.fixture
def no_peers(monkeypatch):
    """A machine with torch alone (jax stays, because scipy looks for it among the loaded modules)."""
    for name in ("apex", "optax", "pytorch_optimizer", "timm"):
        monkeypatch.setitem(sys.modules, name, None)


def unversioned(name):
    return re.sub(r" \d+(\.\w+)+", "", name)


def expected_of_torch(modules):
    fused = FUSED if modules.contenders.fused_problem("cpu") is None else set()
    return TORCH | OURS | fused | ({MUON} if hasattr(torch.optim, "Muon") else set())


@pytest.mark.slow  # many bootstraps; the kernels may have to be compiled
def test_torch_alone_times_its_optimisers_and_ours_and_names_what_is_missing(modules, no_peers):
    got = modules.bench_step.measure("pair", FEW)
    assert {row.name for row in got.rows} == expected_of_torch(modules)
    assert [row.name for row in got.rows if row.error is not None] == []
    for peer in (
        "pytorch_optimizer MARS",
        "timm Mars",
        "apex FusedAdam",
        "optax.adamw jit",
        "mars_optim.jax jit",
    ):
        assert got.absent[peer].startswith("not installed: ")
    assert got.absent["official MARS"] == "not given: its file is named by --official"


def test_only_takes_the_named_contenders_and_relates_them_to_their_counterparts_within_the_rounds(
    modules, no_peers
):
    got = modules.bench_step.measure("pair", FEW, only="^mars-lion for-loop")
    assert {row.name for row in got.rows} == {
        "AdamW foreach",
        "AdamW for-loop",
        "mars-lion for-loop, clip=1.0",
    }
    assert got.absent == {}
    ours, counterpart = got.row("mars-lion for-loop, clip=1.0"), got.row("AdamW for-loop")
    ratio = paired_ratio(ours.seconds, counterpart.seconds)
    text = ours.extra["ratio to its counterpart"]
    assert text == f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) AdamW for-loop"
    assert counterpart.extra["ratio to its counterpart"] == ""


@pytest.mark.parametrize("name", ["many-4k", "gpt2-small", "one-100M"])
def test_large_sets_say_why_orthogonalised_types_are_left_out(modules, name):
    lineup, absent = modules.contenders.orthogonalised(modules.bench_step.SETS[name], "cpu")
    assert lineup == {}
    assert set(absent) == {"mars-shampoo foreach", "mars-shampoo for-loop", "mars-m foreach", MUON}
    reason = "this set has no hidden matrix" if name == "one-100M" else "on CPU: .* operations per step"
    assert all(re.search(f"left out.* {reason}", text) for text in absent.values())


def test_the_sets_are_those_of_the_spec(modules):
    sets = modules.bench_step.SETS
    assert (len(sets["gpt2-small"]), len(sets["one-100M"]), len(sets["many-4k"])) == (148, 1, 1000)
    sizes = {name: sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in sets.items()}
    assert (sizes["one-100M"], sizes["many-4k"]) == (100_000_000, 1000 * 4096)
    assert sizes["gpt2-small"] == 124_439_808  # the published size of GPT-2 small


def test_the_files_of_the_release_are_loaded_from_where_they_are(modules, no_peers, tmp_path):
    files = {"mars.py": "", "mars_fused.py": ", foreach=None, optimize_1d=False"}
    for name, more in files.items():
        (tmp_path / name).write_text(RELEASE.format(more=more))
    (tmp_path / "empty.py").write_text("")
    paths = [tmp_path / name for name in (*files, "empty.py", "missing.py")]
    lineup, absent = modules.peers.peer_contenders("cpu", paths)
    names = ["official MARS (mars.py)", "official MARS (mars_fused.py)"]
    assert list(lineup) == [*names, "official MARS (mars_fused.py) foreach, vectors too"]
    assert "has no class MARS" in absent["official MARS (empty.py)"]
    assert "is no Python file" in absent["official MARS (missing.py)"]
    params = modules.bench_step.parameters([(3, 2)], "cpu")
    before = params[0].detach().clone()
    for contender in lineup.values():
        contender.build(params)()
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("clip", [1.0, None])
def test_stealing_gets_fresh_gradients_and_makes_the_step_of_fused_mars(modules, clip):
    if modules.contenders.fused_problem("cpu") is not None:
        pytest.skip(modules.contenders.fused_problem("cpu"))
    params, others = (modules.bench_step.parameters([(5, 4), (4,)], "cpu") for _ in range(2))
    gradients = [param.grad for param in params]
    steal, copy = modules.contenders.stealing(clip)(params), MARS(others, clip=clip, fused=True)
    for _ in range(4):
        steal()
        copy.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    # the other contenders find the gradients where they were
    assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))


def test_stealing_reads_gradient_and_previous_gradient_from_different_memory(modules, monkeypatch):
    made = []

    class Recorded(MARS):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **{**options, "fused": None})
            made.append(self)

    monkeypatch.setattr(modules.contenders, "MARS", Recorded)
    params = modules.bench_step.parameters([(5, 4)], "cpu")
    steal = modules.contenders.stealing(1.0)(params)
    kept = []
    for _ in range(4):
        steal()
        (state,) = made[0].state.values()
        kept.append(state["last_grad"].data_ptr())
    assert kept[0] == kept[2] != kept[1] == kept[3]
    assert params[0].grad.data_ptr() not in kept


@pytest.mark.parametrize(
    ("peer", "options"),
    [
        ("pytorch_optimizer MARS foreach", {"prev_grad_init": "zero"}),
        ("pytorch_optimizer MARS for-loop", {"prev_grad_init": "zero"}),
        ("timm Mars", {"weight_decay_1d": 0.0}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what peers warn about at import is theirs
@pytest.mark.slow  # imports torchvision
def test_a_peer_makes_the_steps_of_approximate_mars_adamw(modules, peer, options):
    pytest.importorskip(peer.split()[0])
    lineup, _ = modules.peers.peer_contenders("cpu")
    (contender,) = [c for name, c in lineup.items() if unversioned(name) == peer]
    params, ours = (modules.bench_step.parameters([(30, 20), (20,)], "cpu") for _ in range(2))
    step, reference = contender.build(params), MARS(ours, **options)
    generator = torch.Generator().manual_seed(7)
    for _ in range(6):
        for a, b in zip(params, ours, strict=True):
            # norms of the matrix from 0.5 to 5, so that some steps are clipped; no entry is near zero, where
            # the epsilon of pytorch_optimizer, added before the bias correction, would be seen
            size = 0.02 + 0.2 * torch.rand((), generator=generator)
            signs = torch.randn(a.shape, generator=generator).sign()
            a.grad = size * signs * (0.5 + torch.rand(a.shape, generator=generator))
            b.grad = a.grad.clone()
        step()
        reference.step()
    for a, b in zip(params, ours, strict=True):
        # six steps of 3e-3 in float32; the epsilons differ by 1e-5 of a step at most
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.slow  # a fresh process imports jax, torchvision and more
def test_the_command_lists_every_contender_of_this_machine(modules, tmp_path):
    (tmp_path / "mars.py").write_text(RELEASE.format(more=""))
    command = [sys.executable, str(BENCHMARKS / "bench_step.py"), "--set", "pair", "--repeats", "3"]
    command += ["--warmup", "1", "--min-time", "0", "--official", str(tmp_path / "mars.py")]
    command += ["--json", str(tmp_path / "steps.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "steps.json").read_text())
    expected = expected_of_torch(modules) | {"official MARS (mars.py)"}
    for module, rows in PEERS.items():
        expected |= rows if find_spec(module) else set()
    if find_spec("jax") and find_spec("optax"):
        expected |= JAX if find_spec("optax.contrib._muon") else JAX - {JAX_MUON}
    assert {unversioned(row["name"]) for row in table["rows"]} == expected
    assert {row["name"]: row["error"] for row in table["rows"] if row["error"]} == {}
    assert ("apex FusedAdam" in table["absent"]) == (not torch.cuda.is_available())


def test_training_reports_tokens_per_second_of_both_forms(modules):
    got = modules.bench_training.measure("small", FEW)
    names = {row.name for row in got.rows} | set(got.absent)
    assert names == {
        "AdamW foreach",
        "MARS approximate, foreach",
        "MARS approximate, fused",
        "MARS exact, at_previous_params",
        "MARS exact, closure",
    }
    assert [row.error for row in got.rows if row.error is not None] == []
    for row in got.rows:
        assert row.extra["tokens/s"] == f"{16 * 64 / row.median:.0f}"


@pytest.mark.parametrize("form", ["MARS exact, at_previous_params", "MARS exact, closure"])
def test_the_exact_form_trains_with_two_passes_over_one_batch(modules, form):
    training = modules.bench_training
    make, once = training.CONTENDERS[form]
    model = training.ByteGPT(
        training.GPTConfig(width=8, heads=2, context=4), torch.Generator().manual_seed(0)
    )
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[0][0, 0])))
    batches = ((torch.full((1, 4), token), torch.full((1, 4), token)) for token in range(3))
    state = training.Training(model, make(model.parameters()), batches)
    for _ in range(3):
        once(state)
    # way 2 needs no h_1 = g_1 pass, way 1 runs its body at the first step too
    assert seen == ([0, 0, 1, 1, 2, 2] if "at_previous" in form else [0, 1, 1, 2, 2])
