"""A factor cache in pages: sequences of any length share one pool of blocks, and prefixes share blocks.

A block holds the records of `block_size` tokens, of every layer. A sequence is a list of blocks, its row of
the block table; token t lies in block t // block_size at place t % block_size. `fork` copies the list and not
the records: blocks count their owners, and a block with several is copied when one of them writes into it.

Which blocks are free is known on the host, so nothing waits for the device, and a call without enough of them
raises before it writes. The decode kernel reads through the table (`view`); `append` answers `LayerCache`,
and for that gathers the records of all tokens.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 (what is cached); Kwon et al. 2023 (arXiv 2309.06180),
Section 4 (pages, reference counts, copy-on-write).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.torch.cache import CacheLayout, layout_of


class PagedFactorCache:
    """Blocks of records for a changing set of sequences; rows of `append` are `sequences`, in that order.

    Args:
        config: a `CacheLayout`, or a layer or model with the attribute `cache_layout`.
        num_blocks: blocks in the pool, >= 1.
        block_size: tokens per block, >= 1.
        batch: sequences to begin with, all empty.
        device: where the pool lives; the default device if None.
        dtype: floating type of the records; the default dtype if None. Appended records are cast to it.

    Raises:
        TypeError: if `config` has no cache layout or `dtype` is not floating.
        ValueError: if a number is out of range.

    Source: Kwon et al. 2023 (arXiv 2309.06180), Section 4.
    """

    def __init__(
        self,
        config: CacheLayout | Any,
        num_blocks: int,
        block_size: int = 64,
        *,
        batch: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = layout_of(config)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("batch", batch, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._make_pools(torch.empty(0, device=device, dtype=dtype).device, dtype)
        self._forget()
        for _ in range(batch):
            self.allocate()

    def _make_pools(self, device: torch.device, dtype: torch.dtype) -> None:
        pages = (self.num_blocks, self.block_size)
        layers = range(self.layout.num_layers)
        with torch.inference_mode(False):  # in-place writes must stay possible outside inference mode
            k_width, v_width = self.layout.widths(dtype)
            self._k = [torch.zeros(*pages, k_width, device=device, dtype=dtype) for _ in layers]
            self._v = [torch.zeros(*pages, v_width, device=device, dtype=dtype) for _ in layers]
            kept = layers if self.layout.keep_positions else ()
            self._positions = [torch.zeros(*pages, device=device, dtype=torch.int32) for _ in kept]

    def _forget(self) -> None:
        self._owners = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._blocks: dict[int, list[int]] = {}  # of each sequence, in order
        self._lengths: dict[int, list[int]] = {}  # of each sequence, per layer
        self._hidden: dict[int, dict[int, Tensor]] = {}
        self._next = 0
        self._table: Tensor | None = None

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def device(self) -> torch.device:
        """Where the pool lives."""
        return self._k[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the records."""
        return self._k[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, padding of records included, used or not."""
        return sum(pool.numel() * pool.itemsize for pool in (*self._k, *self._v))

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Numbers of the sequences, in the order of the rows of every tensor that goes in or out."""
        return tuple(self._blocks)

    @property
    def block_table(self) -> Int[Tensor, "B pages"]:
        """Blocks of each sequence, int32; a row is filled up with block 0, which is not read there."""
        if self._table is None:
            longest = max(1, max((len(blocks) for blocks in self._blocks.values()), default=1))
            rows = [blocks + [0] * (longest - len(blocks)) for blocks in self._blocks.values()]
            self._table = torch.tensor(rows, dtype=torch.int32, device=self.device).view(len(rows), longest)
        return self._table

    def seq_lens(self, layer: int) -> Int[Tensor, " B"]:
        """Tokens of each sequence that a layer has stored, int32."""
        self._check_layer(layer)
        lengths = [lengths[layer] for lengths in self._lengths.values()]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def past_length(self, layer: int) -> int | Int[Tensor, " B"]:
        """Tokens stored so far: an int where all sequences are equally long."""
        self._check_layer(layer)
        lengths = {lengths[layer] for lengths in self._lengths.values()}
        return lengths.pop() if len(lengths) == 1 else self.seq_lens(layer)

    def key_positions(self, layer: int) -> Int[Tensor, "B M"] | None:
        """Positions of the stored tokens; None unless the layout keeps them."""
        self._check_layer(layer)
        return self._gathered(self._positions[layer], layer) if self._positions else None

    def last_hidden(self, layer: int) -> Float[Tensor, "B d"] | None:
        """Input of the layer at the last token; None before the first token of any sequence."""
        self._check_layer(layer)
        known = [self._hidden[sequence].get(layer) for sequence in self._blocks]
        given = [hidden for hidden in known if hidden is not None]
        if not given:
            return None
        return torch.stack([torch.zeros_like(given[0]) if hidden is None else hidden for hidden in known])

    def set_last_hidden(self, layer: int, hidden: Float[Tensor, "B d"]) -> None:
        """Keep the input of the layer at the last token, which `kv_shift` reads next time."""
        self._check_layer(layer)
        for sequence, row in zip(self._blocks, hidden.detach().clone(), strict=True):
            self._hidden[sequence][layer] = row

    def view(self, layer: int) -> tuple[Tensor, Tensor, Int[Tensor, "B pages"], Int[Tensor, " B"]]:
        """What `tpa_decode` takes to read in place: the pools of K and V, `block_table` and `seq_lens`."""
        self._check_layer(layer)
        return self._k[layer], self._v[layer], self.block_table, self.seq_lens(layer)

    # ------------------------------------------------------------------------------------------- sequences

    def allocate(self) -> int:
        """Add an empty sequence; return its number. Blocks follow when tokens do."""
        return self._add([], [0] * self.layout.num_layers, {})

    def free(self, sequence: int) -> None:
        """Forget a sequence; blocks that it alone owned are free again.

        Raises:
            KeyError: if there is no such sequence.
        """
        self._check_sequence(sequence)
        for block in self._blocks.pop(sequence):
            self._disown(block)
        del self._lengths[sequence], self._hidden[sequence]
        self._table = None

    def fork(self, sequence: int) -> int:
        """Add a sequence with the tokens of another; they share blocks until one of them writes.

        Raises:
            KeyError: if there is no such sequence.
        """
        self._check_sequence(sequence)
        blocks = self._blocks[sequence]
        for block in blocks:
            self._owners[block] += 1
        return self._add(list(blocks), list(self._lengths[sequence]), dict(self._hidden[sequence]))

    def reorder(self, beam_idx: Int[Tensor, " B"] | Sequence[int]) -> None:
        """Row i becomes what row `beam_idx[i]` was, by forks: no record moves. Sequences get new numbers.

        Raises:
            ValueError: if there is not one index of a row per row.
        """
        index = beam_idx.tolist() if isinstance(beam_idx, Tensor) else list(beam_idx)
        old = self.sequences
        if len(index) != len(old) or not all(isinstance(i, int) and 0 <= i < len(old) for i in index):
            raise ValueError(f"beam_idx must hold {len(old)} indices of rows, got {index!r}")
        for i in index:
            self.fork(old[i])
        for sequence in old:
            self.free(sequence)

    def crop(self, n: int) -> None:
        """Keep the first `n` tokens of each sequence; blocks behind them are free again.

        Raises:
            ValueError: if `n` is negative, or a last hidden state is kept (`kv_shift`) and tokens would go.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n!r}")
        shorter = any(max(lengths) > n for lengths in self._lengths.values())
        if shorter and any(self._hidden.values()):
            raise ValueError(f"crop cannot go back under kv_shift: one hidden state is kept, got n={n!r}")
        for sequence, blocks in self._blocks.items():
            self._lengths[sequence] = [min(length, n) for length in self._lengths[sequence]]
            while len(blocks) > -(-max(self._lengths[sequence]) // self.block_size):
                self._disown(blocks.pop())
        self._table = None

    def reset(self) -> None:
        """Empty every sequence; their numbers stay."""
        for sequence in self._blocks:
            self._hidden[sequence] = {}
        self.crop(0)

    # ---------------------------------------------------------------------------------------------- tokens

    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B M Wk"], Float[Tensor, "B M Wv"], Int[Tensor, " B"] | None]:
        """`write`, and then the records of all tokens in order, gathered, with their number per sequence.

        None for the lengths means that all sequences are equally long. Decode from `view` to gather nothing.
        """
        self.write(layer, k, v, positions)
        lengths = None if isinstance(self.past_length(layer), int) else self.seq_lens(layer)
        return self._gathered(self._k[layer], layer), self._gathered(self._v[layer], layer), lengths

    @torch.no_grad()
    def write(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> None:
        """Write T records behind those of each sequence.

        Args:
            layer: index in [0, num_layers).
            k: K records, as wide as the layout says, padded or not.
            v: V records, alike.
            positions: positions of the tokens; their place in the sequence if None. Kept only if the layout
                says so.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if a shape does not fit or too few blocks are free; nothing has been written then.
        """
        self._check_layer(layer)
        new = k.shape[1]
        self._check_records("k", k, self.layout.k_numbers, self._k[layer].shape[-1], new)
        self._check_records("v", v, self.layout.v_numbers, self._v[layer].shape[-1], new)
        if positions is not None and positions.shape != (len(self._blocks), new):
            raise ValueError(
                f"positions must have shape {(len(self._blocks), new)}, got {tuple(positions.shape)}"
            )
        self._reserve(layer, new)
        places = [[lengths[layer] + t for t in range(new)] for lengths in self._lengths.values()]
        pages = [
            [blocks[place // self.block_size] for place in row]
            for blocks, row in zip(self._blocks.values(), places, strict=True)
        ]
        place = torch.tensor(places, device=self.device, dtype=torch.long).view(k.shape[:2])
        at = (
            torch.tensor(pages, device=self.device, dtype=torch.long).view(k.shape[:2]),
            place % self.block_size,
        )
        self._k[layer][(*at, slice(0, k.shape[2]))] = k.to(self.device, self.dtype)
        self._v[layer][(*at, slice(0, v.shape[2]))] = v.to(self.device, self.dtype)
        if self._positions:
            self._positions[layer][at] = (place if positions is None else positions).to(
                self.device, torch.int32
            )
        for lengths in self._lengths.values():
            lengths[layer] += new

    def _reserve(self, layer: int, new: int) -> None:
        """Give every sequence the blocks that `new` tokens of a layer go to, as their only owner."""
        size = self.block_size
        shared: list[tuple[list[int], int]] = []
        missing: list[list[int]] = []
        owners = list(self._owners)
        for blocks, lengths in zip(self._blocks.values(), self._lengths.values(), strict=True):
            start, stop = lengths[layer], lengths[layer] + new
            needed = -(-stop // size)
            for place in range(start // size, min(needed, len(blocks))) if new else ():
                if owners[blocks[place]] > 1:
                    owners[blocks[place]] -= 1
                    shared.append((blocks, place))
            missing += [blocks] * max(0, needed - len(blocks))
        wanted = len(shared) + len(missing)
        if wanted > len(self._free):
            raise ValueError(
                f"{new} new tokens for {len(self._blocks)} sequences need {wanted} more blocks of {size}, "
                f"and {len(self._free)} of {self.num_blocks} are free"
            )
        for blocks, place in shared:
            old, blocks[place] = blocks[place], self._own()
            for pool in (*self._k, *self._v, *self._positions):
                pool[blocks[place]] = pool[old]
            self._disown(old)
        for blocks in missing:
            blocks.append(self._own())
        if wanted:
            self._table = None

    def _gathered(self, pool: Tensor, layer: int) -> Tensor:
        longest = max((lengths[layer] for lengths in self._lengths.values()), default=0)
        pages = self.block_table[:, : -(-longest // self.block_size)].long()
        return pool[pages].flatten(1, 2)[:, :longest]

    # ------------------------------------------------------------------------------------------- ownership

    def _add(self, blocks: list[int], lengths: list[int], hidden: dict[int, Tensor]) -> int:
        sequence, self._next = self._next, self._next + 1
        self._blocks[sequence], self._lengths[sequence], self._hidden[sequence] = blocks, lengths, hidden
        self._table = None
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the pool and return the cache itself; another `dtype` re-lays the records.

        Raises:
            TypeError: if `dtype` is not floating.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        state = self.state_dict()
        target = self.device if device is None else torch.device(device)
        self._make_pools(target, self.dtype if dtype is None else dtype)
        self.load_state_dict(state)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The used blocks of every layer without padding, and who owns them: plain lists and tensors."""
        used = [block for block, owners in enumerate(self._owners) if owners]
        state: dict[str, Any] = {
            "block_size": self.block_size,
            "used": used,
            "blocks": {sequence: list(blocks) for sequence, blocks in self._blocks.items()},
            "lengths": {sequence: list(lengths) for sequence, lengths in self._lengths.items()},
            "hidden": {sequence: dict(hidden) for sequence, hidden in self._hidden.items()},
            "next": self._next,
        }
        for layer in range(self.layout.num_layers):
            state[f"k.{layer}"] = self._k[layer][used, :, : self.layout.k_numbers].clone()
            state[f"v.{layer}"] = self._v[layer][used, :, : self.layout.v_numbers].clone()
            if self._positions:
                state[f"positions.{layer}"] = self._positions[layer][used].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over sequences and blocks, shared ones as shared; pool size, device and dtype stay.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if blocks differ in size, are too many or do not fit the layout; nothing changes then.
        """
        if state["block_size"] != self.block_size:
            raise ValueError(f"block_size must be {self.block_size}, got {state['block_size']}")
        used = list(state["used"])
        if len(used) > self.num_blocks:
            raise ValueError(f"num_blocks must be >= the {len(used)} blocks in use, got {self.num_blocks}")
        layers = range(self.layout.num_layers)
        for name, numbers in (("k", self.layout.k_numbers), ("v", self.layout.v_numbers)):
            for layer in layers:
                expected, got = (len(used), self.block_size, numbers), tuple(state[f"{name}.{layer}"].shape)
                if got != expected:
                    raise ValueError(f"{name}.{layer} must have shape {expected}, got {got}")
        kept = [state[f"positions.{layer}"] for layer in layers] if self._positions else []
        place = {block: i for i, block in enumerate(used)}  # blocks move to the front of this pool
        blocks = {sequence: [place[block] for block in row] for sequence, row in state["blocks"].items()}
        self._forget()
        for layer in layers:
            self._k[layer][: len(used), :, : self.layout.k_numbers] = state[f"k.{layer}"]
            self._v[layer][: len(used), :, : self.layout.v_numbers] = state[f"v.{layer}"]
        for pool, positions in zip(self._positions, kept, strict=True):
            pool[: len(used)] = positions
        for row in blocks.values():
            for block in row:
                self._owners[block] += 1
        self._free = [block for block in self._free if not self._owners[block]]
        self._blocks, self._next = blocks, state["next"]
        self._lengths = {sequence: list(lengths) for sequence, lengths in state["lengths"].items()}
        self._hidden = {
            sequence: {layer: hidden.to(self.device, copy=True) for layer, hidden in kept_hidden.items()}
            for sequence, kept_hidden in state["hidden"].items()
        }

    # ---------------------------------------------------------------------------------------------- checks

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layout.num_layers:
            raise IndexError(f"layer must be in [0, {self.layout.num_layers}), got {layer!r}")

    def _check_sequence(self, sequence: int) -> None:
        if sequence not in self._blocks:
            raise KeyError(f"sequence must be one of {self.sequences}, got {sequence!r}")

    def _check_records(self, name: str, records: Tensor, numbers: int, width: int, new: int) -> None:
        batch = len(self._blocks)
        fits = records.dim() == 3 and records.shape[:2] == (batch, new)
        if not fits or not numbers <= records.shape[2] <= width:
            raise ValueError(
                f"{name} must have shape (sequences, tokens, width) = ({batch}, {new}, {numbers}..{width}), "
                f"got {tuple(records.shape)}"
            )
