"""The cache of the T6 family: its bytes, and the time to append a token and to decode one.

One attention layer of a trained size per mechanism, with M tokens in a `FactorCache`. "append" writes the
record of one token, for TPA into pages and into eight bits too; "step" is the whole layer on one new token:
projections, append, attention, W^O. The table adds the numbers that a token occupies and the bytes of the
whole model's cache, and relates them to MHA's.

Sets with the same size and different M show what grows with the length of the text: nothing is recomputed.

Run: `python benchmarks/bench_cache.py --set medium-1k medium-8k --repeats 20 --json cache.json`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from memory import threads
from torch import nn

from tenfold_tools.bench import Comparison, Options, Row, main
from tpa_attention import accounting
from tpa_attention.config import ModelConfig, preset
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.model import attention
from tpa_attention.torch.paged_cache import PagedFactorCache
from tpa_attention.torch.quantized_cache import QuantizedFactorCache

BASELINE = "mha, step"
MECHANISMS = ("mha", "mqa", "gqa", "mla", "kvonly", "tpa")
PAGE = 64  # tokens of a block
SLACK = 4096  # tokens that the calls of one timing may append
DESCRIPTION = "Bytes of the T6 family's caches, and the time to append and to decode one token, per layer."


@dataclass(frozen=True)
class Workload:
    """A trained size and a filled cache.

    Attributes:
        size: "small", "medium", "large" or "xl".
        tokens: M, cached tokens of each sequence.
        batch: B.
    """

    size: str
    tokens: int
    batch: int = 1


SETS = {
    "tiny": Workload("small", 24),  # for the test of this benchmark
    "small-1k": Workload("small", 1024),
    "small-8k": Workload("small", 8192),
    "medium-1k": Workload("medium", 1024),
    "medium-8k": Workload("medium", 8192),
    "medium-32k": Workload("medium", 32768),
    "xl-32k": Workload("xl", 32768),
    "medium-8k-b16": Workload("medium", 8192, batch=16),
}


@dataclass(frozen=True)
class Layer:
    """One attention layer and its filled cache.

    Attributes:
        config: the model it belongs to.
        module: the layer itself.
        step: the layer on one new token.
        append: the cache alone on one record.
        cache: of this layer.
    """

    config: ModelConfig
    module: nn.Module
    step: Callable[[], Any]
    append: Callable[[], Any]
    cache: FactorCache


def measure(name: str, options: Options) -> Comparison:
    """Times one appended and one decoded token of every mechanism.

    Args:
        name: key of SETS.
        options: of the harness.
    """
    work = SETS[name]
    on_gpu = options.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers = {mechanism: build(work, mechanism, options.device, dtype) for mechanism in MECHANISMS}
    calls = {}
    for mechanism, layer in layers.items():
        calls[f"{mechanism}, step"] = layer.step
        calls[f"{mechanism}, append"] = layer.append
    others = other_caches(work, layers["tpa"], options.device, dtype)
    calls |= {name: write for name, (write, _) in others.items()}

    def back() -> None:
        """Every cache holds M tokens again."""
        for layer in layers.values():
            layer.cache.crop(work.tokens)
        for _, cache in others.values():
            cache.crop(work.tokens)

    with torch.no_grad(), threads(None if on_gpu else 1):
        comparison = options.compare(
            calls,
            baseline=BASELINE,
            title=f"{name}: {work.size}, B {work.batch}, M {work.tokens}, {dtype}",
            setup=back,
        )
    item = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]

    def config(row: Row) -> ModelConfig:
        return layers[row.name.split(",")[0]].config

    def size(row: Row) -> float:
        kind = "int8" if "int8" in row.name else None
        return accounting.cache_bytes(config(row), work.batch, work.tokens, item, kind) / 2**20

    mha = accounting.cache_numbers(layers["mha"].config)
    columns: dict[str, Callable[[Row], str]] = {
        "heads": lambda row: str(config(row).num_attention_heads),
        "numbers per token": lambda row: str(accounting.cache_numbers(config(row))),
        "MHA's over these": lambda row: f"{mha / accounting.cache_numbers(config(row)):.2f}",
        "cache of the model (MiB)": lambda row: f"{size(row):.2f}",
        "tokens/s of one layer": lambda row: f"{work.batch / row.median:.0f}",
    }
    for title, text in columns.items():
        comparison = comparison.with_column(title, text)
    return comparison


def build(work: Workload, mechanism: str, device: str, dtype: torch.dtype) -> Layer:
    """One layer with random weights whose cache holds M random records."""
    generator = torch.Generator(device).manual_seed(0)
    # W^O at zero would be a layer that no model uses
    config = replace(preset(work.size, mechanism), zero_init_output=False)
    layer = attention(config, device=device, dtype=dtype, generator=generator).eval()
    cache = FactorCache(layer, work.batch, work.tokens + SLACK, device, dtype)

    def records(tokens: int) -> list[torch.Tensor]:
        return [
            torch.randn(work.batch, tokens, width, generator=generator, device=device, dtype=dtype)
            for width in (cache.layout.k_numbers, cache.layout.v_numbers)
        ]

    cache.append(0, *records(work.tokens))
    x = torch.randn(work.batch, 1, config.hidden_size, generator=generator, device=device, dtype=dtype)
    one = records(1)
    return Layer(config, layer, lambda: layer(x, cache=cache), lambda: cache.append(0, *one), cache)


def other_caches(
    work: Workload, layer: Layer, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Any], Any]]:
    """TPA's records in pages and in eight bits: name -> (write one token, the cache that holds M)."""
    room = work.tokens + SLACK
    blocks = work.batch * -(-room // PAGE)
    caches: dict[str, Any] = {
        "tpa, append paged": PagedFactorCache(
            layer.module, blocks, PAGE, batch=work.batch, device=device, dtype=dtype
        ),
        "tpa, append int8": QuantizedFactorCache(layer.module, work.batch, room, device=device, dtype=dtype),
    }
    widths = (layer.cache.layout.k_numbers, layer.cache.layout.v_numbers)
    one, many = (
        [torch.ones(work.batch, tokens, width, device=device, dtype=dtype) for width in widths]
        for tokens in (1, work.tokens)
    )
    for cache in caches.values():
        cache.write(0, *many)
    return {name: (lambda cache=cache: cache.write(0, *one), cache) for name, cache in caches.items()}


if __name__ == "__main__":
    sys.exit(main(measure, workloads=list(SETS), default=["medium-1k", "medium-8k"], description=DESCRIPTION))
