"""The TPA layer and the T6 model in float64 NumPy: every variant of the paper, with its factor cache.

A factor map reads a token's hidden state x in R^d:

    contextual        F(x) = reshape(W x)               A_X in R^{R x h}, B_X in R^{R x D}         (3.1)
    non-contextual    F(x) = F, free parameters         not cached                                 (App. G)
    with bias         F(x) = F + reshape(W x)           how a converted layer becomes contextual   (ours)

A layer is a choice of maps: KV-only has no A_Q and a row of B_Q per head, shared B lends K's B to V, order p
has p - 1 small maps whose Kronecker product is the row of B. Then

    head_i = softmax(RoPE(Q_i) RoPE(K_i)^T / sqrt(D)) V_i,    y = W^O concat(head_1 .. head_h)     (3.2)-(3.3)

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and G.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import reference
from jaxtyping import Bool, Float, Int
from reference_rope import Rope, rotate

Array = np.ndarray


# -------------------------------------------------------------------------------------------- factor maps


class FactorMap(NamedTuple):
    """F(x) = constant + weight x; either may be absent, not both."""

    weight: Float[Array, "R n d"] | None = None
    constant: Float[Array, "R n"] | None = None

    @property
    def contextual(self) -> bool:
        return self.weight is not None


PAPER = Rope()
Parts = tuple[Array, ...]  # the factors b, c, ... of the rows of B, each (B, T, R, d_i); prod d_i = D


class Factors(NamedTuple):
    """What a map of Q, K or V makes of the hidden states; under KV-only `a` of Q is None."""

    a: Float[Array, "B T R H"] | None
    b: Parts


def apply(factor_map: FactorMap, x: Float[Array, "B T d"]) -> Float[Array, "B T R n"]:
    if factor_map.weight is None:
        assert factor_map.constant is not None
        return np.broadcast_to(factor_map.constant, (*x.shape[:2], *factor_map.constant.shape))
    linear = np.einsum("btd,rnd->btrn", x, factor_map.weight)
    return linear if factor_map.constant is None else linear + factor_map.constant


def activate(a: Float[Array, "B T R H"], kind: str) -> Float[Array, "B T R H"]:
    """The nonlinearity on head factors; softmax runs over the heads of one rank."""
    if kind == "sigmoid":
        return sigmoid(a)
    if kind == "softmax":
        e = np.exp(a - a.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)
    return a


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def expand(parts: Parts) -> Float[Array, "B T R D"]:
    """vec(b (x) c) of Appendix C: entry j_c d_b + i_b is b[i_b] c[j_c]; the first part runs fastest."""
    rows = parts[0]
    for part in parts[1:]:
        rows = np.einsum("btrj,btri->btrji", part, rows).reshape(*rows.shape[:3], -1)
    return rows


def rotate_first(parts: Parts, positions: Int[Array, "B T"], rope: Rope | None) -> Parts:
    """Theorem C.1: rotating the expanded row by I (x) R_t is rotating b alone."""
    return (rotate(parts[0], positions, rope), *parts[1:])


def rms_norm(
    x: Float[Array, "*rows n"], weight: Float[Array, " n"] | None = None, eps: float = 1e-5
) -> Array:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return normed if weight is None else normed * weight


# ---------------------------------------------------------------------------------------------- the layer


@dataclass(frozen=True)
class Layer:
    """Maps and switches; `v_b` is empty when V shares K's B, `q_a` None under KV-only (q_b has h rows)."""

    q_a: FactorMap | None
    q_b: tuple[FactorMap, ...]
    k_a: FactorMap
    k_b: tuple[FactorMap, ...]
    v_a: FactorMap
    v_b: tuple[FactorMap, ...]
    o: Float[Array, "out hE"]
    rope: Rope | None = PAPER
    head_activation: str = "none"
    rank_scale: bool = True
    factor_norm: bool = False
    out_norm: Float[Array, " E"] | None = None
    gate: Float[Array, "hE d"] | None = None
    kv_shift: Float[Array, " d"] | None = None
    rotate_on_load: bool = False

    @property
    def shared_b(self) -> bool:
        return not self.v_b


class Cache(NamedTuple):
    """What decoding keeps; free factors are None, as is V's B when it is K's; `last` serves the KV shift."""

    ak: Float[Array, "B M RK H"] | None
    bk: Parts | None
    av: Float[Array, "B M RV H"] | None
    bv: Parts | None
    positions: Int[Array, "B M"]
    valid: Bool[Array, "B M"]
    last: Float[Array, "B d"] | None


def forward(
    layer: Layer,
    x: Float[Array, "B T d"],
    *,
    positions: Int[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    cache: Cache | None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Float[Array, "B T out"], Cache]:
    """One call for training, prefill and decode: T new tokens after those of the cache."""
    B, T, _ = x.shape
    past = 0 if cache is None else cache.positions.shape[1]
    positions = np.broadcast_to(past + np.arange(T), (B, T)) if positions is None else positions
    valid = np.ones((B, T), dtype=bool) if valid is None else valid

    q = query_factors(layer, x, positions)
    cache = append(layer, cache, x, positions, valid)
    k, v = load(layer, cache)

    M = cache.positions.shape[1]
    mask = reference.padding_mask(cache.valid)
    if causal:
        mask = mask & reference.causal_mask(T, M, window)
    heads, _ = reference.tpa_attention(
        q.a, expand(q.b), k.a, expand(k.b), v.a, expand(v.b), mask=mask, rank_scale=layer.rank_scale
    )
    return output(layer, x, heads), cache


def query_factors(layer: Layer, x: Float[Array, "B T d"], positions: Int[Array, "B T"]) -> Factors:
    a = None if layer.q_a is None else activate(apply(layer.q_a, x), layer.head_activation)
    parts = norm_rows(layer, tuple(apply(m, x) for m in layer.q_b))
    return Factors(a, rotate_first(parts, positions, layer.rope))


def norm_rows(layer: Layer, parts: Parts) -> Parts:
    """RMSNorm of B's rows before RoPE; the RMS of a Kronecker product is the product of the RMSs."""
    return tuple(rms_norm(part) for part in parts) if layer.factor_norm else parts


def shifted(
    mu: Float[Array, " d"],
    x: Float[Array, "B T d"],
    before: Float[Array, "B d"] | None,
    valid: Bool[Array, "B T"],
) -> Float[Array, "B T d"]:
    """x'_t = mu x_t + (1 - mu) x_{t-1}; what precedes a sequence (padding included) counts as 0."""
    first = np.zeros_like(x[:, 0]) if before is None else before
    previous = np.concatenate([first[:, None], (x * valid[..., None])[:, :-1]], axis=1)
    return mu * x + (1 - mu) * previous


def append(
    layer: Layer,
    cache: Cache | None,
    x: Float[Array, "B T d"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """Keys enter rotated, unless B is shared, free of the token, or asked to be rotated on load."""
    last = None
    if layer.kv_shift is not None:
        last = (x * valid[..., None])[:, -1]
        x = shifted(layer.kv_shift, x, None if cache is None else cache.last, valid)
    k_parts = norm_rows(layer, tuple(apply(m, x) for m in layer.k_b))
    if not rotates_on_load(layer):
        k_parts = rotate_first(k_parts, positions, layer.rope)
    new = Cache(
        activate(apply(layer.k_a, x), layer.head_activation) if layer.k_a.contextual else None,
        k_parts if is_cached(layer.k_b) else None,
        activate(apply(layer.v_a, x), layer.head_activation) if layer.v_a.contextual else None,
        tuple(apply(m, x) for m in layer.v_b) if is_cached(layer.v_b) else None,
        positions,
        valid,
        last,
    )
    return new if cache is None else join(cache, new)


def is_cached(maps: tuple[FactorMap, ...]) -> bool:
    return any(m.contextual for m in maps)


def rotates_on_load(layer: Layer) -> bool:
    """A rotated B_K cannot serve V, and a free B rotated by position is no longer free of the token."""
    return layer.rotate_on_load or layer.shared_b or not is_cached(layer.k_b)


def join(old: Cache, new: Cache) -> Cache:
    """Token axes are concatenated; the last hidden state is replaced."""

    def along_tokens(first: Array | None, second: Array | None) -> Array | None:
        return None if first is None or second is None else np.concatenate([first, second], axis=1)

    def parts_along_tokens(first: Parts | None, second: Parts | None) -> Parts | None:
        if first is None or second is None:
            return None
        return tuple(np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))

    return Cache(
        along_tokens(old.ak, new.ak),
        parts_along_tokens(old.bk, new.bk),
        along_tokens(old.av, new.av),
        parts_along_tokens(old.bv, new.bv),
        np.concatenate([old.positions, new.positions], axis=1),
        np.concatenate([old.valid, new.valid], axis=1),
        new.last,
    )


def load(layer: Layer, cache: Cache) -> tuple[Factors, Factors]:
    """Factors of K (rotated) and V for every cached token."""
    tokens = np.empty((*cache.positions.shape, 0))  # free parameters read no hidden state
    ak = activate(apply(layer.k_a, tokens), layer.head_activation) if cache.ak is None else cache.ak
    av = activate(apply(layer.v_a, tokens), layer.head_activation) if cache.av is None else cache.av
    stored = norm_rows(layer, tuple(apply(m, tokens) for m in layer.k_b)) if cache.bk is None else cache.bk
    bk = rotate_first(stored, cache.positions, layer.rope) if rotates_on_load(layer) else stored
    if layer.shared_b:
        bv = stored
    else:
        bv = tuple(apply(m, tokens) for m in layer.v_b) if cache.bv is None else cache.bv
    return Factors(ak, bk), Factors(av, bv)


def output(layer: Layer, x: Float[Array, "B T d"], heads: Float[Array, "B T h E"]) -> Float[Array, "B T out"]:
    """W^O of the concatenated heads (3.3), after the norm of each head and the gate."""
    if layer.out_norm is not None:
        heads = rms_norm(heads, layer.out_norm)
    y = heads.reshape(*x.shape[:2], -1)
    if layer.gate is not None:
        y = sigmoid(x @ layer.gate.T) * y
    return y @ layer.o.T


def numbers_per_token(cache: Cache) -> int:
    """How many numbers one cached token costs: the count of Table 1, read off the arrays."""
    stored = [cache.ak, *(cache.bk or ()), cache.av, *(cache.bv or ())]
    return sum(array[0, 0].size for array in stored if array is not None)


def parameter_count(layer: Layer) -> int:
    """Entries of all factor maps and W^O; the count of Table 1."""
    maps = [
        layer.k_a,
        *layer.k_b,
        layer.v_a,
        *layer.v_b,
        *layer.q_b,
        *([] if layer.q_a is None else [layer.q_a]),
    ]
    return sum(array.size for m in maps for array in m if array is not None) + layer.o.size


# --------------------------------------------------------------------------------------------- the T6 model


class Block(NamedTuple):
    """Attention and SwiGLU of one layer: gate w1, value w2 (hidden, d), output w3 (d, hidden)."""

    attention: Layer
    w1: Float[Array, "hidden d"]
    w2: Float[Array, "hidden d"]
    w3: Float[Array, "d hidden"]


def swiglu(block: Block, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
    gate = x @ block.w1.T
    return (gate * sigmoid(gate) * (x @ block.w2.T)) @ block.w3.T


def t6_logits(
    embedding: Float[Array, "vocab d"],
    blocks: list[Block],
    tokens: Int[Array, "B T"],
    caches: list[Cache] | None = None,
    eps: float = float(np.finfo(np.float64).eps),
) -> tuple[Float[Array, "B T vocab"], list[Cache]]:
    """Pre-norm residual blocks, norms without weight, embedding tied to the output."""
    x = embedding[tokens]
    kept = []
    for i, block in enumerate(blocks):
        y, cache = forward(block.attention, rms_norm(x, eps=eps), cache=None if caches is None else caches[i])
        kept.append(cache)
        x = x + y
        x = x + swiglu(block, rms_norm(x, eps=eps))
    return rms_norm(x, eps=eps) @ embedding.T, kept
