"""The factor cache: what it returns, refuses, forgets, reorders, counts, and how it travels."""

import copy
import io
import pickle

import pytest
import reference_accounting as accounting
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.config import ModelConfig, preset
from tpa_attention.torch.cache import CacheLayout, FactorCache, LayerCache, padded_width
from tpa_attention.torch.factors import RecordLayout

LAYOUT = CacheLayout(2, 10, 7, keep_positions=True)


def records(seed, tokens, layout=LAYOUT, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, layout.k_numbers), (batch, tokens, layout.v_numbers))
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)


def filled(tokens=3, max_len=6, **options):
    """A cache with the same records in both layers, and those records."""
    cache = FactorCache(LAYOUT, 2, max_len, dtype=torch.float32, **options)
    k, v = records(0, tokens)
    for layer in range(2):
        cache.append(layer, k, v)
    return cache, k, v


def snapshot(cache):
    return {name: tensor.clone() for name, tensor in cache.state_dict().items()}


def unchanged(cache, before):
    after = cache.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_factor_cache_speaks_the_protocol_of_layers():
    assert isinstance(FactorCache(LAYOUT, 1, 1), LayerCache)


def test_appended_records_come_back_in_order_as_views_of_the_buffer():
    cache, k, v = filled(3)
    more_k, more_v = records(1, 2)
    first = cache.append(0, more_k, more_v)
    assert first[2] is None
    torch.testing.assert_close(first[0][..., :10], torch.cat([k, more_k], dim=1), rtol=0, atol=0)
    torch.testing.assert_close(first[1][..., :7], torch.cat([v, more_v], dim=1), rtol=0, atol=0)
    assert not first[0][..., 10:].any()
    assert not first[1][..., 7:].any()
    again = cache.append(0, *records(2, 1))
    assert again[0].untyped_storage().data_ptr() == first[0].untyped_storage().data_ptr()
    assert (cache.past_length(0), cache.past_length(1)) == (6, 3)
    assert cache.seq_lens.tolist() == [3, 3]  # what every layer holds
    assert cache.seq_lens.dtype == torch.int32


def test_records_packed_with_their_padding_are_taken_as_they_are():
    layout = RecordLayout(2, 3, 8)
    cache = FactorCache(CacheLayout(1, layout.numbers, layout.numbers), 2, 4, dtype=torch.float16)
    a, b = torch.randn(2, 4, 2, 3).half(), torch.randn(2, 4, 2, 8).half()
    packed = layout.pack(a, b)
    assert packed.shape[-1] == layout.padded(2) == cache.layout.widths(torch.float16)[0]
    k, _, _ = cache.append(0, packed, packed)
    found_a, found_b = layout.views(k)
    torch.testing.assert_close((found_a, found_b), (a, b), rtol=0, atol=0)


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_a_full_cache_refuses_and_stays_as_it_was(fixed_shape):
    cache, _, _ = filled(3, max_len=5, fixed_shape=fixed_shape)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"capacity 5 holds 3 tokens of layer 1: no room for 3 more"):
        cache.append(1, *records(1, 3))
    assert unchanged(cache, before)
    cache.append(1, *records(1, 2))


def test_a_ragged_cache_refuses_by_its_longest_sequence():
    cache, _, _ = filled(4, max_len=5)
    cache.crop(torch.tensor([1, 4]))
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"capacity 5 holds 4 tokens of layer 0: no room for 2 more"):
        cache.append(0, *records(1, 2))
    assert unchanged(cache, before)


@pytest.mark.parametrize(
    ("layer", "k", "v", "positions", "error", "message"),
    [
        (2, (2, 1, 10), (2, 1, 7), None, IndexError, r"layer must be in \[0, 2\), got 2"),
        (-1, (2, 1, 10), (2, 1, 7), None, IndexError, r"layer must be in \[0, 2\), got -1"),
        (
            0,
            (2, 1, 9),
            (2, 1, 7),
            None,
            ValueError,
            r"k must have shape .* \(2, 1, 10\.\.12\), got \(2, 1, 9\)",
        ),
        (0, (2, 1, 13), (2, 1, 7), None, ValueError, r"k must have shape .*, got \(2, 1, 13\)"),
        (0, (3, 1, 10), (2, 1, 7), None, ValueError, r"k must have shape .*, got \(3, 1, 10\)"),
        (
            0,
            (2, 2, 10),
            (2, 1, 7),
            None,
            ValueError,
            r"v must have shape .* \(2, 2, 7\.\.8\), got \(2, 1, 7\)",
        ),
        (0, (2, 10), (2, 1, 7), None, ValueError, r"k must have shape .*, got \(2, 10\)"),
        (0, (2, 1, 10), (2, 1, 7), (1, 1), ValueError, r"positions must have shape \(2, 1\), got \(1, 1\)"),
    ],
)
def test_records_that_do_not_fit_are_refused_before_anything_is_written(
    layer, k, v, positions, error, message
):
    cache, _, _ = filled()
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.append(
            layer, torch.ones(k), torch.ones(v), positions and torch.zeros(positions, dtype=torch.long)
        )
    assert unchanged(cache, before)


def test_cropped_sequences_go_on_where_they_were_cut():
    cache, k, v = filled(4)
    cache.crop(torch.tensor([4, 1]))
    assert cache.seq_lens.tolist() == [4, 1]
    assert cache.past_length(0).tolist() == [4, 1]
    more_k, more_v = records(1, 2)
    found_k, found_v, lengths = cache.append(0, more_k, more_v)
    assert lengths.tolist() == [6, 3]
    for row, kept in enumerate((4, 1)):
        expected = torch.cat([k[row, :kept], more_k[row]])
        torch.testing.assert_close(found_k[row, : kept + 2, :10], expected, rtol=0, atol=0)
        expected = torch.cat([v[row, :kept], more_v[row]])
        torch.testing.assert_close(found_v[row, : kept + 2, :7], expected, rtol=0, atol=0)


def test_cropping_to_a_number_leaves_a_batch_of_equal_lengths():
    cache, k, v = filled(4)
    cache.crop(torch.tensor([4, 2]))
    cache.crop(2)
    assert cache.past_length(0) == 2
    found, _, lengths = cache.append(0, k[:, :1], v[:, :1])
    assert lengths is None
    torch.testing.assert_close(found[..., :10], torch.cat([k[:, :2], k[:, :1]], dim=1), rtol=0, atol=0)
    cache.crop(100)  # longer than what there is: nothing to do
    assert cache.past_length(0) == 3


@pytest.mark.parametrize("n", [-1, torch.tensor([1, -2])])
def test_negative_lengths_are_refused(n):
    cache, _, _ = filled()
    with pytest.raises(ValueError, match=r"n must be >= 0, got"):
        cache.crop(n)
    assert cache.past_length(0) == 3


@pytest.mark.parametrize("n", [1.5, torch.tensor([1, 2, 3]), torch.tensor([[1, 2]])])
def test_lengths_of_the_wrong_kind_are_refused(n):
    cache, _, _ = filled()
    with pytest.raises(ValueError, match=r"n must be an int or an integer tensor of shape \(2,\), got"):
        cache.crop(n)


def test_hidden_states_are_cropped_with_the_tokens_as_far_as_they_are_kept():
    cache, _, _ = filled(4, rewind=2)
    hidden = torch.arange(40.0).view(2, 4, 5)
    cache.set_last_hidden(0, hidden)
    before = snapshot(cache)
    with pytest.raises(
        ValueError, match=r"crop can take back at most 2 tokens of sequence 1 under kv_shift.*rewind=2.*got 3"
    ):
        cache.crop(torch.tensor([4, 1]))
    assert unchanged(cache, before)
    cache.crop(torch.tensor([4, 2]))
    assert torch.equal(cache.last_hidden(0), torch.stack([hidden[0, 3], hidden[1, 1]]))
    assert cache.last_hidden(1) is None
    with pytest.raises(ValueError, match="at most 0 tokens of sequence 1"):
        cache.crop(torch.tensor([4, 1]))
    cache.crop(0)  # before the first token stands 0, which is known
    assert not cache.last_hidden(0).any()


def test_the_kept_hidden_state_is_a_copy_without_a_graph():
    cache, _, _ = filled()
    hidden = torch.ones(2, 1, 5, requires_grad=True)
    for value in (1.0, 2.0):
        cache.set_last_hidden(0, hidden * value)
        kept = cache.last_hidden(0)
        assert not kept.requires_grad
        torch.testing.assert_close(kept, torch.full((2, 5), value))


def test_reordered_beams_carry_records_lengths_positions_and_hidden_states():
    cache, k, v = filled(4)
    cache.set_last_hidden(0, torch.tensor([[[0.0]], [[1.0]]]))
    other = FactorCache(LAYOUT, 2, 6)
    other.load_state_dict(cache.state_dict())
    other.reorder(torch.tensor([1, 1]))
    found, found_v, _ = other.append(0, k[:, :1], v[:, :1], torch.tensor([[9], [8]]))
    torch.testing.assert_close(found[:, :4, :10], k[[1, 1]], rtol=0, atol=0)
    torch.testing.assert_close(found_v[:, :4, :7], v[[1, 1]], rtol=0, atol=0)
    assert other.last_hidden(0).tolist() == [[1.0], [1.0]]
    assert other.key_positions(0).tolist() == [[0, 1, 2, 3, 9], [0, 1, 2, 3, 8]]


def test_reordering_moves_unequal_lengths():
    cache, k, _ = filled(4)
    cache.crop(torch.tensor([4, 1]))
    cache.reorder(torch.tensor([1, 0]))
    assert cache.seq_lens.tolist() == [1, 4]
    found, _, _ = cache.append(0, *records(1, 1))
    torch.testing.assert_close(found[1, :4, :10], k[0], rtol=0, atol=0)


@pytest.mark.parametrize("index", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
def test_an_order_that_is_not_one_index_per_sequence_is_refused(index):
    cache, _, _ = filled()
    with pytest.raises(ValueError, match=r"beam_idx must hold 2 integers, got torch\."):
        cache.reorder(index)


def test_reset_forgets_tokens_and_keeps_the_buffers():
    cache, _, _ = filled()
    cache.set_last_hidden(1, torch.ones(2, 3, 3))
    hidden = cache.last_hidden(1)
    address = cache.append(0, *records(1, 1))[0].data_ptr()
    cache.reset()
    assert cache.seq_lens.tolist() == [0, 0]
    assert cache.past_length(0) == 0
    assert cache.last_hidden(1).data_ptr() == hidden.data_ptr()
    assert not hidden.any()
    found, _, _ = cache.append(0, *records(2, 1))
    assert found.shape[1] == 1
    assert found.data_ptr() == address


def test_positions_are_kept_only_where_the_layout_says_so():
    cache, _, _ = filled(3)
    assert cache.key_positions(0).tolist() == [[0, 1, 2]] * 2
    cache.append(0, *records(1, 2), positions=torch.tensor([[5, 7], [1, 0]]))
    assert cache.key_positions(0).tolist() == [[0, 1, 2, 5, 7], [0, 1, 2, 1, 0]]
    plain = FactorCache(CacheLayout(1, 10, 7), 2, 3)
    plain.append(0, *records(1, 2), positions=torch.tensor([[5, 7], [1, 0]]))
    assert plain.key_positions(0) is None


def test_a_cache_of_fixed_shape_returns_whole_buffers_and_lengths():
    cache, k, v = filled(3, fixed_shape=True)
    found_k, found_v, lengths = cache.append(0, *records(1, 1))
    assert found_k.shape == (2, 6, 12)
    assert found_v.shape == (2, 6, 8)
    assert lengths.tolist() == [4, 4]
    assert cache.past_length(0).tolist() == [4, 4]
    assert cache.key_positions(0).shape == (2, 6)
    torch.testing.assert_close(found_k[:, :3, :10], k, rtol=0, atol=0)
    cache.crop(torch.tensor([1, 2]))
    cache.reorder(torch.tensor([1, 0]))
    assert cache.append(1, k[:, :1], v[:, :1])[2].tolist() == [3, 2]


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    fixed_shape=st.booleans(),
)
def test_any_sequence_of_operations_equals_lists_of_tokens(chunks, cuts, order, fixed_shape):
    """The model is one Python list of records per sequence."""
    layout = CacheLayout(1, 3, 2)
    cache = FactorCache(layout, 3, 40, dtype=torch.float32, fixed_shape=fixed_shape)
    lists = [[] for _ in range(3)]
    seed = 0
    for chunk in chunks:
        for step in ("append", "crop", "append", "reorder"):
            seed += 1
            if step == "append":
                k, v = records(seed, chunk, layout, batch=3)
                found, _, lengths = cache.append(0, k, v)
                lists = [kept + list(rows) for kept, rows in zip(lists, k, strict=True)]
                host = [found.shape[1]] * 3 if lengths is None else lengths.tolist()
                assert host == [len(kept) for kept in lists]
                for row, kept in enumerate(lists):
                    torch.testing.assert_close(found[row, : len(kept), :3], torch.stack(kept), rtol=0, atol=0)
            elif step == "crop":
                cache.crop(torch.tensor(cuts))
                lists = [kept[:cut] for kept, cut in zip(lists, cuts, strict=True)]
            else:
                cache.reorder(torch.tensor(order))
                lists = [lists[i] for i in order]


# ------------------------------------------------------------------------------------------ how it travels


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_a_state_dict_restores_every_token_in_a_larger_cache_of_another_type(fixed_shape):
    cache, k, v = filled(4, fixed_shape=fixed_shape)
    cache.crop(torch.tensor([4, 2]))
    cache.set_last_hidden(1, torch.ones(2, 1, 3))
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["k.0"].shape == (2, 4, 10)
    other = FactorCache(LAYOUT, 2, 9, dtype=torch.float64)
    other.load_state_dict(state)
    found, _, lengths = other.append(0, k[:, :1], v[:, :1])
    assert found.dtype == torch.float64
    assert lengths.tolist() == [5, 3]
    torch.testing.assert_close(found[0, :4, :10], k[0].double(), rtol=0, atol=0)
    assert other.key_positions(0)[0].tolist() == [0, 1, 2, 3, 4]
    assert other.last_hidden(1).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": torch.zeros(1, 2)}, ValueError, r"lengths must have shape \(2, 2\), got \(1, 2\)"),
        ({"lengths": torch.full((2, 2), 7)}, ValueError, r"capacity must be >= the 7 stored tokens, got 6"),
        ({"k.1": torch.zeros(2, 3, 9)}, ValueError, r"k\.1 must have shape \(2, 3, 10\), got \(2, 3, 9\)"),
        ({"v.0": torch.zeros(2, 2, 7)}, ValueError, r"v\.0 must have shape \(2, 3, 7\), got \(2, 2, 7\)"),
        ({"positions.0": torch.zeros(2, 2)}, ValueError, r"positions\.0 must have shape \(2, 3\)"),
        ({"hidden.0": torch.zeros(3, 1, 2)}, ValueError, r"hidden\.0 must have shape \(2, states, d\)"),
        ({"k.1": None}, KeyError, r"k\.1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    cache, _, _ = filled()
    before = snapshot(cache)
    state = {**cache.state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(error, match=message):
        cache.load_state_dict(state)
    assert unchanged(cache, before)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])  # noqa: S301
def test_a_copied_or_pickled_cache_goes_on_alone(travel):
    cache, k, v = filled(2)
    cache.crop(torch.tensor([2, 1]))
    other = travel(cache)
    assert unchanged(other, snapshot(cache))
    other.append(0, k[:, :1], v[:, :1])
    assert cache.past_length(0).tolist() == [2, 1]
    assert other.past_length(0).tolist() == [3, 2]


def test_moving_to_another_type_keeps_tokens_and_lays_records_anew():
    cache, k, v = filled(3)
    assert cache.to(dtype=torch.float64) is cache
    assert cache.dtype == torch.float64
    found, _, _ = cache.append(0, k[:, :1], v[:, :1])
    assert found.shape == (2, 4, 10)  # two float64 fill 16 bytes
    torch.testing.assert_close(found[:, :3], k.double(), rtol=0, atol=0)
    assert cache.to("cpu").device == torch.device("cpu")
    with pytest.raises(TypeError, match=r"dtype must be a floating type, got torch\.int8"):
        cache.to(dtype=torch.int8)


def test_buffers_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        cache, k, v = filled(2)
        cache.set_last_hidden(0, torch.ones(2, 1, 3))
    cache.append(0, k, v)
    cache.set_last_hidden(0, torch.zeros(2, 1, 3))
    assert cache.past_length(0) == 4
    assert not cache.last_hidden(0).any()


def test_appended_records_leave_no_graph_behind():
    cache = FactorCache(CacheLayout(1, 4, 4), 1, 3)
    k = torch.randn(1, 2, 4, requires_grad=True)
    found, _, _ = cache.append(0, k, k)
    assert not found.requires_grad


# -------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", ["small", "medium", "large", "xl"])
@pytest.mark.parametrize("mechanism", ["tpa", "kvonly", "mha", "mqa", "gqa", "mla_matched"])
def test_allocated_bytes_are_the_numbers_of_table_one(name, mechanism):
    config = preset(name, mechanism)
    kind = {"kvonly": "kv_only"}.get(mechanism, mechanism)
    numbers = accounting.cache_numbers(accounting.preset(name, kind))
    cache = FactorCache(config, 2, 5, device="meta", dtype=torch.float32)
    layers = config.num_hidden_layers
    assert cache.layout.num_layers == layers
    assert cache.layout.k_numbers + cache.layout.v_numbers == numbers
    padding = sum(cache.layout.widths(torch.float32)) - numbers
    assert 0 <= padding < 8  # less than 16 bytes per record
    assert cache.nbytes == 2 * 5 * layers * 4 * (numbers + padding)


def test_records_are_padded_to_sixteen_bytes_as_the_record_layout_pads_them():
    for rank, heads, width in ((1, 3, 8), (2, 34, 64), (3, 5, 7)):
        layout = RecordLayout(rank, heads, width)
        for itemsize in (1, 2, 4, 8):
            assert padded_width(layout.numbers, itemsize) == layout.padded(itemsize)
    assert CacheLayout(1, 196, 0).widths(torch.bfloat16) == (200, 0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FactorCache("tpa", 1, 1), TypeError, r"config must be a CacheLayout, .*, got 'tpa'"),
        (lambda: FactorCache(LAYOUT, 0, 1), ValueError, r"batch must be >= 1, got 0"),
        (lambda: FactorCache(LAYOUT, 1, 0), ValueError, r"max_len must be >= 1, got 0"),
        (lambda: FactorCache(LAYOUT, 1, 1, rewind=-1), ValueError, r"rewind must be >= 0, got -1"),
        (
            lambda: FactorCache(LAYOUT, 1, 1, dtype=torch.int32),
            TypeError,
            r"dtype must be a floating type, got",
        ),
        (lambda: CacheLayout(0, 1, 1), ValueError, r"num_layers must be >= 1, got 0"),
        (lambda: CacheLayout(1, -1, 1), ValueError, r"k_numbers must be >= 0, got -1"),
        (lambda: CacheLayout(1, 1, -2), ValueError, r"v_numbers must be >= 0, got -2"),
    ],
)
def test_caches_that_cannot_be_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_configuration_that_rotates_on_load_keeps_positions():
    config = ModelConfig(
        hidden_size=8, num_attention_heads=2, head_dim=4, num_hidden_layers=2, shared_kv_b=True
    )
    assert FactorCache(config, 1, 1).key_positions(0).shape == (1, 0)
