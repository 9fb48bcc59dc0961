"""A factor cache in pages: sequences of any length share one pool of blocks, and prefixes share blocks.

New records go to their place in the pages in one call (`tpa::append_paged`), and `decode` reads them through
the block table, in place. `append` answers layers that want all records, and for that gathers them. A call
without enough free blocks raises before it writes. How sequences hold blocks: `paged_sequences`.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 (what is cached); Kwon et al. 2023 (arXiv 2309.06180),
Section 4 (pages, reference counts, copy-on-write).
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tpa_attention.torch import blockwise, dispatch
from tpa_attention.torch.append import append_paged
from tpa_attention.torch.factors import RecordLayout
from tpa_attention.torch.functional import tpa_decode
from tpa_attention.torch.paged_sequences import PagedSequences


class PagedFactorCache(PagedSequences):
    """Blocks of records for a changing set of sequences; rows of `append` are `sequences`, in that order.

    With `max_len` the cache has a fixed shape: table and lengths are tensors that stay where they are and are
    written in place, and positions and masks are counted on the device. Then a step runs again from a CUDA
    graph or without compiling anew. Such a step cannot ask for blocks: call `advance` before each replay.

    Args:
        config: a `CacheLayout`, a `ModelConfig`, or a layer or model with the attribute `cache_layout`.
        num_blocks: blocks in the pool, >= 1.
        block_size: tokens per block, >= 1.
        batch: sequences to begin with, all empty; under `max_len` also the most there may be.
        max_len: tokens that a sequence may have, >= 1; None for as many as there are blocks.
        rewind: tokens that `crop` can take back under `kv_shift`; see `FactorCache`.
        device: where the pool lives; the default device if None.
        dtype: floating type of the records; the default dtype if None. Appended records are cast to it.

    Raises:
        TypeError: if `config` has no cache layout or `dtype` is not floating.
        ValueError: if a number is out of range.

    Source: Kwon et al. 2023 (arXiv 2309.06180), Section 4.
    """

    def past_length(self, layer: int) -> int | Int[Tensor, " B"]:
        """Tokens stored so far: an int where all sequences are equally long, but for fixed shapes."""
        unequal = self.valid(layer)
        return self._host.of_layer(layer)[0] if unequal is None else unequal.clone()

    def extent(self, layer: int, new: int = 0) -> int:
        """M, the keys that masks speak of: those of the longest sequence, or `max_len` for fixed shapes."""
        self._check_layer(layer)
        return max(self._host.of_layer(layer), default=0) + new if self.max_len is None else self.max_len

    def valid(self, layer: int) -> Int[Tensor, " B"] | None:
        """Tokens of each sequence, the cache's own memory; None where all sequences are equally long."""
        self._check_layer(layer)
        equal = self.max_len is None and len(set(self._host.of_layer(layer))) == 1
        return None if equal else self._counted(layer)

    def key_positions(self, layer: int) -> Int[Tensor, "B M"] | None:
        """Positions of the stored tokens; None unless the layout keeps them."""
        self._check_layer(layer)
        if not self._positions:
            return None
        longest = self.extent(layer)
        pages = self.block_table[:, : -(-longest // self.block_size)].long()
        return self._positions[layer][pages].flatten(1, 2)[:, :longest]

    def view(self, layer: int) -> tuple[Tensor, Tensor, Int[Tensor, "B pages"], Int[Tensor, " B"]]:
        """What `tpa_decode` takes to read in place: the pools of K and V, `block_table` and `seq_lens`.

        All four are the cache's own memory; lengths and table change with it.
        """
        self._check_layer(layer)
        return self._k[layer], self._v[layer], self.block_table, self._counted(layer)

    # ---------------------------------------------------------------------------------------------- tokens

    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B M Pk"], Float[Tensor, "B M Pv"], Int[Tensor, " B"] | None]:
        """`write`, and then the records of all tokens in order, gathered, with their number per sequence.

        None for the lengths means that all sequences are equally long. `decode` gathers nothing.
        """
        self.write(layer, k, v, positions)
        return *self.read(layer, 0, self.extent(layer)), self.valid(layer)

    @torch.no_grad()
    def write(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> None:
        """Write T records behind those of each sequence.

        Args:
            layer: index in [0, num_layers).
            k: K records, as wide as the layout says, padded or not.
            v: V records, alike.
            positions: positions of the tokens; their place in the sequence if None. Kept only if the layout
                says so.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if a shape does not fit, too few blocks are free or a sequence would be longer than
                `max_len`; nothing has been written then.
            RuntimeError: if a CUDA graph is to hold a cache without `max_len`.
        """
        self._check_layer(layer)
        new = k.shape[1]
        self._check_records("k", k, self.layout.k_numbers, self._k[layer].shape[-1], new)
        self._check_records("v", v, self.layout.v_numbers, self._v[layer].shape[-1], new)
        if positions is not None and positions.shape != (len(self.sequences), new):
            raise ValueError(
                f"positions must have shape {(len(self.sequences), new)}, got {tuple(positions.shape)}"
            )
        recorded = self._recorded()
        if not recorded:
            self._make_room([layer], new)
        lengths, device = self._counted(layer), self.device
        kept = self._positions[layer] if self._positions else None
        append_paged(
            *(self._k[layer], self._v[layer], kept),
            *(k.to(device), v.to(device), self._table[: self._rows], lengths),
            positions=None if positions is None or kept is None else positions.to(device),
        )
        lengths.add_(new)
        if not recorded:
            self._host.count([layer], new)

    def read(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Records of K and V of the tokens in [first, last), gathered; past a sequence they are anything."""
        self._check_layer(layer)
        size = self.block_size
        pages = self.block_table[:, first // size : -(-last // size)].long()
        tokens = slice(first % size, first % size + last - first)
        k, v = (pool[layer][pages].flatten(1, 2)[:, tokens] for pool in (self._k, self._v))
        return k, v

    def decodes(self, records: tuple[RecordLayout, RecordLayout]) -> bool:
        """Whether records of these layouts hold B of K and V, A of both or of none, and are kept here."""
        k, v = records
        complete = k.has_b and v.has_b and k.has_a == v.has_a
        return complete and (k.numbers, v.numbers) == (self.layout.k_numbers, self.layout.v_numbers)

    def decode(
        self,
        layer: int,
        aq: Float[Tensor, "B N RQ H"] | None,
        bq: Float[Tensor, "B N RQ D"],
        records: tuple[RecordLayout, RecordLayout],
        *,
        free_a: tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        rank_scale: bool = True,
        impl: str = "auto",
    ) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
        """Attention of the newest N tokens, already written, to the layer's pages; read in place.

        Args:
            layer: index in [0, num_layers).
            aq: head factors of the queries, or None for a full Q in `bq`.
            bq: feature factors of the queries, rotated.
            records: layouts of the K and V records.
            free_a: A_K and A_V (1, 1, R, H) where the records hold none.
            attn_bias: boolean (True = attend) or floating, broadcastable to (B, H, N, M) with M =
                `extent(layer)`.
            window: keys i with 0 <= t - i < window are seen.
            scale: factor of the logits, D^-0.5 if None.
            rank_scale: whether Q, K and V carry 1/R.
            impl: as in `tpa_decode`.

        Returns:
            Outputs and log-sum-exps.

        Raises:
            ValueError: if the records are not those of the cache, or what is given does not fit.
        """
        k_record, v_record = records
        if not self.decodes(records) or (free_a is None) != k_record.has_a:
            raise ValueError(
                f"records must hold {self.layout.k_numbers} and {self.layout.v_numbers} numbers, B of K and "
                f"V among them, and free_a be given iff they hold no A; got {records} and free_a={free_a}"
            )
        k, v, table, lengths = self.view(layer)
        options: dict[str, Any] = {
            "attn_bias": self._to_whole_pages(attn_bias, layer),
            "window": window,
            "scale": scale,
            "rank_scale": rank_scale,
        }
        if free_a is None:
            out, lse = tpa_decode(
                *(aq, bq, k, v),
                ranks=(k_record.rank, v_record.rank),
                num_heads=k_record.heads,
                head_dim=k_record.width,
                v_head_dim=v_record.width,
                seq_lens=lengths,
                block_table=table,
                return_lse=True,
                impl=impl,
                **options,
            )
            return out, lse

        def factors(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """A repeated without a copy, whether these are pages or tokens in order."""
            (_, bk), (_, bv) = k_record.views(k), v_record.views(v)
            ak, av = (a.to(self.dtype).expand(*k.shape[:2], -1, -1) for a in free_a)
            return ak, cast(Tensor, bk), av, cast(Tensor, bv)

        if dispatch.chosen(impl, aq, bq, *free_a) == "triton":
            return dispatch.by_kernel(aq, bq, *factors(k, v), lengths, table, None, **options)
        return blockwise.decode_loaded(
            *(aq, bq, lambda first, last: factors(*self.read(layer, first, last))),
            (table.shape[1] * self.block_size, k_record.rank, v_record.rank, k_record.heads, v_record.width),
            seq_lens=lengths,
            **options,
        )

    def advance(self, new: int = 1) -> None:
        """Make room for `new` tokens per sequence and count them, before a captured or compiled step runs.

        Such a step writes and attends wherever lengths and table on the device point, and cannot change what
        the host knows. Capturing counts nothing: call this before each replay, the first one too.

        Raises:
            ValueError: if there is no room, or the cache has no fixed shape; nothing changes then.
        """
        if self.max_len is None:
            raise ValueError("advance needs a cache of fixed shape, got max_len=None")
        if new < 0:
            raise ValueError(f"new must be >= 0, got {new!r}")
        layers = range(self.layout.num_layers)
        self._make_room(layers, new)
        self._host.count(layers, new)

    def _to_whole_pages(self, bias: Tensor | None, layer: int) -> Tensor | None:
        """A mask as long as the table; what lies past a sequence is not read whatever it says."""
        if bias is None or bias.shape[-1] == 1:
            return bias
        missing = self._table.shape[1] * self.block_size - self.extent(layer)
        return functional.pad(bias, (0, missing)) if missing else bias

    def _check_records(self, name: str, records: Tensor, numbers: int, width: int, new: int) -> None:
        batch = len(self.sequences)
        fits = records.dim() == 3 and records.shape[:2] == (batch, new)
        if not fits or not numbers <= records.shape[2] <= width:
            raise ValueError(
                f"{name} must have shape (sequences, tokens, width) = ({batch}, {new}, {numbers}..{width}), "
                f"got {tuple(records.shape)}"
            )
