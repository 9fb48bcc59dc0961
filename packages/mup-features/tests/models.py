"""Small torch models of any width for the tests of scaling: an MLP and a transformer with tied embedding."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """The layers of the spec's R6: 8 -> w -> 2w -> w -> 3."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, width, bias=bias)
        self.fc2 = nn.Linear(width, 2 * width, bias=bias)
        self.fc3 = nn.Linear(2 * width, width, bias=bias)
        self.readout = nn.Linear(width, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2, self.fc3):
            x = torch.tanh(layer(x))
        return self.readout(x)


class Block(nn.Module):
    """Pre-norm attention and MLP; heads of 8 so that their number grows with the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, time, 3, width // 8, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A byte-level decoder with learned positions; the readout shares the embedding's weight if tied."""

    def __init__(self, width: int, *, tied: bool = True, vocabulary: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(nn.init.normal_(torch.empty(1, 16, width), std=0.02))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(
    kind: type[nn.Module], width: int, seed: int = 0, dtype: torch.dtype = torch.float64, **options
) -> nn.Module:
    """A model with the torch default initialisation of this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(width, **options).to(dtype)


def on_meta(kind: type[nn.Module], width: int, **options) -> nn.Module:
    """The model without its entries."""
    with torch.device("meta"):
        return kind(width, **options)
