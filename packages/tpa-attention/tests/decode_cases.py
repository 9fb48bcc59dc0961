"""Decode calls of every kind, their float64 truth, and what an implementation makes of them."""

from dataclasses import dataclass

import numpy as np
import reference
import torch

# float32 products of at most 64 terms each and a few hundred weights: the bound of claim C5
FLOAT32_ERROR = 2e-5


@dataclass(frozen=True)
class Case:
    """One call. `lens` None: all tokens are valid; q_rank None: full Q; page 0: contiguous."""

    heads: int = 3
    width: int = 8
    v_width: int = 8
    q_rank: int | None = 2
    k_rank: int = 2
    v_rank: int = 1
    queries: int = 1
    tokens: int = 40
    lens: tuple[int, ...] | None = None
    batch: int = 2
    window: int | None = None
    bias: str | None = None  # "dense", "padding" (broadcast, -inf) or "nothing" (all -inf)
    splits: int | None = None
    page: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "plain"  # "record", "transposed", "fixed a"
    spread: float = 1.0  # factor of the last third of the keys
    quantised: torch.dtype | None = None
    seed: int = 0

    @property
    def scales(self):
        """Factors of the logits and of the output, as `rank_scale=True` defines them."""
        return self.width**-0.5 / self.k_rank / (self.q_rank or 1), 1 / self.v_rank

    def factors(self):
        """aq, bq, ak, bk, av, bv, contiguous, rounded to the dtype; garbage past the lengths."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g).to(self.dtype)

        B, N, M, H, D = self.batch, self.queries, self.tokens, self.heads, self.width
        aq = None if self.q_rank is None else normal(B, N, self.q_rank, H)
        bq = normal(B, N, H if self.q_rank is None else self.q_rank, D)
        ak, bk = normal(B, M, self.k_rank, H), normal(B, M, self.k_rank, D)
        av, bv = normal(B, M, self.v_rank, H), normal(B, M, self.v_rank, self.v_width)
        bk[:, 2 * M // 3 :] *= self.spread
        if self.layout == "fixed a":
            ak, av = (a[:1, :1].expand(B, M, *a.shape[2:]) for a in (ak, av))
        return aq, bq, ak, bk, av, bv

    def attn_bias(self):
        g = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.heads, self.queries, self.tokens)
        if self.bias == "dense":
            return torch.randn(*shape, generator=g)
        if self.bias == "padding":
            first = torch.arange(self.tokens) < torch.tensor([0, 5])[: self.batch, None]
            return torch.zeros(first.shape).masked_fill(first, -torch.inf)[:, None, None].expand(shape)
        if self.bias == "nothing":
            return torch.full((1, 1, 1, 1), -torch.inf).expand(shape)
        return None


def truth(case, factors=None):
    """Output and LSE from `reference.flash_decode` in float64."""
    aq, bq, ak, bk, av, bv = (
        None if factor is None else factor.double().numpy() for factor in factors or case.factors()
    )
    bias = case.attn_bias()
    lens = None if case.lens is None else np.array(case.lens)
    return reference.flash_decode(
        aq, bq, ak, bk, av, bv, seq_lens=lens, window=case.window,
        bias=None if bias is None else bias.double().numpy(),
    )  # fmt: skip


def laid_out(case, factors):
    """The factors where a cache would hold them, NaN past the end of sequences, and the other arguments."""
    aq, bq, *cached = factors
    arguments = {"k_scale": None, "v_scale": None, "block_table": None, "seq_lens": None}
    if case.lens is not None:
        arguments["seq_lens"] = torch.tensor(case.lens, dtype=torch.int32)
        past = torch.arange(case.tokens) >= arguments["seq_lens"][:, None]
        if case.layout != "fixed a":
            cached = [factor.masked_fill(past[:, :, None, None], torch.nan) for factor in cached]
    if case.quantised is not None:
        cached, arguments["k_scale"], arguments["v_scale"] = quantise(cached, case.quantised)
    if case.layout == "record":
        cached = [*as_record(*cached[:2]), *as_record(*cached[2:])]
    if case.layout == "transposed":
        cached = [factor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for factor in cached]
    if case.page:
        if case.lens is None:  # the last page may be longer than the sequence
            arguments["seq_lens"] = torch.full((case.batch,), case.tokens)
        table, *paged = pages(case, *cached, arguments["k_scale"], arguments["v_scale"])
        arguments["block_table"] = table
        cached, (arguments["k_scale"], arguments["v_scale"]) = paged[:4], paged[4:]
    scale, out_scale = case.scales
    arguments |= {"bias": bias_for(case), "window": case.window, "num_splits": case.splits}
    return (aq, bq, *cached), arguments | {"scale": scale, "out_scale": out_scale}


def bias_for(case):
    """The bias, as long as all pages together where there are pages."""
    bias = case.attn_bias()
    if bias is None or not case.page:
        return bias
    return torch.nn.functional.pad(bias, (0, -case.tokens % case.page), value=torch.nan)


def as_record(a, b):
    """A and B as views of records [B | A | pad to 16 bytes]."""
    numbers = b[0, 0].numel()
    padding = -(numbers + a[0, 0].numel()) % (16 // a.itemsize)
    record = torch.cat([b.flatten(2), a.flatten(2), a.new_zeros(*a.shape[:2], padding)], dim=-1)
    return (
        record[..., numbers : numbers + a[0, 0].numel()].unflatten(-1, a.shape[2:]),
        record[..., :numbers].unflatten(-1, b.shape[2:]),
    )


def pages(case, *tensors):
    """A block table of pages in random order, and each tensor cut into them; spare pages hold NaN."""
    blocks = -(-case.tokens // case.page)
    order = torch.randperm(case.batch * blocks + 2, generator=torch.Generator().manual_seed(case.seed))
    table = order[: case.batch * blocks].reshape(case.batch, blocks).to(torch.int32)
    results = [table]
    for tensor in tensors:
        if tensor is None:
            results.append(None)
            continue
        padded = torch.zeros(case.batch, blocks * case.page, *tensor.shape[2:]).to(tensor.dtype)
        padded[:, : case.tokens] = tensor
        store = torch.zeros(len(order), case.page, *tensor.shape[2:])
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            store.fill_(torch.nan)
        store = store.to(tensor.dtype)
        store[table.flatten().long()] = padded.reshape(-1, case.page, *tensor.shape[2:])
        results.append(store)
    return results


def quantise(cached, dtype):
    """Four factors in 8 bits and the products of their scales, NaN (past the end) as 0."""
    largest = 127 if dtype == torch.int8 else 448
    small, scales = [], []
    for factor in cached:
        scale = factor.nan_to_num(0).abs().amax(-1).float().clamp(min=1e-9) / largest
        small.append((factor.nan_to_num(0).float() / scale[..., None]).round().to(dtype))
        scales.append(scale)
    return small, scales[0] * scales[1], scales[2] * scales[3]


def dequantised(case):
    """The factors that quantised ones stand for."""
    aq, bq, *cached = case.factors()
    small, k_scale, v_scale = quantise(cached, case.quantised)
    ak, bk, av, bv = (factor.float() for factor in small)
    return aq, bq, ak * k_scale[..., None], bk, av * v_scale[..., None], bv


def assert_agrees(case, result, error=FLOAT32_ERROR):
    """Output and LSE of `case` against the truth, within `error` of the larger of 1 and the truth."""
    out, lse = (tensor.cpu() for tensor in result)
    assert out.dtype == case.dtype
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    expected, expected_lse = truth(case, dequantised(case) if case.quantised is not None else None)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=error, atol=error)
    np.testing.assert_allclose(lse.double().numpy(), expected_lse, rtol=error, atol=error)
