"""Factors of queries, keys and values: their layout, their product, and the records a cache keeps of them.

Per token, the block of all heads is a short sum of outer products of a head factor a and a feature factor b,

    X_t = s_X sum_r a_r (x) b_r = s_X A_X^T B_X,    s_X = 1/R_X,    X in {Q, K, V}                (3.1)

A has shape (B, T, R, H), B has shape (B, T, R, D): rank before width, so a row of one rank is contiguous.
The cache keeps one record of numbers per token and side, [B: R * D | A: R * H | pad to 16 bytes], so that a
kernel loads both factors of a token with one aligned read; `RecordLayout` packs and views it.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1, Section 3 and Appendix C (higher orders).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ALIGNMENT = 16  # bytes a GPU loads at once


class TPAFactors(NamedTuple):
    """The six factors of one attention call; KV-only has aq = None and bq = Q itself, (B, T, H, D)."""

    aq: Float[Tensor, "B T RQ H"] | None
    bq: Float[Tensor, "B T RQ D"]
    ak: Float[Tensor, "B M RK H"]
    bk: Float[Tensor, "B M RK D"]
    av: Float[Tensor, "B M RV H"]
    bv: Float[Tensor, "B M RV E"]


def rank_factor(a: Float[Tensor, "B T R H"] | None, rank_scale: bool = True) -> float:
    """s_X = 1/R_X; 1 without rank scaling and for a Q that is not factorised."""
    return 1 / a.shape[-2] if a is not None and rank_scale else 1.0


def logit_scale(scale: float | None, width: int) -> float:
    """The factor of the logits: as given, or D^-0.5."""
    return width**-0.5 if scale is None else scale


def materialize(
    a: Float[Tensor, "#B #T R H"] | None, b: Float[Tensor, "#B #T R D"], rank_scale: bool = True
) -> Float[Tensor, "B T H D"]:
    """X_t = s_X A^T B for every token: all heads of Q, K or V from their factors.

    Args:
        a: head factors; None returns `b`, which then is X already (the full Q of KV-only).
        b: feature factors. Sizes of 1 in the batch and token axes of either are broadcast, which serves
            factors that do not depend on the token.
        rank_scale: multiply by 1/R, as the paper defines X; it enters here and nowhere else.

    Raises:
        TypeError: if a factor is not floating.
        ValueError: if the shapes do not fit or R is 0.

    Source: Zhang et al. 2025, eq. 3.1.
    """
    check_factors("a", a, "b", b)
    if a is None:
        return b
    scaled = a * rank_factor(a, rank_scale)  # A is the smaller one: R * H numbers
    if a.shape[-2] == 1:  # an outer product needs no sum; far faster than as many tiny GEMMs
        scaled, b = autocast(scaled), autocast(b)
        return scaled.mT * b
    return scaled.mT @ b


def autocast(x: Tensor) -> Tensor:
    """In the type that autocast gives to the operands of a matrix product, where it is on."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def check_factors(a_name: str, a: Tensor | None, b_name: str, b: Tensor) -> None:
    """Raise unless A is (B, T, R, H) and B is (B, T, R, D), floating, with the same R >= 1."""
    for name, factor, letters in ((a_name, a, "R, H"), (b_name, b, "R, D" if a is not None else "H, D")):
        if factor is None:
            continue
        if not factor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {factor.dtype}")
        if factor.ndim != 4:
            raise ValueError(f"{name} must have shape (B, T, {letters}), got {tuple(factor.shape)}")
    if a is None:
        return
    leading_fit = all(1 in (m, n) or m == n for m, n in zip(a.shape[:2], b.shape[:2], strict=True))
    if not leading_fit or a.shape[2] != b.shape[2] or a.shape[2] == 0:
        raise ValueError(
            f"{a_name} (B, T, R, H) and {b_name} (B, T, R, D) must agree in B, T and R >= 1, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def kronecker_rows(parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "B T R D"]:
    """Row r of B from its order-(p-1) parts, vec(b_r (x) c_r (x) ..): entry j_c d_b + i_b = b[i_b] c[j_c].

    The first part runs fastest (vec stacks columns), so RoPE on B is RoPE on that part alone: I (x) T_t.

    Args:
        parts: at least one tensor (B, T, R, d_i) each, sizes of 1 broadcast; D is the product of the d_i.

    Source: Zhang et al. 2025, Appendix C, Theorem C.1.
    """
    if not parts:
        raise ValueError("parts must hold at least one tensor, got none")
    rows = parts[0]
    for part in parts[1:]:
        rows = (part.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)
    return rows


AUTHORS_KINDS = ("a", "b", "cache_a", "cache_b")


def from_authors_layout(tensor: Float[Tensor, "..."], kind: str) -> Float[Tensor, "..."]:
    """A view, in this package's rank-major layout, of a factor laid out as the authors' code does.

    Args:
        tensor: the factor.
        kind: where it comes from. "a": head factors of the training code, (.., H, R) -> (.., R, H).
            "b": feature factors of the training code, (.., R, D), which agree already. "cache_a" and
            "cache_b": decode caches, (B, M, H, S) -> (B, M, S, H) and (B, M, D, S) -> (B, M, S, D), or at
            rank 1 without the last axis, (B, M, H) -> (B, M, 1, H).

    Raises:
        ValueError: if `kind` is another word or the tensor has too few or too many axes for it.
    """
    if kind not in AUTHORS_KINDS:
        raise ValueError(f"kind must be one of {AUTHORS_KINDS}, got {kind!r}")
    is_cache = kind.startswith("cache")
    if tensor.ndim < 2 or (is_cache and tensor.ndim not in (3, 4)):
        axes = "3 or 4" if is_cache else "2 or more"
        raise ValueError(f"tensor of kind {kind!r} must have {axes} axes, got shape {tuple(tensor.shape)}")
    if kind == "b":
        return tensor
    if is_cache and tensor.ndim == 3:
        return tensor.unsqueeze(2)
    return tensor.mT


@dataclass(frozen=True)
class RecordLayout:
    """How the factors of one token lie in its cache record: [B: rank * width | A: rank * heads | pad].

    Attributes:
        rank: R >= 1.
        heads: H >= 1, the length of a head factor.
        width: D or E >= 1, the length of a feature factor (the sum of the sizes for higher orders).
        has_a: False when the head factor does not depend on the token, and hence is not cached.
        has_b: False when the feature factor is not cached: it is free of the token or lives in the K record.
    """

    rank: int
    heads: int
    width: int
    has_a: bool = True
    has_b: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "heads", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    @property
    def b_numbers(self) -> int:
        """Numbers of the B part, which comes first; A starts at this offset."""
        return self.rank * self.width if self.has_b else 0

    @property
    def a_numbers(self) -> int:
        """Numbers of the A part."""
        return self.rank * self.heads if self.has_a else 0

    @property
    def numbers(self) -> int:
        """Numbers of one record without padding: what Table 1 counts."""
        return self.b_numbers + self.a_numbers

    def padded(self, itemsize: int) -> int:
        """Width of one record in numbers of `itemsize` bytes: padded to a multiple of 16 bytes."""
        if itemsize not in (1, 2, 4, 8):
            raise ValueError(f"itemsize must be 1, 2, 4 or 8 bytes, got {itemsize!r}")
        per_read = ALIGNMENT // itemsize
        return -(-self.numbers // per_read) * per_read

    def pack(
        self, a: Float[Tensor, "B T R H"] | None, b: Float[Tensor, "B T R D"] | None
    ) -> Float[Tensor, "B T W"]:
        """One record per token, padding zero.

        Raises:
            ValueError: if a part the layout has is missing, one it lacks is given, or shapes do not fit.
        """
        self._check_part("a", a, self.has_a, self.heads)
        self._check_part("b", b, self.has_b, self.width)
        parts = [part.flatten(-2) for part in (b, a) if part is not None]
        if not parts:
            raise ValueError("this layout caches neither a nor b: there is nothing to pack")
        padding = self.padded(parts[0].dtype.itemsize) - self.numbers
        if padding:
            parts.append(parts[0].new_zeros(*parts[0].shape[:-1], padding))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def views(
        self, record: Float[Tensor, "B T W"]
    ) -> tuple[Float[Tensor, "B T R H"] | None, Float[Tensor, "B T R D"] | None]:
        """A and B as strided views of the records, without a copy; None for a part that is not cached.

        Raises:
            ValueError: if the record is narrower than the layout.
        """
        if record.ndim != 3 or record.shape[-1] < self.numbers:
            raise ValueError(
                f"record must have shape (B, T, W) with W >= {self.numbers}, got {tuple(record.shape)}"
            )
        b = record[..., : self.b_numbers].unflatten(-1, (self.rank, self.width)) if self.has_b else None
        a = (
            record[..., self.b_numbers : self.numbers].unflatten(-1, (self.rank, self.heads))
            if self.has_a
            else None
        )
        return a, b

    def _check_part(self, name: str, part: Tensor | None, cached: bool, last: int) -> None:
        if (part is not None) != cached:
            raise ValueError(
                f"{name} must be {'given' if cached else 'None'}: the layout has_{name}={cached}"
            )
        if part is not None and (part.ndim != 4 or tuple(part.shape[2:]) != (self.rank, last)):
            raise ValueError(f"{name} must have shape (B, T, {self.rank}, {last}), got {tuple(part.shape)}")
