"""Two small models on random data with which the command `coord-check` shows muP and its absence."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_features.coordinates import CoordReport, Record
from mup_features.width_rules import Form

from .coordinates import coordinate_check
from .optim import param_groups
from .scaling import apply_mup, attention_scale, infer_roles

Model = Literal["mlp", "transformer"]
Scheme = Literal["mup", "sp"]

HEADS = 4
TOKENS = 32
FEATURES = 16
CLASSES = 10
# a base below every width one would try: muP is then the same model family, whatever --widths says
BASE = {"mlp": 16, "transformer": 16}
RATES = {"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3}


class MLP(nn.Module):
    """Three hidden layers, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        h = functional.relu(self.enter(x))
        for layer in self.hidden:
            h = functional.relu(layer(h))
        return self.readout(h)


class Block(nn.Module):
    """Causal attention and an MLP, both after norms."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """The residual stream after this block."""
        batch, length, width = h.shape
        x = self.attention_norm(h)
        q, k, v = (
            layer(x).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(functional.gelu(self.up(self.norm(h))))


class Transformer(nn.Module):
    """Two blocks; the width is that of all four heads."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList([Block(width, scale) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token at every place."""
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def build(model: Model, width: int, scheme: Scheme = "sp") -> nn.Module:
    """A model with torch's default initialization, with muP's attention scale under "mup".

    Args:
        model: "mlp" or "transformer".
        width: of the model.
        scheme: "mup" or "sp".

    Raises:
        ValueError: if the heads do not divide the width of a transformer.
    """
    if model == "mlp":
        return MLP(width)
    if width % HEADS:
        raise ValueError(f"widths must be multiples of {HEADS} for the transformer, got {width}")
    head = width // HEADS
    return Transformer(width, attention_scale(head, BASE[model] // HEADS if scheme == "mup" else head))


def check(
    model: Model,
    scheme: Scheme,
    *,
    widths: list[int],
    seeds: int,
    steps: int,
    optimizer: Literal["sgd", "adam", "adamw"],
    lr: float | None = None,
    form: Form = "mult",
    record: Record = "rms",
) -> CoordReport:
    """Coordinate check of one of the models.

    Args:
        model: "mlp" or "transformer".
        scheme: "mup", or "sp" for torch's own initialization and one rate.
        widths: at least two, increasing.
        seeds: number of runs for each width.
        steps: updates.
        optimizer: "sgd", "adam" or "adamw" (weight decay 0.1).
        lr: rate at base width 16; None for a usual one.
        form: of muP.
        record: "rms" or "l1".

    Raises:
        ValueError: for a bad grid.
    """
    rate = RATES[optimizer] if lr is None else lr
    decay = 0.1 if optimizer == "adamw" else 0.0
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]

    def model_fn(width: int) -> Any:
        made = build(model, width, scheme)
        if scheme == "sp":
            return made
        with torch.device("meta"):
            base, other = (build(model, factor * BASE[model], scheme) for factor in (1, 2))
        roles = infer_roles(made, base, other)
        # torch's default embedding has standard deviation 1 at every width, its layers one over the fan
        return apply_mup(made, roles, form, init="fan_in"), roles

    def optimizer_fn(made: nn.Module, roles: Any = None) -> torch.optim.Optimizer:
        if roles is None:
            return kind(made.parameters(), lr=rate, weight_decay=decay)
        return kind(param_groups(made, roles, rate, decay, optimizer, form=form))

    def batch_fn(seed: int, step: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        generator = torch.Generator().manual_seed(seed)
        if model == "mlp":
            inputs = torch.randn(64, FEATURES, generator=generator)
            return inputs, torch.randint(0, CLASSES, (64,), generator=generator)
        tokens = torch.randint(0, TOKENS, (8, 17), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    return coordinate_check(
        model_fn, batch_fn, widths, range(seeds), steps, optimizer_fn=optimizer_fn, record=record
    )
