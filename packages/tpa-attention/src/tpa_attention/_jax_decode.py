"""FlashTPA on JAX arrays: attention of queries to cached factors, chunk after chunk, K and V never formed.

Running per batch, query and head: y in R^E, s, m (= -inf). For each chunk of cached tokens

    P = B_K Q^T or B_K B_Q^T mixed by A_Q,   L = scale s_Q s_K sum_s P_s * A_K_s,   masked with -inf
    m' = max(m, max L),   p = exp(L - m'),   s = s e^{m - m'} + sum p,   y = y e^{m - m'} + sum p A_V B_V

and in the end O = s_V y / s, LSE = m + ln s. Chunks behind the longest sequence are skipped when the program
runs, so a step against a preallocated cache costs what is stored in it, not its capacity. The loop has a trip
count known to the compiler: it compiles to one body whatever M is, and can be differentiated.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithms 2 and 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_DECODE_TOKENS = 16  # more queries than that share the cost of forming the keys of a chunk


class KeyValueFactors(NamedTuple):
    """Rotated keys, and values, of m cached tokens; sizes of 1 in the batch and token axes are broadcast."""

    ak: Float[Array, "#B #m RK H"]
    bk: Float[Array, "#B #m RK D"]
    av: Float[Array, "#B #m RV H"]
    bv: Float[Array, "#B #m RV E"]


class CachedSizes(NamedTuple):
    """What the loop must know of the cache before it reads from it."""

    keys: int  # M
    heads: int
    k_rank: int
    v_rank: int
    v_width: int  # E


Load = Callable[[Int[Array, ""], int], KeyValueFactors]  # (first token, how many) -> their factors


class _Query(NamedTuple):
    """Scaled queries in the cheaper form: factors, or Q itself with a = None."""

    a: Float[Array, "B N RQ H"] | None
    b: Float[Array, "B N RQ D"]


class _Running(NamedTuple):
    """State of the online softmax."""

    y: Float[Array, "B N H E"]
    s: Float[Array, "B N H"]
    m: Float[Array, "B N H"]


def attend_chunks(
    aq: Float[Array, "B N RQ H"] | None,
    bq: Float[Array, "B N RQ D"],
    load: Load,
    sizes: CachedSizes,
    *,
    chunk: int,
    seq_lens: Int[Array, " B"],
    mask: Bool[Array, "#B #H #N #M"] | None = None,
    bias: Float[Array, "#B #H #N #M"] | None = None,
    window: int | None = None,
    scale: float,
    rank_scale: bool,
) -> tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """Outputs and log-sum-exps of N queries that stand at the end of sequences of the given lengths.

    Args:
        aq: head factors of the queries; None if `bq` is Q itself.
        bq: rotated feature factors.
        load: the factors of a run of cached tokens; called while tracing.
        sizes: sizes of the cache.
        chunk: tokens per step.
        seq_lens: valid tokens of each sequence, the N queries' own included.
        mask: True = attend; besides causality.
        bias: added to the logits.
        window: keys a query sees at most, itself included.
        scale: on Q K^T.
        rank_scale: the factors 1/R.
    """
    B, N = bq.shape[:2]
    wide = jnp.promote_types(bq.dtype, jnp.float32)
    query = _prepared(aq, bq, sizes, wide, scale, rank_scale)
    start = _Running(
        jnp.zeros((B, N, sizes.heads, sizes.v_width), wide),
        jnp.zeros((B, N, sizes.heads), wide),
        jnp.full((B, N, sizes.heads), -jnp.inf, wide),
    )
    s_v = 1 / sizes.v_rank if rank_scale else 1.0
    if 0 in (B, sizes.keys):
        return _finish(start, s_v)
    size = min(chunk, sizes.keys)
    longest = seq_lens.max()
    reach = sizes.keys + 1 if window is None else window

    def step(i: Int[Array, ""], state: _Running) -> _Running:
        # The last chunk starts early rather than run over the end, and leaves out what has been taken in.
        first = jnp.minimum(i * size, sizes.keys - size)
        token = first + jnp.arange(size)
        stored = (token >= i * size) & (token < seq_lens[:, None])  # (B, m)
        factors = _only_where(stored, load(first, size), wide)
        distance = (seq_lens[:, None] + jnp.arange(-N, 0))[:, :, None] - token
        seen = (stored[:, None] & (distance >= 0) & (distance < reach))[:, :, None]  # (B, N, 1, m)
        if mask is not None:
            seen = seen & _columns(mask, first, size)
        logits = _logits(query, factors)
        if bias is not None:
            logits = logits + _columns(bias, first, size).astype(wide)
        return _take_in(state, jnp.where(seen, logits, -jnp.inf), factors)

    def step_if_stored(i: Int[Array, ""], state: _Running) -> _Running:
        return jax.lax.cond(i * size < longest, step, lambda _, unchanged: unchanged, i, state)

    return _finish(jax.lax.fori_loop(0, -(-sizes.keys // size), step_if_stored, start), s_v)


def materialized(a: Float[Array, "#B #T R H"], b: Float[Array, "#B #T R D"]) -> Float[Array, "B T H D"]:
    """A^T B for every token."""
    return jnp.einsum("...rh,...rd->...hd", a, b)


# ------------------------------------------------------------------------------------------ steps of the loop


def _prepared(
    aq: Array | None, bq: Array, sizes: CachedSizes, wide: Any, scale: float, rank_scale: bool
) -> _Query:
    """Factors cost R_K R_Q (D + h) per cached token, Q itself R_K h D; more than 16 queries need Q."""
    scale = scale / sizes.k_rank if rank_scale else scale
    if aq is None:
        return _Query(None, bq.astype(wide) * scale)
    N, rank, D = bq.shape[1:]
    a = aq.astype(wide) * (scale / rank if rank_scale else scale)
    if N <= MAX_DECODE_TOKENS and rank * (D + sizes.heads) < sizes.heads * D:
        return _Query(a, bq.astype(wide))
    return _Query(None, materialized(a, bq.astype(wide)))


def _only_where(stored: Bool[Array, "B m"], factors: KeyValueFactors, wide: Any) -> KeyValueFactors:
    """Zero where nothing is stored: a weight of 0 times a NaN left behind would be NaN."""
    return KeyValueFactors(*(jnp.where(stored[:, :, None, None], f, 0).astype(wide) for f in factors))


def _columns(mask: Array, first: Int[Array, ""], size: int) -> Array:
    """Mask or bias of one chunk of keys as (B, N, H, m), sizes of 1 left for broadcasting."""
    part = mask if mask.shape[-1] == 1 else jax.lax.dynamic_slice_in_dim(mask, first, size, axis=-1)
    return part.swapaxes(1, 2)


def _logits(query: _Query, factors: KeyValueFactors) -> Float[Array, "B N H m"]:
    """The paper's (A.2): scores against the rows of B_K, then the sum over its rank."""
    if query.a is not None:
        p = jnp.einsum("bnrd,bmsd->bnrms", query.b, factors.bk)
        rows = jnp.einsum("bnrh,bnrms->bnhms", query.a, p)
    elif query.b.shape[1] > MAX_DECODE_TOKENS:
        return jnp.einsum("bnhd,bmhd->bnhm", query.b, materialized(factors.ak, factors.bk))
    else:
        rows = jnp.einsum("bnhd,bmsd->bnhms", query.b, factors.bk)
    return jnp.einsum("bnhms,bmsh->bnhm", rows, factors.ak)


def _take_in(state: _Running, logits: Float[Array, "B N H m"], factors: KeyValueFactors) -> _Running:
    """Algorithm 2 for one chunk. The result does not depend on m, hence no gradient flows through it."""
    m = jax.lax.stop_gradient(jnp.maximum(state.m, logits.max(axis=-1)))
    shift = jnp.where(jnp.isfinite(m), m, 0)  # -inf - -inf is NaN
    keep = jnp.exp(state.m - shift)
    p = jnp.exp(logits - shift[..., None])
    if p.shape[1] > MAX_DECODE_TOKENS:
        new = jnp.einsum("bnhm,bmhe->bnhe", p, materialized(factors.av, factors.bv))
    else:
        weighted = jnp.einsum("bnhm,bmuh->bnhmu", p, factors.av)
        new = jnp.einsum("bnhmu,bmue->bnhe", weighted, factors.bv)
    return _Running(state.y * keep[..., None] + new, state.s * keep + p.sum(axis=-1), m)


def _finish(state: _Running, s_v: float) -> tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """O = s_V y / s and LSE = m + ln s; without any key 0 and -inf, with gradients 0."""
    some = state.s > 0
    s = jnp.where(some, state.s, 1)
    return s_v * state.y / s[..., None], jnp.where(some, state.m + jnp.log(s), -jnp.inf)
