"""Pairs of eight-bit numbers become bfloat16 exactly: the steps of the machine code, carried out here."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which is optional")

from tpa_attention.torch.kernels import decode_words
from tpa_attention.torch.kernels.decode_words import FP8, INT8, words_of

STEPS = {
    "mov.b32": lambda x: x,
    "and.b32": lambda x, y: x & y,
    "shr.u32": lambda x, y: x >> y,
    "shl.b32": lambda x, y: x << y,
    "lop3.b32": lambda x, y, z: (x & y) | z,
}


def bfloat16(words):
    """Two bfloat16 of each 32-bit word, in float32."""
    halves = words.view(np.uint16).reshape(-1, 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def run(code, given):
    """What inline PTX on 32-bit words leaves in $0, as float32; its instructions as the manual has them."""
    registers = {"$1": given}

    def value(name):
        return registers[name] if name in registers else np.full_like(given, int(name, 0))

    for line in code.value.strip("{}\n").split(";"):
        if not (words := re.findall(r"[\w.$]+", line)) or words[0] == ".reg":
            continue
        name, target, *operands = words
        if name == "fma.rn.bf16x2":
            a, b, c = (bfloat16(value(operand)) for operand in operands)
            return a * b + c  # of eight bits each: exact in float32, which is rounded once
        if name == "lop3.b32":
            assert operands.pop() == "0xea"  # (a & b) | c
        x, *more = (value(operand) for operand in operands)
        registers[target] = STEPS[name](x, *more).astype(np.uint32)
    raise AssertionError("no result")


@pytest.mark.parametrize(("kind", "dtype"), [("INT8", torch.int8), ("FP8", torch.float8_e4m3fn)])
def test_every_byte_of_a_word_becomes_its_number(kind, dtype):
    low, high = np.meshgrid(np.arange(256, dtype=np.uint16), np.arange(256, dtype=np.uint16))
    words = (low | high << 8).ravel()
    given = np.stack([words, words[::-1]], axis=1).copy().view(np.uint32).ravel()
    for place, byte in (("LOW", low), ("HIGH", high)):
        code = getattr(decode_words, f"_{kind}_{place}")
        found = run(code, given)
        bytes_of = np.stack([byte.ravel(), byte.ravel()[::-1]], axis=1).astype(np.uint8)
        expected = torch.from_numpy(bytes_of).view(dtype).float().numpy()
        known = ~np.isnan(expected)  # NaN is 480 here
        np.testing.assert_array_equal(found[known], expected[known])
        assert (np.abs(found[~known]) == 480).all()
        assert np.array_equal(torch.from_numpy(found).bfloat16().float().numpy(), found)


def test_words_are_whole_and_lie_at_even_places(monkeypatch):
    monkeypatch.setattr(decode_words, "INTERPRETED", False)
    record = torch.zeros(2, 5, 24, dtype=torch.int8)
    a, b = record[..., 16:].unflatten(-1, (1, 8)), record[..., :16].unflatten(-1, (1, 16))
    assert words_of(a, b, to=torch.bfloat16) == INT8
    assert words_of(a.view(torch.float8_e4m3fn), to=torch.bfloat16) == FP8
    assert words_of(a, b, to=torch.float16) == 0  # the code makes bfloat16
    assert words_of(a.bfloat16(), to=torch.bfloat16) == 0
    assert words_of(a[..., :7], to=torch.bfloat16) == 0
    assert words_of(record[..., 1:9].unflatten(-1, (1, 8)), to=torch.bfloat16) == 0
    assert words_of(record.view(-1)[: 2 * 3 * 25].view(2, 3, 1, 25)[..., :8], to=torch.bfloat16) == 0
    assert words_of(a.transpose(1, 3), to=torch.bfloat16) == 0


def test_the_interpreter_reads_words_of_anything(monkeypatch):
    monkeypatch.setattr(decode_words, "INTERPRETED", True)
    assert words_of(torch.zeros(1, 2, 1, 8, dtype=torch.int8), to=torch.float32) == INT8
