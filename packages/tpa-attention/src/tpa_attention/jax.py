"""Tensor Product Attention on JAX arrays: RoPE of factors, their product, attention and decoding from them.

Pure functions with the factor layout of `tpa_attention.torch`: A is (B, T, R, H), B is (B, T, R, D), full
queries are (B, T, H, D) with aq = None, outputs (B, T, H, E). They work under `jit`, `vmap` and `grad`, and
in float64 where the caller has switched it on. Matrix products run at JAX's default precision: on an
accelerator `jax.default_matmul_precision` decides about float32.

    X_t = (1/R_X) A_X^T B_X,    X in {Q, K, V}                                                      (3.1)
    head_i = softmax(Q_i K_i^T / sqrt(D)) V_i                                                       (3.2)

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendix A, Algorithms 2 and 3.
"""

try:
    import jax
    import jaxtyping  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpa_attention.jax needs jax and jaxtyping, and {error.name} is not installed: "
        'pip install "tpa-attention[jax]"',
        name=error.name,
    ) from error

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tpa_attention import _checks
from tpa_attention._jax_decode import (
    MAX_DECODE_TOKENS,
    CachedSizes,
    KeyValueFactors,
    attend_chunks,
    materialized,
)
from tpa_attention._jax_masks import both, causal_mask, split_mask
from tpa_attention._jax_rope import rope

__all__ = ["materialize", "rope", "tpa_attention", "tpa_decode"]


def materialize(
    a: Float[Array, "#B #T R H"] | None, b: Float[Array, "#B #T R D"], rank_scale: bool = True
) -> Float[Array, "B T H D"]:
    """X_t = s_X A^T B for every token: all heads of Q, K or V from their factors.

    Args:
        a: head factors; None returns `b`, which then is X already (the full Q of KV-only).
        b: feature factors. Sizes of 1 in the batch and token axes of either are broadcast, which serves
            factors that do not depend on the token.
        rank_scale: multiply by 1/R, as the paper defines X; it enters here and nowhere else.

    Raises:
        TypeError: if a factor is not floating.
        ValueError: if the shapes do not fit or R is 0.

    Source: Zhang et al. 2025, eq. 3.1.
    """
    _check_pair("a", a, "b", b)
    if a is None:
        return b
    return materialized(a / a.shape[-2] if rank_scale else a, b)


def tpa_attention(
    aq: Float[Array, "B T RQ H"] | None,
    bq: Float[Array, "B T RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    *,
    causal: bool = True,
    mask: Bool[ArrayLike, "..."] | Float[ArrayLike, "..."] | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T H E"]:
    """Attention of factored queries, keys and values: for training and prefill.

    Forms Q, K and V and hands them to `jax.nn.dot_product_attention` (float64, whose softmax it would round,
    is computed here). A query that sees no key gives 0.

    Args:
        aq: head factors of the queries; None if `bq` is Q itself, (B, T, H, D).
        bq: feature factors of the queries, rotated already.
        ak: head factors of the keys.
        bk: feature factors of the keys, rotated already.
        av: head factors of the values.
        bv: feature factors of the values.
        causal: query j of T stands at M - T + j (bottom-right) and sees itself and what precedes it.
        mask: broadcasts to (B, H, T, M): boolean (True = attend), or a bias added to the logits once.
        window: keys a query sees at most, itself included.
        scale: on Q K^T; None for 1/sqrt(D).
        rank_scale: the factors 1/R of (3.1).
        implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".

    Raises:
        TypeError: if a factor is not floating, or a mask neither boolean nor floating.
        ValueError: if shapes do not fit, or a window comes without `causal`.

    Source: Zhang et al. 2025, eq. 3.1-3.2.
    """
    factors = (aq, bq, ak, bk, av, bv)
    B, T, M, H = _check_factors("T", *factors)
    bool_mask, bias = split_mask("mask", mask, (B, H, T, M))
    _check_window(window, causal)
    top_left = causal and T == M and window is None  # which dot_product_attention knows by itself
    seen = both(bool_mask, causal_mask(T, M, window) if causal else None)
    wide = jnp.result_type(*(f for f in factors if f is not None))
    q, k, v = (
        materialize(None if a is None else a.astype(wide), b.astype(wide), rank_scale)
        for a, b in ((aq, bq), (ak, bk), (av, bv))
    )
    if 0 in (B, T, M):
        return jnp.zeros((B, T, H, bv.shape[-1]), wide)
    on_logits = q.shape[-1] ** -0.5 if scale is None else scale
    if wide == jnp.float64:
        out = _float64_attention(q, k, v, seen, bias, on_logits)
    else:
        width = max(q.shape[-1], v.shape[-1])
        q, k, v = (_padded(x, width) for x in (q, k, v))  # it wants equal widths
        out = jax.nn.dot_product_attention(
            *(q, k, v),
            bias=bias,
            mask=bool_mask if top_left else seen,
            is_causal=top_left,
            scale=on_logits,
            implementation=implementation,
        )[..., : bv.shape[-1]]
    if seen is None or (bool_mask is None and T <= M):
        return out  # every query sees a key
    some = jnp.broadcast_to(seen, (*seen.shape[:-1], M)).any(axis=-1).swapaxes(1, 2)  # (B, T, H)
    return jnp.where(some[..., None], out, 0)


def tpa_decode(
    aq: Float[Array, "B N RQ H"] | None,
    bq: Float[Array, "B N RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    *,
    seq_lens: Int[ArrayLike, " B"] | None = None,
    mask: Bool[ArrayLike, "..."] | Float[ArrayLike, "..."] | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    chunk: int = 512,
    return_lse: bool = False,
) -> Float[Array, "B N H E"] | tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """FlashTPA: 1 to 16 new queries against M cached tokens, straight from the factors.

    The cache is read where it lies, `chunk` tokens at a time, with an online softmax: neither K, V nor a copy
    of the cache is made, and chunks behind the longest sequence are not read.

    Args:
        aq: head factors of the queries; None if `bq` is Q itself, (B, N, H, D).
        bq: feature factors of the queries, rotated already.
        ak: head factors of the cached keys.
        bk: feature factors of the cached keys, rotated already.
        av: head factors of the cached values.
        bv: feature factors of the cached values.
        seq_lens: valid tokens of each sequence, 0 to M, the queries' own included; None for all M. Query n
            sees positions <= seq_len - N + n; what lies past seq_len may be anything, NaN too. The values are
            not looked at, they may be traced.
        mask: broadcasts to (B, H, N, M): boolean (True = attend), or a bias added to the logits once.
        window: keys a query sees at most, itself included.
        scale: on Q K^T; None for 1/sqrt(D).
        rank_scale: the factors 1/R of (3.1).
        chunk: cached tokens per step, >= 1.
        return_lse: also return the natural log-sum-exp of the scaled logits, float32 (float64 for float64).

    Returns:
        Outputs, and with `return_lse` the log-sum-exps; 0 and -inf for a query that sees no key.

    Raises:
        TypeError: if a factor is not floating, `seq_lens` no integers, a mask neither boolean nor floating.
        ValueError: if shapes do not fit, N is not 1 to 16, or `chunk` or `window` is < 1.

    Source: Zhang et al. 2025, Algorithms 2 and 3.
    """
    factors = (aq, bq, ak, bk, av, bv)
    B, N, M, H = _check_factors("N", *factors)
    if not 1 <= N <= MAX_DECODE_TOKENS:
        raise ValueError(
            f"decoding takes 1 to {MAX_DECODE_TOKENS} query tokens, got N = {N}; tpa_attention takes any"
        )
    _checks.positive_int("chunk", chunk)
    _check_window(window, causal=True)
    bool_mask, bias = split_mask("mask", mask, (B, H, N, M))
    lengths = jnp.full(B, M) if seq_lens is None else jnp.asarray(seq_lens)
    if lengths.shape != (B,):
        raise ValueError(f"seq_lens must have shape (B,) = ({B},), got {lengths.shape}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"seq_lens must hold integers, got {lengths.dtype}")

    def load(first: Int[Array, ""], size: int) -> KeyValueFactors:
        return KeyValueFactors(
            *(jax.lax.dynamic_slice_in_dim(f, first, size, axis=1) for f in (ak, bk, av, bv))
        )

    narrow = jnp.result_type(*(f for f in factors if f is not None))
    out, lse = attend_chunks(
        aq,
        bq.astype(narrow),
        load,
        CachedSizes(M, H, ak.shape[2], av.shape[2], bv.shape[-1]),
        chunk=chunk,
        seq_lens=lengths.astype(jnp.int32),
        mask=bool_mask,
        bias=bias,
        window=window,
        scale=bq.shape[-1] ** -0.5 if scale is None else scale,
        rank_scale=rank_scale,
    )
    out = out.astype(narrow)
    return (out, lse) if return_lse else out


# ------------------------------------------------------------------------------------- ways to attend


def _float64_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    seen: Bool[Array, "#B #H #T #M"] | None,
    bias: Float[Array, "#B #H #T #M"] | None,
    scale: float,
) -> Float[Array, "B T H E"]:
    """What `jax.nn.dot_product_attention` does, whose softmax is float32 whatever it is given."""
    logits = scale * jnp.einsum("bthd,bmhd->bhtm", q, k)
    if bias is not None:
        logits = logits + bias
    if seen is not None:
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("bhtm,bmhe->bthe", jax.nn.softmax(logits, axis=-1), v)


def _padded(x: Float[Array, "B T H D"], width: int) -> Float[Array, "B T H width"]:
    """Zeros behind the features, which change no logit."""
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


# --------------------------------------------------------------------------------------------------- checks


def _check_pair(a_name: str, a: Array | None, b_name: str, b: Array) -> None:
    """Raise unless A is (B, T, R, H) and B is (B, T, R, D), floating, with the same R >= 1."""
    for name, factor, letters in ((a_name, a, "R, H"), (b_name, b, "H, D" if a is None else "R, D")):
        if factor is None:
            continue
        _check_floating(name, factor)
        if factor.ndim != 4:
            raise ValueError(f"{name} must have shape (B, T, {letters}), got {factor.shape}")
    if a is None:
        return
    leading_fit = all(1 in (m, n) or m == n for m, n in zip(a.shape[:2], b.shape[:2], strict=True))
    if not leading_fit or a.shape[2] != b.shape[2] or a.shape[2] == 0:
        raise ValueError(
            f"{a_name} (B, T, R, H) and {b_name} (B, T, R, D) must agree in B, T and R >= 1, "
            f"got {a.shape} and {b.shape}"
        )


def _check_factors(
    t: str, aq: Array | None, bq: Array, ak: Array, bk: Array, av: Array, bv: Array
) -> tuple[int, int, int, int]:
    """Six floating factors whose shapes agree: every letter one size. Returns B, T or N, M and H."""
    named = (
        ("aq", aq, f"B {t} R_Q H"),
        ("bq", bq, f"B {t} H D" if aq is None else f"B {t} R_Q D"),
        ("ak", ak, "B M R_K H"),
        ("bk", bk, "B M R_K D"),
        ("av", av, "B M R_V H"),
        ("bv", bv, "B M R_V E"),
    )
    present = [(name, factor, axes.split()) for name, factor, axes in named if factor is not None]
    sizes: dict[str, int] = {}
    for name, factor, axes in present:
        _check_floating(name, factor)
        fits = factor.ndim == 4 and all(
            sizes.setdefault(axis, size) == size and (size > 0 or axis in ("B", t, "M"))
            for axis, size in zip(axes, factor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(f"{name} ({', '.join(axes)})" for name, _, axes in present)
            got = ", ".join(f"{name} {factor.shape}" for name, factor, _ in present)
            raise ValueError(f"shapes must be {expected}; got {got}")
    return sizes["B"], sizes[t], sizes["M"], sizes["H"]


def _check_floating(name: str, factor: Array) -> None:
    if not jnp.issubdtype(factor.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got {factor.dtype}")


def _check_window(window: int | None, causal: bool) -> None:
    """None or a positive int, and only where there is an order."""
    if window is None:
        return
    _checks.positive_int("window", window)
    if not causal:
        raise ValueError(f"window needs causal=True (it counts back from the query), got window={window!r}")
