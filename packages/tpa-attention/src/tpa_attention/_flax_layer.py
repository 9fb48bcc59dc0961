"""The attention layer for flax: factor maps, RoPE on B alone, attention from factors, a cache of factors.

    X_t = (1/R_X) A_X(x_t)^T B_X(x_t),  X in {Q, K, V}                                              (3.1)
    head_i = softmax(RoPE(Q)_i RoPE(K)_i^T / sqrt(D)) V_i,   y_t = W^O concat(head_1 .. head_h)   (3.2), (3.3)

One call serves training, prefill in chunks and decoding. Without a cache, and for a prompt that finds it
empty, `jax.nn.dot_product_attention` attends; otherwise the factors are read from the cache chunk by chunk
(`_jax_decode.py`), rotated and expanded there if they are stored in a smaller form.

Source: Zhang et al. 2025 (arXiv 2501.06425), Sections 3 and 4, Appendices C and G.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from ._flax_cache import CacheShapes, LayerCache
from ._flax_checks import given_positions, key_mask, layer_options
from ._flax_kv_shift import KVShift
from ._flax_maps import FactorMap, HeadLinear, drawn, init_a, init_b, xavier_bound
from ._flax_norm import RMSNorm, rms_norm
from ._flax_versions import assign
from ._jax_decode import MAX_DECODE_TOKENS, CachedSizes, KeyValueFactors, Load, attend_chunks
from ._jax_masks import split_mask
from ._jax_rope import rope as apply_rope
from .config import RopeConfig
from .jax import tpa_attention

NORM_EPS = 1e-5


class _Rows(NamedTuple):
    """What the maps make of the hidden states: activated and normed, not rotated, parts side by side."""

    aq: Float[Array, "#B #T RQ H"] | None
    bq: Float[Array, "#B #T RQ nq"]
    ak: Float[Array, "#B #T RK H"]
    bk: Float[Array, "#B #T RK nk"]
    av: Float[Array, "#B #T RV H"]
    bv: Float[Array, "#B #T RV nv"]


class TPAttention(nnx.Module):
    """Causal Tensor Product Attention with every option of the paper, and a few of ours.

    The parameters have the names of the torch layer: `a_q`, `b_q`, `a_k`, `b_k`, `a_v`, `b_v` with kernels
    (d, R, h or D), and `o` (h, E, d). KV-only has no `a_q`, and `b_q` is W^Q. What is fused into one matrix
    product is left to XLA.

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
        init: "t6" (as trained), "xavier" (paper text) or "normal" (std 0.02).
        zero_init_output: W^O starts at zero. Then the gradients of all other parameters are zero in step 1.
        implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
        chunk: cached tokens that a decode step reads at a time.
        dtype: type of the computation; None for that of input and parameters together.
        param_dtype: type of the parameters.
        rngs: source of the initial values, its stream `params`.

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
        init: str = "t6",
        zero_init_output: bool = True,
        implementation: Literal["xla", "cudnn"] | None = None,
        chunk: int = 512,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.q_rank, self.k_rank, self.v_rank = q_rank, k_rank, v_rank
        self.variant, self.shared_kv_b = variant, shared_kv_b
        self.factor_dims = None if factor_dims is None else tuple(factor_dims)
        self.head_activation, self.a_bias = head_activation, a_bias
        self.rope, self.rank_scale, self.factor_norm = rope, rank_scale, factor_norm
        self.init, self.zero_init_output = init, zero_init_output
        self.implementation: Literal["xla", "cudnn"] | None = implementation
        self.chunk = chunk
        self.dtype, self.param_dtype = dtype, param_dtype
        names = layer_options(self)
        self.kv_only = "kv_only" in names
        free_a, free_b = "noncontextual_a" in names, "noncontextual_b" in names
        self.rotate_on_load = rotate_on_load or shared_kv_b or free_b

        def head_map(rank: int) -> FactorMap:
            options = {"contextual": not free_a, "bias": a_bias, "head_axis": 1}
            return FactorMap(d_model, rank, (num_heads,), **options, param_dtype=param_dtype)

        def feature_map(rank: int, width: int) -> FactorMap:
            widths = self.factor_dims or (width,)
            return FactorMap(d_model, rank, widths, contextual=not free_b, param_dtype=param_dtype)

        self.a_q = None if self.kv_only else head_map(q_rank)
        self.b_q = (
            FactorMap(d_model, num_heads, (head_dim,), head_axis=0, param_dtype=param_dtype)
            if self.kv_only
            else feature_map(q_rank, head_dim)
        )
        self.a_k, self.b_k = head_map(k_rank), feature_map(k_rank, head_dim)
        self.a_v, self.b_v = head_map(v_rank), None if shared_kv_b else feature_map(v_rank, self.v_head_dim)
        E = self.v_head_dim
        self.o = HeadLinear((num_heads, E, d_model), 0, param_dtype)
        self.gate = HeadLinear((d_model, num_heads, E), 1, param_dtype) if output_gate else None
        self.out_norm = RMSNorm(E, True, NORM_EPS, param_dtype=param_dtype) if out_norm else None
        self.shift = KVShift(d_model, param_dtype) if kv_shift else None
        self._initialize(rngs)

    def _initialize(self, rngs: nnx.Rngs) -> None:
        """Draw initial values by the scheme `init`; W^O becomes zero unless told otherwise."""
        for a in (self.a_q, self.a_k, self.a_v):
            if a is not None:
                init_a(a, self.init, rngs.params())
        for b in (None if self.kv_only else self.b_q, self.b_k, self.b_v):
            if b is not None:
                init_b(b, self.init, rngs.params())
        if self.kv_only and self.b_q.kernel is not None:
            bound = xavier_bound(self.init, self.d_model, self.num_heads * self.head_dim)
            assign(self.b_q.kernel, drawn(rngs.params(), self.b_q.kernel, bound))
        for linear in (None if self.zero_init_output else self.o, self.gate):
            if linear is not None:
                bound = xavier_bound(self.init, *linear.fans)
                assign(linear.kernel, drawn(rngs.params(), linear.kernel, bound))

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike | None = None) -> LayerCache:
        """An empty cache of this layer.

        Args:
            batch: sequences, >= 1.
            max_len: capacity in tokens, >= 1.
            dtype: floating type of the factors; None for that of the computation.

        Raises:
            TypeError: if a size is no int or `dtype` not floating.
            ValueError: if a size is < 1.
        """
        D, E = (sum(self.factor_dims or (n,)) for n in (self.head_dim, self.v_head_dim))
        shapes = CacheShapes(
            ak=(self.k_rank, self.num_heads) if self.a_k.contextual else None,
            bk=(self.k_rank, D) if self.b_k.contextual else None,
            av=(self.v_rank, self.num_heads) if self.a_v.contextual else None,
            bv=(self.v_rank, E) if self.b_v is not None and self.b_v.contextual else None,
            keep_positions=self.rotate_on_load,
            last_width=None if self.shift is None else self.d_model,
        )
        own = self.param_dtype if self.dtype is None else self.dtype
        return LayerCache(shapes, batch, max_len, own if dtype is None else dtype)

    # --------------------------------------------------------------------------------------------- forward

    def __call__(
        self,
        x: Float[Array, "B T d"],
        position_ids: Int[ArrayLike, "..."] | None = None,
        attention_mask: ArrayLike | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Array, "B T d"]:
        """Attend causally; with a cache, the T tokens are new and come after those it holds.

        Args:
            x: hidden states.
            position_ids: integer positions (T,) or (B, T); by default they count on from what the cache
                holds. Padding needs none: only differences matter.
            attention_mask: (B, M), 1 for valid keys, or (B or 1, h or 1, T, M), boolean (True = attend) or an
                additive bias. Causality holds besides. M is T without a cache, the capacity of the cache with
                one.
            cache: where factors of this layer are kept, and appended to.

        Raises:
            TypeError: if `position_ids` are no integers or a mask (B, M) is floating.
            ValueError: if a shape does not fit, or the cache has no room (it is unchanged then; inside `jit`
                the outputs of a sequence without room are NaN and its cache is unchanged).
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape (B, T, {self.d_model}), got {x.shape}")
        batch, new, _ = x.shape
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        mask = key_mask(mask, batch, self.num_heads, new, new if cache is None else cache.max_len)
        if cache is not None:
            cache.check_room(batch, new)
        x = x.astype(jnp.promote_types(x.dtype, self.param_dtype) if self.dtype is None else self.dtype)
        past = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths[...]
        counted = past[:, None] + jnp.arange(new)
        positions = counted if position_ids is None else given_positions(position_ids, batch, new)
        source = hidden = x
        if self.shift is not None:
            if attention_mask is not None and jnp.ndim(attention_mask) == 2:
                valid = jnp.take_along_axis(jnp.asarray(attention_mask), counted, axis=1)
                hidden = x * valid[..., None].astype(x.dtype)
            source = self.shift(x, hidden, None if cache is None or cache.last is None else cache.last[...])
        rows = self._rows(x, source)
        bq = self._expand(self._rotate(rows.bq, positions, full=self.kv_only), full=self.kv_only)
        if cache is None:
            heads = self._attend_new(rows, bq, positions, mask, x.dtype)
        else:
            heads = self._attend_cached(rows, bq, positions, mask, cache, hidden[:, -1])
        return self._output(x, heads.astype(x.dtype))

    def _attend_new(
        self, rows: _Rows, bq: Array, positions: Array, mask: Array | None, dtype: DTypeLike
    ) -> Float[Array, "B T H E"]:
        """Attention among the new tokens, of factors rounded to `dtype`."""
        batch, new = positions.shape

        def complete(factor: Array) -> Array:
            return _filled(factor, batch, new).astype(dtype)

        return tpa_attention(
            None if rows.aq is None else complete(rows.aq),
            complete(bq),
            complete(rows.ak),
            complete(self._expand(self._rotate(rows.bk, positions))),
            complete(rows.av),
            complete(self._expand(rows.bv)),
            mask=mask,
            scale=self.head_dim**-0.5,
            rank_scale=self.rank_scale,
            implementation=self.implementation,
        )

    def _attend_cached(
        self,
        rows: _Rows,
        bq: Array,
        positions: Array,
        mask: Array | None,
        cache: LayerCache,
        last: Float[Array, "B d"],
    ) -> Float[Array, "B T H E"]:
        """Append the factors of the new tokens, then attend to all tokens, in the type of the cache."""
        batch, new = positions.shape
        was_empty = cache.lengths[...].max() == 0
        bk = rows.bk if self.rotate_on_load else self._rotate(rows.bk, positions)
        fits = cache.append(rows.ak, bk, rows.av, rows.bv, positions)
        dtype = cache.dtype
        if cache.last is not None:
            kept = jnp.where(fits[:, None], last.astype(dtype), cache.last[...])
            assign(cache.last, kept)
        load, seq_lens = self._loader(cache), cache.lengths[...]
        sizes = CachedSizes(cache.max_len, self.num_heads, self.k_rank, self.v_rank, self.v_head_dim)
        split = split_mask("attention_mask", mask, (batch, self.num_heads, new, cache.max_len))

        def from_cache() -> Float[Array, "B T H E"]:
            heads, _ = attend_chunks(
                None if rows.aq is None else _filled(rows.aq, batch, new).astype(dtype),
                _filled(bq, batch, new).astype(dtype),
                load,
                sizes,
                chunk=self.chunk,
                seq_lens=seq_lens,
                mask=split[0],
                bias=split[1],
                scale=self.head_dim**-0.5,
                rank_scale=self.rank_scale,
            )
            return heads.astype(dtype)

        def among_themselves() -> Float[Array, "B T H E"]:
            part = mask if mask is None or mask.shape[-1] == 1 else mask[..., :new]
            return self._attend_new(rows, bq, positions, part, dtype)

        if new <= MAX_DECODE_TOKENS:
            heads = from_cache()
        else:
            heads = jax.lax.cond(was_empty, among_themselves, from_cache)
        return jnp.where(fits[:, None, None, None], heads, jnp.nan)

    # ------------------------------------------------------------------------------ hidden state to factors

    def _rows(self, x: Float[Array, "B T d"], source: Float[Array, "B T d"]) -> _Rows:
        bk = self._norm_rows(self.b_k(source))
        return _Rows(
            None if self.a_q is None else self._activate(self.a_q(x)),
            self._norm_rows(self.b_q(x), full=self.kv_only),
            self._activate(self.a_k(source)),
            bk,
            self._activate(self.a_v(source)),
            bk if self.b_v is None else self.b_v(source),
        )

    def _activate(self, a: Array) -> Array:
        if self.head_activation == "sigmoid":
            return jax.nn.sigmoid(a)
        return jax.nn.softmax(a, axis=-1) if self.head_activation == "softmax" else a

    def _norm_rows(self, b: Array, full: bool = False) -> Array:
        """RMSNorm of each part: the RMS of a Kronecker product is the product of the RMSs."""
        if not self.factor_norm:
            return b
        parts = [b] if full else self._parts(b)
        return jnp.concatenate([rms_norm(part, NORM_EPS) for part in parts], axis=-1)

    def _rotate(self, b: Array, positions: Array, full: bool = False) -> Array:
        """Theorem C.1: the first part alone turns; in a full Q that is every block of its width."""
        if self.factor_dims is None:
            return apply_rope(b, positions, self.rope)
        if full:
            blocks = b.reshape(*b.shape[:2], -1, self.factor_dims[0])
            return apply_rope(blocks, positions, self.rope).reshape(b.shape)
        first, *rest = self._parts(b)
        turned = apply_rope(first, positions, self.rope)
        return jnp.concatenate([turned, *(_filled(part, *turned.shape[:2]) for part in rest)], axis=-1)

    def _expand(self, b: Array, full: bool = False) -> Array:
        """Rows vec(b (x) c (x) ..) of Appendix C: entry j_c d_b + i_b is b[i_b] c[j_c]."""
        if self.factor_dims is None or full:
            return b
        rows, *rest = self._parts(b)
        for part in rest:
            rows = (part[..., :, None] * rows[..., None, :]).reshape(*rows.shape[:3], -1)
        return rows

    def _parts(self, b: Array) -> list[Array]:
        if self.factor_dims is None:
            return [b]
        ends = [sum(self.factor_dims[: i + 1]) for i in range(len(self.factor_dims) - 1)]
        return jnp.split(b, ends, axis=-1)

    def _loader(self, cache: LayerCache) -> Load:
        """Reads a run of cached tokens: free factors filled in, keys rotated, rows expanded."""
        dtype = cache.dtype
        ak = self._activate(self.a_k.constant(dtype)) if cache.ak is None else cache.ak[...]
        av = self._activate(self.a_v.constant(dtype)) if cache.av is None else cache.av[...]
        bk = self._norm_rows(self.b_k.constant(dtype)) if cache.bk is None else cache.bk[...]
        bv = None if cache.bv is None else cache.bv[...]
        if bv is None:
            bv = bk if self.b_v is None else self.b_v.constant(dtype)
        positions = None if cache.positions is None else cache.positions[...]

        def load(first: Int[Array, ""], size: int) -> KeyValueFactors:
            def run(stored: Array) -> Array:
                free = stored.ndim == 4 and stored.shape[:2] == (1, 1)
                return stored if free else jax.lax.dynamic_slice_in_dim(stored, first, size, axis=1)

            keys = run(bk)
            turned = keys if positions is None else self._rotate(keys, run(positions))
            return KeyValueFactors(run(ak), self._expand(turned), run(av), self._expand(run(bv)))

        return load

    def _output(self, x: Float[Array, "B T d"], heads: Float[Array, "B T H E"]) -> Float[Array, "B T d"]:
        if self.out_norm is not None:
            heads = self.out_norm(heads)
        if self.gate is not None:
            heads = jax.nn.sigmoid(self.gate(x)) * heads
        return self.o(heads)


def _filled(factor: Array, batch: int, new: int) -> Array:
    """What does not depend on the token, for every token."""
    return jnp.broadcast_to(factor, (batch, new, *factor.shape[2:]))
