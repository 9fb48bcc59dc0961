"""Who owns which block: sequences as lists of blocks, lengths per layer, owners counted. Host numbers alone.

Token t of a sequence lies in block t // block_size at place t % block_size. Sequences may share blocks; a
block with several owners is replaced by a copy before one of them writes into it.

Source: Kwon et al. 2023 (arXiv 2309.06180), Section 4 (pages, reference counts, copy-on-write).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class PageTable:
    """The bookkeeping of a pool of blocks.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens per block.
        num_layers: layers, whose lengths differ in the middle of a step.
    """

    def __init__(self, num_blocks: int, block_size: int, num_layers: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self.blocks: dict[int, list[int]] = {}  # of each sequence, in order
        self.lengths: dict[int, list[int]] = {}  # of each sequence, per layer
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._next = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    @property
    def used(self) -> list[int]:
        """Blocks that some sequence owns."""
        return [block for block, owners in enumerate(self._owners) if owners]

    @property
    def longest_row(self) -> int:
        """Blocks of the sequence that has most of them."""
        return max((len(blocks) for blocks in self.blocks.values()), default=0)

    def of_layer(self, layer: int) -> list[int]:
        """Tokens of each sequence in a layer."""
        return [lengths[layer] for lengths in self.lengths.values()]

    def rows(self, width: int) -> list[list[int]]:
        """The block table, rows filled up with 0."""
        return [blocks + [0] * (width - len(blocks)) for blocks in self.blocks.values()]

    # ------------------------------------------------------------------------------------------- sequences

    def add(self) -> int:
        """Add an empty sequence; return its number."""
        return self._enter([], [0] * self.num_layers)

    def fork(self, sequence: int) -> int:
        """Add a sequence that shares the blocks of another."""
        blocks = self.blocks[sequence]
        for block in blocks:
            self._owners[block] += 1
        return self._enter(list(blocks), list(self.lengths[sequence]))

    def free(self, sequence: int) -> None:
        """Forget a sequence; blocks that it alone owned are free again."""
        for block in self.blocks.pop(sequence):
            self._disown(block)
        del self.lengths[sequence]

    def crop(self, limits: Iterable[int]) -> None:
        """Keep that many tokens of each sequence at most; blocks behind them are free again."""
        for (sequence, blocks), limit in zip(self.blocks.items(), limits, strict=True):
            self.lengths[sequence] = [min(length, limit) for length in self.lengths[sequence]]
            while len(blocks) > -(-max(self.lengths[sequence]) // self.block_size):
                self._disown(blocks.pop())

    # ---------------------------------------------------------------------------------------------- tokens

    def reserve(self, layers: Sequence[int], new: int) -> tuple[list[tuple[int, int]], bool]:
        """Give every sequence the blocks that `new` tokens of these layers go to, as their only owner.

        Returns:
            Pairs (old, new) of blocks whose records are to be copied, and whether any list has changed.

        Raises:
            ValueError: if too few blocks are free; nothing has changed then.
        """
        if not new:
            return [], False
        size = self.block_size
        shared: list[tuple[list[int], int]] = []
        missing: list[list[int]] = []
        owners = list(self._owners)
        for blocks, lengths in zip(self.blocks.values(), self.lengths.values(), strict=True):
            stored = [lengths[layer] for layer in layers]
            needed = -(-(max(stored) + new) // size)
            for place in range(min(stored) // size, min(needed, len(blocks))):
                if owners[blocks[place]] > 1:
                    owners[blocks[place]] -= 1
                    shared.append((blocks, place))
            missing += [blocks] * max(0, needed - len(blocks))
        wanted = len(shared) + len(missing)
        if wanted > len(self._free):
            raise ValueError(
                f"{new} new tokens for {len(self.blocks)} sequences need {wanted} more blocks of {size}, "
                f"and {len(self._free)} of {self.num_blocks} are free"
            )
        copies = []
        for blocks, place in shared:
            old, blocks[place] = blocks[place], self._own()
            self._disown(old)
            copies.append((old, blocks[place]))
        for blocks in missing:
            blocks.append(self._own())
        return copies, wanted > 0

    def count(self, layers: Sequence[int], new: int) -> None:
        """Note that `new` tokens of these layers have been written."""
        for lengths in self.lengths.values():
            for layer in layers:
                lengths[layer] += new

    # ------------------------------------------------------------------------------------------- ownership

    def _enter(self, blocks: list[int], lengths: list[int]) -> int:
        sequence, self._next = self._next, self._next + 1
        self.blocks[sequence], self.lengths[sequence] = blocks, lengths
        return sequence

    def _own(self) -> int:
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def _disown(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block] == 0:
            self._free.append(block)

    # ----------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "block_size": self.block_size,
            "used": self.used,
            "blocks": {sequence: list(blocks) for sequence, blocks in self.blocks.items()},
            "lengths": {sequence: list(lengths) for sequence, lengths in self.lengths.items()},
            "next": self._next,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over sequences, whose blocks move to the front of this pool, shared ones as shared."""
        place = {block: i for i, block in enumerate(state["used"])}
        self.blocks = {sequence: [place[block] for block in row] for sequence, row in state["blocks"].items()}
        self.lengths = {sequence: list(lengths) for sequence, lengths in state["lengths"].items()}
        self._next = state["next"]
        self._owners = [0] * self.num_blocks
        for row in self.blocks.values():
            for block in row:
                self._owners[block] += 1
        self._free = [block for block in range(self.num_blocks - 1, -1, -1) if not self._owners[block]]
