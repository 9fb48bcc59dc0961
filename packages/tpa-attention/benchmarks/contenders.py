"""Decode steps that every machine with torch can time: TPA from its cache, MHA, GQA, MQA and MLA beside it.

A step is attention of one new token to M cached ones, projections left out. Each contender owns a random
cache in the layout that serves it best, says how many numbers of it a token has, and has a float64 answer of
its own to be compared with. The floor of its time is that in which memory delivers the cache.

    TPA     records [B_K | A_K], [B_V | A_V]                (R_K + R_V)(h + D) numbers
    MHA     (B, h, M, D) keys and values                    2 h D
    GQA-G   (B, G, M, D)                                    2 G D
    MQA     (B, 1, M, D)                                    2 D
    MLA     [latent | rotary key], weights absorbed         d_c + d_R

On a GPU the baselines are timed with the backend of torch's attention that is the fastest there, and GQA and
MLA by the Triton kernels of `peer_kernels` too; a row's note says which backend or tiles were taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from memory import fastest
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpa_attention.accounting import QUANTISED
from tpa_attention.torch.cache import CacheLayout
from tpa_attention.torch.factors import RecordLayout
from tpa_attention.torch.functional import tpa_decode
from tpa_attention.torch.quantized_cache import QuantizedFactorCache

BASELINE = "TPA (16,1,1)"
PAGE = 64  # tokens of a block of the paged cache
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """One decode step.

    Attributes:
        tokens: M, cached tokens of each sequence.
        batch: B.
        heads: h.
        width: D.
        groups: G of GQA.
        latent: d_c of MLA.
        rotary: d_R of MLA.
    """

    tokens: int
    batch: int = 1
    heads: int = 32
    width: int = 64
    groups: int = 4
    latent: int = 256
    rotary: int = 32

    @property
    def title(self) -> str:
        """Sizes in one line."""
        return f"B {self.batch}, M {self.tokens}, h {self.heads}, D {self.width}"


@dataclass(frozen=True)
class Step:
    """A decode step that is ready to run.

    Attributes:
        call: the step; its value is (B, h, E) or (B, 1, h, E) or (B, h, 1, E).
        truth: the answer (h, E) of the first sequence in float64, from the same cache.
        bytes: of the cache that the step must read.
        capturable: whether a CUDA graph may hold it.
        note: backend or tiles that were chosen.
    """

    call: Call
    truth: Call
    bytes: int
    capturable: bool = True
    note: str = ""

    def error(self) -> float:
        """Largest absolute difference of the first sequence's heads to the truth."""
        expected = self.truth()
        found = self.call()[0].double().reshape(expected.shape)
        return float((found - expected).abs().max())


@dataclass(frozen=True)
class Contender:
    """A way to decode.

    Attributes:
        build: makes the cache and the step.
        numbers: cached numbers per token.
    """

    build: Callable[[], Step]
    numbers: int


class Random:
    """Normal tensors of one type on one device, the same on every run."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """A tensor of that shape."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)


def contenders(work: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """What plain torch and this package offer, the baseline first."""
    h, D, G = work.heads, work.width, work.groups

    def tpa(*ranks: int, form: str = "") -> Contender:
        return Contender(
            lambda: tpa_step(work, ranks, form, Random(device, dtype)), (ranks[1] + ranks[2]) * (h + D)
        )

    def grouped(groups: int, form: str) -> Contender:
        return Contender(lambda: grouped_step(work, groups, form, Random(device, dtype)), 2 * groups * D)

    def latent(form: str) -> Contender:
        return Contender(lambda: latent_step(work, form, Random(device, dtype)), work.latent + work.rotary)

    mla = f"MLA {work.latent}+{work.rotary}"
    lineup = {
        BASELINE: tpa(16, 1, 1),
        "TPA (16,2,2)": tpa(16, 2, 2),
        "TPA KV-only, rank 1": tpa(0, 1, 1),
        "TPA (16,1,1), paged": tpa(16, 1, 1, form="paged"),
        "MHA, SDPA": grouped(h, "heads"),
        f"GQA-{G}, SDPA": grouped(G, "heads"),
        f"GQA-{G}, SDPA, groups folded": grouped(G, "folded"),
        "MQA, SDPA": grouped(1, "heads"),
        "MQA, SDPA, groups folded": grouped(1, "folded"),
        f"{mla}, SDPA, absorbed": latent("torch"),
    }
    if work.batch > 1:
        lineup["TPA (16,1,1), ragged"] = tpa(16, 1, 1, form="ragged")
    if device.startswith("cuda"):  # elsewhere the operator computes plainly, on numbers it has widened
        lineup |= {f"TPA (16,1,1), {kind}": tpa(16, 1, 1, form=kind) for kind in QUANTISED}
        lineup |= {
            f"GQA-{G}, Triton": grouped(G, "triton"),
            "MQA, Triton": grouped(1, "triton"),
            f"{mla}, Triton, absorbed": latent("triton"),
        }
    return lineup


# ------------------------------------------------------------------------------------------------------- TPA


def tpa_step(work: Workload, ranks: tuple[int, ...], form: str, draw: Random) -> Step:
    """Decoding from records: contiguous, on shuffled pages, in eight bits, or with lengths from 1 to M.

    The error of eight bits is that of rounding the cache: the truth reads the records as they were.

    Args:
        work: sizes.
        ranks: (R_Q, R_K, R_V); R_Q = 0 for a full Q.
        form: "", "paged", "ragged", "int8" or "fp8_e4m3".
        draw: source of the numbers.
    """
    B, M, h, D = work.batch, work.tokens, work.heads, work.width
    q_rank, k_rank, v_rank = ranks
    layouts = RecordLayout(k_rank, h, D), RecordLayout(v_rank, h, D)
    aq = draw(B, 1, q_rank, h) if q_rank else None
    bq = draw(B, 1, q_rank or h, D)
    caches = [draw(B, M, layout.padded(draw.dtype.itemsize)) for layout in layouts]
    options: dict[str, Any] = {"ranks": (k_rank, v_rank), "num_heads": h, "head_dim": D}
    first, read = M, B * M
    given = caches
    if form == "paged":
        given, options["block_table"] = paged(caches)
        options["seq_lens"] = torch.full(
            (B,), M, dtype=torch.int32, device=draw.device
        )  # the last page has room
    elif form == "ragged":
        lens = torch.linspace(M, 1, B).round().int()
        first, read = int(lens[0]), int(lens.sum())
        options["seq_lens"] = lens.to(draw.device)

    def truth() -> Tensor:
        (ak, bk), (av, bv) = (
            layout.views(cache[:1, :first]) for layout, cache in zip(layouts, caches, strict=True)
        )
        heads = []
        for i in range(h):  # a head at a time: K and V of all heads may not fit
            q = bq[0, 0, i].double() if aq is None else aq[0, 0, :, i].double() @ bq[0, 0].double() / q_rank
            k = torch.einsum("mr,mrd->md", ak[0, :, :, i].double(), bk[0].double()) / k_rank
            v = torch.einsum("mr,mrd->md", av[0, :, :, i].double(), bv[0].double()) / v_rank
            heads.append(attention(q[None], k, v, D**-0.5)[0])
        return torch.stack(heads)

    if form in QUANTISED:
        numbers = [layout.numbers for layout in layouts]
        eight = QuantizedFactorCache(
            *(CacheLayout(1, *numbers), B, M),
            kind=form,
            records=layouts,
            device=draw.device,
            dtype=draw.dtype,
        )
        eight.write(0, *caches)
        return Step(lambda: eight.decode(0, aq, bq)[0], truth, eight.nbytes)
    width = sum(cache.shape[-1] for cache in caches)
    return Step(lambda: tpa_decode(aq, bq, *given, **options), truth, read * width * draw.dtype.itemsize)


def paged(caches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The caches cut into blocks of 64 tokens in random order, and the table that finds them."""
    B, M = caches[0].shape[:2]
    blocks = -(-M // PAGE)
    order = torch.randperm(B * blocks, generator=torch.Generator().manual_seed(1)).to(caches[0].device)
    table = torch.empty_like(order)
    table[order] = torch.arange(B * blocks, device=order.device)
    cut = [
        functional.pad(cache, (0, 0, 0, blocks * PAGE - M)).reshape(B * blocks, PAGE, -1)[order]
        for cache in caches
    ]
    return cut, table.view(B, blocks).int()


# ------------------------------------------------------------------------------------------------ the others


def grouped_step(work: Workload, groups: int, form: str, draw: Random) -> Step:
    """MHA, GQA and MQA by torch's attention or by the Triton kernel of this folder.

    Args:
        work: sizes.
        groups: key-value heads.
        form: "heads": one query row per head, `enable_gqa`; "folded": the heads of a group are rows of one
            query, so that a group is read once; "triton".
        draw: source of the numbers.
    """
    B, M, h, D = work.batch, work.tokens, work.heads, work.width
    q, k, v = draw(B, h, 1, D), draw(B, groups, M, D), draw(B, groups, M, D)
    rows = q.view(B, groups, h // groups, D)

    def torch_call() -> Tensor:
        if form == "folded":
            return functional.scaled_dot_product_attention(rows, k, v)
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=groups < h)

    def truth() -> Tensor:
        parts = [
            attention(rows[0, g].double(), k[0, g].double(), v[0, g].double(), D**-0.5) for g in range(groups)
        ]
        return torch.cat(parts)

    if form == "triton":
        import peer_kernels  # needs triton

        decode = partial(peer_kernels.grouped_decode, q[:, :, 0], k, v)
        ways = {str(tiles): partial(decode, tiles) for tiles in peer_kernels.GROUPED}
        note, call = fastest(ways, draw.device)
    else:
        note, call = torch_attention(torch_call, draw.device)
    return Step(call, truth, 2 * k.numel() * k.itemsize, note=note)


def torch_attention(call: Call, device: str) -> tuple[str, Call]:
    """The call by the backend that is the fastest on a GPU, with its name; elsewhere as it is."""
    if not device.startswith("cuda"):
        return "", call

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return call()

    fused = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    try:
        return fastest({name: partial(by, getattr(SDPBackend, name)) for name in fused}, device)
    except RuntimeError:  # widths that no fused kernel has
        return "MATH", partial(by, SDPBackend.MATH)


def latent_step(work: Workload, form: str, draw: Random) -> Step:
    """MLA with W^UK absorbed in the query and W^UV left out: one key, whose first part is the value.

    Args:
        work: sizes.
        form: "torch" or "triton".
        draw: source of the numbers.
    """
    B, M, h, d_c = work.batch, work.tokens, work.heads, work.latent
    q, cache = draw(B, 1, h, d_c + work.rotary), draw(B, 1, M, d_c + work.rotary)
    scale = (work.width + work.rotary) ** -0.5

    def torch_call() -> Tensor:
        return functional.scaled_dot_product_attention(q, cache, cache[..., :d_c], scale=scale)

    def truth() -> Tensor:
        keys = cache[0, 0].double()
        return attention(q[0, 0].double(), keys, keys[:, :d_c], scale)

    if form == "triton":
        import peer_kernels  # needs triton

        decode = partial(peer_kernels.latent_decode, q[:, 0], cache[:, 0], d_c, scale)
        ways = {str(tiles): partial(decode, tiles) for tiles in peer_kernels.LATENT}
        note, call = fastest(ways, draw.device)
    else:
        note, call = torch_attention(torch_call, draw.device)
    return Step(call, truth, cache.numel() * cache.itemsize, note=note)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v of matrices."""
    return (scale * q @ k.T).softmax(-1) @ v
