"""The baselines beside TPA in float64 NumPy, in their own notation: MHA, MQA, GQA and MLA, causal, with RoPE.

Source: Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023 (GQA); DeepSeek-V2 (arXiv 2405.04434) for MLA.
Letters as in Table 1 of Zhang et al. 2025 (arXiv 2501.06425).
"""

from typing import NamedTuple

import numpy as np
import reference
from jaxtyping import Float, Int
from reference_layer import rms_norm
from reference_rope import Rope, rotate

Array = np.ndarray


class Heads(NamedTuple):
    """h query heads, G key-value heads (MHA: G = h, MQA: G = 1); head i reads group floor(i / (h / G))."""

    q: Float[Array, "h D d"]
    k: Float[Array, "G D d"]
    v: Float[Array, "G E d"]
    o: Float[Array, "d hE"]


def grouped_attention(
    weights: Heads, x: Float[Array, "B T d"], rope: Rope | None, positions: Int[Array, "B T"] | None = None
) -> Float[Array, "B T d"]:
    """Causal multi-head, multi-query and grouped-query attention in their own notation."""
    B, T, _ = x.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    q = rotate(np.einsum("hnd,btd->bthn", weights.q, x), positions, rope)
    k = rotate(np.einsum("gnd,btd->btgn", weights.k, x), positions, rope)
    v = np.einsum("gnd,btd->btgn", weights.v, x)
    share = weights.q.shape[0] // weights.k.shape[0]
    k, v = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)
    heads, _ = reference.softmax_attention(q, k, v, mask=reference.causal_mask(T, T))
    return heads.reshape(B, T, -1) @ weights.o.T


class Latent(NamedTuple):
    """Weights of MLA: latents of width d_c (K, V) and d_c' (Q), one rotary key of width d_R for all heads."""

    q_down: Float[Array, "dq d"]
    q_up: Float[Array, "h D dq"]
    q_rope: Float[Array, "h dR dq"]
    kv_down: Float[Array, "dc d"]
    k_up: Float[Array, "h D dc"]
    v_up: Float[Array, "h D dc"]
    k_rope: Float[Array, "dR d"]
    o: Float[Array, "d hD"]
    q_norm: Float[Array, " dq"]
    kv_norm: Float[Array, " dc"]


class LatentCache(NamedTuple):
    """d_c + d_R numbers per token."""

    c: Float[Array, "B M dc"]
    k_rope: Float[Array, "B M dR"]


def mla_queries(
    weights: Latent, x: Float[Array, "B T d"], rope: Rope, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T h D"], Float[Array, "B T h dR"]]:
    c_q = rms_norm(x @ weights.q_down.T, weights.q_norm)
    content = np.einsum("hnc,btc->bthn", weights.q_up, c_q)
    return content, rotate(np.einsum("hnc,btc->bthn", weights.q_rope, c_q), positions, rope)


def mla_cache(
    weights: Latent, x: Float[Array, "B T d"], rope: Rope, positions: Int[Array, "B T"]
) -> LatentCache:
    c = rms_norm(x @ weights.kv_down.T, weights.kv_norm)
    return LatentCache(c, rotate((x @ weights.k_rope.T)[:, :, None], positions, rope)[:, :, 0])


def mla(weights: Latent, x: Float[Array, "B T d"], rope: Rope) -> tuple[Float[Array, "B T d"], LatentCache]:
    """Latent attention with materialised keys [W^UK c ; k_R] and values W^UV c; scale 1/sqrt(D + d_R)."""
    B, T, _ = x.shape
    positions = np.broadcast_to(np.arange(T), (B, T))
    q_content, q_rope = mla_queries(weights, x, rope, positions)
    cache = mla_cache(weights, x, rope, positions)
    k_content = np.einsum("hnc,btc->bthn", weights.k_up, cache.c)
    k_rope = np.broadcast_to(cache.k_rope[:, :, None], (*k_content.shape[:3], cache.k_rope.shape[-1]))
    q = np.concatenate([q_content, q_rope], axis=-1)
    k = np.concatenate([k_content, k_rope], axis=-1)
    v = np.einsum("hnc,btc->bthn", weights.v_up, cache.c)
    heads, _ = reference.softmax_attention(q, k, v, mask=reference.causal_mask(T, T))
    return heads.reshape(B, T, -1) @ weights.o.T, cache


def mla_decode(
    weights: Latent, x: Float[Array, "B 1 d"], rope: Rope, position: int, cache: LatentCache
) -> Float[Array, "B 1 d"]:
    """One token with W^UK absorbed in the query and W^UV applied after the sum: the cache stays as it is."""
    positions = np.full(x.shape[:2], position)
    q_content, q_rope = mla_queries(weights, x, rope, positions)
    absorbed = np.einsum("bthn,hnc->bthc", q_content, weights.k_up)
    logits = np.einsum("bthc,bmc->bhtm", absorbed, cache.c) + np.einsum(
        "bthr,bmr->bhtm", q_rope, cache.k_rope
    )
    width = q_content.shape[-1] + q_rope.shape[-1]
    alpha, _ = reference.safe_softmax(width**-0.5 * logits)
    summed = np.einsum("bhtm,bmc->bthc", alpha, cache.c)
    heads = np.einsum("bthc,hnc->bthn", summed, weights.v_up)
    return heads.reshape(*x.shape[:2], -1) @ weights.o.T
