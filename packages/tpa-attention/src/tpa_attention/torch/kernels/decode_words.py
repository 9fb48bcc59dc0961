"""Eight-bit numbers two by two, as 16-bit words, and how a word becomes two bfloat16: exactly, bit by bit.

The compiler's conversions take four instructions and more per number, some of which run on few units. Here

    int8   x = f - c,   f = 128 + its low seven bits: they are the mantissa of a bfloat16 with the exponent of
                        128;   c = 128, or 256 where the sign bit is set, which is the lowest bit of exponents
    fp8    sign, four bits of exponent and three of mantissa at their places in a bfloat16 are 2^-120 of the
           number, subnormal ones too; NaN, which no quantised cache holds, would become 480

so that one fused multiply-add ends both, for two words at a time. In the interpreter, which has no machine
code, words are taken apart by shifts.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

INT8, FP8 = 1, 2  # kinds of words
_KINDS = {torch.int8: INT8, torch.float8_e4m3fn: FP8}


def words_of(*factors: Tensor, to: torch.dtype) -> int:
    """INT8 or FP8 where factors can be read as words: whole ones, that lie at even places; 0 where not.

    Args:
        factors: quantised or not, all of one type.
        to: what they are converted to; only bfloat16 on a GPU, anything in the interpreter.
    """
    kind = _KINDS.get(factors[0].dtype, 0)
    if not kind or not (to == torch.bfloat16 or INTERPRETED):
        return 0
    for factor in factors:
        even = (factor.shape[3], factor.storage_offset(), factor.data_ptr(), *factor.stride()[:3])
        if factor.stride(3) != 1 or any(number % 2 for number in even):
            return 0
    return kind


@triton.jit
def low_bytes(x, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    """The low bytes of int16 words as numbers: those at even places. Truth: `.to` of the bytes."""
    if _ASM:
        if KIND == 1:
            y = tl.inline_asm_elementwise(_INT8_LOW, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            y = tl.inline_asm_elementwise(_FP8_LOW, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        y = _number(x & 255, KIND, COMPUTE)
    return y


@triton.jit
def high_bytes(x, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    """The high bytes of int16 words as numbers: those at odd places. Truth: `.to` of the bytes."""
    if _ASM:
        if KIND == 1:
            y = tl.inline_asm_elementwise(_INT8_HIGH, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            y = tl.inline_asm_elementwise(_FP8_HIGH, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        y = _number((x >> 8) & 255, KIND, COMPUTE)
    return y


@triton.jit
def _number(x, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    byte = x.to(tl.uint8)
    if KIND == 1:
        y = byte.to(tl.int8, bitcast=True).to(COMPUTE)
    else:
        y = byte.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    return y


INTERPRETED = not isinstance(low_bytes, triton.JITFunction)
_ASM = tl.constexpr(not INTERPRETED)
_INT8 = """{{
.reg .b32 x, f, c, seven, sign, bias, minus, one;
mov.b32 seven, 0x007f007f;
mov.b32 sign, 0x00800080;
mov.b32 bias, 0x43004300;
mov.b32 minus, 0xc300c300;
mov.b32 one, 0x3f803f80;
shr.u32 x, $1, {shift};
lop3.b32 f, x, seven, bias, 0xea;
lop3.b32 c, x, sign, minus, 0xea;
fma.rn.bf16x2 $0, f, one, c;
}}"""
_INT8_LOW, _INT8_HIGH = (tl.constexpr(_INT8.format(shift=shift)) for shift in (0, 8))
_FP8 = """{{
.reg .b32 m, s, seven, sign, up, zero;
mov.b32 seven, 0x07f007f0;
mov.b32 sign, 0x80008000;
mov.b32 up, 0x7b807b80;
mov.b32 zero, 0x80008000;
{magnitude}
and.b32 m, m, seven;
{sign}
lop3.b32 m, s, sign, m, 0xea;
fma.rn.bf16x2 $0, m, up, zero;
}}"""
_FP8_LOW = tl.constexpr(_FP8.format(magnitude="shl.b32 m, $1, 4;", sign="shl.b32 s, $1, 8;"))
_FP8_HIGH = tl.constexpr(_FP8.format(magnitude="shr.u32 m, $1, 4;", sign="mov.b32 s, $1;"))
