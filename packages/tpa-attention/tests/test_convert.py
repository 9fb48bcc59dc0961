"""Conversion of attention weights against float64 NumPy: exact, truncated, for tokens, refined; reports."""

import json
from itertools import pairwise

import numpy as np
import pytest
import reference_conversion as truth
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_baselines import grouped_attention
from reference_layer import FactorMap, Layer, forward
from reference_rope import Rope
from test_reference_conversion import heads, tokens, worked_weights

from tpa_attention.config import RopeConfig
from tpa_attention.torch import low_rank
from tpa_attention.torch.baselines import GQA
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.convert import mha_to_tpa

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10
RELATIVE = 1e-10  # what the specification asks of every conversion

ROPES = {
    "paper": (Rope(), RopeConfig()),
    "LLaMA": (Rope(base=5e5, sign=1), RopeConfig(base=5e5, sign=1)),
    "partial, interleaved": (
        Rope(fraction=0.5, layout="interleaved"),
        RopeConfig(fraction=0.5, layout="interleaved"),
    ),
    "none": (None, RopeConfig.none()),
}


def flat(weights):
    """Matrices of a layer, rows head by head."""
    rows = (w.reshape(-1, w.shape[-1]) for w in weights[:3])
    return tuple(torch.from_numpy(np.ascontiguousarray(w)) for w in (*rows, weights.o))


def convert(weights, **options):
    return mha_to_tpa(*flat(weights), weights.q.shape[0], weights.k.shape[0], **options)


def hidden(seed=1, shape=(2, 7, 10)):
    """Hidden states of a batch, correlated between features."""
    return tokens(seed, int(np.prod(shape[:-1])), shape[-1]).reshape(shape)


def rebuilt(layer, name):
    """W^ of the h heads of one side, from the parameters of a layer with free A."""
    a, b = getattr(layer, f"a_{name}"), getattr(layer, f"b_{name}")
    rows = b.weight.detach().numpy().reshape(b.rank, -1, layer.d_model)
    return truth.rebuild(a.bias.detach().numpy().reshape(a.rank, -1), rows)


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def output(layer, x):
    with torch.no_grad():
        return layer(torch.from_numpy(x)).numpy()


# ---------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("q_rank", [None, 6])
@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_mha_gqa_and_mqa_convert_exactly_at_the_rank_of_their_groups(rope, q_rank, groups):
    plain, config = ROPES[rope]
    weights, x = heads(0, groups=groups, E=3), hidden()
    layer, report = convert(weights, k_rank=groups, v_rank=groups, q_rank=q_rank, rope=config)
    np.testing.assert_allclose(
        output(layer, x), grouped_attention(weights, x, plain), rtol=RELATIVE, atol=ROUNDING
    )
    assert layer.variant == ("kv_only+noncontextual_a" if q_rank is None else "noncontextual_a")
    (only,) = report
    sides = [only.k, only.v, *([] if q_rank is None else [only.q])]
    assert all(side.exact for side in sides)
    assert all(side.weight_error < 1e-15 for side in sides)  # the R of a and of 1/R, each rounded once
    assert (report.cache_before, report.cache_after, report.cache_ratio) == (groups * 7, groups * 7, 1.0)


def test_head_factors_of_the_exact_route_are_scaled_masks_in_repeat_interleave_order():
    layer, _ = convert(heads(0, groups=2), k_rank=2, v_rank=2)
    np.testing.assert_array_equal(layer.a_k.bias.detach().reshape(2, 6), truth.group_masks(6, 2))
    np.testing.assert_array_equal(layer.b_v.weight.detach(), flat(heads(0, groups=2))[2])


def test_ranks_beyond_the_groups_are_kept_and_change_nothing():
    weights, x = heads(2, groups=2), hidden()
    layer, report = convert(weights, k_rank=5, v_rank=3)
    assert (layer.k_rank, layer.v_rank) == (5, 3)
    np.testing.assert_allclose(
        output(layer, x), grouped_attention(weights, x, Rope()), rtol=RELATIVE, atol=ROUNDING
    )
    assert (report.cache_before, report.cache_after) == (2 * 2 * 4, 5 * 4 + 3 * 4)


def test_baseline_layer_and_its_conversion_agree_with_a_cache():
    gqa = GQA(10, 6, 4, 2, zero_init_output=False, init="normal", dtype=torch.float64)
    parts = (gqa.q, gqa.k, gqa.v, gqa.o)
    layer, _ = mha_to_tpa(*(part.weight for part in parts), 6, 2, k_rank=2, v_rank=2)
    x = torch.from_numpy(hidden())
    cache = FactorCache(layer, 2, 7, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in x.split([3, 1, 1, 2], dim=1)]
        np.testing.assert_allclose(torch.cat(steps, dim=1), gqa(x), rtol=RELATIVE, atol=ROUNDING)


# ------------------------------------------------------------------------------------------------ truncated


def test_worked_weights_have_the_printed_singular_values_and_errors():
    w = worked_weights()
    weights = heads(0)._replace(k=w, v=w)
    printed = (6.75385112929, 6.75151954872, 4.03386650375, 3.44575145587, 0.711434935025, 0.679100765649)
    errors = (0.7879460349364, 0.4919142595083, 0.3266933050992, 0.0896671661666)
    for rank, error in enumerate(errors, start=1):
        layer, report = convert(weights, k_rank=rank, v_rank=rank)
        side = report.layers[0].k
        np.testing.assert_allclose(side.singular_values, printed, rtol=1e-12)  # twelve digits are printed
        assert side.weight_error == pytest.approx(error, rel=0, abs=1e-13)  # thirteen are
        assert side.error_at(rank) == pytest.approx(error, rel=0, abs=1e-13)
        assert relative(rebuilt(layer, "k"), w) == pytest.approx(error, rel=RELATIVE)


@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize(("groups", "rank"), [(6, 1), (6, 5), (3, 1), (3, 2), (2, 1)])
def test_truncation_equals_the_reference_and_has_the_error_of_the_singular_values(side, groups, rank):
    """Eckart-Young, of all h heads: those of a group are rows that repeat."""
    weights = heads(3, groups=groups)
    layer, report = convert(weights, k_rank=rank, v_rank=rank, q_rank=rank)
    w = truth.per_head(getattr(weights, side), 6)
    expected = truth.truncate(w, rank)
    np.testing.assert_allclose(
        rebuilt(layer, side), truth.rebuild(expected.a, expected.b), rtol=0, atol=ROUNDING
    )
    found = getattr(report.layers[0], side)
    assert found.weight_error == pytest.approx(expected.relative_errors[rank - 1], rel=RELATIVE)
    sigma = np.linalg.svd(w.reshape(6, -1), compute_uv=False)[: len(found.singular_values)]
    np.testing.assert_allclose(found.singular_values, sigma, rtol=RELATIVE)
    assert len(found.singular_values) == (6 if side == "q" else groups)
    assert not found.exact


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 5),
    share=st.integers(1, 3),
    D=st.sampled_from([2, 4, 6]),
    E=st.integers(1, 5),
    width=st.integers(1, 12),
    data=st.data(),
)
def test_any_shape_and_rank_has_the_error_that_its_singular_values_say(groups, share, D, E, width, data):
    weights = heads(26, groups * share, groups, D, E, width)
    ranks = {name: data.draw(st.integers(1, groups * share), name) for name in ("k_rank", "v_rank")}
    layer, report = convert(weights, **ranks)
    assert (layer.k_rank, layer.v_rank) == (ranks["k_rank"], ranks["v_rank"])
    for name in ("k", "v"):
        side, rank = getattr(report.layers[0], name), ranks[f"{name}_rank"]
        w = truth.per_head(getattr(weights, name), groups * share)
        error = relative(rebuilt(layer, name), w)
        # what is cut away entirely leaves the rounding of an SVD
        assert side.error_at(rank) == pytest.approx(error, rel=RELATIVE, abs=1e-13)
        assert side.weight_error == pytest.approx(error, rel=RELATIVE, abs=1e-13)
        assert side.exact == (rank >= groups)
        assert not side.exact or error < 1e-15
    x = tokens(27, 5, width)[None]
    assert np.isfinite(output(layer, x)).all()


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("q_rank", [None, 4])
def test_truncated_layer_is_the_reference_layer_of_the_truncated_weights(rope, q_rank):
    plain, config = ROPES[rope]
    weights, x = heads(4, groups=3, E=3), hidden()
    layer, _ = convert(weights, k_rank=2, v_rank=1, q_rank=q_rank, rope=config)
    k, v = truth.truncate(truth.per_head(weights.k, 6), 2), truth.truncate(truth.per_head(weights.v, 6), 1)
    q = None if q_rank is None else truth.truncate(weights.q, q_rank)
    expected = Layer(
        None if q is None else FactorMap(constant=q.a),
        (FactorMap(weights.q if q is None else q.b),),
        FactorMap(constant=k.a),
        (FactorMap(k.b),),
        FactorMap(constant=v.a),
        (FactorMap(v.b),),
        weights.o,
        rope=plain,
    )
    np.testing.assert_allclose(output(layer, x), forward(expected, x)[0], rtol=RELATIVE, atol=ROUNDING)


def test_head_count_of_one_and_weights_of_zero_convert():
    layer, report = convert(heads(5, h=1, groups=1), k_rank=1, v_rank=1)
    assert report.layers[0].k.exact
    nothing = heads(5)._replace(k=np.zeros((6, 4, 10)))
    layer, report = convert(nothing, k_rank=2, v_rank=2, calibration=torch.from_numpy(hidden()))
    assert (report.layers[0].k.weight_error, report.layers[0].k.token_error) == (0.0, 0.0)
    assert np.isfinite(output(layer, hidden())).all()


def test_more_heads_than_numbers_of_a_head_leave_ranks_without_a_singular_value():
    weights = heads(6, h=6, groups=6, D=2, E=2, d=2)  # matrices 6 x 4: the fifth rank has nothing to add
    layer, report = convert(weights, k_rank=5, v_rank=4)
    np.testing.assert_allclose(rebuilt(layer, "k"), weights.k, rtol=0, atol=ROUNDING)
    assert (layer.k_rank, len(report.layers[0].k.singular_values)) == (5, 4)
    assert report.layers[0].k.weight_error < 1e-14  # rounding of an SVD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_has_the_type_of_the_weights_and_errors_are_those_before_rounding(dtype):
    weights = [w.to(dtype) for w in flat(heads(7))]
    layer, report = mha_to_tpa(*weights, 6, 6, k_rank=2, v_rank=2)
    wide, wide_report = mha_to_tpa(*(w.double() for w in weights), 6, 6, k_rank=2, v_rank=2)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert report == wide_report
    for narrow, exact in zip(layer.parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, exact.to(dtype))


def test_parameters_are_copies_that_can_be_trained_and_random_state_is_left_alone():
    weights = flat(heads(8))
    state = torch.random.get_rng_state()
    layer, _ = mha_to_tpa(*weights, 6, 6, k_rank=6, v_rank=6, q_rank=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(w, kept) for w, kept in zip(weights, flat(heads(8)), strict=True))


# ------------------------------------------------------------------------------------------ for given tokens


@pytest.mark.parametrize(("groups", "rank"), [(6, 1), (6, 4), (3, 2)])
def test_truncation_for_tokens_equals_the_reference_and_its_singular_value_formula(groups, rank):
    weights, x = heads(9, groups=groups), hidden(10, (40, 5, 10))
    layer, report = convert(weights, k_rank=rank, v_rank=rank, calibration=torch.from_numpy(x))
    every = x.reshape(-1, 10)
    w = truth.per_head(weights.k, 6)
    expected = truth.truncate_for(w, rank, truth.second_moment(every))
    found = rebuilt(layer, "k")
    np.testing.assert_allclose(found, truth.rebuild(expected.a, expected.b), rtol=RELATIVE, atol=RELATIVE)
    side = report.layers[0].k
    keys, approximate = (np.einsum("hkd,nd->nhk", v, every) for v in (w, found))
    assert side.token_error == pytest.approx(relative(approximate, keys), rel=RELATIVE)
    assert side.token_error == pytest.approx(expected.relative_errors[rank - 1], rel=1e-4)  # less the ridge
    assert side.weight_error == pytest.approx(relative(found, w), rel=RELATIVE)


@pytest.mark.parametrize("count", [4, 200])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_calibrated_truncation_is_never_worse_on_its_tokens_than_plain(rank, seed, count):
    """Four tokens of ten features: C alone would be singular."""
    weights, x = heads(11 + seed), tokens(30 + seed, count)
    plain, _ = convert(weights, k_rank=rank, v_rank=rank)
    _, report = convert(weights, k_rank=rank, v_rank=rank, calibration=torch.from_numpy(x))
    for name in ("k", "v"):
        wanted = np.einsum("hkd,nd->nhk", getattr(weights, name), x)
        found = np.einsum("hkd,nd->nhk", rebuilt(plain, name), x)
        assert getattr(report.layers[0], name).token_error <= relative(found, wanted) + 1e-12
        if count > 10:
            assert getattr(report.layers[0], name).token_error < relative(found, wanted)


@pytest.mark.parametrize("rope", list(ROPES))
def test_output_error_is_that_of_the_layer_against_the_original_attention(rope):
    plain, config = ROPES[rope]
    weights, x = heads(12, groups=3, E=3), hidden(13)
    layer, report = convert(weights, k_rank=2, v_rank=2, calibration=torch.from_numpy(x), rope=config)
    expected = relative(output(layer, x), grouped_attention(weights, x, plain))
    assert report.layers[0].output_error == pytest.approx(expected, rel=RELATIVE)
    assert 1e-3 < expected < 10


def test_one_sequence_may_come_without_a_batch_axis():
    weights, x = heads(14), torch.from_numpy(hidden(15, (1, 9, 10)))
    batched, report = convert(weights, k_rank=2, v_rank=2, calibration=x)
    layer, same = convert(weights, k_rank=2, v_rank=2, calibration=x[0])
    assert report == same
    assert all(torch.equal(*pair) for pair in zip(batched.parameters(), layer.parameters(), strict=True))


# ------------------------------------------------------------------------------- contextual head factors


@pytest.mark.parametrize("q_rank", [None, 3])
def test_contextual_layer_starts_where_the_free_one_is(q_rank):
    weights, x = heads(16, groups=3), hidden()
    options = {"k_rank": 2, "v_rank": 3, "q_rank": q_rank}
    free, _ = convert(weights, **options)
    layer, report = convert(weights, a_bias=True, **options)
    assert layer.variant == ("kv_only" if q_rank is None else "contextual")
    np.testing.assert_allclose(output(layer, x), output(free, x), rtol=RELATIVE, atol=ROUNDING)
    assert report.cache_after == 2 * (6 + 4) + 3 * (6 + 4)  # head factors are cached now
    loss = layer(torch.from_numpy(x)).square().sum()
    loss.backward()
    for name in ("a_k", "a_v", *([] if q_rank is None else ["a_q"])):
        assert layer.get_parameter(f"{name}.weight").grad.abs().max() > 0  # W = 0, and yet it learns


def contextual_pair(seed, rank=2, count=80):
    """The same starting point for the reference and for the code, tokens and their keys."""
    w, x = heads(seed).k, tokens(seed + 1, count)
    start = truth.contextualise(truth.truncate_for(w, rank, truth.second_moment(x)))
    ours = low_rank.ContextualFactors(*(torch.from_numpy(np.ascontiguousarray(part)) for part in start))
    return start, ours, x, np.einsum("hkd,nd->nhk", w, x)


@pytest.mark.parametrize(("rank", "count"), [(1, 80), (2, 80), (3, 12)])
def test_refinement_equals_the_reference_step_by_step(rank, count):
    start, ours, x, keys = contextual_pair(17, rank, count)
    expected, expected_errors = truth.refine(start, x, keys, steps=5)
    found, errors = low_rank.refine(ours, torch.from_numpy(x), torch.from_numpy(keys), steps=5)
    assert len(errors) == len(expected_errors) == 6
    # normal equations of condition up to 1e9, solved by two routes: differences of the models may reach 1e-7,
    # of the errors at a minimum their square
    np.testing.assert_allclose(errors, expected_errors, rtol=1e-9)
    np.testing.assert_allclose(
        low_rank.heads_of(found, torch.from_numpy(x)), truth.heads_of(expected, x), rtol=1e-6, atol=1e-6
    )


def test_refinement_lowers_every_reported_error_and_the_layer_has_the_last():
    weights, x = heads(18, groups=3), hidden(19, (8, 10, 10))
    options = {"k_rank": 2, "v_rank": 2, "q_rank": 3, "calibration": torch.from_numpy(x)}
    start = convert(weights, **options)[1].layers[0]
    layer, report = convert(weights, refine_steps=5, **options)
    assert layer.a_bias
    factors = layer.factors(torch.from_numpy(x))
    with torch.no_grad():
        values = (factors.av.mT @ factors.bv).numpy() / 2
    wanted = np.einsum("hkd,btd->bthk", truth.per_head(weights.v, 6), x)
    assert report.layers[0].v.token_error == pytest.approx(relative(values, wanted), rel=RELATIVE)
    for name in ("q", "k", "v"):
        side, before = getattr(report.layers[0], name), getattr(start, name)
        assert len(side.refinement) > 1
        assert all(later < earlier for earlier, later in pairwise(side.refinement))
        assert side.refinement[0] == pytest.approx(before.token_error, rel=RELATIVE)
        assert side.refinement[-1] == pytest.approx(side.token_error, rel=RELATIVE)
        assert side.weight_error == before.weight_error
    expected = relative(output(layer, x), grouped_attention(weights, x, Rope()))
    assert report.layers[0].output_error == pytest.approx(expected, rel=RELATIVE)


def test_a_step_that_does_not_lower_the_error_is_not_taken(monkeypatch):
    _, ours, x, keys = contextual_pair(20)
    away = torch.zeros((), dtype=torch.float64)

    def overshoot(*arguments):
        return 1.0 + away + 0 * solve(*arguments)

    solve = low_rank._least_squares
    monkeypatch.setattr(low_rank, "_least_squares", overshoot)
    found, errors = low_rank.refine(ours, torch.from_numpy(x), torch.from_numpy(keys), steps=5)
    assert len(errors) == 1
    assert all(torch.equal(*pair) for pair in zip(found, ours, strict=True))


def test_sides_that_lost_nothing_are_not_refined():
    _, report = convert(
        heads(21), k_rank=6, v_rank=2, calibration=torch.from_numpy(hidden(22, (30, 10))), refine_steps=2
    )
    assert report.layers[0].k.refinement == ()
    assert len(report.layers[0].v.refinement) > 1
    assert report.layers[0].k.token_error < 1e-14


# --------------------------------------------------------------------------------------------------- report


def test_report_prints_a_table_and_becomes_json():
    _, report = convert(heads(23, groups=3), k_rank=2, v_rank=3, q_rank=6)
    lines = str(report).splitlines()
    assert lines[0] == "relative errors of the weights"
    assert lines[1].split("  ")[0] == "layer"
    assert lines[2].split() == [
        "0",
        "6",
        "exact",
        "2",
        f"{report.layers[0].k.weight_error:.3e}",
        "3",
        "exact",
    ]
    assert lines[3] == "cached numbers per token: 24 before, 20 after, ratio 1.20"
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["cache_before"], found["cache_after"], found["cache_ratio"]) == (24, 20, 1.2)
    assert found["layers"][0]["k"]["singular_values"] == list(report.layers[0].k.singular_values)
    assert found["layers"][0]["output_error"] is None
    expected = (
        f"Q exact at rank 6, K error {report.layers[0].k.weight_error:.3e} at rank 2, V exact at rank 3"
    )
    assert str(report.layers[0]) == f"{expected}, cache 24 -> 20"


def test_report_shows_errors_on_tokens_where_there_are_some():
    x = torch.from_numpy(hidden(24))
    _, report = convert(heads(23), k_rank=2, v_rank=2, calibration=x, refine_steps=1)
    (layer,) = report.layers
    lines = str(report).splitlines()
    assert lines[0] == "relative errors of the heads of the calibration tokens"
    shown = [f"{layer.k.token_error:.3e}", "2", f"{layer.v.token_error:.3e}", f"{layer.output_error:.3e}"]
    assert lines[2].split() == ["0", "2", *shown]
    assert str(layer).endswith(f"output error {layer.output_error:.3e}, cache 48 -> 40")
    assert report.to_dict()["layers"][0]["k"]["refinement"] == list(layer.k.refinement)
    with pytest.raises(ValueError, match=r"rank must be >= 0, got -1"):
        layer.k.error_at(-1)
    assert layer.k.error_at(0) == pytest.approx(1.0, rel=1e-14)
    assert layer.k.error_at(7) == 0.0
