"""The public functions under torch.compile: one graph, the same numbers, no wait for device values."""

import pytest
import torch
from attention_cases import draw, records, tensors

from tpa_attention.config import RopeConfig
from tpa_attention.torch.functional import merge_partials, tpa_attention, tpa_decode
from tpa_attention.torch.rope import rope

ROUNDING = 1e-12  # a few hundred float64 operations on logits of size 1 to 50; aot_eager changes their order


def attend(aq, bq, ak, bk, av, bv, positions, bounds):
    """RoPE, a chunk of a prefill and packed sequences."""
    config = RopeConfig(scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64})
    bq, bk = rope(bq, positions[-bq.shape[1] :], config), rope(bk, positions, config)
    chunk = tpa_attention(aq, bq, ak, bk, av, bv, window=5)
    packed = tpa_attention(
        aq, bq, *(f[:, : bq.shape[1]] for f in (ak, bk, av, bv)), **bounds, return_lse=True
    )
    return chunk, *packed


def decode(aq, bq, cache_k, cache_v, lens, table, sizes):
    """From a contiguous cache and from pages, merged."""
    whole = tpa_decode(aq, bq, cache_k, cache_v, seq_lens=lens, return_lse=True, **sizes)
    pages = [cache.flatten(0, 1).unflatten(0, (-1, 3)) for cache in (cache_k, cache_v)]
    paged = tpa_decode(aq, bq, *pages, seq_lens=lens, block_table=table, return_lse=True, **sizes)
    return merge_partials(*(torch.stack(pair) for pair in zip(whole, paged, strict=True)))


def errors(_rank, _world_size):
    """Largest differences between compiled and plain, for two lengths of every input."""
    found = []
    compiled_attend = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled_decode = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for T, M in ((4, 9), (6, 15)):
        aq, bq, *kv = tensors(draw(0, T=T, M=M, B=1))
        bounds = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 1, T]))
        given = (aq, bq, *kv, torch.arange(M), bounds)
        found += [(x - y).abs().max() for x, y in zip(attend(*given), compiled_attend(*given), strict=True)]
        *cache, sizes = records(*kv)
        given = (aq, bq, *cache, torch.tensor([M - 1]), torch.arange(M // 3)[None], sizes)
        found += [(x - y).abs().max() for x, y in zip(decode(*given), compiled_decode(*given), strict=True)]
    return [float(x) for x in found]


@pytest.mark.slow
def test_compiled_functions_have_one_graph_and_the_numbers_of_the_plain_ones(run_distributed):
    (found,) = run_distributed(errors, 1, timeout=300)
    assert len(found) == 10
    assert max(found) <= ROUNDING
