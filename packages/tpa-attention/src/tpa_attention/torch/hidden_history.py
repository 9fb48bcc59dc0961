"""Inputs of a layer at the newest tokens of each sequence: what `kv_shift` needs, after `crop` too.

The shift reads the hidden state before a token, so decoding on needs the last one. Taking back n tokens needs
the one n before, which the records do not tell: the last `rewind` + 1 states are kept, newest last. Before
the first token of a sequence stands 0. Tensors are written in place, so a CUDA graph finds them again.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

REWIND = 16  # tokens; as many as one call decodes, so that what speculation guessed can be taken back


class HiddenHistory:
    """The newest states of one layer.

    Args:
        rows: sequences.
        rewind: tokens that can be taken back, >= 0.
        like: a hidden state of the width, type and device of those to come, (.., d).
    """

    def __init__(self, rows: int, rewind: int, like: Float[Tensor, "... d"]) -> None:
        self.rewind_limit = rewind
        self.rows = rows
        with torch.inference_mode(False):  # in-place writes must stay possible outside inference mode
            self._states = torch.zeros(rows, rewind + 1, like.shape[-1], device=like.device, dtype=like.dtype)
            self._known = torch.zeros(rows, device=like.device, dtype=torch.int32)

    @property
    def last(self) -> Float[Tensor, "B d"]:
        """State at the newest token; 0 before the first."""
        return self._states[: self.rows, -1]

    @torch.no_grad()
    def push(self, hidden: Float[Tensor, "B T d"]) -> None:
        """Take in the states of T tokens."""
        states, known = self._states[: self.rows], self._known[: self.rows]
        if hidden.ndim != 3 or hidden.shape[::2] != states.shape[::2]:
            raise ValueError(
                f"hidden must have shape ({self.rows}, T, {states.shape[2]}), got {tuple(hidden.shape)}"
            )
        depth = states.shape[1]
        newest = hidden[:, -depth:].to(states)
        kept = states[:, newest.shape[1] :]
        states.copy_(torch.cat([kept, newest], dim=1))
        known.add_(hidden.shape[1]).clamp_(max=depth)

    def check_rewind(self, back: Sequence[int], left: Sequence[int]) -> None:
        """Raise unless `back` tokens of each sequence, of which `left` remain, can be taken back.

        Raises:
            ValueError: if the state to go back to is not kept.
        """
        for row, (n, remaining, known) in enumerate(zip(back, left, self._known.tolist(), strict=False)):
            if n and remaining and n >= known:
                raise ValueError(
                    f"crop can take back at most {known - 1} tokens of sequence {row} under kv_shift, whose "
                    f"last {known} hidden states are kept (rewind={self.rewind_limit}), got {n}"
                )

    def rewind(self, back: Sequence[int], left: Sequence[int]) -> None:
        """Forget the newest `back` states of each sequence, all of them where nothing is `left`."""
        states, known = self._states[: self.rows], self._known[: self.rows]
        depth = states.shape[1]
        steps = torch.tensor(
            [n if remaining else depth for n, remaining in zip(back, left, strict=True)], device=states.device
        )
        source = torch.arange(depth, device=states.device) - steps[:, None]
        moved = states.gather(1, source.clamp(min=0)[..., None].expand_as(states))
        states.copy_(moved.masked_fill((source < 0)[..., None], 0))
        known.sub_(steps).clamp_(min=0)

    def reorder(self, index: Int[Tensor, " B"]) -> None:
        """Row i becomes what row `index[i]` was."""
        for tensor in (self._states, self._known):
            tensor[: self.rows] = tensor.index_select(0, index)

    def select(self, rows: Sequence[int | None]) -> None:
        """Row i becomes what row `rows[i]` was, or a sequence without tokens where that is None."""
        device = self._states.device
        index = torch.tensor([0 if row is None else row for row in rows], device=device, dtype=torch.long)
        fresh = torch.tensor([row is None for row in rows], device=device, dtype=torch.bool)
        states = self._states[index].masked_fill(fresh[:, None, None], 0)
        known = self._known[index].masked_fill(fresh, 0)
        self.rows = len(rows)
        if self.rows > len(self._states):
            self._states, self._known = states, known
        else:
            self._states[: self.rows], self._known[: self.rows] = states, known

    def clear(self) -> None:
        """As before the first token."""
        self._states.zero_()
        self._known.zero_()

    def state(self) -> tuple[Float[Tensor, "B K d"], Int[Tensor, " B"]]:
        """Copies of the states and of how many of each row are known."""
        return self._states[: self.rows].clone(), self._known[: self.rows].clone()

    def load(self, states: Float[Tensor, "B K d"], known: Int[Tensor, " B"]) -> None:
        """Take over what `state` gave, from a history of any depth."""
        depth = self._states.shape[1]
        newest = states[:, -depth:].to(self._states)
        self.clear()
        self._states[: self.rows, depth - newest.shape[1] :] = newest
        self._known[: self.rows] = known.to(self._known).clamp(max=depth)
