"""The options of `train_lm.py`, the models they name, and how these are trained.

The presets of the paper come from `tpa_attention.config`. Two more are of this recipe: "toy", for trying out,
and "byte", for a byte-level run of minutes on one GPU. Their heads follow the rule that the paper states for
its own: as many as 4 d^2 attention parameters allow, those of MHA.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tenfold_tools.run_folder import UsageError
from tpa_attention import accounting
from tpa_attention.config import (
    IMPLS,
    PRESET_MECHANISMS,
    PRESETS,
    RECIPES,
    ModelConfig,
    TrainingRecipe,
    preset,
    training_recipe,
)

RANKS = (6, 2, 2)  # of the trained models; KV-only reads the last two
MULTIPLE = 64  # rows of an embedding, padded: 50304 for GPT-2's 50257
ALIASES = {"kv_only": "kvonly"}  # as the layer's variant is called
# What two calls must share for one to continue the other.
TRAJECTORY = (
    *("preset", "mechanism", "recipe", "vocabulary", "context", "seed", "precision"),
    *("batch", "steps", "warmup", "lr", "min_lr"),
)


@dataclass(frozen=True)
class Size:
    """A model of this recipe, before a mechanism is chosen.

    Attributes:
        width: d.
        layers: blocks.
        head_dim: D.
        latents: d_c, d_c' and d_R of MLA.
        context: tokens of a window.
        training: rates, batch and length.
    """

    width: int
    layers: int
    head_dim: int
    latents: tuple[int, int, int]
    context: int
    training: TrainingRecipe


SIZES = {
    "toy": Size(
        *(64, 2, 8, (16, 32, 8), 32),
        TrainingRecipe(
            lr=3e-3, min_lr=3e-4, micro_batch=8, accumulation=1, gpus=1, warmup_steps=20, steps=200
        ),
    ),
    "byte": Size(
        *(512, 8, 64, (128, 256, 32), 512),
        TrainingRecipe(
            lr=1e-3, min_lr=1e-4, micro_batch=64, accumulation=1, gpus=1, warmup_steps=100, steps=2000
        ),
    ),
}


def options(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """The command line, with what the preset decides filled in.

    Raises:
        UsageError: if a number is out of range.
    """
    parser = argparse.ArgumentParser(
        "train_lm.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=(*PRESETS, *SIZES), default="medium")
    add("--mechanism", choices=(*PRESET_MECHANISMS, *ALIASES), default="tpa")
    add("--recipe", choices=RECIPES, default="config", help="released configuration, or the paper's text")
    add("--data", required=True, help="folder of shards, or stdlib: bytes of Python's own source")
    add("--out", type=Path, required=True, help="folder of this run")
    add("--batch", type=int, help="sequences per step over all processes; default the preset's (480)")
    add("--micro-batch", type=int, help="sequences per forward pass of a process")
    add("--context", type=int, help="tokens per sequence")
    add("--steps", type=int, help="length of the schedule")
    add("--warmup", type=int)
    add("--lr", type=float, help="peak learning rate")
    add("--min-lr", type=float, help="at the end of the schedule")
    add("--vocabulary", type=int, help="rows of the embedding; default the encoding's, a multiple of 64")
    add("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="under torchrun")
    add("--precision", choices=("bfloat16", "float32"), help="default bfloat16 on a GPU, float32 on a CPU")
    add("--impl", choices=IMPLS, default="auto", help="of attention; it changes rounding and speed alone")
    add("--compile", action="store_true", help="torch.compile model and loss")
    add("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--stop-at", type=int, help="leave after this step, with a checkpoint")
    add("--eval-every", type=int, default=1000)
    add("--eval-windows", type=int, default=1000, help="held-out sequences, from the start of the shards")
    add("--checkpoint-every", type=int, default=1000)
    add("--log-every", type=int, default=10)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.mechanism = ALIASES.get(args.mechanism, args.mechanism)
    recipe = training_of(args.preset, args.recipe)
    defaults = {
        "batch": recipe.batch,
        "micro_batch": recipe.micro_batch,
        "context": SIZES[args.preset].context if args.preset in SIZES else recipe.sequence_length,
        "steps": recipe.steps,
        "warmup": recipe.warmup_steps,
        "lr": recipe.lr,
        "min_lr": recipe.min_lr,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a number out of range."""
    counts = ("batch", "micro_batch", "context", "steps", "vocabulary", "stop_at")
    for name in (*counts, "eval_every", "eval_windows", "checkpoint_every", "log_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    if not 0 <= args.warmup < args.steps:
        raise UsageError(f"--warmup must be in [0, steps), got {args.warmup} with {args.steps} steps")
    for name in ("lr", "min_lr"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name.replace('_', '-')} must be finite and > 0, got {value}")
    if args.seed < 0:
        raise UsageError(f"--seed must be >= 0, got {args.seed}")


def training_of(name: str, recipe: str) -> TrainingRecipe:
    """How a preset is trained."""
    return SIZES[name].training if name in SIZES else training_recipe(name, recipe=recipe)


def schedule(args: argparse.Namespace) -> TrainingRecipe:
    """How this run is trained: the preset's way with the options of the command line."""
    changed = {"lr": args.lr, "min_lr": args.min_lr, "warmup_steps": args.warmup, "steps": args.steps}
    return replace(training_of(args.preset, args.recipe), **changed)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """The model of preset and mechanism, with the vocabulary and context of this run."""
    if args.preset in SIZES:
        config = sized(SIZES[args.preset], args.mechanism, args.recipe)
    else:
        config = preset(args.preset, args.mechanism, recipe=args.recipe)
    return replace(config, vocab_size=args.vocabulary, max_position_embeddings=args.context, impl=args.impl)


def sized(size: Size, mechanism: str, recipe: str) -> ModelConfig:
    """The mechanism with the most heads whose attention has at most the 4 d^2 parameters of MHA.

    "mla_paper" is a table of the paper, for its own sizes.

    Raises:
        UsageError: for "mla_paper", and if not even the fewest heads fit.
    """
    if mechanism == "mla_paper":
        raise UsageError("--mechanism mla_paper is for the presets of the paper; use mla")
    name = "mla" if mechanism.startswith("mla") else mechanism
    latents = dict(zip(("kv_latent", "q_latent", "rope_dim"), size.latents, strict=True))
    groups = 2 if name == "gqa" else None
    q_rank, k_rank, v_rank = RANKS

    def with_heads(heads: int) -> ModelConfig:
        return ModelConfig(
            mechanism=name,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            head_dim=size.head_dim,
            q_rank=q_rank,
            k_rank=k_rank,
            v_rank=v_rank,
            num_key_value_heads=groups,
            init="t6" if recipe == "config" else "xavier",
            **(latents if name == "mla" else {}),
        )

    heads, step = 0, groups or 1
    while accounting.params(with_heads(heads + step)) <= 4 * size.width**2:
        heads += step
    if heads == 0:
        raise UsageError(f"no {name} layer of width {size.width} has at most 4 d^2 parameters")
    return with_heads(heads)


def padded_vocabulary(tokens: int) -> int:
    """The next multiple of 64."""
    return -(-tokens // MULTIPLE) * MULTIPLE
