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
    dump_tuned,
    is_long,
    load_tuned,
    padded,
    padded_heads,
    padded_rows,
    prefers_factored,
    queries_per_program,
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
    assert 1 <= cut.num_warps <= 8
    assert 1 <= cut.num_stages <= 3
    assert 1 <= cut.programs <= 8
    if (
        cut.num_stages > 1 and max(shape.k_rank, shape.v_rank) <= 8
    ):  # else a rank at a time is in shared memory
        assert (cut.num_stages - 1) * cut.block_m * shape.bytes_per_token <= 227 << 10
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
    groups=st.integers(1, 256),
    span=st.integers(0, 1 << 20),
    block_m=st.sampled_from([16, 64, 128]),
    programs=st.integers(1, 8),
)
def test_splits_are_whole_tiles_none_of_which_is_missing_or_empty(groups, span, block_m, programs):
    splits = choose_splits(groups, span, block_m, 132 * programs)
    tiles = -(-max(1, span) // block_m)
    share = -(-tiles // splits)
    assert splits * share >= tiles
    assert (splits - 1) * share < tiles
    assert splits <= max(1, 4 * 132 * programs // groups)  # four waves at most


def waves_of(groups, splits):
    return -(-groups * splits // 792)


@pytest.mark.parametrize("groups", [1, 2, 5, 8, 16, 100])
def test_a_long_cache_fills_whole_waves_of_programs(groups):
    splits = choose_splits(groups, 1 << 20, 32, slots=792)
    waves = waves_of(groups, splits)
    # parts are whole tiles, of which there are hundreds: a few programs may be missing
    assert 0.85 * 792 * waves <= groups * splits <= 792 * waves


def test_a_short_cache_is_split_no_finer_than_pays():
    assert choose_splits(1, 32, 32, slots=792) == 1
    assert choose_splits(4096, 1 << 20, 32, slots=792) == 1
    # with few tiles a part ends sooner the fewer it has, whatever surrounds them
    assert choose_splits(1, 1024, 32, slots=792) == 32


def test_partial_results_stay_below_a_fiftieth_of_a_long_cache():
    shape, tokens = paper(), 1 << 20
    cut = choose_cut("some device", shape)
    splits = choose_splits(1, tokens, cut.block_m, 132 * cut.programs)
    partial = splits * shape.heads * (shape.v_head_dim + 1) * 4
    assert partial < 0.02 * tokens * shape.bytes_per_token


def test_as_many_programs_as_are_meant_to_fit_do():
    for shape in (paper(), paper(heads=64), paper(head_dim=128, v_head_dim=128), paper(itemsize=4)):
        cut = choose_cut("some device", shape)
        assert cut.programs * cut.num_warps * 32 * cut.registers <= 1 << 16
        assert cut.registers % 8 == 0 or cut.registers == 255


def test_a_table_of_cuts_is_read_as_it_was_written(tmp_path):
    measured = {
        ("NVIDIA X", paper()): Cut(32, 16, False, 2, 5, 4),
        ("NVIDIA X", paper(q_rank=None)): Cut(64, 32, True, 4, 3, 2),
    }
    file = tmp_path / "tuned.json"
    file.write_text(dump_tuned(measured))
    assert load_tuned(file) == measured
    assert file.read_text().count("\n") == 4  # a line per entry, so that changes can be read


def test_the_table_of_the_package_holds_cuts_that_the_kernel_can_run():
    for (device, shape), cut in decode_config.TUNED.items():
        assert device.startswith("NVIDIA ")
        assert padded_rows(shape) % cut.block_rows == 0
        assert min(cut.block_m, cut.block_rows) >= 16
        assert not (cut.factored and shape.q_rank is None)


def test_what_was_measured_on_a_device_overrules_the_rule(monkeypatch):
    measured = Cut(block_m=32, block_rows=16, factored=False, num_warps=2, num_stages=5, programs=4)
    monkeypatch.setitem(decode_config.TUNED, ("measured device", paper()), measured)
    assert choose_cut("measured device", paper()) == measured
    assert choose_cut("another device", paper()) != measured
    assert choose_cut("measured device", paper(k_rank=3)) != measured
    choose_cut.cache_clear()


def test_the_bucket_of_a_cache_changes_once():
    buckets = [is_long(1 << power) for power in range(8, 21)]
    assert buckets == sorted(buckets)
    assert set(buckets) == {False, True}
