"""C6 and C8: T6 as a byte-level language model of the standard library, one mechanism against another.

The design is fixed before looking (spec, section f): d = 128, 2 layers, D = 32, 16 windows of 128 bytes per
step, AdamW with the paper's betas, decay 0.1 and clipping at 1, 50 warm-up steps and a cosine to 10 %. Heads
are chosen so that no attention layer has more parameters than MHA's 4 d^2 = 65,536. Within a seed every arm
sees the same batches and starts from the same embedding.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import side_by_side
import torch

from tenfold_tools import data
from tenfold_tools.claims import Number, Run
from tenfold_tools.workloads import evaluate, token_batches, token_windows, train, warmup_cosine
from tpa_attention import accounting
from tpa_attention.config import ModelConfig
from tpa_attention.torch.model import T6, param_groups

WIDTH, LAYERS, HEAD_DIM, CONTEXT, BATCH, WARMUP, FLOOR = 128, 2, 32, 128, 16, 50, 0.1
RATES = (1.5e-3, 3e-3, 6e-3)
TUNING_SEED = 99
THIS = sys.modules[__name__]


@dataclass(frozen=True)
class Arm:
    """An attention mechanism and its peak learning rate.

    Attributes:
        name: as the report shows it.
        mechanism: of `ModelConfig`.
        heads: h.
        ranks: (R_Q, R_K, R_V); not read by the baselines.
        kv_heads: G of GQA.
        init: of the attention's matrices.
        lr: peak learning rate.
    """

    name: str
    mechanism: str
    heads: int
    ranks: tuple[int, int, int] = (1, 1, 1)
    kv_heads: int | None = None
    init: str = "xavier"
    lr: float = 3e-3

    @property
    def config(self) -> ModelConfig:
        """The whole model."""
        q_rank, k_rank, v_rank = self.ranks
        return ModelConfig(
            mechanism=self.mechanism,
            vocab_size=256,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=self.heads,
            head_dim=HEAD_DIM,
            q_rank=q_rank,
            k_rank=k_rank,
            v_rank=v_rank,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=CONTEXT,
            init=self.init,
            impl="sdpa",  # mechanisms are compared, not kernels
        )


MHA = Arm("MHA, h 4", "mha", 4)
TPA = Arm("TPA (4,1,1), h 8", "tpa", 8, (4, 1, 1))
BASELINES = [MHA, Arm("MQA, h 7", "mqa", 7), Arm("GQA, h 6, 2 KV heads", "gqa", 6, kv_heads=2)]
OTHERS = [
    Arm("KV-only rank 1, h 6", "kvonly", 6),
    Arm("TPA (3,2,2), h 7", "tpa", 7, (3, 2, 2)),
    replace(TPA, name="TPA (4,1,1), h 8, init t6", init="t6"),
]
# C8 changes the rank alone: heads and W^Q stay, the parameters of K and V grow with the rank
RANKS = [Arm(f"KV-only rank {rank}", "kvonly", 6, (1, rank, rank)) for rank in (1, 2, 4)]


@dataclass(frozen=True)
class Length:
    """How long a model is trained and how much held-out text it is judged on.

    Attributes:
        steps: optimiser steps.
        windows: held-out windows of 128 bytes; None for all of the 100 kB.
        device: where it runs.
    """

    steps: int
    windows: int | None
    device: str


@dataclass(frozen=True)
class Trained:
    """What came out of one run.

    Attributes:
        held_out: final loss on held-out bytes, nats per byte.
        curve: training loss of every step.
    """

    held_out: float
    curve: list[float]


Runs = dict[tuple[str, int], Trained]  # (arm, seed)


def train_model(arm: Arm, seed: int, text: data.ByteText, length: Length) -> Trained:
    """One run of one arm.

    Args:
        arm: the model and its learning rate.
        seed: of the initial values and, from another stream, of the batches.
        text: training and held-out bytes.
        length: steps and held-out windows.
    """
    initial, order = (torch.Generator().manual_seed(2 * seed + stream) for stream in (0, 1))
    model = T6(arm.config, generator=initial).to(length.device)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=arm.lr, betas=(0.9, 0.95), eps=1e-8)
    batches = token_batches(
        text.train,
        steps=length.steps,
        batch=BATCH,
        context=CONTEXT,
        generator=order,
        device=length.device,
    )
    curve = train(model, optimizer, batches, clip_norm=1.0, rate=warmup_cosine(length.steps, WARMUP, FLOOR))
    windows = token_windows(text.test, context=CONTEXT, batch=32, limit=length.windows, device=length.device)
    return Trained(evaluate(model, windows)[0], curve)


def train_on_source(arm: Arm, seed: int, length: Length) -> Trained:
    """One run on the standard library's source."""
    return train_model(arm, seed, source(), length)


@cache
def source() -> data.ByteText:
    """The text, read once per process."""
    return data.stdlib_source()


def train_all(run: Run, arms: Sequence[Arm], seeds: Sequence[int], length: Length) -> Runs:
    """Every arm on every seed, with progress; on a GPU as many at a time as there are cores."""
    jobs = [(arm, seed, length) for seed in seeds for arm in arms]
    workers = side_by_side.worker_count(length.device, len(jobs))
    found = side_by_side.results(train_on_source, jobs, workers, THIS)
    return {(arm.name, seed): next(found) for arm, seed, _ in run.track(jobs, "runs")}


def tune(run: Run, arms: Sequence[Arm], length: Length) -> tuple[list[Arm], list[dict[str, Any]]]:
    """Each arm with its best rate on the tuning seed, and every configuration that was tried."""
    grid = {arm: [replace(arm, name=f"{arm.name} at {rate:g}", lr=rate) for rate in RATES] for arm in arms}
    candidates = [candidate for of_arm in grid.values() for candidate in of_arm]
    found = train_all(run, candidates, [TUNING_SEED], length)
    best = {
        arm: min(of_arm, key=lambda candidate: found[candidate.name, TUNING_SEED].held_out)
        for arm, of_arm in grid.items()
    }
    tried = configurations(candidates, [TUNING_SEED], found, length, "tuning")
    return [replace(arm, lr=best[arm].lr) for arm in arms], tried


def configurations(
    arms: Sequence[Arm], seeds: Sequence[int], runs: Runs, length: Length, purpose: str
) -> list[dict[str, Any]]:
    """One record per run, with what came out of it."""
    return [
        asdict(arm)
        | {
            "seed": seed,
            "purpose": purpose,
            "steps": length.steps,
            "attention_parameters": accounting.params(arm.config),
            "cached_numbers": accounting.cache_numbers(arm.config),
            "loss": runs[arm.name, seed].held_out,
        }
        for arm in arms
        for seed in seeds
    ]


def levels(arms: Sequence[Arm], seeds: Sequence[int], runs: Runs) -> dict[str, Number]:
    """Held-out loss of each arm."""
    return {
        arm.name: Number.mean(
            f"held-out loss, {arm.name}", [runs[arm.name, seed].held_out for seed in seeds], "nats/byte"
        )
        for arm in arms
    }


def differences(a: Arm, b: Arm, seeds: Sequence[int], runs: Runs) -> list[float]:
    """Loss of a minus loss of b, one per seed."""
    return [runs[a.name, seed].held_out - runs[b.name, seed].held_out for seed in seeds]


def gap(a: Arm, b: Arm, seeds: Sequence[int], runs: Runs) -> Number:
    """The paired difference with its two-sided 95 % interval."""
    return Number.mean(f"{a.name} minus {b.name}", differences(a, b, seeds, runs), "nats/byte")


def smoothed_curves(arms: Sequence[Arm], seeds: Sequence[int], runs: Runs) -> dict[str, Any]:
    """Training loss of each arm, averaged over the seeds and over windows of a fiftieth of the run."""
    found = {}
    for arm in arms:
        mean = np.mean([runs[arm.name, seed].curve for seed in seeds], axis=0)
        window = max(len(mean) // 50, 1)
        found[arm.name] = np.convolve(mean, np.ones(window) / window, mode="valid")
    return found


def superiority(difference: Number) -> str:
    """What a two-sided interval says of "lower loss": supported, not supported or undecided."""
    if difference.high < 0:
        return "supported"
    return "not supported" if difference.low > 0 else "undecided"
