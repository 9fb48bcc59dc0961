"""Inputs of the attention tests: random factors in NumPy and torch, and the reference's answers to them."""

import numpy as np
import reference
import torch
from hypothesis import strategies as st

from tpa_attention.torch.factors import RecordLayout


def draw(seed, T=4, M=7, *, B=2, H=3, D=8, E=6, ranks=(3, 2, 2), kv_only=False):
    """Random float64 factors (aq, bq, ak, bk, av, bv) in NumPy."""
    rng = np.random.default_rng(seed)
    rq, rk, rv = ranks
    aq = None if kv_only else rng.normal(size=(B, T, rq, H))
    bq = rng.normal(size=(B, T, H if kv_only else rq, D))
    ak, bk = rng.normal(size=(B, M, rk, H)), rng.normal(size=(B, M, rk, D))
    av, bv = rng.normal(size=(B, M, rv, H)), rng.normal(size=(B, M, rv, E))
    return aq, bq, ak, bk, av, bv


def tensors(factors, dtype=torch.float64, *, requires_grad=False):
    """The same numbers as torch tensors."""
    return tuple(
        None if x is None else torch.from_numpy(x).to(dtype).requires_grad_(requires_grad) for x in factors
    )


def expected_decode(factors, seq_lens=None, **keywords):
    """Decoding in the reference: ragged, windowed, biased attention of materialised heads."""
    B, N, M = factors[1].shape[0], factors[1].shape[1], factors[2].shape[1]
    lens = np.full(B, M) if seq_lens is None else np.asarray(seq_lens)
    mask = reference.ragged_mask(N, M, lens, keywords.pop("window", None))
    return reference.tpa_attention(*factors, mask=mask, **keywords)


def records(ak, bk, av, bv):
    """Caches of records, and the sizes that `tpa_decode` cannot read off them."""
    k = RecordLayout(ak.shape[2], ak.shape[3], bk.shape[3])
    v = RecordLayout(av.shape[2], av.shape[3], bv.shape[3])
    sizes = {"ranks": (k.rank, v.rank), "num_heads": k.heads, "head_dim": k.width, "v_head_dim": v.width}
    return k.pack(ak, bk), v.pack(av, bv), sizes


@st.composite
def shapes(draw_from, max_queries=6, max_keys=9):
    """Keywords of `draw`: ranks 1-4, odd head counts, any E, KV-only or not, no key at all now and then."""
    sizes = st.integers(1, 4)
    return {
        "seed": draw_from(st.integers(0, 2**31)),
        "T": draw_from(st.integers(1, max_queries)),
        "M": draw_from(st.integers(0, max_keys)),
        "B": draw_from(st.integers(1, 3)),
        "H": draw_from(st.sampled_from([1, 2, 3, 5, 7, 11])),
        "D": draw_from(st.sampled_from([1, 2, 4, 10])),
        "E": draw_from(st.sampled_from([1, 3, 8])),
        "ranks": draw_from(st.tuples(sizes, sizes, sizes)),
        "kv_only": draw_from(st.booleans()),
    }


def assert_close(got, expected, *, atol, rtol=0.0):
    """Outputs and log-sum-exps, -inf where the reference has it."""
    for mine, theirs in zip(got, expected, strict=True):
        array = mine.detach().double().numpy() if isinstance(mine, torch.Tensor) else mine
        np.testing.assert_allclose(array, theirs, rtol=rtol, atol=atol)
