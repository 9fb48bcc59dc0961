"""Exact sizes of caches and models, multiply-adds and arithmetic intensity, for TPA and its competitors.

    cache per token and layer    MHA 2 h D,  GQA 2 G D,  MLA d_c + d_R,  TPA (R_K + R_V)(h + D)

Every count is a plain integer and no framework is imported. The functions on one attention layer take a row
of Table 1 by name with its sizes as keywords, or a `ModelConfig`:

    cache_numbers("tpa", num_heads=32, head_dim=64, k_rank=1, v_rank=1)    # 192
    params(preset("medium", "tpa"))

Source: Zhang et al. 2025 (arXiv 2501.06425), Table 1, Appendices A.4, F.4 and G.
"""

from collections.abc import Mapping
from typing import TypedDict, Unpack

from . import _checks, _layer_counts
from ._layer_counts import MECHANISMS, LayerShape
from .comparison import Comparison, Row
from .config import ModelConfig

__all__ = [
    "ITEM_SIZES",
    "MECHANISMS",
    "QUANTISED",
    "LayerShape",
    "LayerSizes",
    "arithmetic_intensity",
    "cache_bytes",
    "cache_numbers",
    "compare",
    "decode_macs",
    "decode_projection",
    "decode_slope",
    "layer_shape",
    "max_context",
    "model_params",
    "params",
    "prefers_factored_query",
    "saved_activations",
    "training_macs",
]

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = ("int8", "fp8_e4m3")
RECORD_BYTES = 16  # a cache record is padded to whole vectors of this many bytes
SCALE_BYTES = 4  # a float32 scale
REWIND = 16  # what `FactorCache` can take back under the KV shift unless told otherwise


class LayerSizes(TypedDict, total=False):
    """Keywords of the functions on one layer: the fields of `LayerShape` after the mechanism."""

    d_model: int
    num_heads: int
    head_dim: int
    v_head_dim: int | None
    q_rank: int
    k_rank: int
    v_rank: int
    num_kv_heads: int
    kv_latent: int
    q_latent: int
    rope_dim: int
    factor_dims: tuple[int, ...] | None
    variant: str
    shared_kv_b: bool
    a_bias: bool
    out_norm: bool
    output_gate: bool
    kv_shift: bool


def layer_shape(mech: str | ModelConfig | LayerShape, **sizes: Unpack[LayerSizes]) -> LayerShape:
    """The sizes of one attention layer, from a row of Table 1 with keywords or from a configuration.

    Raises:
        ValueError: if the mechanism is unknown, a size is below 1 or contradicts another.
        TypeError: if a size is no int, or keywords come beside a configuration.
    """
    if isinstance(mech, str):
        return LayerShape(mechanism=mech, **sizes)
    if sizes:
        raise TypeError(f"sizes come from the configuration; also given: {', '.join(sorted(sizes))}")
    if isinstance(mech, LayerShape):
        return mech
    if not isinstance(mech, ModelConfig):
        raise TypeError(f"mech must be a mechanism's name, a ModelConfig or a LayerShape, got {mech!r}")
    c = mech
    return LayerShape(
        mechanism=c.mechanism,
        d_model=c.hidden_size,
        num_heads=c.num_attention_heads,
        head_dim=c.head_dim,
        v_head_dim=c.v_head_dim,
        q_rank=c.q_rank,
        k_rank=c.k_rank,
        v_rank=c.v_rank,
        num_kv_heads=c.num_key_value_heads,
        kv_latent=c.kv_latent,
        q_latent=c.q_latent,
        rope_dim=c.rope_dim,
        factor_dims=c.factor_dims,
        variant=c.variant,
        shared_kv_b=c.shared_kv_b,
        a_bias=c.a_bias,
        out_norm=c.out_norm,
        output_gate=c.output_gate,
        kv_shift=c.kv_shift,
    )


# ------------------------------------------------------------------------------------------ one layer


def cache_numbers(mech: str | ModelConfig | LayerShape, **sizes: Unpack[LayerSizes]) -> int:
    """Numbers cached per token and layer (Table 1), without padding, scales and the KV shift's states."""
    return sum(_layer_counts.record_widths(layer_shape(mech, **sizes)))


def params(
    mech: str | ModelConfig | LayerShape, *, latent_norms: bool = False, **sizes: Unpack[LayerSizes]
) -> int:
    """Parameters of one attention layer (Table 1).

    Args:
        mech: row of Table 1, or a configuration.
        latent_norms: count the weights of MLA's two latent RMSNorms, d_c + d_c', as model totals do.
        sizes: see `LayerSizes`.
    """
    return _layer_counts.parameters(layer_shape(mech, **sizes), latent_norms=latent_norms)


def decode_projection(mech: str | ModelConfig | LayerShape, **sizes: Unpack[LayerSizes]) -> int:
    """Multiply-adds of one decode step that do not depend on the cache, W^O left out (A.4)."""
    return _layer_counts.decode_projection(layer_shape(mech, **sizes))


def decode_slope(
    mech: str | ModelConfig | LayerShape, *, query: str = "factored", **sizes: Unpack[LayerSizes]
) -> int:
    """Multiply-adds of one decode step per cached token (A.4).

    Args:
        mech: row of Table 1, or a configuration.
        query: "factored" as in A.4; "full" with the query formed once; "auto" for the cheaper.
        sizes: see `LayerSizes`.
    """
    return _layer_counts.decode_slope(layer_shape(mech, **sizes), query)


def decode_macs(
    mech: str | ModelConfig | LayerShape,
    cached_tokens: int,
    *,
    query: str = "factored",
    **sizes: Unpack[LayerSizes],
) -> int:
    """Multiply-adds of one decode step of one layer: projection + M slope (A.4)."""
    _checks.positive_int("cached_tokens", cached_tokens)
    shape = layer_shape(mech, **sizes)
    slope = _layer_counts.decode_slope(shape, query)
    return _layer_counts.decode_projection(shape) + cached_tokens * slope


def training_macs(mech: str | ModelConfig | LayerShape, tokens: int, **sizes: Unpack[LayerSizes]) -> int:
    """Multiply-adds of factor-space attention over a sequence: T^2 times the slope (A.4), not halved."""
    _checks.positive_int("tokens", tokens)
    return tokens**2 * _layer_counts.decode_slope(layer_shape(mech, **sizes))


def arithmetic_intensity(
    mech: str | ModelConfig | LayerShape,
    *,
    dtype: str = "bfloat16",
    query: str = "factored",
    **sizes: Unpack[LayerSizes],
) -> float:
    """Floating-point operations per byte of cache in a long decode step: 2 slope / (numbers itemsize).

    Below the ratio of a machine's peak rate to its bandwidth the step waits for memory.

    Args:
        mech: row of Table 1, or a configuration.
        dtype: of the cache.
        query: see `decode_slope`.
        sizes: see `LayerSizes`.
    """
    shape = layer_shape(mech, **sizes)
    flop = 2 * _layer_counts.decode_slope(shape, query)
    return flop / (sum(_layer_counts.record_widths(shape)) * _item_size(dtype))


def prefers_factored_query(mech: str | ModelConfig | LayerShape, **sizes: Unpack[LayerSizes]) -> bool:
    """Whether a kernel scores cheaper with A_Q and B_Q than with q formed once: R_Q (D + h) < h D.

    Every dimension is padded to 16, as tensor cores do. KV-only has no factored query.
    """
    s = layer_shape(mech, **sizes)
    if s.kv_only:
        return False
    rank, heads, width = (-(-n // 16) * 16 for n in (s.RQ, s.h, s.D))
    return rank * (width + heads) < heads * width


def saved_activations(
    mech: str | ModelConfig | LayerShape, *, materialised: bool, **sizes: Unpack[LayerSizes]
) -> int:
    """Numbers per token that a TPA layer keeps for its backward pass: factors, O, LSE; Q, K, V if formed."""
    return _layer_counts.saved_activations(layer_shape(mech, **sizes), materialised=materialised)


# ----------------------------------------------------------------------------------------- whole models


def model_params(config: ModelConfig) -> int:
    """Parameters: embedding (twice if untied), attention, SwiGLU, norms that have a weight."""
    d, layers = config.hidden_size, config.num_hidden_layers
    block = params(config, latent_norms=True) + 3 * d * config.ffn_dim
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return embeddings + layers * block + ((2 * layers + 1) * d if config.norm_affine else 0)


def cache_bytes(
    config: ModelConfig,
    batch: int,
    seq_len: int,
    dtype: str = "bfloat16",
    quant: str | None = None,
    tp: int = 1,
    padded: bool = True,
    *,
    rewind: int = REWIND,
) -> int:
    """Bytes of the cache of all layers on one device, as `FactorCache` and `QuantizedFactorCache` lay it out.

    Args:
        config: the model.
        batch: sequences.
        seq_len: cached tokens of each.
        dtype: of the cached numbers, a key of `ITEM_SIZES`.
        quant: None, "int8" or "fp8_e4m3": one byte per number and, per token and rank of K and of V, one
            float32, the product of the scales of a row of A and of B.
        tp: devices of tensor parallelism. Heads are divided, ceil(h / tp), rows of B and latents replicated.
        padded: the K record and the V record of a token end on 16 bytes.
        rewind: tokens that can be taken back under the KV shift, which takes `rewind` + 1 hidden states per
            sequence and layer; 0 for the flax cache, which keeps the last one alone.

    Raises:
        ValueError: if a number is below 1, `tp` above the number of heads, a dtype unknown, or `quant` meets
            a mechanism without factors.
        TypeError: if a number is no int.
    """
    for name, value in {"batch": batch, "seq_len": seq_len, "tp": tp}.items():
        _checks.positive_int(name, value)
    per_token = _token_bytes(config, dtype, quant, tp, padded)
    return batch * (seq_len * per_token + _state_bytes(config, dtype, rewind))


def max_context(
    gpu_bytes: int,
    weights_bytes: int,
    config: ModelConfig,
    *,
    batch: int = 1,
    dtype: str = "bfloat16",
    quant: str | None = None,
    tp: int = 1,
    padded: bool = True,
    rewind: int = REWIND,
    reserved_bytes: int = 0,
) -> int:
    """The most tokens per sequence whose cache fits beside the weights; 0 if not even one fits.

    Args:
        gpu_bytes: memory of one device.
        weights_bytes: weights on that device.
        config: the model.
        batch: sequences.
        dtype: see `cache_bytes`.
        quant: see `cache_bytes`.
        tp: see `cache_bytes`.
        padded: see `cache_bytes`.
        rewind: see `cache_bytes`.
        reserved_bytes: kept free for activations and scratch.

    Raises:
        ValueError: if the weights and the reserve alone do not fit, or as `cache_bytes` does.
    """
    for name, value in {"gpu_bytes": gpu_bytes, "batch": batch, "tp": tp}.items():
        _checks.positive_int(name, value)
    for name, value in {"weights_bytes": weights_bytes, "reserved_bytes": reserved_bytes}.items():
        _checks.whole_number(name, value)
    room = gpu_bytes - weights_bytes - reserved_bytes
    if room < 0:
        raise ValueError(
            f"weights_bytes and reserved_bytes must fit into gpu_bytes, "
            f"got {weights_bytes} and {reserved_bytes} in {gpu_bytes}"
        )
    per_token = _token_bytes(config, dtype, quant, tp, padded)
    return max(0, (room // batch - _state_bytes(config, dtype, rewind)) // per_token)


def _token_bytes(config: ModelConfig, dtype: str, quant: str | None, tp: int, padded: bool) -> int:
    """Cache bytes of one token, all layers, one device."""
    item = _item_size(dtype)
    shape = layer_shape(config)
    if tp > config.num_attention_heads:
        raise ValueError(f"tp must be at most {config.num_attention_heads}, the number of heads, got {tp}")
    scales = 0
    if quant is not None:
        _checks.one_of("quant", quant, QUANTISED)
        if not shape.factored:
            raise ValueError(f"quant is for caches of factors, got {quant!r} with {config.mechanism!r}")
        # A and B of a side share their scales; a side without contextual factors has none
        sides = {m.of: m.rank for m in _layer_counts.cached_maps(shape) if m.contextual}
        scales = sum(sides.values()) * SCALE_BYTES
        item = 1
    records = [width * item for width in _layer_counts.record_widths(shape, tp)]
    if padded:
        records = [-(-size // RECORD_BYTES) * RECORD_BYTES for size in records]
    return config.num_hidden_layers * (sum(records) + scales)


def _state_bytes(config: ModelConfig, dtype: str, rewind: int) -> int:
    """What a sequence keeps besides its tokens: the newest hidden states per layer under the KV shift."""
    _checks.whole_number("rewind", rewind)
    states = rewind + 1 if config.kv_shift else 0
    return config.num_hidden_layers * states * config.hidden_size * _item_size(dtype)


def _item_size(dtype: str) -> int:
    _checks.one_of("dtype", dtype, tuple(ITEM_SIZES))
    return ITEM_SIZES[dtype]


# ------------------------------------------------------------------------------------------ comparison


def compare(
    configs: Mapping[str, ModelConfig],
    *,
    seq_len: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    quant: str | None = None,
    tp: int = 1,
    padded: bool = True,
    baseline: str = "mha",
    query: str = "factored",
    gpu_bytes: int | None = None,
) -> Comparison:
    """Cache, parameters and multiply-adds of several models side by side.

    Args:
        configs: name of the row -> model; at least one.
        seq_len: cached tokens of each sequence.
        batch: sequences.
        dtype: of the cache, and of the weights where `gpu_bytes` is given.
        quant: "int8" or "fp8_e4m3" for those that cache factors; the others stay in `dtype`.
        tp: devices of tensor parallelism.
        padded: see `cache_bytes`.
        baseline: row that the others are compared with; the first where there is none of that name.
        query: see `decode_slope`.
        gpu_bytes: memory of a device, for the longest context beside weights divided by `tp`; None leaves it
            out.

    Raises:
        ValueError: as `cache_bytes` does, and if there is no configuration.
    """
    if not configs:
        raise ValueError("configs must name at least one model, got none")
    rows = []
    for name, config in configs.items():
        shape = layer_shape(config)
        kind = quant if shape.factored else None
        weights = -(-model_params(config) * _item_size(dtype) // tp)
        longest = None
        if gpu_bytes is not None and weights <= gpu_bytes:
            longest = max_context(
                gpu_bytes, weights, config, batch=batch, dtype=dtype, quant=kind, tp=tp, padded=padded
            )
        rows.append(
            Row(
                name=name,
                heads=config.num_attention_heads,
                parameters=model_params(config),
                attention_parameters=params(config, latent_norms=True),
                cache_numbers=cache_numbers(config),
                stored_as=dtype if kind is None else kind,
                cache_bytes=cache_bytes(config, batch, seq_len, dtype, kind, tp, padded),
                projection=decode_projection(config),
                slope=decode_slope(config, query=query),
                macs=decode_macs(config, seq_len, query=query),
                intensity=arithmetic_intensity(config, dtype=dtype, query=query),
                max_context=longest,
            )
        )
    return Comparison(
        rows=tuple(rows),
        baseline=baseline if baseline in configs else next(iter(configs)),
        batch=batch,
        seq_len=seq_len,
        tp=tp,
    )
