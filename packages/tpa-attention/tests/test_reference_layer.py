"""The NumPy truth of the layer: worked value 2, every variant with and without a cache, counts, T6."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_accounting as accounting
import reference_layer
from reference_accounting import Shape
from reference_layer import Block, FactorMap, Layer, expand, forward
from reference_rope import Rope, rotate, rotation_matrix

PRINTED = 1e-13  # the specification prints 14 significant digits
ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10

d, h, D = 10, 3, 8


def worked_layer():
    """Worked value 2: d=6, h=2, D=4, ranks (3, 2, 1)."""

    def weight(rows, columns, phi):
        o, i = np.ogrid[0:rows, 0:columns]
        return np.cos(phi + 0.7 * o + 1.3 * i)

    def head_map(rank, phi):  # row index = head * R + rank
        return FactorMap(weight(2 * rank, 6, phi).reshape(2, rank, 6).transpose(1, 0, 2))

    def feature_map(rank, phi):  # row index = rank * D + feature
        return (FactorMap(weight(rank * 4, 6, phi).reshape(rank, 4, 6)),)

    return Layer(
        head_map(3, 0.1),
        feature_map(3, 0.4),
        head_map(2, 0.2),
        feature_map(2, 0.5),
        head_map(1, 0.3),
        feature_map(1, 0.6),
        weight(6, 8, 0.7),
    )


WORKED_ROWS = np.array(
    [
        [
            0.42272687838258,
            0.029245032786357,
            -0.37799120869553,
            -0.60745227845235,
            -0.55121904994936,
            -0.23573888921993,
        ],
        [
            0.7153283603713,
            0.040902581770611,
            -0.65276032015726,
            -1.0394198438538,
            -0.93722397360285,
            -0.39423702403791,
        ],
        [
            0.73283474736383,
            0.0297825239271,
            -0.68727688587731,
            -1.0810992372561,
            -0.96646372471171,
            -0.39728522102318,
        ],
        [
            0.56698133176376,
            0.018009658180645,
            -0.5394322390535,
            -0.84317072539954,
            -0.75035284468416,
            -0.30463229652721,
        ],
    ]
)
WORKED_INPUT = np.sin(0.1 * np.arange(1, 5)[:, None] * np.arange(1, 7))[None]


def test_worked_layer_agrees_with_the_specification():
    y, _ = forward(worked_layer(), WORKED_INPUT)
    np.testing.assert_allclose(y[0], WORKED_ROWS, rtol=0, atol=PRINTED)


def test_worked_layer_decoded_token_by_token_agrees_with_the_specification():
    cache = None
    for t in range(4):
        y, cache = forward(worked_layer(), WORKED_INPUT[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(y[0, 0], WORKED_ROWS[t], rtol=0, atol=PRINTED)


# ----------------------------------------------------------------------------------------------- variants


def contextual(rng, rank, n):
    return FactorMap(weight=rng.normal(size=(rank, n, d)) / np.sqrt(d))


def free(rng, rank, n):
    return FactorMap(constant=rng.normal(size=(rank, n)))


def with_bias(rng, rank, n):
    return FactorMap(contextual(rng, rank, n).weight, free(rng, rank, n).constant)


def layer_of(
    seed,
    *,
    ranks=(3, 2, 2),
    dims=(D,),
    head=contextual,
    feature=contextual,
    kv_only=False,
    shared=False,
    **switches,
):
    """A random layer of h heads of width D (E = D)."""
    rng = np.random.default_rng(seed)
    rq, rk, rv = ranks
    return Layer(
        q_a=None if kv_only else head(rng, rq, h),
        q_b=(contextual(rng, h, D),) if kv_only else tuple(feature(rng, rq, n) for n in dims),
        k_a=head(rng, rk, h),
        k_b=tuple(feature(rng, rk, n) for n in dims),
        v_a=head(rng, rv, h),
        v_b=() if shared else tuple(feature(rng, rv, n) for n in dims),
        o=rng.normal(size=(d, h * D)) / np.sqrt(h * D),
        **switches,
    )


def gate_of(seed):
    return np.random.default_rng(seed).normal(size=(h * D, d))


LAYERS = {
    "contextual": layer_of(0),
    "without rank scale": layer_of(0, rank_scale=False),
    "KV-only": layer_of(1, kv_only=True),
    "non-contextual A": layer_of(2, head=free),
    "KV-only with non-contextual A": layer_of(2, head=free, kv_only=True),
    "A with bias": layer_of(2, head=with_bias),
    "non-contextual B": layer_of(3, feature=free),
    "shared B": layer_of(4, shared=True),
    "shared non-contextual B": layer_of(4, shared=True, feature=free),
    "rotate on load": layer_of(0, rotate_on_load=True),
    "third order": layer_of(5, dims=(4, 2)),
    "fourth order": layer_of(6, dims=(2, 2, 2)),
    "third order, shared B": layer_of(5, dims=(4, 2), shared=True),
    "sigmoid": layer_of(7, head_activation="sigmoid"),
    "softmax": layer_of(8, head_activation="softmax"),
    "partial rotation": layer_of(9, rope=Rope(fraction=0.5)),
    "interleaved LLaMA rotation": layer_of(9, rope=Rope(layout="interleaved", sign=1)),
    "no rotation": layer_of(9, rope=None),
    "factor norm": layer_of(10, factor_norm=True),
    "factor norm, shared B, third order": layer_of(10, factor_norm=True, shared=True, dims=(4, 2)),
    "output norm and gate": layer_of(11, out_norm=np.linspace(0.5, 1.5, D), gate=gate_of(12)),
    "KV shift": layer_of(13, kv_shift=np.linspace(0.1, 0.9, d)),
}
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def hidden(seed, T=7, B=2):
    return np.random.default_rng(seed).normal(size=(B, T, d))


@EVERY_LAYER
def test_decoding_one_token_at_a_time_gives_the_rows_of_one_pass(layer):
    x = hidden(20)
    expected, _ = forward(layer, x)
    cache = None
    for t in range(x.shape[1]):
        y, cache = forward(layer, x[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(y[:, 0], expected[:, t], rtol=0, atol=ROUNDING)


@EVERY_LAYER
def test_chunked_prefill_equals_one_shot_with_a_window(layer):
    x = hidden(21)
    expected, whole = forward(layer, x, window=3)
    cache, rows = None, []
    for chunk in (x[:, :3], x[:, 3:4], x[:, 4:]):
        y, cache = forward(layer, chunk, cache=cache, window=3)
        rows.append(y)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), expected, rtol=0, atol=ROUNDING)
    assert reference_layer.numbers_per_token(cache) == reference_layer.numbers_per_token(whole)


@EVERY_LAYER
def test_left_padding_changes_no_valid_row(layer):
    x = hidden(22, T=5, B=1)
    expected, _ = forward(layer, x)
    padded = np.concatenate([hidden(23, T=3, B=1), x], axis=1)
    valid = np.array([[False] * 3 + [True] * 5])
    y, cache = forward(layer, padded, positions=np.array([[0, 0, 0, 0, 1, 2, 3, 4]]), valid=valid)
    np.testing.assert_allclose(y[:, 3:], expected, rtol=0, atol=ROUNDING)
    token = hidden(24, T=1, B=1)
    unpadded, _ = forward(layer, np.concatenate([x, token], axis=1))
    decoded, _ = forward(layer, token, positions=np.array([[5]]), cache=cache)
    np.testing.assert_allclose(decoded[:, 0], unpadded[:, -1], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", [name for name in LAYERS if "non-contextual B" not in name])
def test_shifting_every_position_changes_nothing(name):
    x = hidden(25)
    expected, _ = forward(LAYERS[name], x)
    shifted, _ = forward(LAYERS[name], x, positions=np.tile(1000 + np.arange(7), (2, 1)))
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=ROUNDING)  # angles near 1000 carry 1e-13


@EVERY_LAYER
def test_later_tokens_do_not_reach_earlier_rows(layer):
    x = hidden(26)
    changed = x.copy()
    changed[:, 4:] += 1.0
    before, after = forward(layer, x)[0], forward(layer, changed)[0]
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.all(after[:, 4:] != before[:, 4:])


@EVERY_LAYER
def test_rotating_on_load_equals_rotating_before_storing(layer):
    x = hidden(27)
    expected, _ = forward(layer, x)
    found, cache = forward(replace(layer, rotate_on_load=True), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    assert reference_layer.rotates_on_load(replace(layer, rotate_on_load=True))
    assert cache.positions.shape == (2, 7)


def test_shared_b_is_two_separate_maps_with_the_same_weights():
    shared = LAYERS["shared B"]
    x = hidden(28)
    found, cache = forward(shared, x)
    expected, separate = forward(replace(shared, v_b=shared.k_b), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    assert reference_layer.numbers_per_token(separate) - reference_layer.numbers_per_token(cache) == 2 * D


def test_serving_values_from_rotated_shared_rows_would_be_wrong():
    shared, x = LAYERS["shared B"], hidden(29, T=4)
    positions = np.tile(np.arange(4), (2, 1))
    cache = forward(shared, x)[1]
    k, v = reference_layer.load(shared, cache)
    assert v.b[0] is cache.bk[0]
    np.testing.assert_array_equal(k.b[0], rotate(cache.bk[0], positions, shared.rope))
    assert np.max(np.abs(k.b[0] - v.b[0])) > 0.1


def test_free_rows_of_b_make_keys_that_depend_on_the_position_through_rope_alone():
    layer = LAYERS["non-contextual B"]
    k, _ = reference_layer.load(layer, forward(layer, hidden(30, T=3))[1])
    for t in range(3):
        expected = layer.k_b[0].constant @ rotation_matrix(t, D, layer.rope)
        np.testing.assert_allclose(k.b[0][:, t], np.broadcast_to(expected, (2, 2, D)), rtol=0, atol=ROUNDING)


def test_contextual_layers_with_zero_weight_and_a_bias_are_non_contextual():
    layer = LAYERS["non-contextual A"]

    def started_at(m):
        return FactorMap(np.zeros((*m.constant.shape, d)), m.constant)

    contextual_layer = replace(
        layer, q_a=started_at(layer.q_a), k_a=started_at(layer.k_a), v_a=started_at(layer.v_a)
    )
    x = hidden(31)
    np.testing.assert_allclose(forward(contextual_layer, x)[0], forward(layer, x)[0], rtol=0, atol=ROUNDING)


# -------------------------------------------------------------------------------------------- higher order


def test_expanded_rows_stack_the_columns_of_the_outer_product():
    rng = np.random.default_rng(32)
    b, c, e = rng.normal(size=4), rng.normal(size=3), rng.normal(size=2)
    third = expand((b[None, None, None], c[None, None, None]))[0, 0, 0]
    np.testing.assert_array_equal(third, np.outer(b, c).flatten(order="F"))
    for j, i in np.ndindex(3, 4):
        assert third[j * 4 + i] == b[i] * c[j]
    fourth = expand((b[None, None, None], c[None, None, None], e[None, None, None]))[0, 0, 0]
    np.testing.assert_allclose(fourth, np.kron(e, np.kron(c, b)), rtol=1e-15)


@pytest.mark.parametrize("dims", [(4, 3), (2, 3, 2), (6, 1)])
@pytest.mark.parametrize("rope", [Rope(), Rope(layout="interleaved", sign=1)])
def test_rotating_the_first_factor_rotates_the_expanded_row_block_by_block(dims, rope):
    rng = np.random.default_rng(33)
    parts = tuple(rng.normal(size=(1, 5, 2, n)) for n in dims)
    positions = np.array([[0, 1, 2, 30, 400]])
    found = expand(reference_layer.rotate_first(parts, positions, rope))
    for t in range(5):
        blocks = np.kron(np.eye(np.prod(dims[1:])), rotation_matrix(int(positions[0, t]), dims[0], rope))
        np.testing.assert_allclose(found[0, t], expand(parts)[0, t] @ blocks, rtol=0, atol=ROUNDING)


def test_third_order_with_a_factor_of_ones_is_second_order():
    second = LAYERS["contextual"]
    one = FactorMap(constant=np.ones((2, 1)))
    ones = FactorMap(constant=np.ones((3, 1)))
    third = replace(second, q_b=(*second.q_b, ones), k_b=(*second.k_b, one), v_b=(*second.v_b, one))
    x = hidden(34)
    np.testing.assert_allclose(forward(third, x)[0], forward(second, x)[0], rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------- activations, norms, shift


def test_softmax_of_head_factors_sums_to_one_over_heads_for_each_rank():
    a = np.random.default_rng(35).normal(size=(2, 3, 4, 5))
    np.testing.assert_allclose(reference_layer.activate(a, "softmax").sum(axis=-1), 1.0, rtol=1e-15)


def test_sigmoid_layer_caches_activated_head_factors():
    layer, x = LAYERS["sigmoid"], hidden(36)
    _, cache = forward(layer, x)
    raw = reference_layer.apply(layer.k_a, x)
    np.testing.assert_allclose(cache.ak, 1 / (1 + np.exp(-raw)), rtol=1e-14)
    assert not np.any(cache.ak < 0)


def test_norm_of_small_factors_is_the_norm_of_the_expanded_row():
    rng = np.random.default_rng(37)
    parts = (rng.normal(size=(1, 1, 2, 4)), rng.normal(size=(1, 1, 2, 3)))
    separately = expand(tuple(reference_layer.rms_norm(p, eps=0.0) for p in parts))
    np.testing.assert_allclose(separately, reference_layer.rms_norm(expand(parts), eps=0.0), rtol=1e-14)


def test_factor_norm_makes_keys_indifferent_to_the_size_of_b():
    layer = LAYERS["factor norm"]
    larger = replace(
        layer, k_b=(FactorMap(1000 * layer.k_b[0].weight),), q_b=(FactorMap(1000 * layer.q_b[0].weight),)
    )
    x = hidden(38)
    # eps = 1e-5 against mean squares of size 1: the outputs differ by about 1e-5 and no more
    difference = np.max(np.abs(forward(larger, x)[0] - forward(layer, x)[0]))
    assert 1e-9 < difference < 1e-3


def test_shift_of_one_is_no_shift_and_zero_reads_the_previous_token():
    layer, x = LAYERS["contextual"], hidden(39)
    expected, _ = forward(layer, x)
    np.testing.assert_allclose(
        forward(replace(layer, kv_shift=np.ones(d)), x)[0], expected, rtol=0, atol=ROUNDING
    )
    _, cache = forward(replace(layer, kv_shift=np.zeros(d)), x)
    _, plain = forward(layer, x)
    np.testing.assert_allclose(cache.av[:, 1:], plain.av[:, :-1], rtol=0, atol=ROUNDING)
    assert np.all(cache.av[:, 0] == 0)
    np.testing.assert_array_equal(cache.last, x[:, -1])


def test_output_gate_at_zero_weights_halves_the_output():
    layer, x = LAYERS["contextual"], hidden(40)
    gated = replace(layer, gate=np.zeros((h * D, d)))
    np.testing.assert_allclose(forward(gated, x)[0], forward(layer, x)[0] / 2, rtol=0, atol=ROUNDING)


def test_output_norm_gives_every_head_unit_mean_square():
    layer = LAYERS["contextual"]
    normed = replace(layer, o=np.eye(h * D), out_norm=np.ones(D))
    y, _ = forward(normed, hidden(41))
    squares = (y.reshape(2, 7, h, D) ** 2).mean(axis=-1)
    raw, _ = forward(replace(layer, o=np.eye(h * D)), hidden(41))
    raw_squares = (raw.reshape(2, 7, h, D) ** 2).mean(axis=-1)
    np.testing.assert_allclose(squares, raw_squares / (raw_squares + 1e-5), rtol=1e-12)


# ------------------------------------------------------------------------------------------------- counts

COUNTED = {
    "contextual": Shape("tpa", rq=3, rk=2, rv=2),
    "KV-only": Shape("kv_only", rk=2, rv=2),
    "non-contextual A": Shape("noncontextual_a", rq=3, rk=2, rv=2),
    "non-contextual B": Shape("noncontextual_b", rq=3, rk=2, rv=2),
    "shared B": Shape("shared_b", rq=3, rk=2, rv=2),
    "third order": Shape("higher_order", rq=3, rk=2, rv=2, dims=(4, 2)),
    "fourth order": Shape("higher_order", rq=3, rk=2, rv=2, dims=(2, 2, 2)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_table_one_counts_the_arrays_of_the_layer(name):
    shape = replace(COUNTED[name], d=d, h=h, D=D)
    _, cache = forward(LAYERS[name], hidden(42))
    assert reference_layer.numbers_per_token(cache) == accounting.cache_numbers(shape)
    assert reference_layer.parameter_count(LAYERS[name]) == accounting.parameters(shape)


# ---------------------------------------------------------------------------------------------------- T6


def t6(seed, vocabulary=11):
    rng = np.random.default_rng(seed)
    hidden_width = accounting.hidden_width(d)
    blocks = [
        Block(
            layer_of(seed + i),
            rng.normal(size=(hidden_width, d)),
            rng.normal(size=(hidden_width, d)),
            rng.normal(size=(d, hidden_width)),
        )
        for i in range(2)
    ]
    return rng.normal(size=(vocabulary, d)), blocks


def test_t6_with_a_cache_gives_the_logits_of_one_pass():
    embedding, blocks = t6(49)
    tokens = np.array([[1, 5, 3, 0, 10], [2, 2, 7, 9, 4]])
    expected, _ = reference_layer.t6_logits(embedding, blocks, tokens)
    rows, caches = [], None
    for chunk in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
        logits, caches = reference_layer.t6_logits(embedding, blocks, chunk, caches)
        rows.append(logits)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), expected, rtol=0, atol=ROUNDING * 10)


def test_t6_with_zero_outputs_is_its_normalised_embedding():
    embedding, blocks = t6(50)
    silent = [
        block._replace(attention=replace(block.attention, o=0 * block.attention.o), w3=0 * block.w3)
        for block in blocks
    ]
    logits, _ = reference_layer.t6_logits(embedding, silent, np.array([[3, 8]]))
    rows = embedding[[3, 8]]
    expected = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True)) @ embedding.T
    np.testing.assert_allclose(logits[0], expected, rtol=1e-12)


def test_empty_split_of_a_layer_cache_is_harmless():
    layer, x = LAYERS["contextual"], hidden(51)
    positions = np.tile(np.arange(7), (2, 1))
    q = reference_layer.query_factors(layer, x, positions)
    k, v = reference_layer.load(layer, forward(layer, x)[1])
    last = slice(6, 7)
    heads, lse = reference.flash_decode(
        q.a[:, last], q.b[0][:, last], k.a, k.b[0], v.a, v.b[0], num_splits=10, block=1
    )
    assert np.all(np.isfinite(lse))
    expected, _ = forward(layer, x)
    np.testing.assert_allclose(
        reference_layer.output(layer, x[:, last], heads)[:, 0], expected[:, -1], rtol=0, atol=ROUNDING
    )
