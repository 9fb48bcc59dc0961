"""What does not fit is refused before anything is computed, with the name, the rule and the value."""

import jaxtyping
import pytest
import torch
from attention_cases import draw, records, tensors

from tpa_attention.torch import dispatch
from tpa_attention.torch.functional import merge_partials, tpa_attention, tpa_decode, tpa_decode_factors

B, T, M, H, D, E = 2, 4, 7, 3, 8, 6
CALLS = {"tpa_attention": tpa_attention, "tpa_decode_factors": tpa_decode_factors}
NAMES = ("aq", "bq", "ak", "bk", "av", "bv")


@pytest.fixture(autouse=True)
def unchecked():
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def factors(**changed):
    """Fitting factors, T = 4 queries and M = 7 keys; some replaced."""
    return tuple((dict(zip(NAMES, tensors(draw(0)), strict=True)) | changed).values())


def refuses(error, message):
    return pytest.raises(error, match=message)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(B, 99, 2, H), (3, T, 2, H), (B, T, 2), (B, T, 0, H), (B, T, 2, 5, 1)], ids=str
)
def test_shapes_that_disagree_are_listed_by_name(call, name, shape):
    letter = "T" if call == "tpa_attention" else "N"
    expected = (
        rf"shapes must be aq \(B, {letter}, R_Q, H\), bq \(B, {letter}, R_Q, D\), ak \(B, M, R_K, H\), .*"
    )
    with refuses(ValueError, expected + rf"; got .*{name} \({', '.join(map(str, shape))}\)"):
        CALLS[call](*factors(**{name: torch.ones(shape, dtype=torch.float64)}))


@pytest.mark.parametrize("call", CALLS)
def test_a_full_query_has_as_many_rows_as_there_are_heads(call):
    with refuses(
        ValueError, r"shapes must be bq \(B, ., H, D\), ak .*; got bq \(2, 4, 5, 8\), ak \(2, 7, 2, 3\)"
    ):
        CALLS[call](*factors(aq=None, bq=torch.ones(B, T, 5, D, dtype=torch.float64)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_factors_of_integers_are_refused(call, name):
    given = dict(zip(NAMES, factors(), strict=True))
    with refuses(TypeError, rf"{name} must be a floating tensor, got torch.int64"):
        CALLS[call](*factors(**{name: given[name].long()}))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"impl": "fast"}, ValueError, r"impl must be one of 'auto', 'reference', .*, got 'fast'"),
        ({"window": 0}, ValueError, r"window must be >= 1, got 0"),
        ({"window": 2.0}, TypeError, r"window must be an int, got 2.0"),
        ({"scale": "big"}, TypeError, r"scale must be a number or None, got 'big'"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_options_out_of_range_are_named(call, keywords, error, message):
    with refuses(error, message):
        CALLS[call](*factors(), **keywords)


def test_a_window_needs_an_order():
    with refuses(ValueError, r"window needs causal=True .*, got window=3"):
        tpa_attention(*factors(), causal=False, window=3)


@pytest.mark.parametrize(
    ("call", "name", "letters"),
    [("tpa_attention", "attn_mask", "B, H, T, M"), ("tpa_decode_factors", "attn_bias", "B, H, N, M")],
)
def test_masks_that_do_not_broadcast_are_named(call, name, letters):
    for shape in [(6,), (T, 2), (5, T, M), (1, B, H, T, M)]:
        with refuses(ValueError, rf"{name} must broadcast to \({letters}\) = \(2, 3, 4, 7\), got"):
            CALLS[call](*factors(), **{name: torch.ones(shape)})
    with refuses(TypeError, rf"{name} must be bool \(True = attend\) or a floating bias, got torch.int64"):
        CALLS[call](*factors(), **{name: torch.ones(M, dtype=torch.int64)})


def test_boundaries_of_packed_sequences_are_checked():
    one = tuple(f[:1] for f in factors())
    q, k = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 7])
    with refuses(ValueError, r"must be given together, got cu_seqlens_k=None"):
        tpa_attention(*one, cu_seqlens_q=q)
    with refuses(ValueError, r"must be given together, got cu_seqlens_q=None"):
        tpa_attention(*one, cu_seqlens_k=k)
    with refuses(ValueError, r"batch of B = 1, got B = 2"):
        tpa_attention(*factors(), cu_seqlens_q=q, cu_seqlens_k=k)
    with refuses(TypeError, r"cu_seqlens_q must hold integers, got torch.float32"):
        tpa_attention(*one, cu_seqlens_q=q.float(), cu_seqlens_k=k)
    with refuses(ValueError, r"cu_seqlens_k must have shape \(sequences \+ 1,\), got \(3, 1\)"):
        tpa_attention(*one, cu_seqlens_q=q, cu_seqlens_k=k[:, None])
    with refuses(ValueError, r"must count the same sequences, got shapes \(2,\) and \(3,\)"):
        tpa_attention(*one, cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=k)
    for wrong in ([0, 3, 5], [1, 3, 4], [0, 5, 4]):
        with refuses(ValueError, r"cu_seqlens_q must rise from 0 to the 4 tokens there are, got \[., ., .\]"):
            tpa_attention(*one, cu_seqlens_q=torch.tensor(wrong), cu_seqlens_k=k)


@pytest.mark.parametrize("N", [0, 17])
def test_decoding_takes_one_to_sixteen_queries(N):
    with refuses(ValueError, rf"decoding takes 1 to 16 query tokens, got N = {N}; tpa_attention takes more"):
        tpa_decode_factors(*tensors(draw(0, T=N, M=20)))


def test_lengths_are_checked():
    with refuses(TypeError, r"seq_lens must hold integers, got torch.float32"):
        tpa_decode_factors(*factors(), seq_lens=torch.ones(B))
    with refuses(ValueError, r"seq_lens must have shape \(B,\) = \(2,\), got \(3,\)"):
        tpa_decode_factors(*factors(), seq_lens=torch.ones(3, dtype=torch.int32))
    for wrong in ([8, 1], [-1, 2]):
        with refuses(ValueError, r"seq_lens must lie in 0 .. 7, the tokens the cache holds, got \[.*\]"):
            tpa_decode_factors(*factors(), seq_lens=torch.tensor(wrong))


def test_splits_are_a_positive_number():
    with refuses(ValueError, r"num_splits must be >= 1, got 0"):
        tpa_decode_factors(*factors(), num_splits=0)


def decode_records(**changed):
    aq, bq, *kv = factors()
    k, v, sizes = records(*kv)
    arguments = {"aq": aq, "bq": bq, "cache_k": k, "cache_v": v, **sizes} | changed
    first = [arguments.pop(name) for name in ("aq", "bq", "cache_k", "cache_v")]
    return tpa_decode(*first, **arguments)


def test_records_too_narrow_for_the_sizes_are_named():
    with refuses(
        ValueError, r"cache_k must have records of at least 9 \* \(8 \+ 3\) = 99 numbers, got shape"
    ):
        decode_records(ranks=(9, 2))
    with refuses(
        ValueError, r"cache_v must have records of at least 2 \* \(50 \+ 3\) = 106 numbers, got shape"
    ):
        decode_records(v_head_dim=50)


def test_sizes_that_the_query_contradicts_are_named():
    with refuses(ValueError, r"shapes must be aq \(B, N, R_Q, H\), .*, H = 4, D = 8; got aq \(2, 4, 3, 3\)"):
        decode_records(num_heads=4)
    with refuses(ValueError, r"shapes must be .*, H = 3, D = 6; got .*bq \(2, 4, 3, 8\)"):
        decode_records(head_dim=6)
    with refuses(ValueError, r"shapes must be .*cache_k \(B, M, W_K\), .*; got .*cache_k \(1, 7, 22\)"):
        decode_records(cache_k=torch.ones(1, 7, 22, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ranks": 2}, ValueError, r"ranks must be \(k_rank, v_rank\), got 2"),
        ({"ranks": (0, 2)}, ValueError, r"k_rank must be >= 1, got 0"),
        ({"ranks": (2, 2.0)}, TypeError, r"v_rank must be an int, got 2.0"),
        ({"num_heads": None}, TypeError, r"num_heads must be an int, got None"),
        ({"v_head_dim": -1}, ValueError, r"v_head_dim must be >= 1, got -1"),
        (
            {"cache_k": torch.ones(B, M, 24).int()},
            TypeError,
            r"cache_k must be a floating tensor, got torch.int32",
        ),
        ({"block_table": torch.ones(B, 2)}, TypeError, r"block_table must hold integers, got torch.float32"),
        (
            {"block_table": torch.ones(3, 2).int()},
            ValueError,
            r"block_table must have shape \(B, blocks\) with B = 2, got \(3, 2\)",
        ),
        ({"seq_lens": torch.tensor([8, 1])}, ValueError, r"seq_lens must lie in 0 .. 7"),
        ({"impl": "fast"}, ValueError, r"impl must be one of .*'blockwise', 'triton', got 'fast'"),
    ],
)
def test_arguments_of_decoding_from_records_are_checked(changed, error, message):
    with refuses(error, message):
        decode_records(**changed)


def test_parts_that_do_not_fit_are_not_merged():
    with refuses(ValueError, r"outs must be \(S, .., E\) and lses \(S, ..\), got \(2, 3, 4\) and \(3, 2\)"):
        merge_partials(torch.ones(2, 3, 4), torch.ones(3, 2))
    with refuses(TypeError, r"lses must be a floating tensor, got torch.int64"):
        merge_partials(torch.ones(2, 3, 4), torch.ones(2, 3).long())


@pytest.mark.parametrize("call", CALLS)
def test_triton_without_cuda_says_what_to_do(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    with refuses(RuntimeError, r"impl='triton' cannot run: it needs CUDA tensors, got cpu; use impl='auto'"):
        CALLS[call](*factors(), impl="triton")


@pytest.mark.parametrize("call", CALLS)
def test_triton_that_is_not_installed_says_what_to_install(call, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with refuses(RuntimeError, r'triton is not installed: pip install "tpa-attention\[triton\]"'):
        CALLS[call](*factors(), impl="triton")
