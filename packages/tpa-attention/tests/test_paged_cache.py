"""Pages against the contiguous cache: same tokens, shared blocks, nothing written where it does not fit."""

import pickle

import pytest
import torch

from tpa_attention.torch.cache import CacheLayout, FactorCache, LayerCache
from tpa_attention.torch.functional import tpa_decode
from tpa_attention.torch.layers import TPAttention
from tpa_attention.torch.paged_cache import PagedFactorCache

LAYOUT = CacheLayout(2, 5, 3, keep_positions=True)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pages(num_blocks=8, batch=2, layout=LAYOUT, block_size=4):
    return PagedFactorCache(layout, num_blocks, block_size, batch=batch, dtype=torch.float64)


def fill(cache, tokens, seed=0, batch=2):
    """Append `tokens` random records to every layer; what the last layer returned."""
    for layer in range(cache.layout.num_layers):
        k, v = normal(batch, tokens, 5, seed=seed + layer), normal(batch, tokens, 3, seed=seed + 9 + layer)
        result = cache.append(layer, k, v)
    return result


def contents(cache, row, layer=0):
    """Records of one row, without padding, through the table."""
    k, v, table, lens = cache.view(layer)
    length = int(lens[row])
    gathered = (pool[table[row].long()].flatten(0, 1)[:length] for pool in (k, v))
    return [records[:, :numbers] for records, numbers in zip(gathered, (5, 3), strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("block_size", [1, 3, 4, 64])
def test_records_come_back_as_from_a_contiguous_cache(block_size):
    paged = pages(num_blocks=40, block_size=block_size)
    plain = FactorCache(LAYOUT, 2, 16, dtype=torch.float64)
    for step, tokens in enumerate((5, 1, 1, 4)):
        k, v, lens = fill(paged, tokens, seed=step)
        expected_k, expected_v, expected_lens = fill(plain, tokens, seed=step)
        assert torch.equal(k, expected_k)
        assert torch.equal(v, expected_v)
        assert lens is None
        assert expected_lens is None
    assert isinstance(paged, LayerCache)
    assert paged.past_length(1) == 11
    assert torch.equal(paged.key_positions(0), plain.key_positions(0).to(torch.int32))


def test_positions_are_kept_where_they_are_given():
    cache = pages()
    positions = torch.tensor([[3, 4, 9], [0, 1, 2]])
    cache.append(0, normal(2, 3, 5), normal(2, 3, 3), positions)
    assert torch.equal(cache.key_positions(0), positions.to(torch.int32))
    assert pages(layout=CacheLayout(1, 5, 3)).key_positions(0) is None


def test_a_layer_decodes_the_same_from_pages():
    layer = TPAttention(16, 3, 4, q_rank=2, k_rank=2, v_rank=1, zero_init_output=False, dtype=torch.float64)
    x = normal(2, 7, 16)
    cache = PagedFactorCache(layer, 6, 3, batch=2, dtype=torch.float64)
    with torch.no_grad():
        rows = [layer(chunk, cache=cache) for chunk in x.split([3, 1, 2, 1], dim=1)]
        # one pass and four add up in another order
        torch.testing.assert_close(torch.cat(rows, dim=1), layer(x), rtol=1e-12, atol=1e-12)


def test_decoding_through_the_table_equals_decoding_gathered_records():
    layer = TPAttention(16, 3, 4, q_rank=2, k_rank=2, v_rank=1, dtype=torch.float64)
    cache = PagedFactorCache(layer, 9, 2, batch=2, dtype=torch.float64)
    longer = cache.sequences[1]
    k_numbers, v_numbers = cache.layout.k_numbers, cache.layout.v_numbers
    k, v, _ = cache.append(0, normal(2, 5, k_numbers), normal(2, 5, v_numbers))
    pool_k, pool_v, table, lens = cache.view(0)
    query = normal(2, 1, 2, 3, seed=5), normal(2, 1, 2, 4, seed=6)
    sizes = {"ranks": (2, 1), "num_heads": 3, "head_dim": 4}
    paged = tpa_decode(*query, pool_k, pool_v, **sizes, block_table=table, seq_lens=lens)
    plain = tpa_decode(*query, k, v, **sizes)
    torch.testing.assert_close(paged, plain, rtol=1e-12, atol=1e-12)
    assert cache.sequences[1] == longer


def test_sequences_of_unequal_length_are_returned_with_their_lengths():
    cache = pages(batch=1)
    fill(cache, 5, batch=1)
    cache.allocate()
    k, _, lens = cache.append(0, normal(2, 2, 5), normal(2, 2, 3))
    assert lens.tolist() == [7, 2]
    assert lens.dtype == torch.int32
    assert k.shape[1] == 7
    assert cache.past_length(0).tolist() == [7, 2]


def test_a_fork_shares_blocks_until_one_of_them_writes():
    cache = pages(batch=1)
    fill(cache, 6, batch=1)
    assert cache.free_blocks == 6
    cache.fork(cache.sequences[0])
    assert cache.free_blocks == 6
    before = contents(cache, 0)
    fill(cache, 1, seed=50)  # the half full block is copied for one of the two
    assert cache.free_blocks == 5
    for row in range(2):
        assert same([records[:6] for records in contents(cache, row)], before)
    assert not same(contents(cache, 0), contents(cache, 1))
    for layer in range(2):
        expected = normal(2, 1, 5, seed=50 + layer)
        assert torch.equal(contents(cache, 0, layer)[0][6:], expected[0])
        assert torch.equal(contents(cache, 1, layer)[0][6:], expected[1])


def test_freed_blocks_are_used_again_and_shared_ones_stay():
    cache = pages(num_blocks=4, batch=1)
    first = cache.sequences[0]
    fill(cache, 8, batch=1)
    kept = contents(cache, 0)
    second = cache.fork(first)
    cache.free(first)
    assert cache.free_blocks == 2
    assert same(contents(cache, 0), kept)
    cache.free(second)
    assert cache.free_blocks == 4
    cache.allocate()
    fill(cache, 16, batch=1)
    assert cache.free_blocks == 0


def test_too_few_blocks_raise_before_anything_is_written():
    cache = pages(num_blocks=4)
    fill(cache, 6)
    cache.fork(cache.sequences[0])
    state = cache.state_dict()
    with pytest.raises(ValueError, match="need 1 more blocks of 4, and 0 of 4 are free"):
        cache.append(0, normal(3, 1, 5), normal(3, 1, 3))
    with pytest.raises(ValueError, match=r"k must have shape \(sequences, tokens, width\) = \(3, 1, 5..6\)"):
        cache.append(0, normal(3, 1, 9), normal(3, 1, 3))
    after = cache.state_dict()
    assert pickle.dumps({k: x for k, x in state.items() if not isinstance(x, torch.Tensor)}) == pickle.dumps(
        {k: x for k, x in after.items() if not isinstance(x, torch.Tensor)}
    )
    assert all(torch.equal(x, after[k]) for k, x in state.items() if isinstance(x, torch.Tensor))


def test_beams_go_on_from_the_row_they_were_given():
    cache = pages(num_blocks=10, batch=3)
    for layer in range(2):
        cache.append(layer, normal(3, 6, 5, seed=layer), normal(3, 6, 3, seed=layer + 2))
    rows = [contents(cache, row) for row in range(3)]
    cache.reorder(torch.tensor([2, 0, 2]))
    for row, source in enumerate((2, 0, 2)):
        assert same(contents(cache, row), rows[source])
    assert cache.free_blocks == 6
    with pytest.raises(ValueError, match="beam_idx must hold 3 indices of rows"):
        cache.reorder(torch.tensor([0, 3, 1]))


def test_cropping_frees_the_blocks_behind():
    cache = pages()
    fill(cache, 9)
    kept = [[records[:5] for records in contents(cache, row)] for row in range(2)]
    cache.crop(5)
    assert cache.free_blocks == 4
    assert all(same(contents(cache, row), kept[row]) for row in range(2))
    cache.reset()
    assert cache.free_blocks == 8
    assert cache.past_length(0) == 0
    assert len(cache.sequences) == 2
    with pytest.raises(ValueError, match="n must be >= 0, got -1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="n must be an int or hold 2 of them"):
        cache.crop([1, 2, 3])
    fill(cache, 9)
    cache.crop(torch.tensor([9, 4]))
    assert cache.seq_lens.tolist() == [9, 4]
    assert cache.free_blocks == 4


def test_hidden_states_follow_their_sequence():
    cache = pages(batch=2)
    assert cache.last_hidden(0) is None
    fill(cache, 3)
    hidden = normal(2, 3, 6)
    cache.set_last_hidden(0, hidden)
    cache.fork(cache.sequences[1])
    assert torch.equal(cache.last_hidden(0), hidden[[0, 1, 1], 2])
    cache.reorder([1, 1, 0])
    assert torch.equal(cache.last_hidden(0), hidden[[1, 1, 0], 2])
    cache.free(cache.sequences[0])
    cache.allocate()
    expected = torch.cat([hidden[[1, 0], 2], torch.zeros(1, 6)])
    assert torch.equal(cache.last_hidden(0), expected)
    cache.crop([1, 3, 0])
    expected[0] = hidden[1, 0]
    for copy in (cache, pickle.loads(pickle.dumps(cache))):  # noqa: S301  our own bytes
        assert torch.equal(copy.last_hidden(0), expected)
    other = PagedFactorCache(LAYOUT, 8, 4, rewind=1, dtype=torch.float64)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.last_hidden(0), expected)
    with pytest.raises(ValueError, match="crop can take back at most 1 tokens of sequence 1 under kv_shift"):
        other.crop(1)
    assert other.view(0)[3].tolist() == [1, 3, 0]
    assert other.seq_lens.tolist() == [1, 3, 0]
    assert torch.equal(other.last_hidden(0), expected)


def test_a_cache_survives_pickle_state_and_another_type():
    cache = pages()
    fill(cache, 6)
    cache.fork(cache.sequences[0])
    other = pages(num_blocks=5, batch=0)
    other.load_state_dict(cache.state_dict())
    assert other.free_blocks == 1
    copies = [pickle.loads(pickle.dumps(cache)), other]  # noqa: S301  our own bytes
    for copy in copies:
        assert copy.sequences == cache.sequences
        assert all(
            same(contents(copy, row, layer), contents(cache, row, layer))
            for row in range(3)
            for layer in range(2)
        )
        assert torch.equal(copy.key_positions(1), cache.key_positions(1))
    half = other.to(dtype=torch.float32)
    assert half.dtype == torch.float32
    assert torch.equal(contents(half, 2)[0], contents(cache, 2)[0].float())
    fill(cache, 1, batch=3)  # the copies own their blocks
    assert int(copies[0].view(0)[3][0]) == 6


def test_bytes_are_those_of_the_pool():
    cache = pages(num_blocks=8, block_size=4)
    assert cache.nbytes == 8 * 4 * 2 * (6 + 4) * 8  # records padded to 16 bytes: 6 and 4 float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks must be >= 1, got 0"),
        ({"num_blocks": 2, "block_size": 0}, ValueError, "block_size must be >= 1, got 0"),
        ({"num_blocks": 2, "batch": -1}, ValueError, "batch must be >= 0, got -1"),
        ({"num_blocks": 2, "dtype": torch.int8}, TypeError, "dtype must be a floating type"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PagedFactorCache(LAYOUT, **arguments)


def test_what_does_not_fit_a_cache_is_named():
    cache = pages()
    with pytest.raises(IndexError, match=r"layer must be in \[0, 2\), got 2"):
        cache.append(2, normal(2, 1, 5), normal(2, 1, 3))
    with pytest.raises(KeyError, match="sequence must be one of"):
        cache.fork(7)
    with pytest.raises(ValueError, match="positions must have shape"):
        cache.append(0, normal(2, 1, 5), normal(2, 1, 3), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_size must be 4, got 5"):
        cache.load_state_dict(pages(block_size=5).state_dict())
    full = pages(num_blocks=8)
    fill(full, 12)
    with pytest.raises(ValueError, match="num_blocks must be >= the 6 blocks in use, got 3"):
        pages(num_blocks=3).load_state_dict(full.state_dict())


@pytest.mark.parametrize("max_len", [None, 16])
def test_a_cache_used_in_inference_mode_goes_on_outside_of_it(max_len):
    layer = TPAttention(16, 3, 4, q_rank=2, kv_shift=True, zero_init_output=False, dtype=torch.float64)
    x = normal(2, 9, 16)
    with torch.inference_mode():
        cache = PagedFactorCache(layer, 8, 4, batch=2, max_len=max_len, dtype=torch.float64)
        rows = [layer(chunk, cache=cache).clone() for chunk in x[:, :6].split([4, 1, 1], dim=1)]
        cache.reorder([1, 0])
    with torch.no_grad():
        rows.append(layer(x[[1, 0], 6:], cache=cache)[[1, 0]])
        torch.testing.assert_close(torch.cat(rows, dim=1), layer(x), rtol=1e-12, atol=1e-12)


def test_a_state_longer_than_a_cache_of_fixed_shape_is_refused():
    cache = pages()
    fill(cache, 6)
    small = PagedFactorCache(LAYOUT, 8, 4, batch=2, max_len=5, dtype=torch.float64)
    with pytest.raises(ValueError, match="batch and max_len must be >= the 2 sequences of 6 tokens, got 2"):
        small.load_state_dict(cache.state_dict())
    assert small.past_length(0).tolist() == [0, 0]
    large = PagedFactorCache(LAYOUT, 8, 4, batch=2, max_len=8, dtype=torch.float64)
    large.load_state_dict(cache.state_dict())
    assert same(contents(large, 1), contents(cache, 1))
    assert large.block_table.shape == (2, 2)
    with pytest.raises(ValueError, match="capacity 8 holds 6 tokens of layer 1: no room for 3 more"):
        large.write(1, normal(2, 3, 5), normal(2, 3, 3))
    assert large.past_length(1).tolist() == [6, 6]
