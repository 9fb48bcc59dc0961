"""Context-parallel decoding: the cache is split by tokens over the ranks of a group.

Every rank decodes the same queries against the tokens it holds, with log-sum-exps, and the parts are merged
as splits of one cache are:

    O = sum_k w_k O_k,    w_k = exp(LSE_k - L),    L = ln sum_k exp(LSE_k), taken relative to max_k LSE_k

Records are cut by tokens and never within one, so a device keeps exactly 1/p of the cache when p divides the
number of tokens. A new token goes to one rank alone: under "contiguous" to the last that holds any, under
"interleaved" token t goes to rank t mod p, which keeps the parts equal while a text grows.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithm 3, across devices in place of blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpa_attention import _checks

from . import arguments
from .functional import merge_partials, tpa_decode, tpa_decode_factors
from .inputs import combine
from .reference import softmax_and_lse

PLACEMENTS = ("contiguous", "interleaved")
NOWHERE = torch.iinfo(torch.int64).max  # behind every query
GATHER_NUMBERS = 1 << 16  # numbers per rank up to which one collective beats two: 256 KiB in float32

Result = Float[Tensor, "B N H E"] | tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]


def context_parallel_decode(
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    placement: str = "contiguous",
    gather_numbers: int = GATHER_NUMBERS,
) -> "ContextParallelDecode":
    """Decoding against a cache whose tokens lie on the ranks of a group.

    Args:
        group: the ranks, or a mesh of one dimension; all ranks if None.
        placement: which tokens of a sequence a rank holds: "contiguous", rank 0 the first ones and so on, in
            parts of any length, or "interleaved", token t on rank t mod p.
        gather_numbers: outputs and log-sum-exps of up to this many numbers per rank are merged by one
            all-gather; larger ones by an all-gather of log-sum-exps and an all-reduce of weighted outputs.

    Raises:
        ValueError: if `placement` is another word or the mesh has several dimensions.

    Example:
        decode = context_parallel_decode(group)
        out = decode(aq, bq, my_k, my_v, ranks=(2, 2), num_heads=32, head_dim=128, seq_lens=my_lengths)
    """
    return ContextParallelDecode(group, placement=placement, gather_numbers=gather_numbers)


class ContextParallelDecode:
    """What `context_parallel_decode` returns: `tpa_decode` and `tpa_decode_factors` across ranks.

    Every rank calls it with the same queries and its own tokens, and gets the same result. Without gradients.

    Args:
        group: see `context_parallel_decode`.
        placement: see there.
        gather_numbers: see there.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        placement: str = "contiguous",
        gather_numbers: int = GATHER_NUMBERS,
    ) -> None:
        _checks.one_of("placement", placement, PLACEMENTS)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a mesh of 1 dimension, got {group.ndim}")
            group = group.get_group()
        self.group = group
        self.placement = placement
        self.gather_numbers = gather_numbers
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def own_tokens(self, length: int) -> slice:
        """Which of the tokens 0 .. length - 1 this rank keeps; contiguous parts are as equal as can be.

        Args:
            length: tokens of all ranks, >= 0.
        """
        if self.placement == "interleaved":
            return slice(self.rank, length, self.size)
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)

    def __call__(
        self,
        aq: Float[Tensor, "B N RQ H"] | None,
        bq: Float[Tensor, "B N RQ D"],
        cache_k: Float[Tensor, "blocks tokens WK"],
        cache_v: Float[Tensor, "blocks tokens WV"],
        *,
        ranks: tuple[int, int],
        num_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        seq_lens: Int[Tensor, " B"] | None = None,
        block_table: Int[Tensor, "B pages"] | None = None,
        attn_bias: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        rank_scale: bool = True,
        num_splits: int | None = None,
        return_lse: bool = False,
        impl: str = "auto",
    ) -> Result:
        """`tpa_decode` over the tokens of all ranks; caches, lengths and bias are this rank's part.

        Args:
            aq: head factors of the queries, equal on all ranks, as is `bq`.
            bq: feature factors of the queries, or Q itself.
            cache_k: records of this rank's keys, contiguous or paged.
            cache_v: records of its values.
            ranks: (R_K, R_V).
            num_heads: H.
            head_dim: D.
            v_head_dim: E, D if None.
            seq_lens: tokens of each sequence that this rank holds, 0 where it holds none; None: all M.
            block_table: pages of this rank's cache.
            attn_bias: bias or mask of this rank's tokens, (B, H, N, M) or broadcastable.
            window: keys i with 0 <= t - i < window are seen, counted over all ranks.
            scale: as in `tpa_decode`, like all that follow.
            rank_scale: see there.
            num_splits: see there.
            return_lse: see there.
            impl: see there.

        Raises:
            TypeError: as `tpa_decode` does.
            ValueError: alike.

        Source: Zhang et al. 2025, Algorithms 2-3.
        """
        tokens = cache_k.shape[1] * (1 if block_table is None else block_table.shape[1])

        def decode(aq: Tensor | None, bq: Tensor, lengths: Tensor | None, bias: Tensor | None) -> Any:
            return tpa_decode(
                *(aq, bq, cache_k, cache_v),
                ranks=ranks,
                num_heads=num_heads,
                head_dim=head_dim,
                v_head_dim=v_head_dim,
                seq_lens=lengths,
                block_table=block_table,
                attn_bias=bias,
                scale=scale,
                rank_scale=rank_scale,
                num_splits=num_splits,
                return_lse=True,
                impl=impl,
            )

        return self._decode(decode, aq, bq, tokens, seq_lens, attn_bias, window, return_lse)

    def factors(
        self,
        aq: Float[Tensor, "B N RQ H"] | None,
        bq: Float[Tensor, "B N RQ D"],
        ak: Float[Tensor, "B M RK H"],
        bk: Float[Tensor, "B M RK D"],
        av: Float[Tensor, "B M RV H"],
        bv: Float[Tensor, "B M RV E"],
        *,
        seq_lens: Int[Tensor, " B"] | None = None,
        attn_bias: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        rank_scale: bool = True,
        num_splits: int | None = None,
        return_lse: bool = False,
        impl: str = "auto",
    ) -> Result:
        """`tpa_decode_factors` over the tokens of all ranks; factors, lengths and bias are this rank's part.

        Args:
            aq: head factors of the queries, equal on all ranks, as is `bq`.
            bq: feature factors of the queries, or Q itself.
            ak: head factors of this rank's keys.
            bk: their feature factors, rotated.
            av: head factors of this rank's values.
            bv: their feature factors.
            seq_lens: tokens of each sequence that this rank holds; None: all M.
            attn_bias: see `__call__`, like all that follow.
            window: see there.
            scale: see there.
            rank_scale: see there.
            num_splits: see there.
            return_lse: see there.
            impl: see there.

        Raises:
            TypeError: as `tpa_decode_factors` does.
            ValueError: alike.

        Source: Zhang et al. 2025, Algorithms 2-3.
        """

        def decode(aq: Tensor | None, bq: Tensor, lengths: Tensor | None, bias: Tensor | None) -> Any:
            return tpa_decode_factors(
                *(aq, bq, ak, bk, av, bv),
                seq_lens=lengths,
                attn_bias=bias,
                scale=scale,
                rank_scale=rank_scale,
                num_splits=num_splits,
                return_lse=True,
                impl=impl,
            )

        return self._decode(decode, aq, bq, ak.shape[1], seq_lens, attn_bias, window, return_lse)

    # ---------------------------------------------------------------------------------------- how it is done

    @torch.no_grad()
    def _decode(
        self,
        decode: Callable[[Tensor | None, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
        aq: Tensor | None,
        bq: Tensor,
        tokens: int,
        seq_lens: Tensor | None,
        attn_bias: Tensor | None,
        window: int | None,
        return_lse: bool,
    ) -> Result:
        """This rank's part of every query, then the merge.

        The newest query sees all tokens. Where there are several, or a window, it matters which tokens stand
        before a query; they are a prefix of this rank's, of another length for each query.
        """
        (batch, queries), M = bq.shape[:2], tokens
        arguments.check_queries(queries)
        arguments.check_lengths(seq_lens, batch, M)
        arguments.check_window(window)
        if queries == 1 and window is None:
            out, lse = decode(aq, bq, seq_lens, attn_bias)
            return self._merged(out, lse, bq.dtype, return_lse)
        places, total = self._places(batch, M, seq_lens, bq.device)
        outs, lses = [], []
        for n in range(queries):
            place = (total - queries + n)[:, None]
            bias = only_query(attn_bias, n)
            if window is not None:
                bias = combine(bias, (places > place - window)[:, None, None])
            one = slice(n, n + 1)
            seen = (places <= place).sum(1, dtype=torch.int32)
            out, lse = decode(None if aq is None else aq[:, one], bq[:, one], seen, bias)
            outs.append(out)
            lses.append(lse)
        return self._merged(torch.cat(outs, 1), torch.cat(lses, 1), bq.dtype, return_lse)

    def _places(
        self, batch: int, tokens: int, seq_lens: Tensor | None, device: torch.device
    ) -> tuple[Int[Tensor, "B M"], Int[Tensor, " B"]]:
        """Where in its sequence each of this rank's tokens stands, none past the length; whole lengths."""
        if seq_lens is None:
            seq_lens = torch.full((batch,), tokens, device=device)
        lengths = self._gathered(seq_lens.to(device, torch.int64))
        total = lengths.sum(0)
        own = torch.arange(tokens, device=device)
        if self.placement == "interleaved":
            places = (own * self.size + self.rank).expand(batch, tokens)
        else:
            places = lengths[: self.rank].sum(0)[:, None] + own
        return places.masked_fill(own >= lengths[self.rank, :, None], NOWHERE), total

    def _merged(
        self, out: Float[Tensor, "B N H E"], lse: Float[Tensor, "B N H"], dtype: torch.dtype, return_lse: bool
    ) -> Result:
        """The parts of all ranks put together: by one collective while they are small, else by two."""
        out = out.to(lse.dtype)
        if out.numel() + lse.numel() <= self.gather_numbers:
            parts = self._gathered(torch.cat([out, lse.unsqueeze(-1)], dim=-1))
            out, total = merge_partials(parts[..., :-1], parts[..., -1])
        else:
            weights, total = softmax_and_lse(self._gathered(lse), dim=0)
            out = weights[self.rank].unsqueeze(-1) * out
            dist.all_reduce(out, group=self.group)
        return (out.to(dtype), total) if return_lse else out.to(dtype)

    def _gathered(self, part: Tensor) -> Tensor:
        """The parts of all ranks, (p, ..)."""
        part = part.contiguous()
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part, group=self.group)
        return whole.unflatten(0, (self.size, part.shape[0]))


def only_query(attn_bias: Tensor | None, n: int) -> Tensor | None:
    """The rows of a bias, broadcastable to (B, H, N, M), that belong to one query."""
    if attn_bias is None or attn_bias.ndim < 2 or attn_bias.shape[-2] == 1:
        return attn_bias
    return attn_bias[..., n : n + 1, :]
