"""How the prefill kernels are cut: tiles, warps, stages, which operands are expanded, how heads are grouped.

Attention of T queries to M keys is bound by arithmetic, so tiles are as large as registers allow. An operand
that is read again and again, K and V by every block of queries, can be built from its factors each time,

    R tile multiply-adds and as many conversions, on tiles that live in registers,

or once, into memory that is given back at the end of the call ("expanded", numbers per token: h D). Building
costs time with every block that reads the operand, expanding once per token; so operands of higher rank and
long sequences are expanded. Neither is kept for the backward pass, and both round at the same place.

Gradients of B are sums over heads. A program owns a block of tokens and a group of heads, and adds up the
share of its heads where no other program writes; what the groups hold is summed at the end. There are as few
groups as fill the device, so their number times the tokens of a call is bounded:

    groups * tokens * batch <= max(tokens * batch, programs that fill the device * tokens per program).

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3; Dao 2023 (arXiv 2307.08691), the tiling.
"""

from dataclasses import dataclass

from .decode_config import padded

MAX_WIDTH = 256  # D and E; wider tiles fit no multiprocessor
BUILT_RANKS = 4  # streamed operands of more ranks are always expanded
_LONG = 1024  # tokens from which expanding a streamed operand costs less than building it in each block
_PROGRAMS_PER_PROCESSOR = 4  # two run at a time; under a causal order they differ in length


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
    """The three kernels of a call, and what they share.

    Args:
        forward: outputs and log-sum-exps; streams K and V.
        grad_q: gradients of the query's factors; streams K and V.
        grad_kv: gradients of the factors of K and V; streams Q.
        expand_q: whether Q is expanded where it is streamed.
        expand_kv: whether K and V are.
        groups: groups of heads in the backward pass; None: as few as fill the device.
    """

    forward: Tile
    grad_q: Tile
    grad_kv: Tile
    expand_q: bool
    expand_kv: bool
    groups: int | None = None


def choose_plan(
    itemsize: int,
    head_dim: int,
    v_head_dim: int,
    ranks: tuple[int | None, int, int],
    tokens: tuple[int, int],
) -> Plan:
    """The plan of a call.

    Args:
        itemsize: bytes of a number: 2 for tensor cores, 4 for float32, which is multiplied without them.
        head_dim: D.
        v_head_dim: E.
        ranks: (R_Q, R_K, R_V), R_Q None for a Q that is not factorised.
        tokens: (T, M).
    """
    q_rank, k_rank, v_rank = ranks
    width = max(padded(head_dim), padded(v_head_dim))
    forward, grad_q, grad_kv = _tiles(itemsize, width)
    return Plan(
        forward,
        grad_q,
        grad_kv,
        expand_q=q_rank is not None and (q_rank > 2 or tokens[1] >= _LONG),
        expand_kv=max(k_rank, v_rank) > 2 or tokens[0] >= _LONG,
    )


def choose_groups(batch: int, blocks: int, heads: int, processors: int) -> int:
    """Groups of heads that give every processor some programs, no more.

    Args:
        batch: sequences.
        blocks: blocks of tokens per sequence.
        heads: h.
        processors: multiprocessors of the device.
    """
    wanted = -(-processors * _PROGRAMS_PER_PROCESSOR // max(1, batch * blocks))
    per_group = -(-heads // min(heads, wanted))
    return -(-heads // per_group)


def _tiles(itemsize: int, width: int) -> tuple[Tile, Tile, Tile]:
    """Tiles of the three kernels, chosen by what sm_90 makes of them.

    Up to a width of 64 shared memory allows two programs on a multiprocessor. The forward loops keep all in
    registers; of the backward ones, with their four tiles, a few addresses and masks are read back.
    """
    if itemsize > 2:
        if width <= 64:
            return Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
        return Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)
    if width <= 64:
        return Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)
    if width <= 128:
        return Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)
    return Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)
