"""experiments/train_lm.py trains alone and with two ranks, continues exactly, and sizes every mechanism."""

import json
import math
import signal
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the recipe trains torch models")
pytest.importorskip("tenfold_tools.data", reason="the recipe runs in the monorepo's workshop")

from recipe_runs import EXPERIMENTS, checkpoint, lines, script, status  # noqa: E402

from tpa_attention import accounting  # noqa: E402
from tpa_attention.config import PRESET_MECHANISMS, preset  # noqa: E402
from tpa_attention.torch import T6  # noqa: E402

train_lm, settings, shards = (script(name) for name in ("train_lm", "train_settings", "shards"))

PATIENCE = 240  # of a call on a busy machine; the work takes seconds
VOCABULARY = 16
STEPS = 6
MECHANISMS = [name for name in PRESET_MECHANISMS if name not in ("mla_matched", "mla_paper")]


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Without the runtime check of annotations, a third of the time here: tests of the layers have it on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def files(tmp_path):
    """Shards of 200 and 150 tokens: a repeated sequence, so there is something to learn."""
    (tmp_path / "shards").mkdir()
    for name, count in (("train_0", 120), ("train_1", 80), ("val", 150)):
        (np.arange(count) * 3 % VOCABULARY).astype(np.uint16).tofile(tmp_path / "shards" / f"{name}.bin")
    (tmp_path / "shards" / "meta.json").write_text(json.dumps({"vocabulary": VOCABULARY}))
    return tmp_path


def arguments(folder, out, *more, steps=STEPS):
    """The toy preset on batches of 8 sequences of 8 tokens, in 4 micro-batches."""
    text = "--preset toy --context 8 --batch 8 --micro-batch 2 --warmup 1 --lr 0.01 --vocabulary 16"
    text += f" --eval-every 2 --checkpoint-every 2 --log-every 1 --device cpu --steps {steps}"
    files = ["--data", folder / "shards", "--out", folder / out]
    return [str(part) for part in (*files, *text.split(), *more)]


def train(folder, out, *more, **sizes):
    assert status(arguments(folder, out, *more, **sizes)) == 0
    return checkpoint(folder / out)


def assert_identical(left, right):
    """Two nested structures, equal to the last bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_identical(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def losses(out):
    kept = [entry for entry in lines(out) if "loss" in entry]
    for entry in kept:
        del entry["tokens_per_second"]
    return kept


# -------------------------------------------------------------------------------------------------- one run


def test_a_run_learns_and_leaves_log_checkpoint_and_summary(files, capsys):
    state = train(files, "run", steps=20)
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert summary["val_loss"] < 0.5 * math.log(VOCABULARY)
    assert summary["val_loss"] == state["evaluations"][-1][1]
    assert (state["step"], state["sequences"], summary["tokens"]) == (20, 160, 20 * 8 * 8)
    log = lines(files / "run")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 21))
    assert [entry["step"] for entry in log if "val_loss" in entry] == list(range(2, 21, 2))
    assert losses(files / "run")[0]["loss"] > math.log(VOCABULARY)  # untrained: no better than chance
    assert (log[0]["parameters"], log[0]["cached_numbers_per_token_and_layer"]) == (
        accounting.model_params(settings.model_config(settings.options(arguments(files, "run"), None))),
        4 * (9 + 8),
    )
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""  # no progress bar where nobody watches
    assert {path.name for path in (files / "run").iterdir()} == {"log.jsonl", "checkpoint.pt", "summary.json"}


def test_the_weights_of_a_checkpoint_load_into_the_model_of_the_package(files):
    state = train(files, "run")
    model = T6(settings.model_config(settings.options(arguments(files, "run"), None)))
    model.load_state_dict(state["model"])
    corpus = shards.open_corpus(str(files / "shards"), 8)
    rows = corpus.val.rows(range(corpus.val.windows), VOCABULARY)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    # the recipe's own evaluation, summed in parts of two sequences
    assert loss.item() == pytest.approx(state["evaluations"][-1][1], rel=1e-5)


def test_a_step_is_one_of_adamw_on_the_whole_batch(files):
    """The recipe by hand: the windows of the formula, the schedule, clipping at 1, decay on everything."""
    found = train(files, "run", "--batch", 4, "--micro-batch", 4, steps=2)
    args = settings.options(arguments(files, "unused", steps=2), None)
    model = T6(settings.model_config(args), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    corpus = shards.open_corpus(str(files / "shards"), 8)
    for step, rate in enumerate((0.01, 0.01)):  # one step of warm-up, then the start of the cosine
        rows = corpus.train.rows(corpus.train.order(range(4 * step, 4 * step + 4), 0), VOCABULARY)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits, targets = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, targets, reduction="none").mean().backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
    for name, value in model.state_dict().items():
        # Roundings of 1e-8, larger where a gradient is as small as Adam's eps, hence the mean of all. Leaving
        # out the decay or the clipping moves it by 1e-4.
        assert (found["model"][name] - value).abs().mean() < 1e-7, name


@pytest.mark.parametrize("mechanism", ["tpa", "mla"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(files, mechanism):
    more = ("--mechanism", mechanism)
    whole = train(files, "whole", *more)
    half = train(files, "parts", *more, "--stop-at", 3)
    assert half["step"] == 3
    assert not (files / "parts" / "summary.json").exists()
    with (files / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 1.0}\n{"step": 4, "lo')  # of a step that is run again, and cut short
    assert_identical(train(files, "parts", *more, "--resume"), whole)
    assert losses(files / "parts") == losses(files / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_that_continues_it(files, monkeypatch, number):
    before = signal.getsignal(signal.SIGINT)
    rare = ("--checkpoint-every", 100, "--eval-every", 100)
    whole = train(files, "whole", *rare)
    order, calls = shards.Shards.order, []

    def interrupt_third_step(self, sequences, seed):
        calls.append(seed)
        if len(calls) == 3:
            signal.raise_signal(number)
        return order(self, sequences, seed)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "order", interrupt_third_step)
        assert status(arguments(files, "stopped", *rare)) == 128 + number
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint(files / "stopped")["step"] == 3
    assert_identical(train(files, "stopped", "--resume", *rare), whole)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(files, monkeypatch, capsys):
    train(files, "run", "--stop-at", 2)
    monkeypatch.setattr(train_lm, "token_losses", lambda logits, _: logits.sum(-1) * math.nan)
    assert status(arguments(files, "run", "--resume")) == 1
    assert "the loss is nan at step 2" in capsys.readouterr().err
    assert checkpoint(files / "run")["step"] == 2


# --------------------------------------------------------------------------------------------- the mechanisms


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", settings.SIZES)
def test_every_mechanism_has_as_many_heads_as_the_parameters_of_mha_allow(name, mechanism):
    size = settings.SIZES[name]
    config = settings.sized(size, mechanism, "config")
    assert config.num_hidden_layers == size.layers
    budget = 4 * size.width**2
    assert 0.9 * budget < accounting.params(config) <= budget
    heads = config.num_attention_heads
    assert {"mha": size.width // size.head_dim, "mqa": 2 * size.width // size.head_dim - 1}.get(
        mechanism, heads
    ) == heads  # 4 d h D and 2 d D (h + 1) equal 4 d^2 exactly
    with torch.device("meta"):
        model = T6(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == accounting.model_params(config)


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "mla_paper", "kv_only"])
def test_presets_of_the_paper_keep_their_heads(mechanism):
    args = settings.options(["--data", "x", "--out", "x", "--mechanism", mechanism], None)
    args.vocabulary = 50304
    known = preset("medium", settings.ALIASES.get(mechanism, mechanism))
    assert settings.model_config(args) == known
    assert (args.batch, args.micro_batch, args.steps, args.warmup, args.lr) == (480, 20, 100_000, 2000, 6e-4)
    assert settings.schedule(args) == settings.training_recipe("medium")


@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name not in ("tpa", "mla")])
def test_every_other_mechanism_trains(files, mechanism):
    train(files, "run", "--mechanism", mechanism, steps=2)
    first, second = losses(files / "run")
    assert second["loss"] < first["loss"]


def test_a_vocabulary_is_padded_to_a_multiple_of_64():
    assert [settings.padded_vocabulary(n) for n in (50257, 256, 257)] == [50304, 256, 320]


# ------------------------------------------------------------------------------------------ several processes


def two_ranks(rank, world_size, argv):
    torch.set_num_threads(1)
    return status(argv)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_and_their_checkpoint_continues_on_one(run_distributed, files, parallel):
    alone = train(files, "alone")
    stopped = arguments(files, "shared", "--parallel", parallel, "--stop-at", 4)
    assert run_distributed(two_ranks, 2, stopped, timeout=PATIENCE) == [0, 0]
    # float32 sums in another order: a few units in the last place per step, amplified by Adam
    for one, two in zip(losses(files / "alone"), losses(files / "shared"), strict=False):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    continued = train(files, "shared", "--resume")
    assert [step for step, _ in continued["evaluations"]] == [2, 4, 6]
    for (_, expected), (_, found) in zip(alone["evaluations"], continued["evaluations"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_two_ranks_and_a_checkpoint_of_one_continues_sharded(files):
    alone = train(files, "alone")
    train(files, "run", "--stop-at", 2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    rest = arguments(files, "run", "--resume", "--parallel", "fsdp2")
    done = subprocess.run(
        [*launcher, str(EXPERIMENTS / "train_lm.py"), *rest], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(alone["evaluations"][-1][1], rel=1e-5)  # as above


@pytest.mark.slow  # compiles forward and backward
def test_a_compiled_run_is_the_plain_one_but_for_rounding(files):
    launcher = [sys.executable, str(EXPERIMENTS / "train_lm.py")]
    done = subprocess.run(
        [*launcher, *arguments(files, "compiled", "--compile", steps=2)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    train(files, "plain", steps=2)
    for one, two in zip(losses(files / "plain"), losses(files / "compiled"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)  # fused sums round otherwise


# ----------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "nowhere"), "--data must be a folder of shards or 'stdlib', got nowhere"),
        (("--context", 200), "must hold more than 200 tokens, got 120 at most"),
        (("--vocabulary", 8), "--vocabulary must be at least the encoding's 16, got 8"),
        (("--batch", 9), "--batch must be a multiple of processes x micro-batch = 1 x 2, got 9"),
        (("--warmup", 6), "--warmup must be in [0, steps), got 6 with 6 steps"),
        (("--lr", "nan"), "--lr must be finite and > 0, got nan"),
        (("--eval-windows", 0), "--eval-windows must be >= 1, got 0"),
        (("--seed", -1), "--seed must be >= 0, got -1"),
        (("--parallel", "fsdp2"), "--parallel fsdp2 needs torchrun"),
        (("--mechanism", "mla_paper"), "--mechanism mla_paper is for the presets of the paper; use mla"),
        (("--resume",), "checkpoint.pt does not exist"),
    ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(files, capsys, more, message):
    assert status(arguments(files, "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (files / "run" / "checkpoint.pt").exists()


def test_a_run_in_the_folder_is_neither_overwritten_nor_continued_under_other_settings(files, capsys):
    before = train(files, "run", "--stop-at", 2)
    for more, message in (
        ((), "holds a run; continue it with --resume"),
        (("--resume", "--lr", 0.02), "--resume cannot change settings: lr 0.01 -> 0.02"),
    ):
        assert status(arguments(files, "run", *more)) == 2
        assert message in capsys.readouterr().err
    np.zeros(130, np.uint16).tofile(files / "shards" / "train_0.bin")
    assert status(arguments(files, "run", "--resume")) == 2
    assert "data [['train_0.bin', 120]" in capsys.readouterr().err
    assert_identical(checkpoint(files / "run"), before)
    (files / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert status(arguments(files, "run", "--resume")) == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err
