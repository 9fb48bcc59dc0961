"""How the decode kernel is cut: bounds that every cut keeps, splits that cover the cache, and overrides."""

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from tpa_attention.torch.kernels import decode_config
from tpa_attention.torch.kernels.decode_config import (
    Cut,
    Shape,
    choose_cut,
    choose_splits,
    is_long,
    padded,
    padded_heads,
    padded_rows,
    prefers_factored,
    queries_per_program,
    split_length,
)

SHAPES = st.builds(
    Shape,
    heads=st.integers(1, 128),
    head_dim=st.integers(1, 256),
    v_head_dim=st.integers(1, 256),
    q_rank=st.none() | st.integers(1, 32),
    k_rank=st.integers(1, 32),
    v_rank=st.integers(1, 32),
    queries=st.integers(1, 16),
    itemsize=st.sampled_from([1, 2, 4]),
    long=st.booleans(),
)


def paper(**changed):
    sizes = {"heads": 32, "head_dim": 64, "v_head_dim": 64, "q_rank": 16, "k_rank": 1, "v_rank": 1}
    return Shape(**(sizes | {"queries": 1, "itemsize": 2, "long": True} | changed))


@given(shape=SHAPES)
def test_every_cut_is_one_that_the_kernel_can_run(shape):
    cut = choose_cut("some device", shape)
    for size in (cut.block_m, cut.block_rows):
        assert size >= 16
        assert size & (size - 1) == 0
    assert cut.num_warps in (4, 8)
    assert 1 <= cut.num_stages <= 4
    if cut.num_stages > 1:  # else tiles are not kept in shared memory
        assert cut.num_stages * cut.block_m * shape.bytes_per_token <= 96 << 10
    assert cut.block_rows <= padded_rows(shape)
    assert not (cut.factored and shape.q_rank is None)
    # rows of a program are whole queries, or a part of one
    assert padded_heads(shape.heads) % cut.block_rows == 0 or cut.block_rows % padded_heads(shape.heads) == 0


@given(shape=SHAPES)
def test_all_queries_and_heads_are_in_some_program(shape):
    cut = choose_cut("some device", shape)
    programs = -(-padded_rows(shape) // cut.block_rows)
    rows = {
        (row // padded_heads(shape.heads), row % padded_heads(shape.heads))
        for row in range(programs * cut.block_rows)
    }
    assert {(n, h) for n in range(shape.queries) for h in range(shape.heads)} <= rows
    assert 1 <= queries_per_program(shape.heads, cut.block_rows, shape.queries) <= shape.queries


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("q_rank", [1, 6, 16, 24, 32])
def test_the_query_is_factored_where_the_paper_counts_fewer_products(heads, head_dim, q_rank):
    shape = paper(heads=heads, head_dim=head_dim, q_rank=q_rank)
    expected = reference.prefers_factored_query(padded(q_rank), heads, head_dim, tile=16)
    assert prefers_factored(shape, block_rows=heads) == expected


@given(
    batch=st.integers(1, 64),
    row_blocks=st.integers(1, 4),
    span=st.integers(0, 1 << 20),
    block_m=st.sampled_from([16, 64, 128]),
)
def test_splits_are_whole_tiles_that_cover_what_is_to_be_read(batch, row_blocks, span, block_m):
    splits = choose_splits(batch, row_blocks, span, block_m, processors=132)
    length = split_length(span, splits, block_m)
    assert length % block_m == 0
    assert splits * length >= span
    assert splits == 1 or length >= 4 * block_m
    assert (splits - 1) * batch * row_blocks <= 3 * 132


def test_a_long_cache_fills_the_device_and_a_short_one_is_not_split():
    assert choose_splits(1, 1, 1 << 20, 64, processors=132) == 3 * 132
    assert choose_splits(4096, 1, 1 << 20, 64, processors=132) == 1
    assert choose_splits(1, 1, 100, 64, processors=132) == 1


def test_partial_results_stay_below_a_hundredth_of_a_long_cache():
    shape, tokens = paper(), 1 << 20
    cut = choose_cut("some device", shape)
    splits = choose_splits(1, 1, tokens, cut.block_m, processors=132)
    partial = splits * shape.heads * (shape.v_head_dim + 1) * 4
    assert partial < 0.01 * tokens * shape.bytes_per_token


def test_what_was_measured_on_a_device_overrules_the_rule(monkeypatch):
    measured = Cut(block_m=32, block_rows=16, factored=False, num_warps=2, num_stages=5)
    monkeypatch.setitem(decode_config.TUNED, ("measured device", paper()), measured)
    assert choose_cut("measured device", paper()) == measured
    assert choose_cut("another device", paper()) != measured
    assert choose_cut("measured device", paper(k_rank=3)) != measured
    choose_cut.cache_clear()


def test_the_bucket_of_a_cache_changes_once():
    buckets = [is_long(1 << power) for power in range(8, 21)]
    assert buckets == sorted(buckets)
    assert set(buckets) == {False, True}
