"""C3 and C4: what the paper counts, and what real models, caches and matrix products amount to.

Models are built on the meta device, which has shapes and no memory; caches are allocated. Multiply-adds are
those of torch's flop counter while the reference decodes: it sees matrix products alone, as A.4 does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tpa_attention import accounting
from tpa_attention.config import PRESETS, ModelConfig, preset
from tpa_attention.torch import reference
from tpa_attention.torch.baselines import attend
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.model import T6

COLUMNS = ("mha", "mqa", "gqa", "mla_paper", "mla_matched", "kvonly", "tpa")

# Parameters of whole models with tied embeddings, and cached numbers per token and layer. The matched MLA has
# no published number: its head count is this package's choice.
PARAMETERS = {
    "small": {"tpa": 124_342_272, "kvonly": 124_379_136, "mha": 123_568_128, "mla_matched": 123_085_824},
    "medium": {"tpa": 353_992_704, "kvonly": 353_157_120, "mha": 353_452_032, "mla_paper": 417_976_320},
    "large": {"tpa": 773_698_560, "kvonly": 773_053_440, "mha": 772_131_840, "mla_paper": 909_321_216},
    "xl": {"tpa": 1_555_814_400, "kvonly": 1_559_500_800, "mha": 1_554_892_800, "mla_paper": 1_810_065_408},
}
for _sizes in PARAMETERS.values():
    _sizes |= {"mqa": _sizes["mha"], "gqa": _sizes["mha"]}
_CACHED = {
    "small": (1536, 128, 256, 288, 344, 392),
    "medium": (2048, 128, 256, 544, 372, 444),
    "large": (2560, 128, 256, 544, 404, 500),
    "xl": (3200, 128, 256, 544, 444, 568),
}
CACHED = {
    size: dict(zip(("mha", "mqa", "gqa", "mla_paper", "kvonly", "tpa"), row, strict=True))
    | {"mla_matched": row[3]}
    for size, row in _CACHED.items()
}

BATCH, CAPACITY = 2, 48


@dataclass(frozen=True)
class ModelCount:
    """A trained size with one mechanism: what is built beside what is counted.

    Attributes:
        size: "small", "medium", "large" or "xl".
        mechanism: a column of the paper's table.
        parameters: of the model on the meta device.
        counted_parameters: by `accounting`.
        published_parameters: of the paper's model; None where there is none.
        attention: parameters of one attention layer.
        counted_attention: by `accounting` (Table 1, with MLA's latent norms).
        cached: numbers per token and layer that the allocated cache stores, without padding.
        counted_cached: by `accounting`.
        published_cached: of the paper's model.
        cache_bytes: storage of the allocated cache (bfloat16).
        counted_bytes: by `accounting`, records padded to 16 bytes.
    """

    size: str
    mechanism: str
    parameters: int
    counted_parameters: int
    published_parameters: int | None
    attention: int
    counted_attention: int
    cached: int
    counted_cached: int
    published_cached: int
    cache_bytes: int
    counted_bytes: int

    @property
    def mismatches(self) -> int:
        """How many of the comparisons are not equal."""
        pairs = [
            (self.parameters, self.counted_parameters),
            (self.attention, self.counted_attention),
            (self.cached, self.counted_cached),
            (self.cached, self.published_cached),
            (self.cache_bytes, self.counted_bytes),
        ]
        if self.published_parameters is not None:
            pairs.append((self.parameters, self.published_parameters))
        return sum(built != counted for built, counted in pairs)


def models(sizes: tuple[str, ...] = PRESETS) -> list[tuple[str, str]]:
    """(size, mechanism) of every model to count."""
    return [(size, mechanism) for size in sizes for mechanism in COLUMNS]


def count_model(size: str, mechanism: str) -> ModelCount:
    """Build a model without memory and its cache with memory, and count both."""
    config: ModelConfig = preset(size, mechanism)
    model = T6(config, device="meta")
    cache = FactorCache(config, BATCH, CAPACITY, dtype=torch.bfloat16)
    record = cache.layout
    return ModelCount(
        size,
        mechanism,
        sum(parameter.numel() for parameter in model.parameters()),
        accounting.model_params(config),
        PARAMETERS[size].get(mechanism),
        sum(parameter.numel() for parameter in model.model.layers[0].attn.parameters()),
        accounting.params(config, latent_norms=True),
        record.k_numbers + record.v_numbers,
        accounting.cache_numbers(config),
        CACHED[size][mechanism],
        cache.nbytes,
        accounting.cache_bytes(config, BATCH, CAPACITY),
    )


def cache_curves(size: str) -> dict[str, tuple[list[int], list[float]]]:
    """Mechanism -> (cached tokens, GiB of the whole model's cache for one sequence in bfloat16)."""
    lengths = [2**n for n in range(12, 18)]
    configs = {name: preset(size, name) for name in ("mha", "mla", "tpa", "kvonly", "gqa", "mqa")}
    return {
        name: (lengths, [accounting.cache_bytes(config, 1, length) / 2**30 for length in lengths])
        for name, config in configs.items()
    }


# ---------------------------------------------------------------------------------------- multiply-adds (A.4)


@dataclass(frozen=True)
class Example:
    """An example of Appendix A.4: sizes, and multiply-adds per cached token (the slope).

    Attributes:
        sizes: d, h, D, G, d_c, d_R.
        slopes: mechanism or ranks (R_Q, R_K, R_V) -> published slope.
    """

    sizes: tuple[int, int, int, int, int, int]
    slopes: dict[str | tuple[int, int, int], int]


_RANKS = ((16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2))


def _example(sizes: tuple[int, int, int, int, int, int], *slopes: int) -> Example:
    return Example(sizes, dict(zip(("mha", "gqa", "mla", *_RANKS), slopes, strict=True)))


EXAMPLES = {
    "I": _example((2048, 32, 64, 4, 256, 32), 4096, 4096, 17408, 3584, 7168, 2816, 5632),
    "II": _example((4096, 32, 128, 4, 512, 64), 8192, 8192, 34816, 6656, 13312, 5376, 10752),
    "III": _example((7168, 64, 128, 8, 512, 64), 16384, 16384, 69632, 11264, 22528, 9728, 19456),
}


@dataclass(frozen=True)
class SlopeCount:
    """Multiply-adds per cached token of one decode step.

    Attributes:
        name: which model.
        flops: counted floating-point operations per cached token, a multiply-add being two.
        formula: twice the slope by `accounting`.
        published: twice the table's integer; None where the paper has none.
    """

    name: str
    flops: float
    formula: int
    published: int | None

    @property
    def mismatches(self) -> int:
        """How many of the comparisons are not equal."""
        return int(self.flops != self.formula) + int(self.published not in (None, self.formula))


def example_slopes(name: str) -> list[SlopeCount]:
    """Every column of one example."""
    _, heads, width, groups, latent, rotary = EXAMPLES[name].sizes
    found = []
    for column, slope in EXAMPLES[name].slopes.items():
        if isinstance(column, tuple):
            label, flops = f"TPA {column}", factor_slope(heads, width, column)
            formula = accounting.decode_slope("tpa", num_heads=heads, head_dim=width, **_named_ranks(column))
        elif column == "mla":  # absorbed: one key [latent ; rotary] and one value for all heads
            label, flops = "MLA", heads_slope(heads, 1, latent + rotary, latent)
            formula = accounting.decode_slope("mla", num_heads=heads, kv_latent=latent, rope_dim=rotary)
        else:
            kv_heads = heads if column == "mha" else groups
            label, flops = column.upper(), heads_slope(heads, kv_heads, width, width)
            formula = accounting.decode_slope(
                column, num_heads=heads, head_dim=width, num_kv_heads=kv_heads if column == "gqa" else None
            )
        found.append(SlopeCount(f"example {name}, {label}", flops, 2 * formula, 2 * slope))
    return found


def preset_slopes(size: str) -> list[SlopeCount]:
    """TPA and KV-only of a trained size, which the paper gives no slope for."""
    found = []
    for mechanism in ("tpa", "kvonly"):
        config = preset(size, mechanism)
        ranks = (config.q_rank, config.k_rank, config.v_rank)
        flops = factor_slope(
            config.num_attention_heads, config.head_dim, ranks, kv_only=mechanism == "kvonly"
        )
        formula = 2 * accounting.decode_slope(config)
        found.append(SlopeCount(f"{size}, {mechanism}", flops, formula, None))
    return found


def factor_slope(heads: int, width: int, ranks: tuple[int, int, int], *, kv_only: bool = False) -> float:
    """Floating-point operations per cached token of the factor-space reference, by the flop counter."""

    def decode(tokens: int) -> None:
        q_rank, k_rank, v_rank = ranks
        aq = None if kv_only else _zeros(1, q_rank, heads)
        bq = _zeros(1, heads if kv_only else q_rank, width)
        sides = ((k_rank, heads), (k_rank, width), (v_rank, heads), (v_rank, width))
        reference.tpa_decode_factors(aq, bq, *(_zeros(tokens, *side) for side in sides))

    return _growth(decode)


def heads_slope(heads: int, kv_heads: int, width: int, v_width: int) -> float:
    """The same of one query against materialised keys and values."""

    def decode(tokens: int) -> None:
        q, k, v = _zeros(1, heads, width), _zeros(tokens, kv_heads, width), _zeros(tokens, kv_heads, v_width)
        attend(q, k, v, None, width**-0.5, plain=True)

    return _growth(decode)


def _growth(decode: Callable[[int], object]) -> float:
    """(operations with 2 M cached tokens - operations with M) / M."""
    tokens, counted = 128, []
    for length in (tokens, 2 * tokens):
        with FlopCounterMode(display=False) as counter:
            decode(length)
        counted.append(counter.get_total_flops())
    return (counted[1] - counted[0]) / tokens


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(1, *shape)


def _named_ranks(ranks: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("q_rank", "k_rank", "v_rank"), ranks, strict=True))
