"""Caches that layers decode from in place, of every kind, and hidden states to decode."""

import torch
from test_reference_layer import d

from tpa_attention.torch.paged_cache import PagedFactorCache
from tpa_attention.torch.quantized_cache import QuantizedFactorCache

KINDS = ("pages", "pages of fixed shape", "int8", "fp8_e4m3", "int8 of fixed shape")


def cache_for(layer, kind, batch=2, room=24, dtype=torch.float64, device=None):
    place = {"dtype": dtype, "device": device}
    fixed = kind.endswith("fixed shape")
    if kind.startswith("pages"):
        blocks = batch * -(-room // 4)
        return PagedFactorCache(layer, blocks, 4, batch=batch, max_len=room if fixed else None, **place)
    return QuantizedFactorCache(layer, batch, room, kind=kind.split()[0], fixed_shape=fixed, **place)


def tensor(seed, batch=2, tokens=9, width=d):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
