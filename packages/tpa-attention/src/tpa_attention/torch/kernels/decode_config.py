"""How the decode kernel is cut: tile sizes, warps, stages, query form and splits, from sizes the host knows.

Decoding is bound by memory. What counts is that every multiprocessor always has tens of kilobytes on their
way and enough warps to hide what happens between two tiles, so programs are small, a warp per 16 rows and
tiles of 32 tokens, and as many stand side by side as registers and shared memory hold. The splits fill that
many programs once; lengths divide among them on the device. Bytes per token, the floor, are

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

MAX_QUERIES = 16
TUNED_FILE = Path(__file__).with_name("decode_tuned.json")
_LONG = 1 << 14  # cached tokens from which a cache counts as long
_SHARED_BYTES = 227 << 10  # of a Hopper multiprocessor, which has this many 32-bit registers, too
_REGISTERS = 1 << 16
_THREAD_REGISTERS = 168  # per thread: enough for one rank of 64 features and 16 rows per warp
_MAX_ROWS = 128
UNROLLED_RANKS = 8
_MAX_COLUMNS = 64  # rows of B_Q in one tile of the factored form
_TILE_TOKENS = 32
_TILE_NUMBERS = 32 * 32  # of the output per warp: 32 registers of each thread
_STAGES = 3
_MAX_PROGRAMS = 8  # per multiprocessor: more splits than these cost more to merge than they hide
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
    tokens, numbers, registers = _TILE_TOKENS, _TILE_NUMBERS, 255
    if shape.itemsize == 4:  # without tensor cores, operands of products take registers
        tokens, numbers = tokens // 2, numbers // 2
    elif max(padded(shape.head_dim), width) <= 64 and shape.k_rank == shape.v_rank == 1:
        registers = _THREAD_REGISTERS
    block_rows = min(_MAX_ROWS, padded_rows(shape))
    while block_rows > 16 and block_rows * width > 8 * numbers:
        block_rows //= 2
    warps = min(8, max(block_rows // 16, -(-block_rows * width // numbers)))
    tile = _tile_bytes(shape, block_rows, tokens)
    stages = max(1, min(_STAGES, _SHARED_BYTES // 2 // tile + 1))
    # beside the tiles: the query and the weights
    shared = max(1, stages - 1) * tile + block_rows * (padded(shape.head_dim) + 2 * tokens) * 4
    programs = min(_MAX_PROGRAMS, _SHARED_BYTES // shared, _REGISTERS // (registers * 32 * warps))
    return Cut(tokens, block_rows, prefers_factored(shape, block_rows), warps, stages, max(1, programs))


def _tile_bytes(shape: Shape, block_rows: int, tokens: int) -> int:
    """Shared memory of one tile: all ranks at once where they are unrolled, sizes padded."""
    heads = padded(min(block_rows, padded_heads(shape.heads)))
    keys = min(shape.k_rank, UNROLLED_RANKS) * (padded(shape.head_dim) + heads)
    values = min(shape.v_rank, UNROLLED_RANKS) * (padded(shape.v_head_dim) + heads)
    return tokens * (keys + values) * shape.itemsize
