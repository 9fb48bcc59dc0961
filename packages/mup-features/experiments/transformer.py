"""A byte-level transformer whose width grows, for muTransfer at the full scale.

Pre-norm blocks of causal attention and a GELU network of four times the width, learned positions, no biases,
a readout of its own. The number of heads stays, their dimension grows: under muP logits are q.k sqrt(d0) / d,
which `attention_scale` gives and which equals the usual q.k / sqrt(d) at base width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256
HEADS = 4


class ByteTransformer(nn.Module):
    """Logits over the next byte.

    Weights are normal with deviation 1 / sqrt(fan in), embeddings with deviation 1.

    Args:
        width: of the residual stream, a multiple of the 4 heads.
        generator: source of the initial weights, on the CPU.
        scale: factor of the attention logits.
        layers: number of blocks.
        context: longest sequence in bytes.
    """

    def __init__(
        self, width: int, generator: torch.Generator, *, scale: float, layers: int = 2, context: int = 128
    ) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS} heads, got {width!r}")
        with torch.device("meta"):  # what torch would draw is not wanted
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, scale) for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)
            self.readout = nn.Linear(width, VOCABULARY, bias=False)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.normal_(generator=generator)
                elif isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                elif isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, 256) of bytes (batch, length)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


class Block(nn.Module):
    """Attention and a network of two layers, each added to what it reads."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.before_network = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        x = x + self._attend(self.before_attention(x))
        return x + self.down(functional.gelu(self.up(self.before_network(x))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.mix(attended.transpose(1, 2).flatten(-2))
