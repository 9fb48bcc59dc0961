"""Records of factors in the caches of transformers.

The cache is one of transformers' own, Dynamic, Static or any other that keeps what it is given: the K record
of a token, packed factors, is stored as `keys` of a single head, (B, 1, T, W_K), the V record as `values`,
(B, 1, T, W_V). So beams reorder, assisted decoding crops and a static cache compiles without code of ours.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, for what is cached.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Cache

# transformers 5.0 has get_mask_sizes(cache_position, layer), later ones get_mask_sizes(query_length, layer)
MASK_SIZES_TAKE_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


class RecordsInCache:
    """A Hugging Face cache as the `LayerCache` that attention layers speak to, for one forward pass.

    Args:
        cache: keeps what it is given per layer.
        slots: places (T,) of the new tokens in it.
        batch: sequences.
        key_positions: (B, M) positions of all slots, for layers that rotate keys when they load them.
    """

    def __init__(
        self,
        cache: Cache,
        slots: Int[Tensor, " T"],
        batch: int,
        key_positions: Int[Tensor, "B M"] | None,
    ) -> None:
        self._cache = cache
        self._slots = slots
        self._key_positions = key_positions
        # before the first update: static caches hand out the very tensor that they count in
        self._filled = (slots[-1] + 1).to(torch.int32).expand(batch)

    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,  # noqa: ARG002 (the model knows them already)
    ) -> tuple[Float[Tensor, "B M Wk"], Float[Tensor, "B M Wv"], Int[Tensor, " B"] | None]:
        """Store the records as one head; lengths only where the cache returns more than it was given."""
        where = {"cache_position": self._slots}  # read by static caches of transformers 5.0
        keys, values = self._cache.update(k.unsqueeze(1), v.unsqueeze(1), layer, where)
        return keys[:, 0], values[:, 0], self._filled if is_static(self._cache) else None

    def past_length(self, layer: int) -> Int[Tensor, " B"]:  # noqa: ARG002 (layers are alike)
        """Places before the new tokens."""
        return self._filled - len(self._slots)

    def key_positions(self, layer: int) -> Int[Tensor, "B M"] | None:  # noqa: ARG002 (layers are alike)
        """Positions of all slots, if the layers rotate keys on load."""
        return self._key_positions

    def last_hidden(self, layer: int) -> Float[Tensor, "B d"] | None:  # noqa: ARG002
        """None: no hidden state is kept."""
        return None

    def set_last_hidden(self, layer: int, hidden: Float[Tensor, "B T d"]) -> None:  # noqa: ARG002
        """Refuse: there is no place for it."""
        raise ValueError("use_cache must be False under kv_shift: a Hugging Face cache keeps no hidden state")


def is_static(cache: Cache) -> bool:
    """Whether the cache returns buffers of fixed size, filled in part."""
    return bool(cache.is_compileable)


def mask_length(cache: Cache, slots: Int[Tensor, " T"]) -> int:
    """M, the number of keys that attention will see."""
    new: Any = len(slots) if MASK_SIZES_TAKE_LENGTH else slots
    return int(cache.get_mask_sizes(new, 0)[0])


def key_mask(mask: Tensor, length: int, *, static: bool) -> Bool[Tensor, "B {length}"]:
    """True for valid keys; also beyond them in a static cache, whose lengths hide what is not filled."""
    if mask.shape[1] > length or (mask.shape[1] < length and not static):
        raise ValueError(
            f"attention_mask must have shape (B, M) with M {'<=' if static else '='} {length}, cached tokens "
            f"included, got {tuple(mask.shape)}"
        )
    return functional.pad(mask.to(torch.bool), (0, length - mask.shape[1]), value=True)


def all_valid(mask: Tensor) -> bool:
    """Whether the mask says nothing; not asked where the answer would have to be compiled or captured."""
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool(mask.all())


def key_positions(
    slots: Int[Tensor, " T"],
    positions: Int[Tensor, "..."],
    mask: Tensor | None,
    length: int,
    batch: int,
) -> Int[Tensor, "B M"]:
    """Positions of all slots: the new ones as given, earlier ones counted back over the valid tokens.

    Args:
        slots: places (T,) of the new tokens in the cache.
        positions: their positions, (T,) or (B, T).
        mask: (B, M), True for valid keys; None, or another shape, if all are.
        length: M.
        batch: B.
    """
    new = len(slots)
    every = torch.arange(length, device=slots.device).expand(batch, length)
    at = positions.expand(batch, new)
    count = every if mask is None or mask.ndim != 2 else mask.long().cumsum(-1) - 1
    shift = at[:, :1] - count.index_select(1, slots[:1])
    given = at.gather(1, (every - slots[0]).clamp(0, new - 1))
    return torch.where(every < slots[0], count + shift, given)
