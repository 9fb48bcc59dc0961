"""KV shift: keys and values read a blend of a token and the one before it.

    x'_t = mu * x_t + (1 - mu) * x_{t-1},   mu in R^d learned, initially 1,   x_{-1} = 0

The shift acts before the factor maps, so cached factors keep their rank and the cache only adds the newest
hidden states of each sequence (`hidden_history.py`). The paper names the idea in its introduction without a
formula; this is ours.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class KVShift(nn.Module):
    """The learned blend; at its initial value the identity.

    Args:
        d_model: width of the hidden states.
        device: where the parameter lives.
        dtype: its type.
    """

    def __init__(
        self, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        hidden: Float[Tensor, "B T d"],
        before: Float[Tensor, "B d"] | None = None,
        starts: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """The blend of every token with the one before it.

        Args:
            x: hidden states.
            hidden: the same with padding at 0, which is what the next token sees.
            before: hidden state before the first token; 0 if None.
            starts: tokens that begin a packed sequence, before which there is 0.
        """
        first = torch.zeros_like(x[:, 0]) if before is None else before.to(x)
        previous = torch.cat([first[:, None], hidden[:, :-1]], dim=1)
        if starts is not None:
            previous = previous.masked_fill(starts[..., None], 0)
        mu = self.mu.to(x.dtype)
        return mu * x + (1 - mu) * previous


def zero_padding(
    x: Float[Tensor, "B T d"], place: Int[Tensor, "B T"], attention_mask: Tensor | None
) -> Float[Tensor, "B T d"]:
    """Hidden states with padding at 0; a mask of four axes says nothing about padding.

    Args:
        x: hidden states of the new tokens.
        place: where the new tokens stand among all M.
        attention_mask: (B, M), 1 for valid tokens, or anything else.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return x
    return x * attention_mask.gather(1, place.long())[..., None].to(x.dtype)
