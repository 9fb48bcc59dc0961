"""How the decode kernel is cut: tile sizes, warps, stages, query form and splits, from sizes the host knows.

Decoding is bound by memory. What counts is that every multiprocessor always has tens of kilobytes on their
way, and few instructions and no spills between two tiles: eight warps in two programs, tiles of 32 or 64
tokens. On an H100 this was within 2 % of the fastest cut for every 16-bit shape of the benchmarks, and so was
the full q in place of its factors: with tensor cores their second product costs more steps than it saves.
The splits fill that many programs once; lengths divide among them on the device. Bytes per token, the floor,

    (R_K (D + h) + R_V (E + h)) itemsize.

Nothing here reads the device's memory or depends on lengths that lie there: a call with the same shapes is
cut the same way, as a CUDA graph needs, and no kernel is compiled again because a cache has grown within its
bucket. `decode_tuned.json` overrules the rule where `benchmarks/bench_decode.py --tune` has measured.
Triton's autotuner would measure again for every length.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithm 3 (split caches), Appendix A.4 (the query's form).
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TUNED_FILE = Path(__file__).with_name("decode_tuned.json")
_LONG = 1 << 14  # cached tokens from which a cache counts as long
_SHARED_BYTES = 227 << 10  # of a Hopper multiprocessor
_REGISTERS = 1 << 16  # of a multiprocessor, of 32 bits
_WARPS = 8  # of one: with so many, a thread may use all the registers it can address
_TILE_BYTES = 24 << 10  # twice that in flight per program and two programs: far more than latency asks for
_WARP_NUMBERS = 64 * 32  # of the output: 64 registers of each thread
_STAGES = 3
_MAX_ROWS = 128
UNROLLED_RANKS = 8
_MAX_COLUMNS = 64  # rows of B_Q in one tile of the factored form
_OVERHEAD_TILES = 4  # what forming the query, storing and merging a part costs, in tiles


@dataclass(frozen=True)
class Shape:
    """What the cut depends on; `long` is the bucket of the cache's length.

    Args:
        heads: h >= 1.
        head_dim: D of queries and keys.
        v_head_dim: E.
        q_rank: R_Q, None for a Q that is not factorised.
        k_rank: R_K.
        v_rank: R_V.
        queries: N, 1 to 16.
        itemsize: bytes of a cached number.
        long: whether the cache holds 2^14 tokens or more.
    """

    heads: int
    head_dim: int
    v_head_dim: int
    q_rank: int | None
    k_rank: int
    v_rank: int
    queries: int
    itemsize: int
    long: bool

    @property
    def bytes_per_token(self) -> int:
        """Bytes that must be read per cached token."""
        keys = self.k_rank * (self.head_dim + self.heads)
        return (keys + self.v_rank * (self.v_head_dim + self.heads)) * self.itemsize


@dataclass(frozen=True)
class Cut:
    """One way to cut the kernel.

    Args:
        block_m: cached tokens per tile, a power of two >= 16.
        block_rows: rows (query, head) per program, a power of two >= 16.
        factored: scores from the factors of Q; False: from q, formed once per program.
        num_warps: warps per program.
        num_stages: tiles in the pipeline; 1: the loop is not pipelined.
        programs: programs that are to run side by side on a multiprocessor; their registers are limited to
            what this leaves, and the cache is split into as many parts.
    """

    block_m: int
    block_rows: int
    factored: bool
    num_warps: int
    num_stages: int
    programs: int

    @property
    def registers(self) -> int:
        """What a thread may use so that `programs` fit, in the steps in which hardware allocates."""
        return max(32, min(255, _REGISTERS // (self.programs * self.num_warps * 32) // 8 * 8))


def load_tuned(file: Path = TUNED_FILE) -> dict[tuple[str, Shape], Cut]:
    """(name of the device, shape) -> what was fastest there.

    Args:
        file: as `dump_tuned` writes it.
    """
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return {(entry["device"], Shape(**entry["shape"])): Cut(**entry["cut"]) for entry in entries}


def dump_tuned(tuned: dict[tuple[str, Shape], Cut]) -> str:
    """The text of such a file, an entry per line."""
    lines = [
        json.dumps({"device": device, "shape": asdict(shape), "cut": asdict(cut)})
        for (device, shape), cut in tuned.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


TUNED = load_tuned()


def is_long(capacity: int) -> bool:
    """The bucket of a cache that holds `capacity` tokens."""
    return capacity >= _LONG


@functools.lru_cache(maxsize=1024)
def choose_cut(device: str, shape: Shape) -> Cut:
    """The measured cut of a shape on a device, else the one that follows from its bytes and registers.

    Args:
        device: `torch.cuda.get_device_name`, or any other name for a device without entries.
        shape: sizes of the call.
    """
    return TUNED.get((device, shape)) or _rule(shape)


def prefers_factored(shape: Shape, block_rows: int) -> bool:
    """Whether scores from the factors of Q cost less than from q, in the tiles that are multiplied.

    Per cached token and rank of K, a program with n queries multiplies n R_Q rows of B_Q with D numbers and
    mixes them into its rows: n R_Q (D + rows) against rows D. For one query this is R_Q (D + h) < h D.

    Source: Zhang et al. 2025, Appendix A.4.
    """
    if shape.q_rank is None:
        return False
    columns = padded(queries_per_program(shape.heads, block_rows, shape.queries) * shape.q_rank)
    rows, features = min(block_rows, padded_rows(shape)), padded(shape.head_dim)
    return columns <= _MAX_COLUMNS and columns * (features + rows) < rows * features


def padded(size: int) -> int:
    """The next power of two, at least the 16 that a matrix instruction wants."""
    return max(16, 1 << (size - 1).bit_length())


def padded_heads(heads: int) -> int:
    """Rows of one query: heads padded to a power of two, so a tile has whole queries or a part of one."""
    return 1 << (heads - 1).bit_length()


def padded_rows(shape: Shape) -> int:
    """Rows of all queries, a power of two too."""
    return padded(shape.queries * padded_heads(shape.heads))


def queries_per_program(heads: int, block_rows: int, queries: int) -> int:
    """Queries that share one program."""
    return min(queries, max(1, block_rows // padded_heads(heads)))


@functools.lru_cache(maxsize=1024)
def choose_splits(groups: int, span: int, block_m: int, slots: int) -> int:
    """Parts in which the cache is read in parallel.

    Programs run in waves of `slots`, and a wave takes as long as the tiles of one part and what surrounds
    them. The fewest parts that make this shortest are chosen, out of those that fill whole waves.

    Args:
        groups: programs per part: sequences times the programs that share the tokens of one.
        span: tokens that the longest sequence can have to read: capacity, or less with a window.
        block_m: tokens per tile.
        slots: programs that run at the same time on the device.
    """
    tiles = -(-max(1, span) // block_m)

    def cost(splits: int) -> int:
        return -(-groups * splits // slots) * (-(-tiles // splits) + _OVERHEAD_TILES)

    options = {1} | {min(tiles, max(1, waves * slots // groups)) for waves in range(1, 5)}
    # a part of whole tiles may be as long with fewer parts
    options = {-(-tiles // -(-tiles // splits)) for splits in options}
    return min(sorted(options), key=cost)


def _rule(shape: Shape) -> Cut:
    width = padded(shape.v_head_dim)
    single = shape.itemsize == 4  # without tensor cores, operands of products take registers
    numbers = _WARP_NUMBERS // 2 if single else _WARP_NUMBERS
    block_rows = min(_MAX_ROWS, padded_rows(shape))
    while block_rows > 16 and block_rows * width > 8 * numbers:
        block_rows //= 2
    warps = min(8, max(2, block_rows // 16, -(-block_rows * width // numbers)))
    if block_rows == 32:
        warps = max(4, warps)
    tokens = 64 if _tile_bytes(shape, block_rows, 64) <= _TILE_BYTES else 32
    if single:
        tokens = 16
    tile = _tile_bytes(shape, block_rows, tokens)
    stages = max(1, min(_STAGES, _SHARED_BYTES // 2 // tile + 1))
    # beside the tiles: the query and the weights
    shared = max(1, stages - 1) * tile + block_rows * (padded(shape.head_dim) + 2 * tokens) * 4
    programs = max(1, min(_WARPS // warps, _SHARED_BYTES // shared))
    return Cut(tokens, block_rows, single and prefers_factored(shape, block_rows), warps, stages, programs)


def _tile_bytes(shape: Shape, block_rows: int, tokens: int) -> int:
    """Shared memory of one tile: all ranks at once where they are unrolled, else one; sizes padded."""
    heads = padded(min(block_rows, padded_heads(shape.heads)))
    unrolled = max(shape.k_rank, shape.v_rank) <= UNROLLED_RANKS
    keys = (shape.k_rank if unrolled else 1) * (padded(shape.head_dim) + heads)
    values = (shape.v_rank if unrolled else 1) * (padded(shape.v_head_dim) + heads)
    return tokens * (keys + values) * shape.itemsize
