"""Small reference workloads in plain torch: a byte-level GPT, an MLP and a CNN for digits, one training loop.

For experiments that compare optimisers, layers or schedules on real data (see `data`) within seconds. Every
random choice comes from a torch.Generator that the caller passes: the same seed gives the same run, and
nothing touches the global generator.

    generator = torch.Generator().manual_seed(0)
    model = ByteGPT(GPTConfig(), generator)
    batches = token_batches(text.train, steps=400, batch=16, context=64, generator=generator)
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches, clip_norm=1.0)
    loss, _ = evaluate(model, token_windows(text.test, context=64))

A model returns logits with the classes last; batches are (inputs, targets).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class GPTConfig:
    """Size of a `ByteGPT`.

    Attributes:
        width: size of the residual stream, a multiple of heads.
        layers: number of blocks.
        heads: attention heads per block.
        context: longest sequence, in bytes.
        vocabulary: number of token values; 256 for bytes.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    vocabulary: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")


class ByteGPT(nn.Module):
    """Decoder-only transformer as in GPT-2: learned positions, pre-norm, GELU, tied head, no bias anywhere.

    Initialised as nanoGPT does: normal with deviation 0.02, and 0.02 / sqrt(2 layers) where a block writes
    into the residual stream.

    Args:
        config: the size.
        generator: source of the initial weights, on the CPU.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        with _own_initialisation():
            self.tokens = nn.Embedding(config.vocabulary, config.width)
            self.positions = nn.Embedding(config.context, config.width)
            self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    narrow = math.sqrt(2 * config.layers) if name.endswith("out.weight") else 1.0
                    nn.init.normal_(parameter, std=0.02 / narrow, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the token that follows each of tokens (batch, length)."""
        if tokens.shape[-1] > self.config.context:
            raise ValueError(
                f"tokens must be at most context = {self.config.context} long, got {tokens.shape[-1]}"
            )
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Block(nn.Module):
    """Causal self-attention and a two-layer GELU network, each added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.attention_out(self._attend(self.attention_norm(x)))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, width / heads)
            for part in self.attention_in(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(-2)


class DigitsMLP(nn.Module):
    """Fully connected ReLU network; 64-64-64-10 for the 8 x 8 digits.

    Initialised as torch.nn.Linear is: uniform in +- 1 / sqrt(fan in).

    Args:
        generator: source of the initial weights, on the CPU.
        widths: layer widths from input to output, at least two.
    """

    def __init__(self, generator: torch.Generator, widths: tuple[int, ...] = (64, 64, 64, 10)) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be at least two numbers >= 1, got {widths!r}")
        with _own_initialisation():
            self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        _initialise_uniformly(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of inputs (batch, features)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class DigitsCNN(nn.Module):
    """Two 3 x 3 convolutions with ReLU, each halving the image, and a linear layer, for images of 8 x 8.

    Initialised as torch.nn.Conv2d and Linear are: uniform in +- 1 / sqrt(fan in).

    Args:
        generator: source of the initial weights, on the CPU.
        channels: channels of the two convolutions.
    """

    def __init__(self, generator: torch.Generator, channels: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        if min(channels) < 1:
            raise ValueError(f"channels must be two numbers >= 1, got {channels!r}")
        with _own_initialisation():
            self.first = nn.Conv2d(1, channels[0], 3, padding=1)
            self.second = nn.Conv2d(channels[0], channels[1], 3, padding=1)
            self.last = nn.Linear(channels[1] * 4, 10)
        _initialise_uniformly(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10) of images given as rows (batch, 64)."""
        x = x.unflatten(-1, (1, 8, 8))
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.last(x.flatten(1))


def _own_initialisation() -> AbstractContextManager[None]:
    """Layers built inside leave the global generator as it was; what they drew from it is overwritten."""
    return torch.random.fork_rng(devices=[])


def _initialise_uniformly(model: nn.Module, generator: torch.Generator) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


# ----------------------------------------------------------------------------------------------- batches


def token_batches(
    tokens: NDArray[np.uint8],
    *,
    steps: int,
    batch: int,
    context: int,
    generator: torch.Generator,
    device: str = "cpu",
) -> Iterator[Batch]:
    """Random windows of a text, and the same windows moved on by one token.

    Args:
        tokens: shape (length,), longer than context.
        steps: number of batches.
        batch: windows per batch.
        context: length of a window.
        generator: source of the windows' starts, on the CPU.
        device: where the batches go.

    Raises:
        ValueError: if the text is not longer than context.
    """
    text = _text(tokens, context, device)
    offsets = torch.arange(context + 1)
    for _ in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        windows = text[(starts + offsets).to(device)]
        yield windows[:, :-1], windows[:, 1:]


def token_windows(
    tokens: NDArray[np.uint8],
    *,
    context: int,
    batch: int = 128,
    limit: int | None = None,
    device: str = "cpu",
) -> Iterator[Batch]:
    """A whole text in consecutive windows (the incomplete last one left out), for `evaluate`.

    Args:
        tokens: shape (length,), longer than context.
        context: length of a window.
        batch: most windows per batch.
        limit: use the first so many windows only; None for all.
        device: where the batches go.

    Raises:
        ValueError: if the text is not longer than context.
    """
    text = _text(tokens, context, device)
    count = (len(text) - 1) // context
    count = count if limit is None else min(count, limit)
    inputs = text[: count * context].view(count, context)
    targets = text[1 : count * context + 1].view(count, context)
    yield from zip(inputs.split(batch), targets.split(batch), strict=True)


def sample_batches(
    inputs: Tensor, targets: Tensor, *, steps: int, batch: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Random samples, drawn with replacement.

    Args:
        inputs: shape (samples, ...).
        targets: shape (samples, ...).
        steps: number of batches.
        batch: samples per batch.
        generator: source of the choice, on the CPU.

    Raises:
        ValueError: if inputs and targets differ in length or are empty.
    """
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            f"inputs and targets must be equally many, >= 1, got {len(inputs)} and {len(targets)}"
        )
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch,), generator=generator).to(inputs.device)
        yield inputs[rows], targets[rows]


def _text(tokens: NDArray[np.uint8], context: int, device: str) -> Tensor:
    if len(tokens) <= context:
        raise ValueError(f"tokens must be longer than context = {context}, got {len(tokens)}")
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)


# ---------------------------------------------------------------------------------------------- training


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over all targets of a batch; the classes are the logits' last dimension."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    clip_norm: float | None = None,
    rate: Callable[[int], float] | None = None,
    before_backward: Callable[[Batch], None] | None = None,
) -> list[float]:
    """One optimiser step per batch.

    Args:
        model: the module, trained in place.
        optimizer: holds the model's parameters; its groups' `lr` at entry is what `rate` scales.
        batches: one per step; their number is the number of steps.
        loss: of model and batch, a 0-d tensor.
        clip_norm: clip the global gradient norm to this before each step; None for no clipping.
        rate: factor on every learning rate at step 0, 1, ... (see `linear_decay`, `warmup_cosine`).
        before_backward: called with each batch, gradients cleared, for methods with a second pass.

    Returns:
        The training loss of every batch, before the step it causes.
    """
    bases = [group["lr"] for group in optimizer.param_groups]
    losses = []
    model.train()
    for step, batch in enumerate(batches):
        if rate is not None:
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * rate(step)
        optimizer.zero_grad()
        if before_backward is not None:
            before_backward(batch)
        value = loss(model, batch)
        value.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy over every target of the batches.

    Args:
        model: the module, left in the mode it was in.
        batches: they may differ in size.

    Raises:
        ValueError: if there are no targets.
    """
    training = model.training
    model.eval()
    total, correct, count = 0.0, 0, 0
    for inputs, targets in batches:
        logits = model(inputs).flatten(0, -2)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        correct += int((logits.argmax(-1) == targets.flatten()).sum())
        count += targets.numel()
    model.train(training)
    if count == 0:
        raise ValueError("batches must hold at least one target, got none")
    return total / count, correct / count


def linear_decay(steps: int) -> Callable[[int], float]:
    """Rate factor that falls from 1 at step 0 towards 0 at step `steps`.

    Args:
        steps: length of the run, >= 1.
    """
    _check_steps(steps, warmup=0)
    return lambda step: max(0.0, 1 - step / steps)


def warmup_cosine(steps: int, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Rate factor that rises linearly over `warmup` steps (1 / warmup first), then falls along half a cosine.

    Args:
        steps: length of the run, > warmup.
        warmup: steps of the rise, >= 0.
        floor: factor at the end of the run, in [0, 1].
    """
    _check_steps(steps, warmup)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor!r}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / (steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return factor


def _check_steps(steps: int, warmup: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"steps must be > warmup >= 0, got steps={steps!r} and warmup={warmup!r}")
