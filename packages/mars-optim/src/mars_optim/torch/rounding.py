"""Stochastic rounding of float32 results into bfloat16 parameters.

bfloat16 keeps 8 bits of precision: an update smaller than about 1/512 of its parameter is lost by rounding
to nearest, every time. Rounding up with the probability of the part that is cut off keeps it in the mean.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_CUT_BITS = 16  # of the 32 of a float32, bfloat16 keeps the upper half


def stochastic_round_(
    target: Float[Tensor, "*shape"],
    value: Float[Tensor, "*shape"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Write a float32 tensor into a bfloat16 one, each entry rounded to a neighbour, right in the mean.

    Entries that bfloat16 represents, infinities and NaN among them, are written as they are. The result
    depends on the generator alone, so replicas that must stay equal need generators in equal states.

    Args:
        target: bfloat16, changed in place.
        value: float32.
        generator: source of the random bits, on the device of the tensors; None: torch's default one.

    Raises:
        TypeError: for other dtypes.

    Source: spec d.2; Zamirai et al. 2020 (arXiv 2010.06192).
    """
    if target.dtype != torch.bfloat16 or value.dtype != torch.float32:
        raise TypeError(
            f"target and value must be bfloat16 and float32, got {target.dtype} and {value.dtype}"
        )
    noise = torch.randint(
        1 << _CUT_BITS, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    # the carry of the cut part into the kept part is the rounding; sign and magnitude are apart, so it
    # rounds away from zero, and a carry out of the mantissa moves to the next power of two
    bits = value.contiguous().view(torch.int32)
    rounded = ((bits + noise) & (-1 << _CUT_BITS)).view(torch.float32)
    return target.copy_(torch.where(value.isfinite(), rounded, value))


def write_rounded(
    stored: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Round working copies into their storage; of equal dtype they are the storage, and nothing is done.

    Args:
        stored: tensors of one dtype.
        values: tensors of one dtype, the working one.
        stochastic: round bfloat16 stochastically; other dtypes to nearest all the same.
        generator: for stochastic rounding.
    """
    if not stored or stored[0].dtype == values[0].dtype:
        return
    if stochastic and stored[0].dtype == torch.bfloat16 and values[0].dtype == torch.float32:
        for target, value in zip(stored, values, strict=True):
            stochastic_round_(target, value, generator)
        return
    torch._foreach_copy_(list(stored), list(values))  # pyright: ignore[reportPrivateImportUsage]
