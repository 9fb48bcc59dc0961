"""The rules a configuration obeys: each function raises with the argument's name, the rule and the value."""

from collections.abc import Mapping, Sequence
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig

VARIANTS = ("contextual", "kv_only", "noncontextual_a", "noncontextual_b")
SCALING_KEYS = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0  # of llama3, where they are not given: those of Llama 3.1
ROPE_DTYPES = ("float64", "float32", "bfloat16", "float16")
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("q_rank", "k_rank", "v_rank", "max_position_embeddings"),
)
OPTIONAL_SIZES = (
    "v_head_dim",
    "num_key_value_heads",
    "kv_latent",
    "q_latent",
    "rope_dim",
    "intermediate_size",
)
LATENT_SIZES = ("kv_latent", "q_latent", "rope_dim")
SWITCHES = (
    *("tie_word_embeddings", "norm_affine", "shared_kv_b", "a_bias", "rank_scale", "rotate_on_load"),
    *("out_norm", "factor_norm", "output_gate", "kv_shift", "fused_proj", "zero_init_output"),
)
# options of the TPA layer alone, with the value that leaves them out
TPA_OPTIONS = {
    "variant": "contextual",
    "shared_kv_b": False,
    "factor_dims": None,
    "head_activation": "none",
    "a_bias": False,
    "rank_scale": True,
    "rotate_on_load": False,
    "out_norm": False,
    "factor_norm": False,
    "output_gate": False,
    "kv_shift": False,
}


# ------------------------------------------------------------------------------------------ single values


def one_of(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raise ValueError unless the value is among those accepted."""
    if value not in accepted or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def positive_int(name: str, value: object) -> None:
    """Raise TypeError unless the value is an int (no bool), ValueError unless it is at least 1."""
    whole_number(name, value, least=1)


def whole_number(name: str, value: object, *, least: int = 0) -> None:
    """Raise TypeError unless the value is an int (no bool), ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")


def real_above(name: str, value: object, bound: float) -> None:
    """Raise TypeError unless the value is a number, ValueError unless it is finite and above the bound."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (isfinite(value) and value > bound):
        raise ValueError(f"{name} must be finite and > {bound:g}, got {value!r}")


def share(name: str, value: object) -> None:
    """Raise TypeError unless the value is a number, ValueError unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def rotation(values: Sequence[Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Check base, fraction, layout, sign, scaling and dtype, in this order; return a copy of the scaling.

    Args:
        values: what was given.
        names: how the caller's arguments are called, for the messages.
    """
    base, fraction, layout, sign, scaling, dtype = values
    real_above(names[0], base, 1)
    share(names[1], fraction)
    one_of(names[2], layout, ("half", "interleaved"))
    one_of(names[3], sign, (-1, 1))
    if dtype is not None:
        one_of(names[5], dtype, ROPE_DTYPES)
    return None if scaling is None else rope_scaling(names[4], scaling)


def rope_scaling(name: str, scaling: object) -> dict[str, Any]:
    """A checked copy of the scaling; "type", the older name of "rope_type", is renamed."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{name} must be a dictionary or None, got {scaling!r}")
    given = dict(scaling)
    if "type" in given and "rope_type" not in given:
        given["rope_type"] = given.pop("type")
    kind = given.get("rope_type")
    one_of(f"{name}['rope_type']", kind, tuple(SCALING_KEYS))
    keys = SCALING_KEYS[str(kind)]
    if unknown := sorted(set(given) - {"rope_type", *keys}):
        raise ValueError(f"{name} of kind {kind!r} takes {', '.join(keys)}, got {', '.join(unknown)} as well")
    length = "original_max_position_embeddings"
    if length in keys:
        positive_int(f"{name}[{length!r}]", given.get(length))
    for key in keys:
        if key != length and (key == "factor" or key in given):
            real_above(f"{name}[{key!r}]", given.get(key), 0)
    if given["factor"] < 1:
        raise ValueError(f"{name}['factor'] must be >= 1, got {given['factor']!r}")
    if kind == "llama3":
        given = {"low_freq_factor": LOW_FREQ_FACTOR, "high_freq_factor": HIGH_FREQ_FACTOR, **given}
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        if high <= low:
            raise ValueError(
                f"{name}['high_freq_factor'] must be > {name}['low_freq_factor'], got {high!r} and {low!r}"
            )
    return given


def variant_names(variant: object) -> frozenset[str]:
    """The names joined in a variant, without "contextual"."""
    names = variant.split("+") if isinstance(variant, str) else [variant]
    for name in names:
        one_of("variant", name, VARIANTS)
    if len(set(names)) < len(names):
        raise ValueError(f"variant names a part twice, got {variant!r}")
    if "contextual" in names and len(names) > 1:
        raise ValueError(f"variant 'contextual' stands alone, got {variant!r}")
    if {"noncontextual_a", "noncontextual_b"} <= set(names):
        raise ValueError(f"variant needs a contextual A or a contextual B, got {variant!r}")
    return frozenset(str(name) for name in names) - {"contextual"}


# ------------------------------------------------------------------------------------ the whole configuration


def model(config: "ModelConfig") -> None:
    """All rules of a `ModelConfig`; its rotation checks itself when it is built."""
    for name in SIZES:
        positive_int(name, getattr(config, name))
    for name in OPTIONAL_SIZES:
        if getattr(config, name) is not None:
            positive_int(name, getattr(config, name))
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")
    if config.norm_eps is not None:
        real_above("norm_eps", config.norm_eps, 0)
    if config.mechanism in ("tpa", "kvonly"):
        tpa_layer(config)
    else:
        for name, unset in TPA_OPTIONS.items():
            if getattr(config, name) != unset:
                raise ValueError(
                    f"{name} is an option of mechanisms tpa and kvonly; {config.mechanism} takes only "
                    f"{unset!r}, got {getattr(config, name)!r}"
                )
        if config.value_dim != config.head_dim:
            raise ValueError(
                f"v_head_dim must equal head_dim under {config.mechanism}, "
                f"got {config.v_head_dim} and {config.head_dim}"
            )
    key_value_heads(config)
    latents(config)
    config.rope.rotary_dim(rotated_width(config))


def rotated_width(config: "ModelConfig") -> int:
    """Width of the rows that RoPE turns: D, the first factor, or MLA's d_R."""
    if config.mechanism == "mla":
        return config.rope_dim or 0
    return config.head_dim if config.factor_dims is None else config.factor_dims[0]


def tpa_layer(config: "ModelConfig") -> None:
    """Options that exclude one another in a TPA layer."""
    free = variant_names(config.variant)
    if config.shared_kv_b and config.k_rank != config.v_rank:
        raise ValueError(f"shared_kv_b needs k_rank = v_rank, got {config.k_rank} and {config.v_rank}")
    if config.shared_kv_b and config.value_dim != config.head_dim:
        raise ValueError(
            f"shared_kv_b needs v_head_dim = head_dim, got {config.v_head_dim} and {config.head_dim}"
        )
    if config.a_bias and "noncontextual_a" in free:
        raise ValueError(f"a_bias needs a contextual A, got variant {config.variant!r}")
    if config.factor_dims is not None:
        factor_dims(config.factor_dims, config.head_dim, config.value_dim)


def factor_dims(dims: tuple[int, ...], head_dim: int, value_dim: int) -> None:
    """Widths of the factors of a row: at least two, and their product is D and E."""
    if len(dims) < 2:
        raise ValueError(f"factor_dims needs at least two widths, got {dims!r}")
    for width in dims:
        positive_int("factor_dims", width)
    if not prod(dims) == head_dim == value_dim:
        raise ValueError(
            f"the product of factor_dims must equal head_dim and v_head_dim, "
            f"got {dims!r} with product {prod(dims)}, {head_dim} and {value_dim}"
        )


def key_value_heads(config: "ModelConfig") -> None:
    """G is given for GQA, where it divides h, and for nothing else."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.mechanism == "gqa":
        if groups is None:
            raise ValueError("num_key_value_heads must be given under mechanism 'gqa', got None")
        if heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads, got {groups} and {heads}")
    elif groups is not None:
        raise ValueError(
            f"num_key_value_heads is for mechanism 'gqa', got {groups} with {config.mechanism!r}"
        )


def latents(config: "ModelConfig") -> None:
    """The latent widths are given for MLA and for nothing else."""
    for name in LATENT_SIZES:
        given = getattr(config, name) is not None
        if given and config.mechanism != "mla":
            raise ValueError(
                f"{name} is for mechanism 'mla', got {getattr(config, name)} with {config.mechanism!r}"
            )
        if not given and config.mechanism == "mla":
            raise ValueError(f"{name} must be given under mechanism 'mla', got None")
