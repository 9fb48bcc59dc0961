"""What the public functions of `functional.py` accept: every rule raises before anything is computed.

Values that live on an accelerator (lengths, boundaries, block tables) are not looked at, which would wait for
the device; on the CPU and outside of torch.compile they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_DECODE_TOKENS = 16  # more queries are a prefill
Named = Sequence[tuple[str, Tensor | None, str]]


def check_factors(
    query_axis: str,
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
) -> None:
    """Six floating factors whose shapes agree; `query_axis` is the letter of the queries' token axis.

    Raises:
        TypeError: if a factor is not a floating tensor.
        ValueError: if the shapes disagree; the message lists what is expected and what was given by name.
    """
    t = query_axis
    named: Named = (
        ("aq", aq, f"B {t} R_Q H"),
        ("bq", bq, f"B {t} H D" if aq is None else f"B {t} R_Q D"),
        ("ak", ak, "B M R_K H"),
        ("bk", bk, "B M R_K D"),
        ("av", av, "B M R_V H"),
        ("bv", bv, "B M R_V E"),
    )
    check_floating(named)
    check_shapes(named, may_be_empty=("B", t, "M"))


def check_records(
    aq: Tensor | None,
    bq: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    *,
    ranks: tuple[int, int],
    num_heads: int,
    head_dim: int,
    v_head_dim: int,
    paged: bool,
) -> None:
    """Queries and caches of records, contiguous or paged, of the sizes that the records cannot tell.

    Raises:
        TypeError: if a tensor is not floating or a size is no integer.
        ValueError: if a shape does not fit those sizes.
    """
    if not isinstance(ranks, tuple) or len(ranks) != 2:
        raise ValueError(f"ranks must be (k_rank, v_rank), got {ranks!r}")
    sizes = {"k_rank": ranks[0], "v_rank": ranks[1], "num_heads": num_heads, "head_dim": head_dim}
    for name, size in {**sizes, "v_head_dim": v_head_dim}.items():
        check_positive(name, size)
    tokens = "blocks block_size" if paged else "B M"
    check_floating((("aq", aq, ""), ("bq", bq, ""), ("cache_k", cache_k, ""), ("cache_v", cache_v, "")))
    check_shapes(
        (
            ("aq", aq, "B N R_Q H"),
            ("bq", bq, "B N H D" if aq is None else "B N R_Q D"),
            ("cache_k", cache_k, f"{tokens} W_K"),
            ("cache_v", cache_v, f"{tokens} W_V"),
        ),
        given={"H": num_heads, "D": head_dim},
        may_be_empty=("B", "N", "M", "blocks"),
    )
    for name, cache, rank, width in (
        ("cache_k", cache_k, ranks[0], head_dim),
        ("cache_v", cache_v, ranks[1], v_head_dim),
    ):
        numbers = rank * (width + num_heads)
        if cache.shape[-1] < numbers:
            raise ValueError(
                f"{name} must have records of at least {rank} * ({width} + {num_heads}) = {numbers} numbers, "
                f"got shape {tuple(cache.shape)}"
            )


def check_queries(N: int) -> None:
    """Decoding is for 1 to 16 queries."""
    if not 1 <= N <= MAX_DECODE_TOKENS:
        raise ValueError(
            f"decoding takes 1 to {MAX_DECODE_TOKENS} query tokens, got N = {N}; tpa_attention takes more"
        )


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], letters: str) -> None:
    """A boolean or floating tensor that broadcasts to `shape`."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = attend) or a floating bias, got {mask.dtype}")
    given = tuple(mask.shape)
    fits = len(given) <= len(shape) and all(
        mine in (1, full) for mine, full in zip(reversed(given), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to ({letters}) = {shape}, got {given}")


def check_window(window: int | None, causal: bool = True) -> None:
    """None or a positive int, and only where there is an order."""
    if window is None:
        return
    check_positive("window", window)
    if not causal:
        raise ValueError(f"window needs causal=True (it counts back from the query), got window={window!r}")


def check_scale(scale: float | None) -> None:
    """None or a real number."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")


def check_positive(name: str, value: object) -> None:
    """An int of at least 1 (symbolic ones of torch.compile too)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value!r}")


def check_boundaries(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, B: int, T: int, M: int
) -> None:
    """Both or none; integers 0 = c_0 <= c_1 <= .. <= c_n = number of tokens, for a batch of 1."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be given together, got {missing}=None")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    if B != 1:
        raise ValueError(f"packed sequences lie end to end in a batch of B = 1, got B = {B}")
    for name, boundaries, total in (("cu_seqlens_q", cu_seqlens_q, T), ("cu_seqlens_k", cu_seqlens_k, M)):
        check_integers(name, boundaries)
        if boundaries.ndim != 1 or boundaries.shape[0] < 2:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(boundaries.shape)}")
        if readable(boundaries):
            values = boundaries.tolist()
            if values[0] != 0 or values[-1] != total or sorted(values) != values:
                raise ValueError(f"{name} must rise from 0 to the {total} tokens there are, got {values}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must count the same sequences, "
            f"got shapes {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )


def check_lengths(seq_lens: Tensor | None, B: int, M: int) -> None:
    """(B,) integers, each 0 to M."""
    if seq_lens is None:
        return
    check_integers("seq_lens", seq_lens)
    if tuple(seq_lens.shape) != (B,):
        raise ValueError(f"seq_lens must have shape (B,) = ({B},), got {tuple(seq_lens.shape)}")
    if readable(seq_lens) and B and not 0 <= int(seq_lens.min()) <= int(seq_lens.max()) <= M:
        raise ValueError(
            f"seq_lens must lie in 0 .. {M}, the tokens the cache holds, got {seq_lens.tolist()}"
        )


def check_block_table(block_table: Tensor | None, B: int) -> None:
    """(B, blocks) integers."""
    if block_table is None:
        return
    check_integers("block_table", block_table)
    if block_table.ndim != 2 or block_table.shape[0] != B:
        raise ValueError(
            f"block_table must have shape (B, blocks) with B = {B}, got {tuple(block_table.shape)}"
        )


def check_integers(name: str, tensor: Tensor) -> None:
    """A tensor of integers, bool excluded."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")


def check_floating(named: Named) -> None:
    """Floating tensors, all of them."""
    for name, tensor, _ in named:
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}")


def check_shapes(
    named: Named, *, given: dict[str, int] | None = None, may_be_empty: Sequence[str] = ()
) -> None:
    """Every letter stands for one size wherever it occurs, and for at least 1 unless it may be empty."""
    present = [(name, tensor, axes.split()) for name, tensor, axes in named if tensor is not None]
    sizes = dict(given or {})
    for _, tensor, axes in present:
        fits = tensor.ndim == len(axes) and all(
            sizes.setdefault(axis, size) == size and (size > 0 or axis in may_be_empty)
            for axis, size in zip(axes, tensor.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(f"{name} ({', '.join(axes)})" for name, _, axes in present)
            got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor, _ in present)
            known = "".join(f", {letter} = {size}" for letter, size in (given or {}).items())
            raise ValueError(f"shapes must be {expected}{known}; got {got}")


def readable(tensor: Tensor) -> bool:
    """Whether looking at values costs nothing: on the CPU, outside of torch.compile and torch.export."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor
