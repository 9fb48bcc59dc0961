"""Factor maps: from a token's hidden state x in R^d to the rows of A or B, and how they start.

    contextual        F(x) = reshape(W x)             A_X in R^{R x h}, B_X in R^{R x D}              (3.1)
    non-contextual    F(x) = F, free parameters       not cached                                 (App. G)
    with bias         F(x) = F + reshape(W x)         how a converted layer becomes contextual     (ours)

Initial bounds of the uniform weights, for R rows of width n (n = h for A, D for B, d_i for a part of higher
order):

    "t6", as trained: Xavier on the views        A sqrt(6 / ((h + d) R)),   B sqrt(6 / ((R + d) n))
    "xavier", the paper's text: on the matrices  sqrt(6 / (d + R n))
    "normal": standard deviation 0.02

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and G, and the released training code.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

NORMAL_STD = 0.02


class FactorMap(nn.Module):
    """One map to R rows of sum(widths) numbers; row r starts at r * sum(widths) of the flat output.

    Args:
        d_model: d, width of the hidden state.
        rank: R, number of rows.
        widths: widths of the parts of a row: (h,) for A, (D,) for B, (d_b, d_c, ..) for higher orders.
        contextual: whether there is a weight, (R * sum(widths), d). Without one the map is its bias.
        bias: whether a contextual map has a bias, (R * sum(widths),).
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        widths: Sequence[int],
        *,
        contextual: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.rank, self.widths = d_model, rank, tuple(widths)
        rows = rank * sum(widths)
        self.weight = (
            nn.Parameter(torch.empty(rows, d_model, device=device, dtype=dtype)) if contextual else None
        )
        self.bias = (
            nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias or not contextual else None
        )

    @property
    def contextual(self) -> bool:
        """Whether the rows depend on the token."""
        return self.weight is not None

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "#B #T R n"]:
        """Rows of every token; a non-contextual map returns its (1, 1, R, n) parameters."""
        return project([self], x, fused=False)[0]

    def rows(self, linear: Float[Tensor, "B T Rn"] | None) -> Float[Tensor, "#B #T R n"]:
        """Rows from the product W x, None for a non-contextual map."""
        if linear is None:
            flat = self._bias().view(1, 1, -1)
        else:
            flat = linear if self.bias is None else linear + self.bias.to(linear.dtype)
        return flat.unflatten(-1, (self.rank, sum(self.widths)))

    @property
    def matrix(self) -> Float[Tensor, "Rn d"]:
        """The weight W.

        Raises:
            ValueError: if the map is non-contextual and has none.
        """
        if self.weight is None:
            raise ValueError("the map must be contextual to have a weight; it is its bias")
        return self.weight

    @torch.no_grad()
    def set_constant(self, rows: Float[Tensor, "R n"]) -> None:
        """Write what does not depend on the token, F of F(x) = F + W x.

        Raises:
            ValueError: if the map has no bias or the shape is not (R, sum(widths)).
        """
        expected = (self.rank, sum(self.widths))
        if tuple(rows.shape) != expected:
            raise ValueError(f"rows must have shape {expected}, got {tuple(rows.shape)}")
        self._bias().copy_(rows.flatten())

    def _bias(self) -> Tensor:
        if self.bias is None:
            raise ValueError("the map must have a bias to be used without W x; it has a weight alone")
        return self.bias

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return (
            f"d_model={self.d_model}, rank={self.rank}, widths={self.widths}, contextual={self.contextual}, "
            f"bias={self.bias is not None}"
        )


def project(
    maps: Sequence[FactorMap], x: Float[Tensor, "B T d"], *, fused: bool
) -> list[Float[Tensor, "#B #T R n"]]:
    """Rows of several maps of one input; `fused` makes a single matrix product of all weights.

    The weights are joined for the product and stay separate parameters, so names, checkpoints, sharding and
    optimizers see six small matrices; the copy costs as much as reading the weights once.
    """
    contextual = [m for m in maps if m.contextual]
    if not contextual:
        return [m.rows(None) for m in maps]
    if fused and len(contextual) > 1:
        joined = functional.linear(x, torch.cat([m.matrix for m in contextual]))
        products = list(joined.split([m.matrix.shape[0] for m in contextual], dim=-1))
    else:
        products = [functional.linear(x, m.matrix) for m in contextual]
    dtype = products[0].dtype  # autocast: parameters that pass no product follow
    rows = iter(products)
    return [m.rows(next(rows)) if m.contextual else m.rows(None).to(dtype) for m in maps]


def empty_linear(
    inward: int,
    outward: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """A linear map without bias and without initial values: nothing is drawn from the global generator."""
    linear = nn.Linear(inward, outward, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(outward, inward, device=device, dtype=dtype))
    return linear


# ----------------------------------------------------------------------------------------- initial values


@torch.no_grad()
def init_a(factor_map: FactorMap, scheme: str, generator: torch.Generator | None = None) -> None:
    """Initial values of a head map: weights, bias 0; free rows 1 + N(0, 0.02^2) of mean square 1."""
    d, rank, h = factor_map.d_model, factor_map.rank, factor_map.widths[0]
    if factor_map.weight is None:
        rows = factor_map.rows(None)[0, 0]
        rows.normal_(1.0, NORMAL_STD, generator=generator)
        rows.div_(rows.square().mean(dim=-1, keepdim=True).sqrt())
        return
    bound = {"t6": sqrt(6 / ((h + d) * rank)), "xavier": sqrt(6 / (d + rank * h)), "normal": None}[scheme]
    fill(factor_map.weight, bound, generator)
    if factor_map.bias is not None:
        factor_map.bias.zero_()


@torch.no_grad()
def init_b(factor_map: FactorMap, scheme: str, generator: torch.Generator | None = None) -> None:
    """Initial values of a feature map: the scheme's weights per part; free parts N(0, 1/d_i)."""
    d, rank = factor_map.d_model, factor_map.rank
    if factor_map.weight is None:
        parts = factor_map.rows(None)[0, 0].split(factor_map.widths, dim=-1)
        for part, n in zip(parts, factor_map.widths, strict=True):
            part.normal_(0.0, n**-0.5, generator=generator)
        return
    rows = factor_map.weight.unflatten(0, (rank, sum(factor_map.widths)))
    for part, n in zip(rows.split(factor_map.widths, dim=1), factor_map.widths, strict=True):
        bound = {"t6": sqrt(6 / ((rank + d) * n)), "xavier": sqrt(6 / (d + rank * n)), "normal": None}[scheme]
        fill(part, bound, generator)
    if factor_map.bias is not None:
        factor_map.bias.zero_()


@torch.no_grad()
def init_linear(
    weight: Float[Tensor, "out in"], scheme: str, generator: torch.Generator | None = None
) -> None:
    """Initial values of W^Q under KV-only, gate and W^O: Xavier, or N(0, 0.02^2) under "normal"."""
    fan_out, fan_in = weight.shape
    fill(weight, None if scheme == "normal" else sqrt(6 / (fan_in + fan_out)), generator)


def fill(weight: Tensor, bound: float | None, generator: torch.Generator | None) -> None:
    """Uniform in (-bound, bound), or N(0, 0.02^2) without a bound."""
    if bound is None:
        weight.normal_(0.0, NORMAL_STD, generator=generator)
    else:
        weight.uniform_(-bound, bound, generator=generator)
