"""TPAttention with a cache: decoding, chunks, padding, unequal lengths, other caches, precisions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import OPTIONS, build
from reference_layer import forward
from test_reference_layer import LAYERS, D, d, h, hidden
from torch.nn import functional

from tpa_attention.torch.baselines import MLA
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.layers import MAX_DECODE_TOKENS, TPAttention

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10, in float64
EVERY_NAME = pytest.mark.parametrize("name", OPTIONS)
EVERY_ROUTE = ("contextual", "KV-only with non-contextual A", "shared B", "third order", "KV shift")
EVERY_NAME_AND_SHAPE = pytest.mark.parametrize(
    ("name", "fixed_shape"), [*((name, False) for name in OPTIONS), *((name, True) for name in EVERY_ROUTE)]
)


def tensor(seed, **shape):
    return torch.from_numpy(hidden(seed, **shape))


def cache_for(layer, batch=2, max_len=12, **options):
    return FactorCache(layer, batch, max_len, **{"dtype": torch.float64, **options})


def in_chunks(layer, x, chunks, cache, **arguments):
    parts = x.split(chunks, dim=1)
    return torch.cat([layer(part, cache=cache, **arguments) for part in parts], dim=1)


def close(found, expected, atol=ROUNDING):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=atol)


class ConcatenatingCache:
    """The least a cache of one layer can be: records are concatenated, positions not kept."""

    def __init__(self):
        self.k = self.v = self.hidden = None

    def append(self, _layer, k, v, _positions):
        self.k = k if self.k is None else torch.cat([self.k, k], dim=1)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=1)
        return self.k, self.v, None

    def past_length(self, _layer):
        return 0 if self.k is None else self.k.shape[1]

    def key_positions(self, _layer):
        return None

    def last_hidden(self, _layer):
        return self.hidden

    def set_last_hidden(self, _layer, hidden):
        self.hidden = hidden[:, -1]


# ------------------------------------------------------------------------------------- one pass is the truth


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "auto") for name in OPTIONS),
        # the factors are the same whatever attends to them
        *((name, impl) for impl in ("reference", "sdpa") for name in EVERY_ROUTE),
    ],
)
def test_decoding_token_by_token_gives_the_rows_of_one_pass(name, impl):
    layer = build(name, impl=impl)
    expected, _ = forward(LAYERS[name], hidden(20, T=5))
    close(in_chunks(layer, tensor(20, T=5), (1,) * 5, cache_for(layer)), expected)


@EVERY_NAME_AND_SHAPE
def test_chunks_of_a_prefill_give_the_rows_of_one_pass(name, fixed_shape):
    layer = build(name)
    expected, _ = forward(LAYERS[name], hidden(21))
    close(in_chunks(layer, tensor(21), (3, 1, 3), cache_for(layer, fixed_shape=fixed_shape)), expected)


@EVERY_NAME_AND_SHAPE
def test_chunks_too_long_to_decode_are_attended_like_a_prefill(name, fixed_shape):
    layer, chunk = build(name), MAX_DECODE_TOKENS + 2
    x = tensor(22, T=2 * chunk, B=1)
    cache = cache_for(layer, 1, 2 * chunk + 3, fixed_shape=fixed_shape)
    close(in_chunks(layer, x, (chunk, chunk), cache), layer(x))


@EVERY_NAME
def test_a_cache_that_keeps_no_positions_serves_consecutive_ones(name):
    layer, x = build(name), tensor(23, T=5)
    expected = layer(x)
    close(in_chunks(layer, x, (3, 1, 1), ConcatenatingCache()), expected)
    shifted = ConcatenatingCache()
    rows = [
        layer(x[:, a:b], torch.arange(100 + a, 100 + b), cache=shifted) for a, b in ((0, 3), (3, 4), (4, 5))
    ]
    close(torch.cat(rows, dim=1), expected)  # only distances matter


@pytest.mark.parametrize("name", ["shared B", "non-contextual B", "contextual", "third order, shared B"])
def test_positions_with_gaps_are_remembered(name):
    layer, x = build(name), tensor(24)
    positions = torch.tensor([[0, 2, 3, 10, 11, 40, 41], [5, 4, 3, 2, 1, 0, 9]])
    expected, _ = forward(LAYERS[name], x.numpy(), positions=positions.numpy())
    cache = cache_for(layer)
    rows = [layer(x[:, t : t + 1], positions[:, t : t + 1], cache=cache) for t in range(7)]
    close(torch.cat(rows, dim=1), expected)


@EVERY_NAME_AND_SHAPE
def test_padding_on_the_left_changes_no_decoded_row(name, fixed_shape):
    layer = build(name)
    x, token = tensor(25, T=5, B=1), tensor(26, T=1, B=1)
    padded = torch.cat([tensor(27, T=3, B=1), x], dim=1)
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    length = 12 if fixed_shape else 8
    cache = cache_for(layer, 1, fixed_shape=fixed_shape)
    found = layer(padded, attention_mask=functional.pad(valid, (0, length - 8), value=1), cache=cache)
    close(found[:, 3:], layer(x))
    longer = functional.pad(valid, (0, 1 if not fixed_shape else 4), value=1)
    decoded = layer(token, attention_mask=longer, cache=cache)
    close(decoded[:, 0], layer(torch.cat([x, token], dim=1))[:, -1])


@EVERY_NAME
def test_sequences_of_unequal_length_are_decoded_as_if_alone(name):
    layer = build(name)
    x = tensor(28)
    more = tensor(29, T=2)
    expected = [
        layer(torch.cat([x[row : row + 1, :length], more[row : row + 1]], dim=1))[0, length:]
        for row, length in enumerate((7, 2))
    ]
    for chunks in ((1, 1), (2,)):
        cache = cache_for(layer)
        layer(x, cache=cache)
        cache.crop(torch.tensor([7, 2]))
        close(in_chunks(layer, more, chunks, cache), torch.stack(expected))


def test_long_chunks_behind_unequal_lengths_are_attended_as_if_alone():
    layer, x, more = build("shared B"), tensor(30), tensor(31, T=20)
    cache = cache_for(layer, max_len=30)
    layer(x, cache=cache)
    cache.crop(torch.tensor([2, 7]))
    valid = torch.ones(2, 27, dtype=torch.int64)
    valid[:, 0] = 0
    found = layer(more, attention_mask=valid, cache=cache)
    for row, length in enumerate((2, 7)):
        whole = torch.cat([x[row : row + 1, :length], more[row : row + 1]], dim=1)
        alone = layer(whole, attention_mask=valid[:1, : length + 20])
        close(found[row], alone[0, length:])


def test_beams_go_on_from_the_sequence_they_were_given():
    layer, x, token = build("contextual"), tensor(32), tensor(33, T=1)
    cache = cache_for(layer)
    layer(x, cache=cache)
    cache.reorder(torch.tensor([1, 1]))
    found = layer(token, cache=cache)
    close(found[:, 0], layer(torch.cat([x[[1, 1]], token], dim=1))[:, -1])


def test_a_bias_of_four_axes_is_added_while_decoding():
    layer, x = build("contextual"), tensor(34)
    bias = torch.from_numpy(np.random.default_rng(35).normal(size=(2, h, 7, 7)))
    expected = layer(x, attention_mask=bias)
    cache = cache_for(layer)
    rows = [
        layer(x[:, t : t + 1], attention_mask=bias[:, :, t : t + 1, : t + 1], cache=cache) for t in range(7)
    ]
    close(torch.cat(rows, dim=1), expected)


def test_layers_of_a_model_keep_their_records_apart():
    layers = [build("contextual"), build("rotate on load")]
    layout = layers[1].cache_layout
    cache = FactorCache(type(layout)(2, layout.k_numbers, layout.v_numbers, True), 2, 7, dtype=torch.float64)
    x = tensor(36)
    expected = [layer(x) for layer in layers]
    for t in range(7):
        for index, layer in enumerate(layers):
            found = layer(x[:, t : t + 1], cache=cache, layer_idx=index)
            close(found[:, 0], expected[index][:, t])


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(list(OPTIONS)),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    fixed_shape=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_chunks_give_the_rows_of_one_pass(name, chunks, fixed_shape, seed):
    layer, x = build(name), tensor(seed, T=sum(chunks))
    cache = cache_for(layer, max_len=20, fixed_shape=fixed_shape)
    close(in_chunks(layer, x, chunks, cache), layer(x))


# ---------------------------------------------------------------------------------------- types and refusals


def test_attention_runs_in_the_type_of_the_cache_and_returns_that_of_the_input():
    layer, x = build("contextual"), tensor(37)
    expected = layer(x)
    for dtype, atol in (
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.1),
    ):  # 2^-24 and 2^-9, values of size 1 to 10
        found = in_chunks(layer, x, (3, 1, 3), cache_for(layer, dtype=dtype))
        assert found.dtype == torch.float64
        difference = (found - expected).abs().max()
        assert 1e-12 < difference < atol


@pytest.mark.parametrize(
    "name", ["KV-only with non-contextual A", "shared B", "third order", "non-contextual B"]
)
def test_autocast_decodes_from_a_cache_of_its_type(name):
    layer, x = build(name).float(), tensor(38).float()
    expected = layer(x)
    cache = cache_for(layer, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = in_chunks(layer, x, (3, 1, 3), cache)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)  # four roundings of 2^-9


def test_a_full_cache_refuses_a_forward_pass_and_stays_as_it_was():
    layer, x = build("KV shift"), tensor(39)
    cache = cache_for(layer, max_len=7)
    layer(x, cache=cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"capacity 7 holds 7 tokens of layer 0: no room for 1 more"):
        layer(x[:, :1], cache=cache)
    after = cache.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 1, dtype=torch.bool)},
            ValueError,
            r"attention_mask must have shape \(B, M\) = \(2, 4\) .*, got \(2, 1\)",
        ),
        ({"attention_mask": torch.ones(2, 4)}, TypeError, r"attention_mask \(B, M\) must be bool or integer"),
        ({"cu_seqlens": torch.tensor([0, 1])}, ValueError, r"cu_seqlens must be None with a cache"),
        ({"position_ids": torch.arange(4)}, ValueError, r"position_ids must have shape \(1,\) or \(2, 1\)"),
        ({"layer_idx": 1}, IndexError, r"layer must be in \[0, 1\), got 1"),
    ],
)
def test_arguments_that_do_not_fit_leave_the_cache_as_it_was(arguments, error, message):
    layer, x = build("contextual"), tensor(40)
    cache = cache_for(layer)
    layer(x[:, :3], cache=cache)
    with pytest.raises(error, match=message):
        layer(x[:, :1], cache=cache, **arguments)
    assert cache.past_length(0) == 3


def test_a_cache_of_another_layout_is_refused():
    layer, other = build("contextual"), build("shared B")
    with pytest.raises(ValueError, match=r"v must have shape .* \(2, 7, 6\.\.6\), got \(2, 7, 22\)"):
        layer(tensor(41), cache=FactorCache(other.cache_layout, 2, 7, dtype=torch.float64))


def test_values_of_another_width_and_unequal_ranks_decode():
    layer = TPAttention(d, h, D, 1, 3, 2, v_head_dim=5, zero_init_output=False, dtype=torch.float64)
    x = tensor(42)
    close(in_chunks(layer, x, (2, 5), cache_for(layer)), layer(x))


def test_a_layer_that_caches_nothing_of_v_decodes():
    options = {"shared_kv_b": True, "variant": "noncontextual_a", "zero_init_output": False}
    layer = TPAttention(d, h, D, 3, 2, 2, **options, dtype=torch.float64)
    assert layer.cache_layout.v_numbers == 0
    x = tensor(43)
    close(in_chunks(layer, x, (2, 4, 1), cache_for(layer)), layer(x))


def test_decoding_leaves_no_graph_in_the_cache_when_gradients_are_on():
    layer, x = build("KV shift"), tensor(44)
    cache = cache_for(layer)
    in_chunks(layer, x, (1,) * 7, cache)
    assert not any(t.requires_grad for t in cache.state_dict().values())


def decode_compiled(_rank, _world_size):
    """Graphs that 20 compiled steps took, and how far they are from one pass, per layer."""
    from torch._dynamo.testing import CompileCounter

    layers = {
        "tpa": TPAttention(16, 3, 8, 3, 2, 2, zero_init_output=False),
        "shared": TPAttention(
            16, 3, 8, 3, 2, 2, zero_init_output=False, shared_kv_b=True, factor_dims=(4, 2)
        ),
        "mla": MLA(16, 4, 8, 6, 6, 4, zero_init_output=False),
    }
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, layer in layers.items():
        torch._dynamo.reset()
        counter = CompileCounter()
        step = torch.compile(layer, fullgraph=True, backend=counter)
        cache = FactorCache(layer, 2, 20, fixed_shape=True)
        with torch.no_grad():
            rows = torch.cat([step(x[:, t : t + 1], cache=cache) for t in range(20)], dim=1)
            found[name] = (counter.frame_count, (rows - layer(x)).abs().max().item())
    return found


@pytest.mark.slow
def test_a_cache_of_fixed_shape_is_compiled_once_for_all_steps(run_distributed):
    (found,) = run_distributed(decode_compiled, 1, timeout=150)
    for name, (graphs, error) in found.items():
        assert graphs == 1, name
        assert error < 5e-6, name  # float32, values of size 1
