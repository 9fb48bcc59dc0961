"""How the decode kernel is cut: tile sizes, warps, stages, query form and splits, from sizes the host knows.

Decoding is bound by memory, so a tile is as many tokens as keep enough bytes on their way,

    bytes per token = (R_K (D + h) + R_V (E + h)) itemsize,

and no more than leaves room for two programs per multiprocessor. Nothing here reads the device's memory or
depends on lengths that lie there: a call with the same shapes is cut the same way, as a CUDA graph needs, and
no kernel is compiled again because a cache has grown within its bucket. `TUNED` overrules the rule where
somebody has measured; Triton's autotuner would measure again for every length.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithm 3 (split caches), Appendix A.4 (the query's form).
"""

import functools
from dataclasses import dataclass

MAX_QUERIES = 16
_LONG = 1 << 14  # cached tokens from which a cache counts as long
_SHORT_TILE_BYTES, _LONG_TILE_BYTES = 12 << 10, 24 << 10
_SHARED_BYTES = 96 << 10  # of the 227 KiB of a Hopper multiprocessor: two programs side by side
_REGISTERS = 48  # float32 numbers per thread of output and logits tiles; more, and ptxas spills (sm_90)
_MAX_ROWS = 128
_MAX_COLUMNS = 64  # rows of B_Q in one tile of the factored form
_MIN_TILES = 4  # per split: the query's tile and the partial result must be worth it
_PROGRAMS_PER_PROCESSOR = 3  # two run at a time; ragged lengths leave some of them without work


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
        num_stages: tiles on their way at once; 1: the loop is not pipelined.
    """

    block_m: int
    block_rows: int
    factored: bool
    num_warps: int
    num_stages: int


# (name of the device, shape) -> what was fastest there; written by `bench_decode.py --tune`
TUNED: dict[tuple[str, Shape], Cut] = {}


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


def choose_splits(batch: int, row_blocks: int, span: int, block_m: int, processors: int) -> int:
    """Parts in which the cache is read in parallel: enough programs for the device, each with some tiles.

    Args:
        batch: sequences.
        row_blocks: programs that share the tokens of a sequence.
        span: tokens that the longest sequence can have to read: capacity, or less with a window.
        block_m: tokens per tile.
        processors: multiprocessors of the device.
    """
    wanted = -(-processors * _PROGRAMS_PER_PROCESSOR // max(1, batch * row_blocks))
    return max(1, min(wanted, span // (_MIN_TILES * block_m)))


def split_length(span: int, num_splits: int, block_m: int) -> int:
    """Tokens per split, whole tiles; the same for all sequences, so work follows the sum of their lengths."""
    tiles = -(-max(1, span) // block_m)
    return -(-tiles // num_splits) * block_m


def _rule(shape: Shape) -> Cut:
    width = padded(shape.v_head_dim)
    block_rows = min(_MAX_ROWS, padded_rows(shape))
    while block_rows > 16 and block_rows * (width + 16) > 8 * 32 * _REGISTERS:
        block_rows //= 2
    warps = 8 if block_rows * (width + 16) > 4 * 32 * _REGISTERS else 4
    wanted = _LONG_TILE_BYTES if shape.long else _SHORT_TILE_BYTES
    block_m = 128
    while block_m > 16 and (
        block_m * shape.bytes_per_token > wanted or block_rows * (width + block_m) > warps * 32 * _REGISTERS
    ):
        block_m //= 2
    stages = min(4, _SHARED_BYTES // (block_m * shape.bytes_per_token))
    return Cut(block_m, block_rows, prefers_factored(shape, block_rows), warps, max(1, stages))
