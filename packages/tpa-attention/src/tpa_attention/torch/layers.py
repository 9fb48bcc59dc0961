"""The attention layer: factor maps, RoPE on B alone, attention from factors, a cache of factors.

    X_t = (1/R_X) A_X(x_t)^T B_X(x_t),  X in {Q, K, V}                                              (3.1)
    head_i = softmax(RoPE(Q)_i RoPE(K)_i^T / sqrt(D)) V_i,   y_t = W^O concat(head_1 .. head_h)   (3.2), (3.3)

Every variant of the paper is a choice of maps (`factor_maps.py`): KV-only has no A_Q and Q itself for B_Q,
non-contextual A or B are parameters and not cached, shared B lends K's rows to V, order p has p - 1 parts per
row. One call serves training, prefill in chunks and decoding; up to 16 new tokens against a cache are decoded
straight from the records.

Source: Zhang et al. 2025 (arXiv 2501.06425), Sections 3 and 4, Appendices C and G.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tpa_attention import _checks
from tpa_attention.config import HEAD_ACTIVATIONS, IMPLS, INITS, RopeConfig

from . import blockwise, dispatch, inputs
from .arguments import MAX_DECODE_TOKENS
from .cache import CacheLayout, LayerCache
from .cache_protocol import decodes_in_place, store
from .factor_maps import FactorMap, empty_linear, init_a, init_b, init_linear, project
from .factors import RecordLayout, TPAFactors
from .functional import tpa_attention, tpa_decode_factors
from .kv_shift import KVShift, zero_padding
from .masks import ragged_mask
from .rows import NORM_EPS, activate, expand, norm_parts, rms_norm, rotate_blocks, rotate_first

IN_PLACE = ("auto", "triton")  # implementations that read records in pages or in eight bits


class TPAttention(nn.Module):
    """Causal Tensor Product Attention with every option of the paper, and a few of ours.

    Parameters: `a_q`, `b_q`, `a_k`, `b_k`, `a_v`, `b_v` (rows r * h + head for A, r * D + feature for B; the
    bias of a map holds what does not depend on the token) and `o`. KV-only has no `a_q`, and `b_q` is W^Q.

    Args:
        d_model: d, width of the hidden states.
        num_heads: h.
        head_dim: D, width of a query or key head.
        q_rank: R_Q; not read under KV-only.
        k_rank: R_K.
        v_rank: R_V.
        v_head_dim: E, width of a value head; D if None.
        variant: "contextual", or names joined by "+": "kv_only" and one of "noncontextual_a",
            "noncontextual_b".
        shared_kv_b: V uses the rows of B_K, before RoPE. Needs R_K = R_V and E = D.
        factor_dims: widths (d_b, d_c, ..) of the parts of a row of B; their product is D = E.
        head_activation: "none", "sigmoid" or "softmax" (over the heads of one rank), on every A.
        a_bias: contextual A are c + W x.
        rope: rotation of the rows of B_Q and B_K (of their first part under `factor_dims`).
        rank_scale: the factor 1/R of (3.1).
        rotate_on_load: cache unrotated keys. Forced where B_K is shared or does not depend on the token.
        out_norm: RMSNorm (eps 1e-5, weight of size E) of each head's output.
        factor_norm: RMSNorm (eps 1e-5, no weight) of the rows of B_Q and B_K before RoPE; under KV-only of
            the heads of Q. Not QK-norm, which would need materialised keys.
        output_gate: sigmoid(W^g x) times the concatenated heads.
        kv_shift: K and V read mu * x_t + (1 - mu) * x_{t-1} with a learned mu in R^d that starts at 1.
        fused_proj: one matrix product for all maps of the same input.
        init: "t6" (as trained), "xavier" (paper text) or "normal" (std 0.02).
        zero_init_output: W^O starts at zero. Then the gradients of all other parameters are zero in step 1.
        impl: "auto", "reference", "sdpa", "flex" or "triton".
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.

    Raises:
        TypeError: if a size is no int.
        ValueError: if an option or a combination is not among those above.

    Source: Zhang et al. 2025, Section 3; App. C (order), App. G (variants, initial values); the authors' code
    (`out_norm`). `factor_norm`, `a_bias`, the gate's and the shift's formulas are ours.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        q_rank: int = 6,
        k_rank: int = 2,
        v_rank: int = 2,
        *,
        v_head_dim: int | None = None,
        variant: str = "contextual",
        shared_kv_b: bool = False,
        factor_dims: Sequence[int] | None = None,
        head_activation: str = "none",
        a_bias: bool = False,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
        rank_scale: bool = True,
        rotate_on_load: bool = False,
        out_norm: bool = False,
        factor_norm: bool = False,
        output_gate: bool = False,
        kv_shift: bool = False,
        fused_proj: bool = True,
        init: str = "t6",
        zero_init_output: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.q_rank, self.k_rank, self.v_rank = q_rank, k_rank, v_rank
        self.variant, self.shared_kv_b = variant, shared_kv_b
        self.factor_dims = None if factor_dims is None else tuple(factor_dims)
        self.head_activation, self.a_bias = head_activation, a_bias
        self.rope, self.rank_scale = rope, rank_scale
        self.factor_norm, self.fused_proj = factor_norm, fused_proj
        self.init, self.zero_init_output, self.impl = init, zero_init_output, impl
        names = self._validate()
        self.kv_only = "kv_only" in names
        free_a, free_b = "noncontextual_a" in names, "noncontextual_b" in names
        self.rotate_on_load = rotate_on_load or shared_kv_b or free_b

        place = {"device": device, "dtype": dtype}

        def head_map(rank: int) -> FactorMap:
            return FactorMap(d_model, rank, (num_heads,), contextual=not free_a, bias=a_bias, **place)

        def feature_map(rank: int, width: int) -> FactorMap:
            return FactorMap(d_model, rank, self.factor_dims or (width,), contextual=not free_b, **place)

        self.a_q = None if self.kv_only else head_map(q_rank)
        self.b_q = (
            FactorMap(d_model, num_heads, (head_dim,), **place)
            if self.kv_only
            else feature_map(q_rank, head_dim)
        )
        self.a_k, self.b_k = head_map(k_rank), feature_map(k_rank, head_dim)
        self.a_v, self.b_v = head_map(v_rank), None if shared_kv_b else feature_map(v_rank, self.v_head_dim)
        width = num_heads * self.v_head_dim
        self.o = empty_linear(width, d_model, **place)
        self.gate = empty_linear(d_model, width, **place) if output_gate else None
        self.out_norm = nn.RMSNorm(self.v_head_dim, eps=NORM_EPS, **place) if out_norm else None
        self.shift = KVShift(d_model, **place) if kv_shift else None

        k_width, v_width = (sum(self.factor_dims or (n,)) for n in (head_dim, self.v_head_dim))
        self.k_record = RecordLayout(k_rank, num_heads, k_width, not free_a, not free_b)
        self.v_record = RecordLayout(v_rank, num_heads, v_width, not free_a, not (free_b or shared_kv_b))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values anew, by the scheme `init`; W^O becomes zero unless told otherwise."""
        for a in (self.a_q, self.a_k, self.a_v):
            if a is not None:
                init_a(a, self.init, generator)
        if self.kv_only:
            init_linear(self.b_q.matrix, self.init, generator)
        for b in (None if self.kv_only else self.b_q, self.b_k, self.b_v):
            if b is not None:
                init_b(b, self.init, generator)
        if self.zero_init_output:
            nn.init.zeros_(self.o.weight)
        else:
            init_linear(self.o.weight, self.init, generator)
        if self.gate is not None:
            init_linear(self.gate.weight, self.init, generator)
        if self.out_norm is not None:
            nn.init.ones_(self.out_norm.weight)
        if self.shift is not None:
            nn.init.ones_(self.shift.mu)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a `FactorCache` of this layer alone holds."""
        return CacheLayout(1, self.k_record.numbers, self.v_record.numbers, self.rotate_on_load)

    # --------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        position_ids: Int[Tensor, "..."] | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_idx: int = 0,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Attend causally; with a cache, the T tokens are new and come after those it holds.

        Args:
            x: hidden states.
            position_ids: integer positions (T,) or (B, T); by default they count on from what the cache holds
                and restart in every packed sequence. Padding needs none: only differences matter.
            attention_mask: (B, M), 1 for valid keys among all M tokens, or (B, 1 or h, T, M), boolean (True =
                attend) or an additive bias. Causality holds besides.
            cache: where records of this layer are kept, and appended to.
            layer_idx: which layer of the cache this is.
            cu_seqlens: boundaries 0 .. T of sequences packed in a batch of one.

        Raises:
            TypeError: if `position_ids` are no integers or a mask (B, M) is floating.
            ValueError: if a shape does not fit, packed sequences meet a cache, or the cache has no room (it
                is unchanged then).
        """
        past = None if cache is None else cache.past_length(layer_idx)
        inputs.check_input(x, self.d_model, position_ids, attention_mask, past, cu_seqlens)
        batch, new, _ = x.shape
        counted = inputs.new_positions(past, batch, new, x.device, cu_seqlens)
        positions = counted if position_ids is None else position_ids.expand(batch, new)
        source = hidden = x
        if self.shift is not None:
            hidden = zero_padding(x, counted, attention_mask)
            before = None if cache is None else cache.last_hidden(layer_idx)
            source = self.shift(x, hidden, before, None if cu_seqlens is None else counted == 0)
        raw = self._project(x, source)
        bq = self._queries(raw.bq, positions)
        if cache is None:
            heads = self._attend_new(raw, bq, positions, attention_mask, cu_seqlens)
        else:
            heads = self._attend_cached(raw, bq, positions, counted, attention_mask, cache, layer_idx)
            if self.shift is not None:
                cache.set_last_hidden(layer_idx, hidden)
        return self._output(x, heads)

    def factors(
        self, x: Float[Tensor, "B T d"], position_ids: Int[Tensor, "..."] | None = None
    ) -> TPAFactors:
        """The six factors of every token, rotated, rows of B expanded: what `tpa_attention` takes.

        Under `kv_shift` the token before the first counts as 0.
        """
        inputs.check_input(x, self.d_model, position_ids, None, None, None)
        batch, new, _ = x.shape
        counted = inputs.new_positions(None, batch, new, x.device)
        positions = counted if position_ids is None else position_ids.expand(batch, new)
        raw = self._project(x, x if self.shift is None else self.shift(x, x))
        bq = self._queries(raw.bq, positions)
        return self._complete(raw, bq, self._rotated(raw.bk, positions), batch, new)

    def _attend_new(
        self,
        raw: TPAFactors,
        bq: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Float[Tensor, "B T H E"]:
        batch, new = positions.shape
        heads = tpa_attention(
            *self._complete(raw, bq, self._rotated(raw.bk, positions), batch, new),
            attn_mask=inputs.key_mask(attention_mask, batch, new, new),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            rank_scale=self.rank_scale,
            impl=self.impl,
        )
        return cast(Tensor, heads)

    def _attend_cached(
        self,
        raw: TPAFactors,
        bq: Tensor,
        positions: Tensor,
        counted: Tensor,
        attention_mask: Tensor | None,
        cache: LayerCache,
        layer_idx: int,
    ) -> Float[Tensor, "B T H E"]:
        """Store the records of the new tokens, then attend to all tokens, in the type of the cache."""
        batch, new = positions.shape
        few, records = new <= MAX_DECODE_TOKENS, (self.k_record, self.v_record)
        own = cache if few and self.impl in IN_PLACE and decodes_in_place(cache) else None
        # plain torch makes factors of records a block at a time
        in_blocks = few and self.impl == "auto" and dispatch.chosen("auto", bq) == "blockwise"
        direct = own is not None and self._attends_to_rows and own.decodes(records)
        if own is not None and not (direct or in_blocks):
            own = None
        if own is not None:
            inputs.key_mask(attention_mask, batch, new, own.extent(layer_idx, new))  # before anything changes
        stored = store(cache, own, layer_idx, *self._pack(raw, positions), positions)
        mask = inputs.key_mask(attention_mask, batch, new, stored.keys)
        aq = None if raw.aq is None else raw.aq.expand(batch, new, -1, -1).to(stored.dtype)
        bq = bq.expand(batch, new, -1, -1).to(stored.dtype)
        options = {"rank_scale": self.rank_scale, "impl": self.impl}
        ragged: dict[str, Any] = {"seq_lens": stored.seq_lens, "attn_bias": mask}
        if own is not None and direct:
            free_a = None if self.k_record.has_a else (self._free_a(self.a_k), self._free_a(self.a_v))
            heads, _ = own.decode(layer_idx, aq, bq, records, free_a=free_a, attn_bias=mask, **options)
            return heads.to(raw.bq.dtype)
        at = self._key_positions(cache, layer_idx, stored.keys, positions, counted)

        def load(first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return self._unpack(*stored.read(first, last), None if at is None else at[:, first:last])

        if in_blocks:
            sizes = (stored.keys, self.k_rank, self.v_rank, self.num_heads, self.v_head_dim)
            heads, _ = blockwise.decode_loaded(aq, bq, load, sizes, **ragged, rank_scale=self.rank_scale)
        elif few:
            heads = tpa_decode_factors(aq, bq, *load(0, stored.keys), **ragged, **options)
        else:
            causal = stored.seq_lens is None
            if stored.seq_lens is not None:
                mask = inputs.combine(mask, ragged_mask(new, stored.keys, stored.seq_lens))
            kv = load(0, stored.keys)
            heads = tpa_attention(aq, bq, *kv, causal=causal, attn_mask=mask, **options)
        return cast(Tensor, heads).to(raw.bq.dtype)

    # ------------------------------------------------------------------------------ hidden state to factors

    def _project(self, x: Float[Tensor, "B T d"], source: Float[Tensor, "B T d"]) -> TPAFactors:
        """Rows of all maps, activated and normed, not rotated, parts of higher order side by side."""
        q_maps = [m for m in (self.a_q, self.b_q) if m is not None]
        kv_maps = [m for m in (self.a_k, self.b_k, self.a_v, self.b_v) if m is not None]
        if source is x:
            rows = project([*q_maps, *kv_maps], x, fused=self.fused_proj)
        else:
            rows = project(q_maps, x, fused=self.fused_proj) + project(kv_maps, source, fused=self.fused_proj)
        aq = None if self.a_q is None else activate(rows.pop(0), self.head_activation)
        bq, ak, bk, av, *bv = rows
        if self.factor_norm:
            bq, bk = norm_parts(bq, self.b_q.widths), norm_parts(bk, self.b_k.widths)
        ak, av = activate(ak, self.head_activation), activate(av, self.head_activation)
        return TPAFactors(aq, bq, ak, bk, av, bv[0] if bv else bk)

    def _queries(self, bq: Float[Tensor, "#B #T R n"], positions: Tensor) -> Float[Tensor, "B T R D"]:
        """B_Q, or Q itself under KV-only, rotated and expanded."""
        first = self.b_k.widths[0]
        if self.kv_only:
            return rotate_blocks(bq, positions, self.rope, first)
        return expand(rotate_first(bq, positions, self.rope, first), self.b_q.widths)

    def _rotated(self, bk: Float[Tensor, "#B #T R n"], positions: Tensor) -> Float[Tensor, "B T R n"]:
        return rotate_first(bk, positions, self.rope, self.b_k.widths[0])

    def _complete(self, raw: TPAFactors, bq: Tensor, bk: Tensor, batch: int, new: int) -> TPAFactors:
        """All factors for every token; what does not depend on the token is broadcast without a copy."""
        aq = None if raw.aq is None else raw.aq.expand(batch, new, -1, -1)
        bk, bv = expand(bk, self.b_k.widths), expand(raw.bv, self._v_widths)
        return TPAFactors(aq, bq, *(f.expand(batch, new, -1, -1) for f in (raw.ak, bk, raw.av, bv)))

    @property
    def _v_widths(self) -> tuple[int, ...]:
        return self.b_k.widths if self.b_v is None else self.b_v.widths

    # --------------------------------------------------------------------------------------------- records

    @property
    def _attends_to_rows(self) -> bool:
        """Whether records hold the rows of B as attention reads them."""
        return not self.rotate_on_load and self.factor_dims is None

    def _free_a(self, head_map: FactorMap) -> Float[Tensor, "1 1 R H"]:
        """Head factors that do not depend on the token."""
        return activate(head_map.rows(None), self.head_activation)

    def _pack(self, raw: TPAFactors, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Records of the new tokens; keys enter rotated unless they are rotated on load."""
        bk = raw.bk
        if self.k_record.has_b and not self.rotate_on_load:
            bk = self._rotated(bk, positions)
        return _packed(self.k_record, raw.ak, bk), _packed(self.v_record, raw.av, raw.bv)

    def _unpack(
        self, k: Float[Tensor, "B M Wk"], v: Float[Tensor, "B M Wv"], key_positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A_K, B_K (rotated), A_V, B_V of every cached token, rows expanded."""
        ak, bk = self.k_record.views(k)
        av, bv = self.v_record.views(v)
        ak = self._free_a(self.a_k).to(k.dtype) if ak is None else ak
        av = self._free_a(self.a_v).to(k.dtype) if av is None else av
        if bk is None:
            free = self.b_k.rows(None)
            bk = (norm_parts(free, self.b_k.widths) if self.factor_norm else free).to(k.dtype)
        if bv is None:
            bv = bk if self.b_v is None else self.b_v.rows(None).to(k.dtype)
        if key_positions is not None:
            bk = self._rotated(bk, key_positions)
        shape = (*k.shape[:2], -1, -1)
        bk, bv = expand(bk, self.b_k.widths), expand(bv, self._v_widths)
        return ak.expand(shape), bk.expand(shape), av.expand(shape), bv.expand(shape)

    def _key_positions(
        self, cache: LayerCache, layer_idx: int, keys: int, positions: Tensor, counted: Tensor
    ) -> Tensor | None:
        """Where cached keys are to be rotated to; without positions in the cache they are consecutive."""
        if not self.rotate_on_load:
            return None
        kept = cache.key_positions(layer_idx)
        if kept is not None:
            return kept
        offset = positions[:, :1] - counted[:, :1]
        return offset + torch.arange(keys, device=positions.device)

    def _output(self, x: Float[Tensor, "B T d"], heads: Float[Tensor, "B T H E"]) -> Float[Tensor, "B T d"]:
        if self.out_norm is not None:
            heads = rms_norm(heads, self.out_norm.weight)
        y = heads.flatten(2)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.o(y)

    # ---------------------------------------------------------------------------------------------- checks

    def _validate(self) -> frozenset[str]:
        """Check the options; return the names in `variant`."""
        for name in ("d_model", "num_heads", "head_dim", "q_rank", "k_rank", "v_rank", "v_head_dim"):
            _checks.positive_int(name, getattr(self, name))
        names = _checks.variant_names(self.variant)
        _checks.one_of("head_activation", self.head_activation, HEAD_ACTIVATIONS)
        _checks.one_of("init", self.init, INITS)
        _checks.one_of("impl", self.impl, IMPLS)
        if not isinstance(self.rope, RopeConfig):
            raise TypeError(f"rope must be a RopeConfig (RopeConfig.none() for none), got {self.rope!r}")
        if self.shared_kv_b and (self.k_rank, self.head_dim) != (self.v_rank, self.v_head_dim):
            raise ValueError(
                f"shared_kv_b needs k_rank = v_rank and v_head_dim = head_dim, got ranks {self.k_rank} and "
                f"{self.v_rank}, widths {self.v_head_dim} and {self.head_dim}"
            )
        if self.a_bias and "noncontextual_a" in names:
            raise ValueError(f"a_bias needs a contextual A, got variant {self.variant!r}")
        if self.factor_dims is not None:
            _checks.factor_dims(self.factor_dims, self.head_dim, self.v_head_dim)
        self.rope.rotary_dim(self.head_dim if self.factor_dims is None else self.factor_dims[0])
        return names

    def extra_repr(self) -> str:
        """Sizes, ranks and variant."""
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"ranks=({self.q_rank}, {self.k_rank}, {self.v_rank}), variant={self.variant!r}"
        )


def _packed(layout: RecordLayout, a: Tensor, b: Tensor) -> Tensor:
    """Records of the parts that the layout keeps; width 0 if it keeps none."""
    if layout.numbers == 0:
        return b.new_zeros(*b.shape[:2], 0)
    return layout.pack(a if layout.has_a else None, b if layout.has_b else None)
