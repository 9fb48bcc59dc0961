"""GPT-2's options and the paper's settings and results: what `gpt2.py` runs by default, and its verdict.

Source: Yuan et al. 2025 (arXiv 2411.10438) and the authors' configurations; Muon on medium and large from
their README; mars-m from Liu et al. 2025 (arXiv 2510.21800).
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tenfold_tools.run_folder import UsageError

OPTIMIZERS = ("adamw", "muon", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m")
SHAPE = ("layers", "heads", "width")
SIZES = {  # layers, heads, width, lowest learning rate of the schedule
    "small": (12, 12, 768, 3e-5),
    "medium": (24, 16, 1024, 6e-5),
    "large": (36, 20, 1280, 1e-5),
    "xl": (48, 25, 1600, 1e-5),
}
RATES = {  # peak learning rates of the four sizes
    "adamw": (6e-4, 3e-4, 2e-4, 2e-4),
    "muon": (2e-2, 1e-2, 6.67e-3, 6.67e-3),
    "mars-adamw": (6e-3, 3e-3, 2e-3, 2e-3),
    "mars-m": (6e-3, 5e-3, 5e-3, 5e-3),
}
# What two calls must share for one to continue the other.
TRAJECTORY = (
    *(*SHAPE, "context", "vocabulary", "seed", "precision"),
    *("optimizer", "exact", "lr", "min_lr", "gamma", "batch", "steps", "warmup"),
)

# Validation loss at 5, 20 and 50 billion tokens. "approx" and "exact" are MARS-AdamW.
TOKENS = (5e9, 20e9, 50e9)
LOSSES = {
    "small": {
        "adamw": (3.193, 3.024, 2.885),
        "muon": (3.165, 3.006, 2.901),
        "mars-adamw approx": (3.108, 2.981, 2.849),
        "mars-adamw exact": (3.107, 2.980, 2.847),
    },
    "medium": {
        "adamw": (3.084, 2.821, 2.691),
        "muon": (3.009, 2.813, 2.688),
        "mars-adamw approx": (2.969, 2.763, 2.636),
    },
    "large": {
        "adamw": (3.013, 2.741, 2.561),
        "muon": (2.915, 2.691, 2.573),
        "mars-adamw approx": (2.876, 2.647, 2.518),
    },
}

MARGIN = -0.03
# The published "5B" is 10k steps of 480 x 1024 tokens.
LEAST_TOKENS = 10_000 * 480 * 1024
# An evaluation counts as "at 5B tokens" if it is this close: 10k steps are 4.92B.
NEARNESS = 0.025


def options(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpt2.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, required=True, help="token file to train on")
    add("--val", type=Path, required=True, help="token file to evaluate on, all of it")
    add("--out", type=Path, required=True, help="folder of this run")
    add("--size", choices=SIZES, default="small")
    add("--optimizer", choices=OPTIMIZERS, default="mars-adamw")
    add("--exact", action="store_true", help="exact form of a mars optimizer")
    add("--lr", type=float, help="peak learning rate; default: the published one of optimizer and size")
    add("--gamma", type=float, default=0.025, help="strength of the correction")
    add("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    add("--batch", type=int, default=480, help="sequences per step, over all processes")
    add("--micro-batch", type=int, default=15, help="sequences per forward pass of a process")
    add("--steps", type=int, default=100_000, help="length of the schedule")
    add("--warmup", type=int, default=2000)
    add("--stop-at", type=int, help="leave after this step, with a checkpoint")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--eval-every", type=int, default=1000)
    add("--checkpoint-every", type=int, default=1000)
    add("--log-every", type=int, default=10)
    add("--precision", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--compile", action="store_true", help="torch.compile the blocks and the loss")
    add("--fused", action="store_true", help="fused kernels of the mars optimizers")
    add("--against", type=Path, nargs="*", default=[], help="folders of finished runs, for the verdict")
    add("--seed", type=int, default=0)
    for name in SHAPE:
        add(f"--{name}", type=int, help="instead of the size's own")
    add("--context", type=int, default=1024)
    add("--vocabulary", type=int, default=50304)
    args = parser.parse_args(argv)

    *shape, lowest = SIZES[args.size]
    asked = [getattr(args, name) for name in SHAPE]
    for name, given, own in zip(SHAPE, asked, shape, strict=True):
        setattr(args, name, own if given is None else given)
    if asked != [None] * 3 or (args.context, args.vocabulary) != (1024, 50304):
        args.size = "custom"  # nothing is published for it
    elif args.lr is None and args.optimizer in RATES:
        args.lr = RATES[args.optimizer][list(SIZES).index(args.size)]
    if args.lr is None:
        raise UsageError(f"--lr is needed: no rate is published for {args.optimizer} at this size")
    args.min_lr = min(lowest, args.lr)
    if args.exact and not args.optimizer.startswith("mars"):
        raise UsageError(f"--exact needs a mars optimizer, got {args.optimizer}")
    counts = ("batch", "micro_batch", "steps", "eval_every", "checkpoint_every", "log_every")
    for name in (*SHAPE, "context", "vocabulary", *counts):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    if args.width % args.heads:
        raise UsageError(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    if not 0 <= args.warmup < args.steps:
        raise UsageError(f"--warmup must be in [0, steps), got {args.warmup} with {args.steps} steps")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise UsageError(f"--lr must be finite and > 0, got {args.lr}")
    return args


def summary_of(args: argparse.Namespace, evaluations: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """What `summary.json` says of a finished run, with the published losses beside the measured ones.

    Args:
        args: the options of the run.
        evaluations: (step, validation loss), the last one at the end of the run.
    """
    form = "exact" if args.exact else "approx"
    arm = f"{args.optimizer} {form}" if args.optimizer.startswith("mars") else args.optimizer
    per_step = args.batch * args.context
    seen = [(step * per_step, loss) for step, loss in evaluations]
    beside = []
    for column, tokens in enumerate(TOKENS if args.size in LOSSES else ()):
        near = [(abs(at - tokens), loss) for at, loss in seen if abs(at / tokens - 1) <= NEARNESS]
        published = {name: losses[column] for name, losses in LOSSES[args.size].items()}
        beside.append({"tokens": tokens, "measured": min(near)[1] if near else None, "published": published})
    return {
        "arm": arm,
        "size": args.size,
        "lr": args.lr,
        "seed": args.seed,
        "steps": args.steps,
        "tokens": seen[-1][0],
        "tokens_evaluated": seen[-1][0] * (2 if args.exact else 1),
        "val_loss": seen[-1][1],
        "beside": beside,
    }


def verdict(runs: Iterable[dict[str, Any]], arm: str) -> tuple[str, str]:
    """Verdict and reason of "MARS minus AdamW <= -0.03 at the end of a run of 5B tokens, both grids tuned".

    A grid is tuned if its best rate has a worse one on either side. One run per rate: no interval over seeds.

    Args:
        runs: summaries of finished runs, of `arm` and of AdamW at several rates each.
        arm: the arm to be judged.
    """
    if not arm.startswith("mars"):
        return "NOT-RUN", "the claim is about MARS"
    enough = [run for run in runs if run["size"] == "small" and run["tokens"] >= LEAST_TOKENS]
    grids = {name: {run["lr"]: run for run in enough if run["arm"] == name} for name in (arm, "adamw")}
    missing = [name for name, grid in grids.items() if not grid]
    if missing:
        return "NOT-RUN", f"needs finished runs of GPT-2 small, 5B tokens or more, of {' and '.join(missing)}"
    lengths = {run["tokens"] for grid in grids.values() for run in grid.values()}
    if len(lengths) > 1:
        return "NOT-RUN", f"the runs differ in tokens: {', '.join(map(str, sorted(lengths)))}"
    best = {name: min(grid, key=lambda lr, grid=grid: grid[lr]["val_loss"]) for name, grid in grids.items()}
    gap = grids[arm][best[arm]]["val_loss"] - grids["adamw"][best["adamw"]]["val_loss"]
    measured = f"{arm} at {best[arm]:g} minus adamw at {best['adamw']:g} is {gap:+.4f} (asked: <= {MARGIN})"
    at_edge = [name for name, grid in grids.items() if not min(grid) < best[name] < max(grid)]
    if at_edge:
        return "INCONCLUSIVE", f"{measured}; the best rate of {' and '.join(at_edge)} is at its grid's edge"
    return ("PASS" if gap <= MARGIN else "FAIL"), measured


def report(summary: dict[str, Any]) -> list[str]:
    """The summary in lines to read.

    Args:
        summary: what `summary_of` returned, with its verdict.
    """
    rows = [
        f"{summary['arm']} {summary['size']}, lr {summary['lr']:g}: validation loss "
        f"{summary['val_loss']:.4f} after {summary['steps']} steps, {summary['tokens'] / 1e9:.3g}B tokens"
    ]
    for row in summary["beside"]:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3f}"
        published = ", ".join(f"{name} {loss:.3f}" for name, loss in row["published"].items())
        rows.append(f"at {row['tokens'] / 1e9:.0f}B tokens: {measured}; published: {published}")
    return [*rows, f"MARS beats AdamW by {-MARGIN}: {summary['verdict']}, {summary['reason']}"]
