"""Products of factors, the authors' layouts, and the records a cache keeps."""

import jaxtyping
import numpy as np
import pytest
import reference
import reference_layer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.torch.factors import (
    RecordLayout,
    TPAFactors,
    from_authors_layout,
    kronecker_rows,
    materialize,
    rank_factor,
)

ROUNDING = 1e-14  # at most four products of numbers below 5, summed in float64


@pytest.fixture
def unchecked():
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 5),
    R=st.integers(1, 4),
    H=st.integers(1, 13),
    D=st.integers(1, 12),
    rank_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_materialize_equals_the_reference(B, T, R, H, D, rank_scale, seed):
    a, b = draw(seed, B, T, R, H), draw(seed + 1, B, T, R, D)
    expected = reference.materialize(a.numpy(), b.numpy(), rank_scale)
    np.testing.assert_allclose(materialize(a, b, rank_scale), expected, rtol=0, atol=ROUNDING * R * 5)


def test_a_query_without_head_factors_is_the_query_itself():
    q = draw(0, 2, 3, 5, 4)
    assert materialize(None, q) is q
    assert rank_factor(None) == 1.0
    assert rank_factor(draw(0, 1, 1, 4, 2)) == 0.25
    assert rank_factor(draw(0, 1, 1, 4, 2), rank_scale=False) == 1.0


@pytest.mark.parametrize("R", [1, 3])
def test_factors_free_of_the_token_are_broadcast(R):
    a, b = draw(0, 1, 1, R, 5), draw(1, 2, 3, R, 4)
    np.testing.assert_allclose(materialize(a, b), materialize(a.expand(2, 3, R, 5), b), rtol=0, atol=ROUNDING)


@settings(max_examples=20, deadline=None)
@given(R=st.integers(1, 4), c=st.floats(0.1, 10), seed=st.integers(0, 2**31))
def test_the_product_ignores_the_order_of_ranks_and_who_carries_the_scale(R, c, seed):
    a, b = draw(seed, 2, 3, R, 5), draw(seed + 1, 2, 3, R, 4)
    order = torch.randperm(R, generator=torch.Generator().manual_seed(seed))
    other = materialize(c * a[:, :, order], b[:, :, order] / c)
    np.testing.assert_allclose(other, materialize(a, b), rtol=0, atol=1e-13)


@pytest.mark.parametrize("R", [1, 2])
def test_autocast_materialises_a_float32_product_within_bfloat16(R):
    a, b = draw(0, 2, 3, R, 5, dtype=torch.float32), draw(1, 2, 3, R, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = materialize(a, b)
        from_16_bits = materialize(a.bfloat16(), b.bfloat16())
    assert x.dtype == torch.bfloat16  # an outer product like a matrix product
    assert from_16_bits.dtype == torch.bfloat16
    # three roundings to bfloat16 (2^-9 each) of terms below 25
    np.testing.assert_allclose(x.float(), materialize(a, b), rtol=0, atol=3 * 25 * 2**-9)


@pytest.mark.parametrize("sizes", [(4,), (4, 3), (2, 3, 2)])
def test_rows_of_higher_order_follow_the_reference(sizes):
    parts = tuple(draw(i, 2, 3, 2, size) for i, size in enumerate(sizes))
    expected = reference_layer.expand(tuple(part.numpy() for part in parts))
    np.testing.assert_allclose(kronecker_rows(parts), expected, rtol=0, atol=ROUNDING)


def test_rows_need_a_part():
    with pytest.raises(ValueError, match="parts must hold at least one tensor"):
        kronecker_rows(())


def test_factors_travel_as_a_named_tuple():
    q, a, b = draw(0, 1, 2, 3, 4), draw(1, 1, 2, 2, 3), draw(2, 1, 2, 2, 4)
    factors = TPAFactors(None, q, a, b, a, b)
    assert factors.aq is None
    assert factors._fields == ("aq", "bq", "ak", "bk", "av", "bv")


# ------------------------------------------------------------------------------------- the authors' layouts


def test_head_factors_of_the_training_code_become_rank_major():
    theirs = draw(0, 2, 3, 7, 4)  # (B, T, H, R)
    ours = from_authors_layout(theirs, "a")
    assert ours.shape == (2, 3, 4, 7)
    assert ours[1, 2, 3, 5] == theirs[1, 2, 5, 3]
    assert ours.data_ptr() == theirs.data_ptr()


def test_feature_factors_of_the_training_code_agree_already():
    theirs = draw(0, 2, 3, 4, 8)
    assert from_authors_layout(theirs, "b") is theirs


@pytest.mark.parametrize("kind", ["cache_a", "cache_b"])
def test_decode_caches_become_rank_major(kind):
    rank_one, general = draw(0, 2, 9, 7), draw(1, 2, 9, 7, 3)
    assert torch.equal(from_authors_layout(rank_one, kind)[:, :, 0], rank_one)
    ours = from_authors_layout(general, kind)
    assert ours.shape == (2, 9, 3, 7)
    assert ours[1, 8, 2, 6] == general[1, 8, 6, 2]


def test_unknown_kinds_and_axes_are_named():
    with pytest.raises(ValueError, match=r"kind must be one of \('a', 'b', 'cache_a', 'cache_b'\), got 'c'"):
        from_authors_layout(draw(0, 2, 3), "c")
    with pytest.raises(
        ValueError, match=r"tensor of kind 'cache_a' must have 3 or 4 axes, got shape \(2, 3\)"
    ):
        from_authors_layout(draw(0, 2, 3), "cache_a")
    with pytest.raises(ValueError, match=r"tensor of kind 'a' must have 2 or more axes, got shape \(3,\)"):
        from_authors_layout(draw(0, 3), "a")


# -------------------------------------------------------------------------------------------------- records


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 4),
    layout=st.builds(
        RecordLayout,
        rank=st.integers(1, 4),
        heads=st.integers(1, 11),
        width=st.integers(1, 12),
        has_a=st.booleans(),
        has_b=st.booleans(),
    ).filter(lambda layout: layout.has_a or layout.has_b),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_views_of_a_packed_record_are_the_factors_without_a_copy(B, T, layout, dtype):
    a = draw(0, B, T, layout.rank, layout.heads).to(dtype) if layout.has_a else None
    b = draw(1, B, T, layout.rank, layout.width).to(dtype) if layout.has_b else None
    record = layout.pack(a, b)
    assert record.shape == (B, T, layout.padded(dtype.itemsize))
    assert record.shape[-1] * dtype.itemsize % 16 == 0
    assert not record[..., layout.numbers :].any()
    back_a, back_b = layout.views(record)
    for mine, theirs in ((a, back_a), (b, back_b)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine, theirs)
            assert theirs.untyped_storage().data_ptr() == record.untyped_storage().data_ptr()


def test_records_put_b_before_a_and_rank_before_width():
    a, b = torch.arange(6.0).view(1, 1, 2, 3), 10 + torch.arange(8.0).view(1, 1, 2, 4)
    record = RecordLayout(rank=2, heads=3, width=4).pack(a, b)
    assert record.flatten().tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 0, 1, 2, 3, 4, 5, 0, 0]


@pytest.mark.parametrize(
    ("layout", "numbers", "padded"),
    [
        (RecordLayout(1, 32, 64), 96, 96),  # the rank-one example of the specification: 192 bytes a side
        (RecordLayout(2, 34, 64), 196, 200),  # T6 small: 2 (34 + 64) = 196 numbers, 8 to a read of 16 bytes
        (RecordLayout(2, 34, 64, has_b=False), 68, 72),
        (RecordLayout(2, 34, 64, has_a=False), 128, 128),
    ],
)
def test_the_padding_fills_the_last_read_of_sixteen_bytes(layout, numbers, padded):
    assert layout.numbers == numbers
    assert layout.padded(2) == padded


def test_views_serve_a_slice_of_a_longer_cache():
    layout = RecordLayout(2, 3, 4)
    cache = torch.zeros(2, 10, layout.padded(4))
    a, b = draw(0, 2, 4, 2, 3, dtype=torch.float32), draw(1, 2, 4, 2, 4, dtype=torch.float32)
    cache[:, 3:7] = layout.pack(a, b)
    back_a, back_b = layout.views(cache[:, 3:7])
    assert back_a is not None and back_b is not None
    assert torch.equal(back_a, a) and torch.equal(back_b, b)


def test_parts_that_do_not_fit_the_layout_are_named(unchecked):
    a, b = draw(0, 1, 2, 2, 3), draw(1, 1, 2, 2, 4)
    with pytest.raises(ValueError, match=r"a must be None: the layout has_a=False"):
        RecordLayout(2, 3, 4, has_a=False).pack(a, b)
    with pytest.raises(ValueError, match=r"b must be given: the layout has_b=True"):
        RecordLayout(2, 3, 4).pack(a, None)
    with pytest.raises(ValueError, match=r"a must have shape \(B, T, 2, 5\), got \(1, 2, 2, 3\)"):
        RecordLayout(2, 5, 4).pack(a, b)
    with pytest.raises(ValueError, match=r"neither a nor b"):
        RecordLayout(2, 5, 4, has_a=False, has_b=False).pack(None, None)
    with pytest.raises(ValueError, match=r"record must have shape \(B, T, W\) with W >= 14, got"):
        RecordLayout(2, 3, 4).views(draw(0, 1, 2, 13))
    with pytest.raises(ValueError, match=r"itemsize must be 1, 2, 4 or 8 bytes, got 3"):
        RecordLayout(2, 3, 4).padded(3)
    with pytest.raises(ValueError, match=r"rank must be an integer >= 1, got 0"):
        RecordLayout(0, 3, 4)


def test_factors_that_do_not_fit_are_named(unchecked):
    a, b = draw(0, 1, 2, 2, 3), draw(1, 1, 2, 2, 4)
    with pytest.raises(TypeError, match=r"a must be a floating tensor, got torch.int64"):
        materialize(a.long(), b)
    with pytest.raises(ValueError, match=r"b must have shape \(B, T, R, D\), got \(2, 2, 4\)"):
        materialize(a, b[0])
    with pytest.raises(
        ValueError, match=r"must agree in B, T and R >= 1, got \(1, 2, 2, 3\) and \(1, 2, 1, 4\)"
    ):
        materialize(a, b[:, :, :1])
    with pytest.raises(ValueError, match=r"b must have shape \(B, T, H, D\), got \(2, 4\)"):
        materialize(None, b[0, 0])
