"""The NumPy truth of rotation, attention, decode and gradients: worked value 1 and the identities."""

import numpy as np
import pytest
import reference
from reference_rope import Rope, frequencies, rotary_dim, rotate, rotation_matrix, unrotate

PRINTED = 1e-13  # the specification prints 14 significant digits of numbers below 2
ROUNDING = 1e-13  # a few hundred float64 operations on numbers of size 1 to 10

EVERY_ROPE = [
    pytest.param(Rope(layout=layout, sign=sign, fraction=fraction), id=f"{layout} {sign:+d} {fraction}")
    for layout in ("half", "interleaved")
    for sign in (-1, 1)
    for fraction in (1.0, 0.5)
]


def draw(seed, T=5, M=7, *, B=2, H=3, D=8, E=6, ranks=(3, 2, 2), kv_only=False):
    """Random factors (aq, bq, ak, bk, av, bv)."""
    rng = np.random.default_rng(seed)
    rq, rk, rv = ranks
    aq = None if kv_only else rng.normal(size=(B, T, rq, H))
    bq = rng.normal(size=(B, T, H if kv_only else rq, D))
    ak, bk = rng.normal(size=(B, M, rk, H)), rng.normal(size=(B, M, rk, D))
    av, bv = rng.normal(size=(B, M, rv, H)), rng.normal(size=(B, M, rv, E))
    return aq, bq, ak, bk, av, bv


def worked_decode():
    """Worked value 1: M=5, H=3, R_Q=R_K=2, R_V=1, D=E=4; batch axis first."""
    m, h, d = np.arange(5.0), np.arange(3.0), np.arange(4.0)
    r = np.arange(2.0)
    aq = np.sin(1 + h + 2 * r[:, None])[None, None]
    bq = np.cos(r[:, None] + d / 2)[None, None]
    ak = np.cos(0.3 * m[:, None, None] + h - r[:, None])[None]
    bk = np.sin(0.2 * m[:, None, None] + 0.7 * r[:, None] + 0.1 * d)[None]
    av = np.sin(0.4 * m[:, None, None] + 0.5 * h)[None]
    bv = np.cos(0.25 * m[:, None, None] + d)[None]
    return aq, bq, ak, bk, av, bv


WORKED_OUT = np.array(
    [
        [0.46532415433347, -0.089448094765505, -0.56198217804809, -0.51783243854687],
        [0.6641322348605, 0.036799196764579, -0.6243668531285, -0.71149289767051],
        [0.72008550409834, 0.11499040673234, -0.59582634027795, -0.75884309783064],
    ]
)
WORKED_LSE = np.array([1.8716709172451, 1.8083187387886, 1.5418202237444])

WAYS = {
    "materialised": reference.tpa_attention,
    "factor space": reference.factor_space_attention,
    "FlashTPA in one split": lambda *f: reference.flash_decode(*f, block=5),
    "FlashTPA in blocks of two": lambda *f: reference.flash_decode(*f, block=2),
    "FlashTPA in three splits": lambda *f: reference.flash_decode(*f, num_splits=3, block=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_worked_decode_agrees_with_the_specification(way):
    out, lse = WAYS[way](*worked_decode())
    np.testing.assert_allclose(out[0, 0], WORKED_OUT, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(lse[0, 0], WORKED_LSE, rtol=0, atol=PRINTED)


# --------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("rope", EVERY_ROPE)
def test_rotation_is_the_product_with_its_matrix(rope):
    b = np.random.default_rng(0).normal(size=(2, 4, 3, 8))
    positions = np.array([[0, 1, 5, 1000], [7, 7, 2, 0]])
    turned = rotate(b, positions, rope)
    for i, j in np.ndindex(2, 4):
        expected = b[i, j] @ rotation_matrix(int(positions[i, j]), 8, rope)
        np.testing.assert_allclose(turned[i, j], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rope", EVERY_ROPE)
def test_rotations_are_orthogonal_and_compose_to_their_difference(rope):
    t, s = rotation_matrix(11, 8, rope), rotation_matrix(4, 8, rope)
    np.testing.assert_allclose(t @ t.T, np.eye(8), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(t @ s.T, rotation_matrix(7, 8, rope), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rope", EVERY_ROPE)
def test_rotating_the_rows_of_b_rotates_every_materialised_head(rope):
    aq, bq, *_ = draw(1)
    positions = np.array([[3, 4, 5, 6, 7], [0, 0, 9, 2, 50]])
    of_rows = reference.materialize(aq, rotate(bq, positions, rope))
    of_heads = rotate(reference.materialize(aq, bq), positions, rope)
    np.testing.assert_allclose(of_rows, of_heads, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rope", EVERY_ROPE)
def test_logits_depend_on_the_difference_of_positions_alone(rope):
    aq, bq, ak, bk, *_ = draw(2)
    query, key = np.arange(2, 7), np.arange(7)

    def logits(shift):
        rows = (
            rotate(bq, np.tile(query + shift, (2, 1)), rope),
            rotate(bk, np.tile(key + shift, (2, 1)), rope),
        )
        return reference.factored_logits(aq, rows[0], ak, rows[1])

    # angles near 5000 carry an error of 5000 * 2^-53 = 6e-13, logits are of size 1
    np.testing.assert_allclose(logits(5000), logits(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rope", [*EVERY_ROPE, Rope(scaling={"rope_type": "linear", "factor": 4.0})])
def test_unrotate_undoes_rotate(rope):
    b = np.random.default_rng(3).normal(size=(2, 4, 3, 8))
    positions = np.array([[0, 1, 5, 1000], [7, 7, 2, 0]])
    np.testing.assert_allclose(
        unrotate(rotate(b, positions, rope), positions, rope), b, rtol=0, atol=ROUNDING
    )


def test_the_paper_turns_clockwise_and_llama_counterclockwise():
    b = np.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    positions = np.array([[1, 1]])
    cos, sin = np.cos(1.0), np.sin(1.0)
    np.testing.assert_allclose(
        rotate(b, positions, Rope(sign=-1))[0, :, 0], [[cos, -sin], [sin, cos]], atol=1e-16
    )
    np.testing.assert_allclose(
        rotate(b, positions, Rope(sign=1))[0, :, 0], [[cos, sin], [-sin, cos]], atol=1e-16
    )


def test_layouts_differ_by_a_permutation_of_the_features():
    b = np.random.default_rng(4).normal(size=(1, 3, 2, 8))
    positions = np.array([[0, 3, 9]])
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # half's pair (i, i + 4) moved to (2i, 2i + 1)
    half = rotate(b, positions, Rope(layout="half"))[..., order]
    interleaved = rotate(b[..., order], positions, Rope(layout="interleaved"))
    np.testing.assert_array_equal(half, interleaved)


def test_frequencies_start_at_one_and_follow_the_base():
    theta, factor = frequencies(8, Rope(base=10000.0))
    np.testing.assert_allclose(theta, [1.0, 0.1, 0.01, 0.001], rtol=1e-15)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("width", "fraction", "turned"), [(64, 1.0, 64), (64, 0.5, 32), (10, 0.5, 4), (7, 1.0, 6), (8, 0.0, 0)]
)
def test_partial_rotation_turns_an_even_number_of_leading_features(width, fraction, turned):
    assert rotary_dim(width, fraction) == turned
    b = np.random.default_rng(5).normal(size=(1, 1, 1, width))
    out = rotate(b, np.array([[2]]), Rope(fraction=fraction))
    np.testing.assert_array_equal(out[..., turned:], b[..., turned:])
    assert np.all(out[..., :turned] != b[..., :turned])


def test_linear_scaling_is_a_fractional_position():
    b = np.random.default_rng(6).normal(size=(1, 2, 1, 8))
    scaled = rotate(b, np.array([[4, 12]]), Rope(scaling={"rope_type": "linear", "factor": 4.0}))
    np.testing.assert_allclose(scaled, rotate(b, np.array([[1, 3]]), Rope()), rtol=0, atol=ROUNDING)


def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest():
    plain, _ = frequencies(64, Rope())
    scaled, factor = frequencies(64, Rope(scaling={"rope_type": "ntk", "factor": 8.0}))
    assert factor == 1.0
    np.testing.assert_allclose([scaled[0], scaled[-1]], [plain[0], plain[-1] / 8], rtol=1e-13)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales_logits():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    plain, _ = frequencies(64, Rope())
    scaled, factor = frequencies(64, Rope(scaling=scaling))
    turns = 1024 * plain / (2 * np.pi)
    assert np.all(scaled[turns > 40] == plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 4, rtol=1e-14)
    assert factor == pytest.approx(0.1 * np.log(4) + 1, abs=1e-15)
    b = np.random.default_rng(7).normal(size=(1, 2, 1, 64))
    positions = np.array([[3, 3]])
    turned = rotate(b, positions, Rope(scaling=scaling))
    assert np.sum(turned[0, 0] * turned[0, 1]) == pytest.approx(
        factor**2 * np.sum(b[0, 0] * b[0, 1]), abs=1e-12
    )
    np.testing.assert_allclose(unrotate(turned, positions, Rope(scaling=scaling)), b, rtol=0, atol=ROUNDING)


# --------------------------------------------------------------------------------- equalities of attention


@pytest.mark.parametrize("kv_only", [False, True])
@pytest.mark.parametrize("rank_scale", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 2, 1), (2, 3, 4)])
def test_factor_space_attention_equals_materialised_attention(kv_only, rank_scale, ranks):
    factors = draw(10, ranks=ranks, kv_only=kv_only)
    options = {
        "mask": reference.causal_mask(5, 7),
        "bias": np.random.default_rng(11).normal(size=(2, 3, 5, 7)),
    }
    expected = reference.tpa_attention(*factors, **options, rank_scale=rank_scale, scale=0.3)
    found = reference.factor_space_attention(*factors, **options, rank_scale=rank_scale, scale=0.3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING * 10)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 9])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_only", [False, True])
def test_flash_decode_equals_attention_for_ragged_lengths_and_any_splits(num_splits, window, kv_only):
    N, M = 3, 7
    factors = draw(12, N, M, B=5, kv_only=kv_only)
    lens = np.array([0, 1, 3, 6, 7])
    bias = np.random.default_rng(13).normal(size=(5, 3, N, M))
    out, lse = reference.flash_decode(
        *factors, seq_lens=lens, window=window, bias=bias, num_splits=num_splits, block=2
    )
    mask = reference.ragged_mask(N, M, lens, window)
    expected_out, expected_lse = reference.tpa_attention(*factors, mask=mask, bias=bias)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=ROUNDING * 10)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=ROUNDING * 10)
    assert np.all(out[0] == 0)
    assert np.all(lse[0] == -np.inf)


def test_ragged_rows_equal_the_shorter_sequences_alone():
    aq, bq, *cached = draw(14, 2, 7, B=3)
    lens = np.array([2, 5, 7])
    out, lse = reference.flash_decode(aq, bq, *cached, seq_lens=lens, num_splits=2, block=3)
    for i, length in enumerate(lens):
        one = slice(i, i + 1)
        alone = reference.tpa_attention(
            aq[one], bq[one], *(c[one, :length] for c in cached), mask=reference.causal_mask(2, int(length))
        )
        np.testing.assert_allclose(out[i], alone[0][0], rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(lse[i], alone[1][0], rtol=0, atol=ROUNDING)


def test_garbage_past_the_length_changes_nothing():
    aq, bq, *cached = draw(15, 1, 7)
    lens = np.array([4, 6])
    dirty = [c.copy() for c in cached]
    for c in dirty:
        c[0, 4:], c[1, 6:] = 1e30, -1e30
    clean = reference.flash_decode(aq, bq, *cached, seq_lens=lens, num_splits=3, block=2)
    found = reference.flash_decode(aq, bq, *dirty, seq_lens=lens, num_splits=3, block=2)
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)


def test_merging_is_associative_and_ignores_order():
    rng = np.random.default_rng(16)
    outs, lses = rng.normal(size=(4, 2, 3, 5)), rng.normal(size=(4, 2, 3)) * 30
    together = reference.merge_partials(outs, lses)
    backwards = reference.merge_partials(outs[::-1], lses[::-1])
    pairs = [reference.merge_partials(outs[i : i + 2], lses[i : i + 2]) for i in (0, 2)]
    in_pairs = reference.merge_partials(*(np.stack(both) for both in zip(*pairs, strict=True)))
    for found in (backwards, in_pairs):
        for one, other in zip(found, together, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING)


def test_empty_splits_weigh_nothing_and_leave_no_nan():
    rng = np.random.default_rng(17)
    out, lse = rng.normal(size=(1, 2, 5)), rng.normal(size=(1, 2))
    empty_out, empty_lse = np.zeros((1, 2, 5)), np.full((1, 2), -np.inf)
    merged = reference.merge_partials(
        np.concatenate([empty_out, out, empty_out]), np.concatenate([empty_lse, lse, empty_lse])
    )
    np.testing.assert_array_equal(merged[0], out[0])
    np.testing.assert_array_equal(merged[1], lse[0])
    nothing = reference.merge_partials(np.stack([empty_out, empty_out]), np.stack([empty_lse, empty_lse]))
    assert np.all(nothing[0] == 0)
    assert np.all(nothing[1] == -np.inf)


def test_merge_shifts_by_the_maximum_when_splits_differ_by_more_than_exp_can_hold():
    aq, bq, ak, bk, av, bv = draw(18, 1, 8, B=1, H=2)
    bk[:, :4] *= 40_000  # split log-sum-exps differ by more than exp can hold: 88 in float32, 709 in float64
    out, lse = reference.flash_decode(aq, bq, ak, bk, av, bv, num_splits=2, block=2)
    split = [
        reference.tpa_attention(aq, bq, *(c[:, part] for c in (ak, bk, av, bv)))
        for part in (slice(4), slice(4, 8))
    ]
    assert np.all(np.abs(split[0][1] - split[1][1]) > 709)
    expected = reference.tpa_attention(aq, bq, ak, bk, av, bv)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-11)  # logits near 5000 carry 1e-12 each
    np.testing.assert_allclose(lse, expected[1], rtol=1e-14)


@pytest.mark.parametrize("way", [reference.tpa_attention, reference.factor_space_attention])
def test_rows_without_a_key_return_zero_and_minus_infinity(way):
    factors = draw(19)
    mask = reference.causal_mask(5, 7).copy()
    mask[2] = False
    out, lse = way(*factors, mask=mask)
    assert np.all(out[:, 2] == 0)
    assert np.all(lse[:, 2] == -np.inf)
    assert np.all(np.isfinite(lse[:, [0, 1, 3, 4]]))


def test_a_bias_of_minus_infinity_is_a_mask_and_a_constant_moves_the_lse_alone():
    factors = draw(20)
    mask = reference.causal_mask(5, 7)
    expected = reference.tpa_attention(*factors, mask=mask)
    as_bias = reference.tpa_attention(*factors, bias=np.where(mask, 0.0, -np.inf))
    moved = reference.tpa_attention(*factors, mask=mask, bias=np.full((1, 1, 1, 1), 3.25))
    np.testing.assert_array_equal(as_bias[0], expected[0])
    np.testing.assert_allclose(moved[0], expected[0], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(moved[1], expected[1] + 3.25, rtol=0, atol=ROUNDING)


def test_more_queries_than_keys_leave_the_first_rows_empty():
    out, lse = reference.tpa_attention(*draw(21, 4, 2), mask=reference.causal_mask(4, 2))
    assert np.all(out[:, :2] == 0)
    assert np.all(lse[:, :2] == -np.inf)
    assert np.all(np.isfinite(lse[:, 2:]))


def test_window_shows_the_token_itself_and_those_just_before_it():
    expected = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    np.testing.assert_array_equal(reference.causal_mask(4, 4, window=2), expected)
    np.testing.assert_array_equal(reference.causal_mask(2, 4, window=2), expected[2:])
    np.testing.assert_array_equal(reference.causal_mask(4, 4, window=4), reference.causal_mask(4, 4))


def test_ragged_mask_of_full_lengths_is_the_causal_mask():
    np.testing.assert_array_equal(
        reference.ragged_mask(3, 6, np.array([6]), 2)[0, 0], reference.causal_mask(3, 6, window=2)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_equal_the_sequences_alone(causal):
    aq, bq, ak, bk, av, bv = draw(22, 6, 9, B=1)
    cu_q, cu_k = np.array([0, 2, 2, 6]), np.array([0, 4, 5, 9])
    mask = reference.packed_mask(cu_q, cu_k, causal=causal)
    out, lse = reference.tpa_attention(aq, bq, ak, bk, av, bv, mask=mask)
    for i in (0, 2):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = reference.tpa_attention(
            aq[:, rows],
            bq[:, rows],
            *(c[:, columns] for c in (ak, bk, av, bv)),
            mask=reference.causal_mask(*(int(s.stop - s.start) for s in (rows, columns))) if causal else None,
        )
        np.testing.assert_allclose(out[:, rows], alone[0], rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(lse[:, rows], alone[1], rtol=0, atol=ROUNDING)


def test_rank_order_and_the_split_of_scale_between_factors_do_not_matter():
    aq, bq, ak, bk, av, bv = draw(23, ranks=(4, 3, 2))
    expected = reference.tpa_attention(aq, bq, ak, bk, av, bv)
    q, k = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    permuted = reference.tpa_attention(
        aq[:, :, q], bq[:, :, q], ak[:, :, k], bk[:, :, k], av[:, :, ::-1], bv[:, :, ::-1]
    )
    rescaled = reference.tpa_attention(aq * 5, bq / 5, ak / 3, bk * 3, av * 0.1, bv / 0.1)
    for found in (permuted, rescaled):
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=ROUNDING * 10)


def test_permuting_heads_permutes_outputs():
    aq, bq, ak, bk, av, bv = draw(24)
    order = np.array([2, 0, 1])
    expected, _ = reference.tpa_attention(aq, bq, ak, bk, av, bv)
    found, _ = reference.tpa_attention(aq[..., order], bq, ak[..., order], bk, av[..., order], bv)
    np.testing.assert_allclose(found, expected[:, :, order], rtol=0, atol=ROUNDING)


def test_rank_scale_divides_each_block_by_its_rank_once():
    aq, bq, ak, bk, av, bv = draw(25, ranks=(3, 2, 4))
    scaled = reference.tpa_attention(aq, bq, ak, bk, av, bv)
    plain = reference.tpa_attention(aq / 3, bq, ak / 2, bk, av / 4, bv, rank_scale=False)
    for one, other in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING)


def test_factored_query_pays_off_as_the_multiply_adds_say():
    assert reference.prefers_factored_query(21, 32, 64)  # 2016 < 2048
    assert not reference.prefers_factored_query(22, 32, 64)  # 2112 > 2048
    assert not reference.prefers_factored_query(17, 32, 64, tile=16)  # 17 is computed as 32


@pytest.mark.parametrize("kv_only", [False, True])
def test_contractions_cost_what_appendix_a4_counts_and_the_products_with_a_beside(monkeypatch, kv_only):
    T, M, H, D, E, (rq, rk, rv) = 5, 7, 3, 8, 6, (3, 2, 4)
    factors = draw(26, T, M, B=1, H=H, D=D, E=E, ranks=(rq, rk, rv), kv_only=kv_only)
    counted, contract = [], np.einsum

    def counting(subscripts, *operands):
        sizes = {}
        for letters, operand in zip(subscripts.split("->")[0].split(","), operands, strict=True):
            sizes.update(zip(letters, operand.shape, strict=True))
        counted.append(int(np.prod(list(sizes.values()))))
        return contract(subscripts, *operands)

    monkeypatch.setattr(np, "einsum", counting)
    reference.factor_space_attention(*factors)
    scores = rk * H * D if kv_only else rq * rk * D + H * rq * rk
    beside = H * rk + H * rv  # elementwise in the heads: A.4 leaves them out
    assert sum(counted) == T * M * (scores + H * rv * E + beside)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kv_only", [False, True])
@pytest.mark.parametrize("rank_scale", [False, True])
def test_gradient_formulas_agree_with_central_differences(kv_only, rank_scale):
    factors = draw(30, 3, 4, B=1, H=2, D=4, E=3, kv_only=kv_only)
    mask = reference.causal_mask(3, 4, window=3)
    d_out = np.random.default_rng(31).normal(size=(1, 3, 2, 3))
    gradients = reference.attention_backward(*factors, d_out, mask=mask, rank_scale=rank_scale)

    def value(changed):
        return np.sum(reference.tpa_attention(*changed, mask=mask, rank_scale=rank_scale)[0] * d_out)

    step = 1e-5  # truncation step^2, cancellation 1e-16 / step: both about 1e-10
    for position, factor in enumerate(factors):
        if factor is None:
            assert gradients[position] is None
            continue
        for index in np.ndindex(factor.shape):
            nudged = []
            for sign in (1, -1):
                moved = factor.copy()
                moved[index] += sign * step
                nudged.append(value([*factors[:position], moved, *factors[position + 1 :]]))
            numeric = (nudged[0] - nudged[1]) / (2 * step)
            assert gradients[position][index] == pytest.approx(numeric, abs=2e-9)


def test_gradient_of_b_before_rope_is_the_gradient_after_it_turned_back():
    aq, bq, *rest = draw(32, 3, 3, B=1, H=2, D=4, E=3)
    rope, positions = Rope(), np.array([[5, 6, 7]])
    d_out = np.random.default_rng(33).normal(size=(1, 3, 2, 3))
    after = reference.attention_backward(aq, rotate(bq, positions, rope), *rest, d_out).bq
    before = unrotate(after, positions, rope)

    def value(b):
        return np.sum(reference.tpa_attention(aq, rotate(b, positions, rope), *rest)[0] * d_out)

    for index in np.ndindex(bq.shape):
        step = np.zeros_like(bq)
        step[index] = 1e-5
        assert before[index] == pytest.approx((value(bq + step) - value(bq - step)) / 2e-5, abs=2e-9)
