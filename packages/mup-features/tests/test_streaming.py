"""Accumulated Grams against dense ones, however the features arrive."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features.metrics import StreamingGram, gram

N = 5


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 10**6),
)
def test_any_chunks_give_the_dense_gram(widths, dtype, seed):
    rng = np.random.default_rng(seed)
    A, A0 = (rng.standard_normal((N, sum(widths))).astype(dtype) for _ in range(2))
    sums = StreamingGram(N, reference=True)
    for start, width in zip(np.cumsum([0, *widths]), widths, strict=False):
        sums.update(A[:, start : start + width], A0[:, start : start + width])
    A, A0, n = A.astype(float), A0.astype(float), sum(widths)
    # Sums of at most 45 products in two orders.
    for found, expected in [
        (sums.gram(), A @ A.T / n),
        (sums.gram(normalize=False), A @ A.T),
        (sums.reference_gram(), A0 @ A0.T / n),
        (sums.cross(), A @ A0.T / n),
        (sums.displacement(), ((A - A0) ** 2).sum(1) / n),
    ]:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert sums.features == n


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_blocks_of_samples_give_the_dense_gram(block, seed):
    A = np.random.default_rng(seed).standard_normal((N, 11))
    sums = StreamingGram(N)
    sums.update_by_rows(lambda rows: A[rows, :4], block).update_by_rows(lambda rows: A[rows, 4:], block)
    assert sums.gram() == pytest.approx(gram(A), abs=1e-13)
    assert np.array_equal(sums.gram(), sums.gram().T)


def test_merged_shards_of_features_give_the_whole():
    A = np.random.default_rng(0).standard_normal((N, 30))
    left, right = StreamingGram(N).update(A[:, :7]), StreamingGram(N).update(A[:, 7:])
    assert left.merge(right).gram() == pytest.approx(gram(A), abs=1e-13)
    assert left.features == 30


def test_large_chunks_are_multiplied_in_pieces(monkeypatch):
    A = np.random.default_rng(0).standard_normal((N, 100)).astype(np.float32)
    monkeypatch.setattr("mup_features.streaming._PIECE", 7 * N)
    sums = StreamingGram(N, reference=True).update(A, A + 1)
    assert sums.gram() == pytest.approx(gram(A), rel=1e-13)
    assert sums.displacement() == pytest.approx(np.ones(N), rel=1e-6)  # A + 1 is rounded to float32


def test_products_of_float32_features_are_exact():
    A = np.array([[1 + 2.0**-23, 1.0], [1.0, -1.0]], dtype=np.float32)
    # (1 + u) - 1 survives; rounded to float32 products it would too, (1 + u)^2 would not.
    assert StreamingGram(2).update(A).gram(normalize=False)[0, 0] == (1 + 2.0**-23) ** 2 + 1


def test_a_bad_chunk_is_refused_and_adds_nothing():
    sums = StreamingGram(2, reference=True).update(np.eye(2), np.eye(2))
    before = sums.gram()
    for chunk, reference, message in [
        (np.ones((3, 1)), np.ones((3, 1)), r"chunk must have shape \(2, features\), got \(3, 1\)"),
        (np.ones((2, 1)), np.ones((2, 2)), r"reference must have shape \(2, 1\), got \(2, 2\)"),
        (np.ones((2, 1)), np.full((2, 1), np.nan), "reference must be finite, got 2"),
        (np.ones((2, 1)), None, "reference must be given exactly"),
        (np.ones((2, 1), dtype=complex), np.ones((2, 1)), "chunk must be real"),
    ]:
        with pytest.raises(ValueError, match=message):
            sums.update(chunk, reference)
    assert np.array_equal(sums.gram(), before) and sums.features == 2


def test_misuse_says_what_is_wrong():
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        StreamingGram(0)
    with pytest.raises(ValueError, match="seen no features"):
        StreamingGram(2).gram()
    with pytest.raises(ValueError, match="without reference=True"):
        StreamingGram(2).update(np.eye(2)).cross()
    with pytest.raises(ValueError, match="other must have 2 samples, got 3"):
        StreamingGram(2).merge(StreamingGram(3))
    with pytest.raises(ValueError, match=r"load\(rows\) must have shape \(1, 3\), got \(1, 2\)"):
        StreamingGram(2).update_by_rows(lambda rows: np.ones((1, 3 - rows.start)), 1)
