"""What claim 8 trains: a network on digits, or a byte-level transformer on the standard library's source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformer import HEADS, ByteTransformer

from mup_features.torch import attention_scale
from tenfold_tools.data import ByteText, digits, stdlib_source
from tenfold_tools.workloads import DigitsMLP, token_windows

Batch = tuple[torch.Tensor, torch.Tensor]
CONTEXT = 128
EVALUATED = 256  # windows of text


@dataclass(frozen=True)
class Task:
    """Models by width and batches by seed and step.

    Attributes:
        base: width at which muP is the standard parametrization.
        batch: samples, or windows of text, in a training batch.
        probe: those in a batch of the coordinate check; small, see `coordinate_check`.
        model: makes the model of (width, seed, whether it shall follow muP).
        draw: draws a batch for (device, number of samples, seed, step); the same for the same.
        evaluation: inputs and targets of the final loss, on a device.
    """

    base: int
    batch: int
    probe: int
    model: Callable[[int, int, bool], nn.Module]
    draw: Callable[[str, int, int, int], Batch]
    evaluation: Callable[[str], Batch]


def digits_network(width: int, seed: int, mup: bool) -> nn.Module:  # noqa: ARG001
    """A ReLU network with three hidden layers; it needs nothing of its own for muP."""
    return DigitsMLP(torch.Generator().manual_seed(seed), (64, width, width, width, 10))


@lru_cache(maxsize=2)  # a batch is drawn at every step, and reading takes 0.2 s
def all_digits(device: str) -> Batch:
    """Every digit."""
    samples = digits()
    X = torch.as_tensor(np.asarray(samples.inputs), dtype=torch.float32, device=device)
    return X, torch.as_tensor(np.asarray(samples.targets), device=device)


def some_digits(device: str, count: int, seed: int, step: int) -> Batch:
    """Digits drawn with replacement."""
    X, y = all_digits("cpu")
    rows = np.random.default_rng([seed, step]).integers(0, len(X), count)
    return X[rows].to(device), y[rows].to(device)


def byte_transformer(width: int, seed: int, mup: bool) -> nn.Module:
    """The transformer, with muP's attention logits or the usual ones."""
    dimension = width // HEADS
    scale = attention_scale(dimension, TEXT.base // HEADS) if mup else dimension**-0.5
    generator = torch.Generator().manual_seed(seed)
    return ByteTransformer(width, generator, scale=scale, context=CONTEXT)


def some_text(device: str, count: int, seed: int, step: int) -> Batch:
    """Windows of text from anywhere in its training part."""
    tokens = _text().train
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - CONTEXT, count)
    rows = np.stack([tokens[start : start + CONTEXT + 1] for start in starts]).astype(np.int64)
    windows = torch.as_tensor(rows, device=device)
    return windows[:, :-1], windows[:, 1:]


def held_out_text(device: str) -> Batch:
    """The first windows of the held-out part."""
    return next(token_windows(_text().test, context=CONTEXT, batch=EVALUATED, limit=EVALUATED, device=device))


@lru_cache(maxsize=1)
def _text() -> ByteText:
    return stdlib_source()


DIGITS = Task(64, 128, 16, digits_network, some_digits, all_digits)
TEXT = Task(128, 16, 2, byte_transformer, some_text, held_out_text)
TASKS = {"digits": DIGITS, "text": TEXT}
