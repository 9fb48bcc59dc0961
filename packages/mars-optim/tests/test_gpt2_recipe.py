"""experiments/gpt2.py trains on token files, alone and with two ranks, continues exactly, and judges runs."""

import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the recipes show their progress with it")
pytest.importorskip("tenfold_tools.workloads", reason="the recipe trains the workshop's GPT")

from recipes import EXPERIMENTS, assert_identical, checkpoint, script, status

gpt2, settings = (script(name) for name in ("gpt2", "gpt2_settings"))

# The limit of a call is for a busy machine; the work takes seconds.
PATIENCE = 240
VOCABULARY = 16
STEPS = 6
FORMS = [
    ("adamw",),
    ("muon",),
    ("mars-adamw",),
    ("mars-adamw", "--exact"),
    ("mars-lion", "--exact"),
    ("mars-shampoo", "--exact"),
    ("mars-m",),
]


@pytest.fixture
def files(tmp_path):
    """Token files of 200 and 150 tokens: a repeated sequence, so there is something to learn."""
    for name, count in (("train", 200), ("val", 150)):
        (np.arange(count) * 3 % VOCABULARY).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    return tmp_path


def arguments(folder, out, *more, optimizer="mars-adamw", steps=STEPS):
    """A model of two layers and width 32, on batches of 8 sequences of 8 tokens."""
    text = "--layers 2 --heads 2 --width 32 --context 8 --batch 8 --micro-batch 2 --warmup 1 --lr 0.01"
    text += f" --vocabulary {VOCABULARY} --eval-every 2 --checkpoint-every 2 --log-every 1 --steps {steps}"
    files = ["--train", folder / "train.bin", "--val", folder / "val.bin", "--out", folder / out]
    return [str(part) for part in (*files, *text.split(), "--optimizer", optimizer, *more)]


def train(folder, out, *more, **options):
    assert status("gpt2", arguments(folder, out, *more, **options)) == 0
    return checkpoint(folder / out)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_log_checkpoint_and_summary(files, capsys):
    # 20 steps at ten times the usual rate take a repeated sequence of 16 tokens far below chance
    state = train(files, "run", "--exact", steps=20)
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert summary["val_loss"] < 0.5 * math.log(VOCABULARY)
    assert state["step"] == 20
    assert summary["val_loss"] == state["evaluations"][-1][1]
    assert summary["tokens"] == 20 * 8 * 8
    assert summary["tokens_evaluated"] == 2 * summary["tokens"]
    log = lines(files / "run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 20
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.1  # untrained: near chance
    assert [entry["step"] for entry in log if "val_loss" in entry] == list(range(2, 21, 2))
    out, err = capsys.readouterr()
    assert "validation loss" in out
    assert err == ""  # no progress bar where nobody watches
    assert {path.name for path in (files / "run").iterdir()} == {"log.jsonl", "checkpoint.pt", "summary.json"}


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(files, form):
    optimizer, *more = form
    whole = train(files, "whole", *more, optimizer=optimizer)
    half = train(files, "parts", *more, "--stop-at", 3, optimizer=optimizer)
    assert half["step"] == 3
    parts = train(files, "parts", *more, "--resume", optimizer=optimizer)
    assert_identical(parts, whole)
    kept = [[e for e in lines(files / out) if "loss" in e] for out in ("whole", "parts")]
    for entry in (*kept[0], *kept[1]):
        del entry["tokens_per_second"]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_that_continues_it(files, monkeypatch, number):
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    whole = train(files, "whole", "--checkpoint-every", 100)
    tokens, batches = gpt2.Tokens, []
    windows = tokens.windows

    def interrupt_third_batch(self, starts):
        batches.append(starts)
        if len(batches) == 3:
            signal.raise_signal(number)
        return windows(self, starts)

    options = ("--checkpoint-every", 100, "--eval-every", 100)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "windows", interrupt_third_batch)
        assert status("gpt2", arguments(files, "stopped", *options)) == 128 + number
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint(files / "stopped")["step"] == 3
    assert not (files / "stopped" / "summary.json").exists()
    continued = train(files, "stopped", "--resume", *options)
    assert_identical(continued["model"], whole["model"])
    assert_identical(continued["optimizer"], whole["optimizer"])


def test_a_log_line_cut_short_is_dropped_when_the_run_continues(files):
    train(files, "run", "--stop-at", 2)
    with (files / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    train(files, "run", "--resume")
    assert [entry["step"] for entry in lines(files / "run") if "loss" in entry] == list(range(1, STEPS + 1))


def test_accumulation_changes_a_run_by_rounding_only(files):
    parts, at_once = train(files, "parts", "--exact"), train(files, "once", "--exact", "--micro-batch", 8)
    # the mean over the batch is summed in another order; six steps of Adam amplify it
    assert parts["evaluations"][-1][1] == pytest.approx(at_once["evaluations"][-1][1], rel=1e-5)


def test_the_forms_differ_from_the_second_step_on(files):
    runs = {form: train(files, form, *more) for form, more in (("approx", ()), ("exact", ("--exact",)))}
    losses = {form: [e["loss"] for e in lines(files / form) if "loss" in e] for form in runs}
    assert losses["approx"][:2] == losses["exact"][:2]  # c_1 = g_1 in both
    assert losses["approx"][2] != losses["exact"][2]


def exact_steps_by_hand(files, steps):
    """The recipe's exact form again: whole batches, h_t by autograd at a kept copy, one factor for both."""
    args = settings.options(arguments(files, "unused", "--exact", steps=steps), None)
    model = gpt2.ByteGPT(gpt2.GPTConfig(32, 2, 2, 8, VOCABULARY), torch.Generator().manual_seed(0))
    optimizer, order = gpt2.build_optimizer(model, args), torch.Generator().manual_seed(1)
    tokens = np.fromfile(files / "train.bin", np.uint16).astype(np.int64)
    rate = gpt2.warmup_cosine(steps, 1, 3e-5 / 0.01)
    names, params = zip(*model.named_parameters(), strict=True)
    before, norms = [param.detach().clone() for param in params], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate(step)
        starts = torch.randint(200 - 8, (8,), generator=order)
        rows = torch.from_numpy(np.stack([tokens[start : start + 9] for start in starts.tolist()]))

        def gradient(values, rows=rows):
            leaves = [value.detach().clone().requires_grad_() for value in values]
            logits = torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), rows[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            return torch.autograd.grad(loss, leaves)

        g, h = gradient(params), gradient(before)
        norms.append(torch.linalg.vector_norm(torch.cat([part.flatten() for part in g])))
        factor = min(1.0, 1.0 / (norms[-1].item() + 1e-6))
        before = [param.detach().clone() for param in params]
        for param, part in zip(params, g, strict=True):
            param.grad = part * factor
        optimizer.step(prev_grads=[part * factor for part in h])
    return {name: param.detach() for name, param in zip(names, params, strict=True)}, norms


def test_the_exact_form_clips_both_gradients_by_one_factor_and_equals_steps_by_hand(files):
    found = train(files, "run", "--exact")["model"]
    expected, norms = exact_steps_by_hand(files, STEPS)
    assert min(norms) > 1.1  # every step is clipped
    for name, value in expected.items():
        # float32 sums in another order, amplified where Adam divides by a small second moment
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def two_ranks(rank, world_size, argv):
    torch.set_num_threads(1)
    return status("gpt2", argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "optimizer"),
    [
        ("ddp", "mars-adamw"),
        ("ddp", "mars-shampoo"),
        ("fsdp2", "mars-adamw"),
        ("fsdp2", "mars-shampoo"),
        ("fsdp2", "muon"),
        ("fsdp2", "adamw"),
    ],
)
def test_two_ranks_train_as_one_and_their_checkpoint_continues_on_one(
    run_distributed, files, parallel, optimizer
):
    more = ("--exact",) if optimizer.startswith("mars") else ()
    alone = train(files, "alone", *more, optimizer=optimizer)
    stopped = arguments(files, "shared", *more, "--parallel", parallel, "--stop-at", 4, optimizer=optimizer)
    assert run_distributed(two_ranks, 2, stopped, timeout=PATIENCE) == [0, 0]
    losses = [[e["loss"] for e in lines(files / out) if "loss" in e] for out in ("alone", "shared")]
    # float32 sums in another order: a few units in the last place per step, amplified by the normalisation
    assert losses[1] == pytest.approx(losses[0][:4], rel=1e-5)
    continued = train(files, "shared", *more, "--resume", optimizer=optimizer)
    assert [step for step, _ in continued["evaluations"]] == [2, 4, 6]
    for (_, expected), (_, found) in zip(alone["evaluations"], continued["evaluations"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_two_ranks_and_a_checkpoint_of_one_continues_sharded(files):
    alone = train(files, "alone", "--exact")
    train(files, "run", "--exact", "--stop-at", 2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    rest = arguments(files, "run", "--exact", "--resume", "--parallel", "fsdp2")
    done = subprocess.run(
        [*launcher, str(EXPERIMENTS / "gpt2.py"), *rest], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1  # one rank speaks
    found = checkpoint(files / "run")["evaluations"][-1][1]
    assert found == pytest.approx(alone["evaluations"][-1][1], rel=1e-5)  # as above


def damaged(files, what):
    if what == "missing":
        (files / "train.bin").unlink()
    elif what == "token":
        np.full(200, VOCABULARY, np.uint16).tofile(files / "train.bin")
    elif what == "validation token":
        np.full(200, VOCABULARY, np.uint16).tofile(files / "val.bin")
    elif what == "short":
        np.zeros(8, np.uint16).tofile(files / "val.bin")
    elif what == "odd":
        (files / "train.bin").write_bytes(b"123")
    elif what == "checkpoint":
        (files / "run").mkdir()
        (files / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("missing", (), "train.bin does not exist"),
        ("token", (), "must hold tokens below 16, got 16"),
        ("validation token", (), "val.bin must hold tokens below 16, got 16"),
        ("short", (), "must hold more than 8 tokens, got 8"),
        ("odd", (), "odd number of bytes"),
        ("batch", ("--batch", 9), "--batch must be a multiple of processes x micro-batch = 1 x 2, got 9"),
        ("exact", ("--optimizer", "adamw", "--exact"), "--exact needs a mars optimizer, got adamw"),
        ("warm-up", ("--warmup", 6), "--warmup must be in [0, steps), got 6 with 6 steps"),
        ("rate", ("--lr", "nan"), "--lr must be finite and > 0, got nan"),
        ("alone", ("--parallel", "fsdp2"), "--parallel fsdp2 needs torchrun"),
        ("heads", ("--heads", 5), "--width must be a multiple of --heads, got 32 and 5"),
        ("nothing", ("--resume",), "checkpoint.pt does not exist"),
        ("checkpoint", ("--resume",), "checkpoint.pt cannot be read"),
        ("against", ("--against", "nowhere"), "nowhere holds no finished run"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(files, capsys, what, more, message):
    damaged(files, what)
    assert status("gpt2", arguments(files, "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gpt2.py: error: ")
    assert error.count("\n") == 1


def test_a_run_is_neither_overwritten_nor_continued_under_other_settings(files, capsys):
    before = train(files, "run", "--stop-at", 2)
    assert status("gpt2", arguments(files, "run")) == 2
    assert "--resume" in capsys.readouterr().err
    assert status("gpt2", arguments(files, "run", "--resume", "--seed", 1)) == 2
    assert "seed 0 -> 1" in capsys.readouterr().err
    assert_identical(checkpoint(files / "run"), before)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(files, capsys):
    assert status("gpt2", arguments(files, "run", "--lr", 1e30, optimizer="adamw")) == 1
    assert "the loss is nan at step" in capsys.readouterr().err


def test_the_defaults_are_the_published_settings():
    options = settings.options
    needed = ["--train", "t", "--val", "v", "--out", "o"]

    def found(text):
        args = options([*needed, *text.split()], None)
        return args.lr, args.min_lr, args.gamma, args.batch, args.context, args.steps, args.warmup

    shared = (0.025, 480, 1024, 100_000, 2000)
    assert found("") == (6e-3, 3e-5, *shared)
    assert found("--size medium") == (3e-3, 6e-5, *shared)
    assert found("--size large") == found("--size xl") == (2e-3, 1e-5, *shared)
    assert found("--size medium --optimizer mars-m")[0] == 5e-3
    assert found("--size large --optimizer adamw")[:2] == (2e-4, 1e-5)
    assert found("--optimizer muon")[0] == 2e-2
    with pytest.raises(settings.UsageError, match="--lr is needed"):
        options([*needed, "--optimizer", "mars-lion"], None)


@pytest.mark.parametrize(
    ("optimizer", "vectors", "embeddings", "matrices"),
    [
        # (rate over --lr, decay) of each kind of parameter
        ("mars-adamw", (0.5, 0.1), (1.0, 0.01), (1.0, 0.01)),
        ("mars-shampoo", (0.5, 0.1), (0.5, 0.01), (1.0, 0.01)),
        ("mars-m", (1.0, 0.1), (1.0, 0.1), (1.0, 0.1)),
        ("muon", (0.15, 0.0), (0.15, 0.1), (1.0, 0.0)),
        ("adamw", (1.0, 0.0), (1.0, 0.1), (1.0, 0.1)),
    ],
)
def test_each_kind_of_parameter_has_its_published_rate_and_decay(optimizer, vectors, embeddings, matrices):
    args = settings.options(f"--train t --val v --out o --optimizer {optimizer} --lr 0.5".split(), None)
    model = gpt2.ByteGPT(gpt2.GPTConfig(), torch.Generator().manual_seed(0))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = gpt2.build_optimizer(model, args)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # a gradient of zero leaves the decay alone: x <- (1 - rate decay) x
    wanted = {"norm.weight": vectors, "tokens.weight": embeddings, "blocks.0.mlp_in.weight": matrices}
    for name, (rate, decay) in wanted.items():
        expected = start[name] * (1 - 0.5 * rate * decay)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, msg=name)


def finished(arm, lr, loss, tokens=5_000_000_000, size="small"):
    return {"arm": arm, "lr": lr, "val_loss": loss, "tokens": tokens, "size": size}


ADAMW = [finished("adamw", lr, loss) for lr, loss in ((3e-4, 3.21), (6e-4, 3.19), (1.2e-3, 3.20))]
MARS = [finished("mars-adamw approx", lr, loss) for lr, loss in ((3e-3, 3.15), (6e-3, 3.11), (1.2e-2, 3.13))]


@pytest.mark.parametrize(
    ("runs", "expected", "reason"),
    [
        (ADAMW + MARS, "PASS", "-0.0800"),
        (ADAMW + [{**run, "val_loss": run["val_loss"] + 0.06} for run in MARS], "FAIL", "-0.0200"),
        (ADAMW[:2] + MARS, "INCONCLUSIVE", "best rate of adamw is at its grid's edge"),
        (ADAMW + MARS[1:], "INCONCLUSIVE", "best rate of mars-adamw approx is at its grid's edge"),
        (MARS, "NOT-RUN", "of adamw"),
        (ADAMW + [{**run, "tokens": 10**9} for run in MARS], "NOT-RUN", "of mars-adamw approx"),
        (ADAMW + [{**run, "size": "medium"} for run in MARS], "NOT-RUN", "of mars-adamw approx"),
        (ADAMW + [{**run, "tokens": 10**10} for run in MARS], "NOT-RUN", "differ in tokens"),
    ],
)
def test_the_verdict_follows_the_rule_for_gpt2_small(runs, expected, reason):
    found, why = settings.verdict(runs, "mars-adamw approx")
    assert found == expected
    assert reason in why


def test_published_losses_stand_beside_the_evaluation_nearest_in_tokens():
    args = settings.options(["--train", "t", "--val", "v", "--out", "o"], None)
    summary = settings.summary_of(args, [[9000, 3.3], [10_000, 3.12], [11_000, 3.1], [100_000, 2.85]])
    rows = {
        row["tokens"]: (row["measured"], row["published"]["mars-adamw approx"]) for row in summary["beside"]
    }
    assert rows == {5e9: (3.12, 3.108), 20e9: (None, 2.981), 50e9: (2.85, 2.849)}
    report = settings.report({**summary, "verdict": "NOT-RUN", "reason": "alone"})
    assert any("at 5B tokens: 3.120; published: adamw 3.193, muon 3.165" in line for line in report)


def test_runs_named_against_enter_the_verdict(files, capsys):
    other = files / "other"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps(finished("adamw", 1e-3, 3.2)))
    train(files, "run", "--against", other)
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert summary["verdict"] == "NOT-RUN"
    assert summary["reason"].endswith("of mars-adamw approx")  # AdamW's is there, this toy does not count
