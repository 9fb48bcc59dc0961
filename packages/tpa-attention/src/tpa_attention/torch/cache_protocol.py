"""What attention layers and caches say to each other, whichever way the records are kept.

`LayerCache` is the conversation every cache takes part in: records of new tokens in, records of all tokens
out. Where that is a view, decoding reads the cache in place already. A cache whose records lie in pages or in
eight bits would have to gather or widen all of them at each step; it answers `DecodesInPlace` besides: it
attends for the layer from the records as they lie, or hands them out a block at a time.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 (what is cached), Algorithms 2-3 (decoding from it).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .factors import RecordLayout


@runtime_checkable
class LayerCache(Protocol):
    """What an attention layer asks of a cache."""

    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B M Pk"], Float[Tensor, "B M Pv"], Int[Tensor, " B"] | None]:
        """Take the records of T new tokens; return those of all tokens and how many of each row are valid.

        None for the lengths means that all M records of every sequence are valid. What is returned may be the
        cache's own memory, good until the next call.
        """
        ...

    def past_length(self, layer: int) -> int | Int[Tensor, " B"]:
        """Tokens stored so far: an int where all sequences are equally long."""
        ...

    def key_positions(self, layer: int) -> Int[Tensor, "B M"] | None:
        """Positions of the stored tokens, for layers that rotate keys when they load them.

        None where the cache keeps none: then stored tokens stand at consecutive positions.
        """
        ...

    def last_hidden(self, layer: int) -> Float[Tensor, "B d"] | None:
        """Input of the layer at the last token, for `kv_shift`; None or 0 before the first token."""
        ...

    def set_last_hidden(self, layer: int, hidden: Float[Tensor, "B T d"]) -> None:
        """Take the inputs of the layer at the T new tokens; the last ones are kept."""
        ...


@runtime_checkable
class DecodesInPlace(LayerCache, Protocol):
    """What a layer asks of a cache whose records are not one tensor that it could be given."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of queries, and of records that come and go."""
        ...

    def extent(self, layer: int, new: int = 0) -> int:
        """M, the keys that masks speak of, once `new` more tokens are written."""
        ...

    def valid(self, layer: int) -> Int[Tensor, " B"] | None:
        """How many records of each row are valid, None if all are; good until the next call."""
        ...

    def write(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> object:
        """Take the records of T new tokens; raise before anything is written if they do not fit."""
        ...

    def read(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Records of K and V (B, last - first, W) of these tokens, for layers that attend block by block."""
        ...

    def decodes(self, records: tuple[RecordLayout, RecordLayout]) -> bool:
        """Whether `decode` takes records of these layouts of K and V."""
        ...

    def decode(
        self,
        layer: int,
        aq: Float[Tensor, "B N RQ H"] | None,
        bq: Float[Tensor, "B N RQ D"],
        records: tuple[RecordLayout, RecordLayout],
        *,
        free_a: tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
        rank_scale: bool = True,
        impl: str = "auto",
    ) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
        """Attention of the newest N tokens, already written; outputs and log-sum-exps.

        `free_a` are A_K and A_V (1, 1, R, H) where records hold none.
        """
        ...


def decodes_in_place(cache: LayerCache) -> TypeGuard[DecodesInPlace]:
    """Whether the cache is a `DecodesInPlace`.

    Asked at each step, hence by one method; `isinstance` would look for all of them.
    """
    return hasattr(cache, "decodes")


class Stored(NamedTuple):
    """What a layer knows of the records of all tokens.

    Attributes:
        keys: M, how many there are of every sequence, valid or not.
        seq_lens: how many of each are valid; None if all are.
        dtype: their type.
        read: K and V records (B, last - first, W) of the tokens in [first, last).
    """

    keys: int
    seq_lens: Int[Tensor, " B"] | None
    dtype: torch.dtype
    read: Callable[[int, int], tuple[Tensor, Tensor]]


def store(
    cache: LayerCache,
    in_place: DecodesInPlace | None,
    layer: int,
    k: Float[Tensor, "B T Wk"],
    v: Float[Tensor, "B T Wv"],
    positions: Int[Tensor, "B T"],
) -> Stored:
    """Give a cache the records of T new tokens, by `write` if it is to be read in place, else by `append`."""
    if in_place is None:
        all_k, all_v, seq_lens = cache.append(layer, k, v, positions)
        return Stored(all_k.shape[1], seq_lens, all_k.dtype, lambda a, b: (all_k[:, a:b], all_v[:, a:b]))
    in_place.write(layer, k, v, positions)
    return Stored(
        in_place.extent(layer),
        in_place.valid(layer),
        in_place.dtype,
        lambda a, b: in_place.read(layer, a, b),
    )
