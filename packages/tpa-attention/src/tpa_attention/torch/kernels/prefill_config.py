"""How the prefill kernels are cut: tiles, warps and stages, and how many heads are expanded at a time.

Attention of T queries to M keys is bound by arithmetic, so tiles are as large as registers allow. Q, K and V,
and in the backward pass their gradients, exist for some heads at a time. In numbers, O being B T H E of them,

    forward   3 B T D heads  ~  O          backward   6 B T D heads  ~  1.5 O          for D = E and T = M

unless so few heads would leave multiprocessors idle, where sequences are few and short.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3; Dao 2023 (arXiv 2307.08691), the tiling.
"""

import functools
from dataclasses import dataclass

from .decode_config import padded

FORWARD_SHARE, BACKWARD_SHARE = 3, 4  # parts in which the heads are expanded
_PROGRAMS_PER_PROCESSOR = 8  # two run at a time; under a causal order they differ in length
_BLOCK = 64  # tokens of a program, about


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel.

    Args:
        queries: per tile, a power of two >= 16.
        keys: per tile, a power of two >= 16.
        num_warps: warps per program.
        num_stages: tiles on their way at once; 1: the loop is not pipelined.
        registers: per thread at most, so that more programs run side by side; None: what the compiler likes.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Options of the launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, **limit}


@dataclass(frozen=True)
class Plan:
    """The three kernels of a call.

    Args:
        forward: outputs and log-sum-exps; streams K and V.
        grad_q: gradients of Q; streams K and V.
        grad_kv: gradients of K and V; streams Q and the gradient of O.
        heads: that are expanded at a time; None: see `choose_heads`.
    """

    forward: Tile
    grad_q: Tile
    grad_kv: Tile
    heads: int | None = None


@functools.lru_cache(maxsize=256)
def choose_plan(itemsize: int, head_dim: int, v_head_dim: int) -> Plan:
    """The plan of a call.

    In 16 bits up to a width of 64 it is the fastest that was measured on an H100: two programs share a
    multiprocessor, of the gradients of K and V three, at the price of registers that are read back. The
    others follow from what sm_90 makes of them.

    Args:
        itemsize: bytes of a number: 2 for tensor cores, 4 for float32, which is multiplied without them.
        head_dim: D.
        v_head_dim: E.
    """
    width = max(padded(head_dim), padded(v_head_dim))
    if itemsize > 2:
        if width <= 64:
            return Plan(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
        return Plan(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
    if width <= 64:
        return Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 2, 168))
    if width <= 128:
        return Plan(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2))
    return Plan(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1))


def choose_heads(share: int, batch: int, tokens: int, heads: int, processors: int) -> int:
    """Heads that are expanded at a time: 1 / share of all, or as many as keep every processor busy.

    Args:
        share: parts, if each of them fills the device.
        batch: sequences.
        tokens: T.
        heads: h.
        processors: multiprocessors of the device.
    """
    blocks = batch * -(-tokens // _BLOCK)
    busy = -(-processors * _PROGRAMS_PER_PROCESSOR // max(1, blocks))
    pieces = max(1, min(share, heads // min(busy, heads)))
    return -(-heads // pieces)
