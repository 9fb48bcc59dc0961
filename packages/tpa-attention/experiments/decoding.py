"""C5's measurements: decoding from factors against materialised attention, and the memory it needs meanwhile.

Random calls: ranks 1 to 4, 1 to 48 heads, any cache up to 700 tokens, 1 to 16 new tokens, ragged lengths with
0 and 1 among them, KV-only or not. The truth is softmax attention in float64 with Q, K and V written out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tenfold_tools._memory import peak_memory
from tpa_attention.torch.factors import RecordLayout, TPAFactors
from tpa_attention.torch.functional import tpa_decode, tpa_decode_factors


@dataclass(frozen=True)
class Call:
    """Shapes of one decode call.

    Attributes:
        batch: B.
        queries: N.
        tokens: M, capacity of the cache.
        heads: h.
        width: D.
        v_width: E.
        ranks: (R_Q, R_K, R_V).
        kv_only: whether Q is not factored.
        lens: valid tokens of each sequence.
    """

    batch: int
    queries: int
    tokens: int
    heads: int
    width: int
    v_width: int
    ranks: tuple[int, int, int]
    kv_only: bool
    lens: tuple[int, ...]


def random_call(generator: torch.Generator) -> Call:
    """One call; every third batch has a sequence of length 0 or 1."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, tokens = integer(1, 3), integer(1, 700)
    lens = [integer(0, tokens) for _ in range(batch)]
    if integer(0, 2) == 0:
        lens[0] = integer(0, 1)
    widths = (8, 16, 24, 64, 128)
    return Call(
        batch,
        integer(1, 16),
        tokens,
        integer(1, 48),
        widths[integer(0, 4)],
        widths[integer(0, 4)],
        (integer(1, 4), integer(1, 4), integer(1, 4)),
        integer(0, 3) == 0,
        tuple(lens),
    )


def random_factors(call: Call, generator: torch.Generator) -> TPAFactors:
    """Normal factors, float64, on the CPU."""

    def draw(tokens: int, rank: int, width: int) -> Tensor:
        return torch.randn(call.batch, tokens, rank, width, dtype=torch.float64, generator=generator)

    q_rank, k_rank, v_rank = call.ranks
    return TPAFactors(
        None if call.kv_only else draw(call.queries, q_rank, call.heads),
        draw(call.queries, call.heads if call.kv_only else q_rank, call.width),
        draw(call.tokens, k_rank, call.heads),
        draw(call.tokens, k_rank, call.width),
        draw(call.tokens, v_rank, call.heads),
        draw(call.tokens, v_rank, call.v_width),
    )


def materialised(call: Call, factors: TPAFactors) -> Tensor:
    """Softmax attention of all heads; query n stands at len - N + n, and sees nothing after itself."""
    aq, bq, ak, bk, av, bv = factors
    q_rank, k_rank, v_rank = call.ranks
    q = bq if aq is None else torch.einsum("bnrh,bnrd->bnhd", aq, bq) / q_rank
    k = torch.einsum("bmrh,bmrd->bmhd", ak, bk) / k_rank
    v = torch.einsum("bmrh,bmre->bmhe", av, bv) / v_rank
    at = torch.tensor(call.lens)[:, None] - call.queries + torch.arange(call.queries)
    seen = torch.arange(call.tokens) <= at[:, :, None]  # (B, N, M)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / call.width**0.5
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v)


def errors(call: Call, factors: TPAFactors, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest absolute error of every way to decode, in one type.

    Args:
        call: the shapes.
        factors: float64.
        dtype: of the factors that are decoded from.
        device: where.

    Returns:
        way -> error. Kernels know no float64: there the ways of plain torch answer.
    """
    truth = materialised(call, factors)
    given = [None if f is None else f.to(device, dtype) for f in factors]
    lens = torch.tensor(call.lens, dtype=torch.int32, device=device)
    _, k_rank, v_rank = call.ranks
    k_layout = RecordLayout(k_rank, call.heads, call.width)
    v_layout = RecordLayout(v_rank, call.heads, call.v_width)
    records = k_layout.pack(given[2], given[3]), v_layout.pack(given[4], given[5])
    found = {
        "reference": tpa_decode_factors(*given, seq_lens=lens, impl="reference"),
        "factors": tpa_decode_factors(*given, seq_lens=lens),
        "records": tpa_decode(
            *given[:2],
            *records,
            ranks=(k_rank, v_rank),
            num_heads=call.heads,
            head_dim=call.width,
            v_head_dim=call.v_width,
            seq_lens=lens,
        ),
    }
    return {way: float((out.cpu().double() - truth).abs().max()) for way, out in found.items()}


# ----------------------------------------------------------------------------------------------------- memory


def scratch(heads: int, width: int, tokens: int, device: str) -> int:
    """Most bytes alive at a time during a decode call beyond its inputs (float32, ranks (16, 1, 1)).

    Args:
        heads: h.
        width: D = E.
        tokens: M.
        device: where.
    """
    generator = torch.Generator().manual_seed(0)
    call = Call(1, 1, tokens, heads, width, width, (16, 1, 1), False, (tokens,))
    factors = [None if f is None else f.to(device, torch.float32) for f in random_factors(call, generator)]

    def decode() -> None:
        tpa_decode_factors(*factors)

    if device != "cpu":
        decode()  # what is compiled and kept is no scratch
        return peak_memory(decode, device) or 0
    return live_peak(decode)


def live_peak(function: Callable[[], Any]) -> int:
    """Most bytes that tensors made by the function hold at one time, to the byte."""
    with _Ledger() as ledger:
        function()
    return ledger.peak


class _Ledger(TorchDispatchMode):
    """Counts the storages of results, from the operation that makes them until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = WeakTensorKeyDictionary()  # tensor -> address and size of its storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            arg.untyped_storage().data_ptr()
            for arg in (*args, *(kwargs or {}).values())
            if isinstance(arg, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        known = {address for address, _ in self._alive.values()}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (
                    storage.data_ptr() in known or storage.data_ptr() not in inputs
                ):  # not a view of the inputs
                    self._alive[tensor] = (storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, sum(dict(self._alive.values()).values()))
        return out
