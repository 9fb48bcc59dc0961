"""Decoding steps that the host does not see: captured in a CUDA graph or compiled, again and again.

A cache of fixed shape must lead such a step to the next place by what is on the device alone.
"""

from contextlib import contextmanager

import pytest
import torch
from cache_cases import cache_for, tensor
from layer_cases import OPTIONS, build

from tpa_attention.torch.layers import TPAttention

ROUNDING = 1e-12  # products of numbers of size 1 to 10, summed in blocks, in float64


@contextmanager
def recorded(cache):
    """As while a CUDA graph is captured or replayed: only what is on the device may matter."""
    cache._recorded = lambda: True
    yield
    del cache._recorded


def test_a_step_that_the_host_does_not_see_goes_where_lengths_and_table_point():
    layer, x = build("KV shift"), tensor(20, tokens=14)
    cache = cache_for(layer, "pages of fixed shape")
    layer(x[:, :3], cache=cache)
    table, lengths = cache.block_table, cache.view(0)[3]
    for t in range(3, 14):
        cache.advance()
        with recorded(cache):
            found = layer(x[:, t : t + 1], cache=cache)
        torch.testing.assert_close(found, layer(x[:, : t + 1])[:, -1:], rtol=0, atol=ROUNDING)
    assert cache.seq_lens.tolist() == [14, 14]
    assert cache.block_table.data_ptr() == table.data_ptr()
    assert cache.view(0)[3].data_ptr() == lengths.data_ptr()
    assert torch.equal(cache.block_table, table)  # four pages each by now, in the tensor of the first step
    assert len(set(table[:, :4].flatten().tolist())) == 8
    cache.reorder([1, 0])
    cache.crop([5, 14])
    assert cache.view(0)[2].data_ptr() == table.data_ptr()
    assert lengths.tolist() == [5, 14]


def test_advancing_without_room_changes_nothing():
    layer, x = build("contextual"), tensor(21, tokens=7)
    cache = cache_for(layer, "pages of fixed shape", room=8)
    layer(x, cache=cache)
    cache.advance()
    with pytest.raises(ValueError, match="capacity 8 holds 8 tokens of layer 0: no room for 1 more"):
        cache.advance()
    assert cache.extent(0) == 8
    with pytest.raises(ValueError, match="advance needs a cache of fixed shape, got max_len=None"):
        cache_for(layer, "pages").advance()
    with pytest.raises(ValueError, match="new must be >= 0, got -1"):
        cache.advance(-1)
    with pytest.raises(ValueError, match="at most batch = 2 sequences, got one more"):
        cache.allocate()
    with pytest.raises(ValueError, match="at most batch = 2 sequences, got one more"):
        cache.fork(cache.sequences[0])
    cache.free(cache.sequences[0])
    with recorded(cache), pytest.raises(RuntimeError, match="call advance, with 0 if need be"):
        layer(x[:1, :1], cache=cache)


def decode_compiled(_rank, _world_size):
    """Graphs that 20 compiled steps took with each cache, and how far they are from eager ones."""
    from torch._dynamo.testing import CompileCounter

    layer = TPAttention(16, 3, 8, 3, 2, 2, zero_init_output=False)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in ("pages of fixed shape", "int8 of fixed shape"):
        torch._dynamo.reset()
        counter = CompileCounter()
        step = torch.compile(layer, fullgraph=True, backend=counter)
        cache, eager = (cache_for(layer, kind, dtype=torch.float32) for _ in range(2))
        rows, expected = [], []
        with torch.no_grad():
            for t in range(20):
                if kind.startswith("pages"):
                    cache.advance()
                rows.append(step(x[:, t : t + 1], cache=cache))
                expected.append(layer(x[:, t : t + 1], cache=eager))
        error = (torch.cat(rows) - torch.cat(expected)).abs().max().item()
        found[kind] = (counter.frame_count, error, cache.past_length(0).tolist())
    return found


@pytest.mark.slow
def test_a_cache_of_fixed_shape_is_compiled_once_for_all_steps(run_distributed):
    (found,) = run_distributed(decode_compiled, 1, timeout=150)
    for kind, (graphs, error, lengths) in found.items():
        assert graphs == 1, kind
        assert error < 5e-6, kind  # float32, values of size 1
        assert lengths == [20, 20]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("contextual", f"{kind} of fixed shape") for kind in ("pages", "int8", "fp8_e4m3")),
        *((name, "pages of fixed shape") for name in ("KV-only with non-contextual A", "KV shift")),
        ("KV-only", "int8 of fixed shape"),
    ],
)
def test_a_cuda_graph_decodes_in_place_as_the_cache_grows(name, kind):
    options = OPTIONS[name] | {"zero_init_output": False, "generator": torch.Generator().manual_seed(22)}
    layer = TPAttention(64, 6, 32, 4, 2, 2, **options).cuda().bfloat16()
    x = tensor(23, tokens=40, width=64).cuda().bfloat16()
    cache, eager = (cache_for(layer, kind, room=48, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    token = x[:, :1].clone()
    with torch.no_grad():
        expected = [layer(x[:, :20], cache=eager)]
        expected += [layer(x[:, t : t + 1], cache=eager) for t in range(20, 40)]
        layer(x[:, :20], cache=cache)
        layer(x[:, 20:21], cache=cache)  # compiles
        if kind.startswith("pages"):
            cache.advance(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            row = layer(token, cache=cache)
        for t in range(21, 40):
            if kind.startswith("pages"):
                cache.advance()
            token.copy_(x[:, t : t + 1])
            graph.replay()
            truth = expected[t - 19]
            assert (row - truth).norm() <= 2**-7 * truth.norm()  # bfloat16; the newest key alone weighs 1/40
    assert cache.seq_lens.tolist() == [40, 40]
