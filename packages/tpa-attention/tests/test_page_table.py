"""Bookkeeping of pages against a table of tokens: nobody's page is written by another, none is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.torch.page_table import PageTable

BLOCKS, SIZE, LAYERS = 12, 3, 2


class Pages:
    """Pages that hold what was written, and what every sequence should read."""

    def __init__(self):
        self.table = PageTable(BLOCKS, SIZE, LAYERS)
        self.memory = [[None] * SIZE for _ in range(BLOCKS)]
        self.truth = {}
        self.count = 0

    def write(self, new):
        try:
            copies, changed = self.table.reserve(range(LAYERS), new)
        except ValueError:
            return False
        assert changed or not copies
        for old, copy in copies:
            self.memory[copy] = list(self.memory[old])
        for sequence, blocks in self.table.blocks.items():
            length = self.table.lengths[sequence][0]
            for place in range(length, length + new):
                self.count += 1
                self.memory[blocks[place // SIZE]][place % SIZE] = self.count
                self.truth[sequence].append(self.count)
        self.table.count(range(LAYERS), new)
        return True

    def check(self):
        owned = set()
        for sequence, blocks in self.table.blocks.items():
            tokens = [token for block in blocks for token in self.memory[block]]
            length = self.table.lengths[sequence][0]
            assert tokens[:length] == self.truth[sequence]
            owned |= set(blocks)
        assert sorted(owned) == self.table.used
        assert self.table.free_blocks == BLOCKS - len(owned)


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(1, 5),
    steps=st.lists(st.tuples(st.sampled_from("awwffcx"), st.integers(0, 5)), max_size=14),
)
def test_every_sequence_reads_what_was_written_to_it(start, steps):
    pages = Pages()
    for what, n in [("a", 0), ("w", start), ("f", 0), ("w", 1), *steps]:
        sequences = list(pages.table.blocks)
        one = sequences[n % len(sequences)] if sequences else None
        if what == "a":
            pages.truth[pages.table.add()] = []
        elif what == "w":
            before = pages.table.state()
            if not pages.write(n):
                assert pages.table.state() == before
        elif one is None:
            continue
        elif what == "f":
            pages.truth[pages.table.fork(one)] = list(pages.truth[one])
        elif what == "c":
            pages.table.crop([n] * len(sequences))
            pages.truth = {sequence: tokens[:n] for sequence, tokens in pages.truth.items()}
        else:
            pages.table.free(one)
            del pages.truth[one]
        pages.check()


def test_too_few_blocks_are_counted_with_the_copies_that_sharing_asks_for():
    table = PageTable(3, 4, 1)
    first = table.add()
    table.reserve([0], 6)
    table.count([0], 6)
    table.fork(first)
    table.fork(first)
    with pytest.raises(ValueError, match="3 sequences need 2 more blocks of 4, and 1 of 3"):
        table.reserve([0], 1)
    assert table.reserve([0], 0) == ([], False)
    table.free(first)
    assert table.reserve([0], 1) == ([(1, 2)], True)


def test_a_layer_behind_the_others_gets_no_second_page():
    table = PageTable(4, 2, 2)
    table.add()
    assert table.reserve([0], 2) == ([], True)
    table.count([0], 2)
    assert table.reserve([1], 2) == ([], False)
    table.count([1], 2)
    assert table.of_layer(1) == [2]
    assert table.rows(3) == [[0, 0, 0]]
    assert table.longest_row == 1


def test_a_state_moves_to_the_front_of_another_pool():
    table = PageTable(6, 2, 1)
    gone, kept = table.add(), table.add()
    table.reserve([0], 3)
    table.count([0], 3)
    other = table.fork(kept)
    table.free(gone)
    small = PageTable(2, 2, 1)
    small.load(table.state())
    assert small.blocks == {kept: [0, 1], other: [0, 1]}
    assert small.free_blocks == 0
    small.free(kept)
    assert small.free_blocks == 0
    small.free(other)
    assert small.free_blocks == 2
    assert small.add() == other + 1
