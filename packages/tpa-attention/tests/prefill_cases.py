"""Calls of attention to whole sequences, of every kind; their float64 truth and that of their gradients."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpa_attention.torch import reference

# float32 products of at most 64 terms each and a few hundred weights, relative to the largest number
FLOAT32_ERROR = 2e-5
NAMES = ("out", "lse", "daq", "dbq", "dak", "dbk", "dav", "dbv")


@dataclass(frozen=True)
class Case:
    """One call. q_rank None: full Q; bounds: cu_seqlens of queries and keys, in a batch of 1."""

    tokens: int = 20
    keys: int = 20
    heads: int = 2
    width: int = 8
    v_width: int = 8
    q_rank: int | None = 2
    k_rank: int = 2
    v_rank: int = 1
    batch: int = 1
    causal: bool = True
    window: int | None = None
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "plain"  # "projection" (views of one product), "transposed", "fixed a"
    spread: float = 1.0  # factor of the last third of the keys
    by_lse: bool = True  # whether log-sum-exps have gradients too
    seed: int = 0

    @property
    def scales(self):
        """Factors of the logits and of the output, as `rank_scale=True` defines them."""
        scale = self.width**-0.5 if self.scale is None else self.scale
        return scale / self.k_rank / (self.q_rank or 1), 1 / self.v_rank

    def options(self, device="cpu"):
        """What follows the factors in `prefill_ops.prefill`."""
        bounds = (None, None)
        if self.bounds is not None:
            bounds = tuple(torch.tensor(b, dtype=torch.int32, device=device) for b in self.bounds)
        return (*bounds, self.causal, self.window, *self.scales)

    def factors(self):
        """aq, bq, ak, bk, av, bv, rounded to the dtype, laid out as asked."""
        B, T, M, H = self.batch, self.tokens, self.keys, self.heads
        g = torch.Generator().manual_seed(self.seed)
        sizes = [
            (T, self.q_rank, H),
            (T, self.q_rank or H, self.width),
            (M, self.k_rank, H),
            (M, self.k_rank, self.width),
            (M, self.v_rank, H),
            (M, self.v_rank, self.v_width),
        ]
        made = [
            None if size[1] is None else torch.randn(B, *size, generator=g).to(self.dtype) for size in sizes
        ]
        made[3][:, 2 * M // 3 :] *= self.spread
        if self.layout == "fixed a":
            made[2], made[4] = (a[:1, :1].expand(B, M, *a.shape[2:]) for a in (made[2], made[4]))
        if self.layout == "transposed":
            made = [x if x is None else x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in made]
        if self.layout == "projection":
            rows = torch.cat([x.flatten(2) for x in made[2:]], dim=-1)
            parts = rows.split([x[0, 0].numel() for x in made[2:]], dim=-1)
            made[2:] = [part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, made[2:], strict=True)]
        return tuple(made)

    def gradients(self):
        """Those of out and lse; the latter None if nobody uses lse."""
        g = torch.Generator().manual_seed(self.seed + 1)
        rows = (self.batch, self.tokens, self.heads)
        dout, dlse = torch.randn(*rows, self.v_width, generator=g), torch.randn(*rows, generator=g)
        return dout.to(self.dtype), dlse if self.by_lse else None


def truth(case):
    """out, lse and the gradients of the factors, by autograd through the package's reference in float64."""
    factors = [None if x is None else x.double().clone().requires_grad_() for x in case.factors()]
    bounds_q, bounds_k, causal, window, scale, out_scale = case.options()
    out, lse = reference.tpa_attention(
        *factors, causal=causal, window=window, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k,
        scale=scale, rank_scale=False,
    )  # fmt: skip
    out = out * out_scale
    dout, dlse = case.gradients()
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse == -torch.inf, 0, lse) * dlse.double()).sum()
    wanted = [x for x in factors if x is not None]
    grads = torch.autograd.grad(loss, wanted) if loss.requires_grad else [torch.zeros_like(x) for x in wanted]
    return out.detach(), lse.detach(), *[None] * (6 - len(grads)), *grads


def results(case, forward, backward, device="cpu"):
    """What `prefill` and `prefill_backward`, or functions with their arguments, make of a case."""
    factors = [None if x is None else x.to(device) for x in case.factors()]
    options = case.options(device)
    out, lse = forward(*factors, *options)
    dout, dlse = (None if x is None else x.to(device) for x in case.gradients())
    grads = list(backward(dout, dlse, *factors, out, lse, *options))
    return (out, lse, None if case.q_rank is None else grads[0], *grads[1:])


def kernels(plan=None):
    """The kernels' functions, called as the operators are."""
    from tpa_attention.torch.kernels.prefill import prefill_triton
    from tpa_attention.torch.kernels.prefill_backward import prefill_backward_triton
    from tpa_attention.torch.prefill_ops import intervals

    def around(kernel, at):
        def call(*arguments):
            *tensors, bounds_q, bounds_k, causal, window, scale, out_scale = arguments
            bq, bk = tensors[at + 1], tensors[at + 3]
            seen = intervals(bounds_q, bounds_k, bq.shape[1], bk.shape[1], causal, window)
            return kernel(*tensors, seen, causal, window, scale, out_scale, plan)

        return call

    return around(prefill_triton, 0), around(prefill_backward_triton, 2)


def assert_agrees(case, found, error=FLOAT32_ERROR):
    """Everything within `error` of the truth, relative to the larger of 1 and the largest true number."""
    for name, mine, true in zip(NAMES, found, truth(case), strict=True):
        if true is None:
            assert mine is None, name
            continue
        assert mine.dtype == (torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype)
        largest = float(true[true.isfinite()].abs().max()) if true.isfinite().any() else 0.0
        got, bound = mine.detach().cpu().double(), error * max(1.0, largest)
        np.testing.assert_allclose(got, true, rtol=0, atol=bound, err_msg=f"{name}, {case}")


def rms_error(mine: Tensor, true: Tensor) -> float:
    """Root of the mean squared error, of the numbers that are finite in truth."""
    finite = true.isfinite()
    return float((mine.detach().cpu().double() - true)[finite].square().mean().sqrt())
