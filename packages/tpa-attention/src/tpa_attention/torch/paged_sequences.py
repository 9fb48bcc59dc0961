"""Sequences in pages: the pool of blocks, who holds which, and what the device knows of it.

A block holds the records of `block_size` tokens, of every layer. A sequence is a list of blocks, its row of
the block table; token t lies in block t // block_size at place t % block_size. `fork` copies the list and not
the records: blocks count their owners, and a block with several is copied when one of them writes into it.

Which blocks are free is known on the host (`page_table`), so nothing waits for the device. Table and lengths
on the device follow the host where sequences come, go or grow, and are written in place where shapes allow.

Source: Kwon et al. 2023 (arXiv 2309.06180), Section 4 (pages, reference counts, copy-on-write).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.torch.cache import CacheLayout, layout_of
from tpa_attention.torch.hidden_history import REWIND, HiddenHistory
from tpa_attention.torch.page_table import PageTable


class PagedSequences:
    """Everything about `PagedFactorCache`, whose arguments these are, but what tokens write and read."""

    def __init__(
        self,
        config: CacheLayout | Any,
        num_blocks: int,
        block_size: int = 64,
        *,
        batch: int = 0,
        max_len: int | None = None,
        rewind: int = REWIND,
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
            ("max_len", 1 if max_len is None else max_len, 1),
            ("rewind", rewind, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_len = max_len
        self.rewind = rewind
        self._most = batch
        self._pages = None if max_len is None else -(-max_len // block_size)
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
            self._table = torch.zeros(self._most, self._pages or 1, device=device, dtype=torch.int32)
            self._lengths = torch.zeros(len(layers), self._most, device=device, dtype=torch.int32)

    def _forget(self) -> None:
        self._host = PageTable(self.num_blocks, self.block_size, self.layout.num_layers)
        self._hidden: list[HiddenHistory | None] = [None for _ in range(self.layout.num_layers)]
        self._source: dict[int, int] = {}  # row of each sequence in the hidden states
        self._rows = 0
        self._stale_table = self._stale_rows = True

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
        return self._host.free_blocks

    @property
    def sequences(self) -> tuple[int, ...]:
        """Numbers of the sequences, in the order of the rows of every tensor that goes in or out."""
        return tuple(self._host.blocks)

    @property
    def block_table(self) -> Int[Tensor, "B pages"]:
        """Blocks of each sequence, int32; a row is filled up with block 0, which is not read there."""
        self._upload()
        return self._table[: self._rows]

    @property
    def seq_lens(self) -> Int[Tensor, " B"]:
        """Tokens that every layer holds of each sequence, int32 on the cache's device."""
        self._upload()
        return self._lengths[:, : self._rows].amin(dim=0)

    def last_hidden(self, layer: int) -> Float[Tensor, "B d"] | None:
        """Input of the layer at the last token; None before the first token of any sequence."""
        self._check_layer(layer)
        self._upload()
        history = self._hidden[layer]
        return None if history is None else history.last

    def set_last_hidden(self, layer: int, hidden: Float[Tensor, "B T d"]) -> None:
        """Take the inputs of the layer at the T new tokens; `kv_shift` reads the last one next time."""
        self._check_layer(layer)
        self._upload()
        history = self._hidden[layer]
        if history is None:
            history = self._hidden[layer] = HiddenHistory(self._rows, self.rewind, hidden)
        history.push(hidden)

    # ------------------------------------------------------------------------------------------- sequences

    def allocate(self) -> int:
        """Add an empty sequence; return its number. Blocks follow when tokens do.

        Raises:
            ValueError: if a cache of fixed shape has no row for it.
        """
        self._check_rows()
        self._stale_table = self._stale_rows = True
        return self._host.add()

    def free(self, sequence: int) -> None:
        """Forget a sequence; blocks that it alone owned are free again.

        Raises:
            KeyError: if there is no such sequence.
        """
        self._check_sequence(sequence)
        self._host.free(sequence)
        self._stale_table = self._stale_rows = True

    def fork(self, sequence: int) -> int:
        """Add a sequence with the tokens of another; they share blocks until one of them writes.

        Raises:
            KeyError: if there is no such sequence.
            ValueError: if a cache of fixed shape has no row for it.
        """
        self._check_sequence(sequence)
        self._check_rows()
        return self._fork(sequence)

    def _fork(self, sequence: int) -> int:
        new = self._host.fork(sequence)
        if sequence in self._source:
            self._source[new] = self._source[sequence]
        self._stale_table = self._stale_rows = True
        return new

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
            self._fork(old[i])
        for sequence in old:
            self.free(sequence)

    def crop(self, n: int | Sequence[int] | Int[Tensor, " B"]) -> None:
        """Keep the first `n` tokens, of each sequence its own number or one for all; free what lies behind.

        Raises:
            ValueError: if a number is negative, there is not one per sequence, or under `kv_shift` if more
                tokens would go than there are hidden states kept (`rewind`); nothing changes then.
        """
        given = n.tolist() if isinstance(n, Tensor) else n
        limits = [given] * len(self.sequences) if isinstance(given, int) else list(given)
        if len(limits) != len(self.sequences):
            raise ValueError(f"n must be an int or hold {len(self.sequences)} of them, got {n!r}")
        if min(limits, default=0) < 0 or (isinstance(given, int) and given < 0):
            raise ValueError(f"n must be >= 0, got {n!r}")
        self._upload()
        kept = []
        for layer, history in enumerate(self._hidden):
            if history is not None:
                lengths = self._host.of_layer(layer)
                left = [min(pair) for pair in zip(lengths, limits, strict=True)]
                kept.append((history, [a - b for a, b in zip(lengths, left, strict=True)], left))
        for history, back, left in kept:
            history.check_rewind(back, left)
        for history, back, left in kept:
            history.rewind(back, left)
        self._host.crop(limits)
        self._stale_table = self._stale_rows = True

    def reset(self) -> None:
        """Empty every sequence; their numbers stay."""
        self.crop(0)

    def _make_room(self, layers: Sequence[int], new: int) -> None:
        """Blocks for `new` tokens, as lists and on the device; raises before anything changes."""
        longest = max((max(self._host.of_layer(layer), default=0) for layer in layers), default=0)
        if self.max_len is not None and longest + new > self.max_len:
            raise ValueError(
                f"cache of capacity {self.max_len} holds {longest} tokens of layer {layers[0]}: "
                f"no room for {new} more"
            )
        copies, changed = self._host.reserve(layers, new)
        for old, copy in copies:
            for pool in (*self._k, *self._v, *self._positions):
                pool[copy] = pool[old]
        self._stale_table |= changed
        self._upload()

    # ------------------------------------------------------------------------------------- on the device

    def _recorded(self) -> bool:
        """Whether this call is captured or compiled, so that host numbers must not enter it."""
        if torch.compiler.is_compiling():
            return self.max_len is not None
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if captured and self.max_len is None:
            raise RuntimeError("a CUDA graph needs a cache of fixed shape, got max_len=None")
        return captured

    def _counted(self, layer: int) -> Int[Tensor, " B"]:
        """Tokens of each sequence, on the device, where `write` counts them."""
        self._upload()
        return self._lengths[layer, : self._rows]

    def _upload(self) -> None:
        """Bring table, lengths and the order of hidden states on the device up to what the host knows."""
        if not (self._stale_table or self._stale_rows):
            return
        if self._recorded():
            raise RuntimeError("call advance, with 0 if need be, before a step is captured or compiled")
        rows = len(self.sequences)
        with torch.inference_mode(False), torch.no_grad():
            width = self._pages or max(1, self._host.longest_row)
            if self._table.shape[1] != width or len(self._table) < rows:
                self._table = self._table.new_zeros(max(rows, self._most), width)
            if self._lengths.shape[1] < rows:
                self._lengths = self._lengths.new_zeros(len(self._lengths), rows)
            self._table[:rows] = torch.tensor(self._host.rows(width), dtype=torch.int32).view(rows, width)
            if self._stale_rows:
                counted = [self._host.of_layer(layer) for layer in range(self.layout.num_layers)]
                self._lengths[:, :rows] = torch.tensor(counted, dtype=torch.int32).view(-1, rows)
                order = [self._source.get(sequence) for sequence in self.sequences]
                for history in self._hidden:
                    if history is not None and order != list(range(history.rows)):
                        history.select(order)
                self._source = {sequence: row for row, sequence in enumerate(self.sequences)}
        self._rows = rows
        self._stale_table = self._stale_rows = False

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
        self._upload()
        state = self._host.state()
        used = state["used"]
        for layer in range(self.layout.num_layers):
            state[f"k.{layer}"] = self._k[layer][used, :, : self.layout.k_numbers].clone()
            state[f"v.{layer}"] = self._v[layer][used, :, : self.layout.v_numbers].clone()
            if self._positions:
                state[f"positions.{layer}"] = self._positions[layer][used].clone()
            history = self._hidden[layer]
            if history is not None:
                state[f"hidden.{layer}"], state[f"known_hidden.{layer}"] = history.state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over sequences and blocks, shared ones as shared; pool size, device and dtype stay.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if blocks differ in size, are too many or do not fit the layout; nothing changes then.
        """
        if state["block_size"] != self.block_size:
            raise ValueError(f"block_size must be {self.block_size}, got {state['block_size']}")
        used, rows = list(state["used"]), len(state["blocks"])
        if len(used) > self.num_blocks:
            raise ValueError(f"num_blocks must be >= the {len(used)} blocks in use, got {self.num_blocks}")
        longest = max((max(lengths) for lengths in state["lengths"].values()), default=0)
        if self.max_len is not None and (longest > self.max_len or rows > self._most):
            raise ValueError(
                f"batch and max_len must be >= the {rows} sequences of {longest} tokens, "
                f"got {self._most} and {self.max_len}"
            )
        layers = range(self.layout.num_layers)
        for name, numbers in (("k", self.layout.k_numbers), ("v", self.layout.v_numbers)):
            for layer in layers:
                expected, got = (len(used), self.block_size, numbers), tuple(state[f"{name}.{layer}"].shape)
                if got != expected:
                    raise ValueError(f"{name}.{layer} must have shape {expected}, got {got}")
        kept = [state[f"positions.{layer}"] for layer in layers] if self._positions else []
        self._forget()
        self._host.load(state)
        for layer in layers:
            self._k[layer][: len(used), :, : self.layout.k_numbers] = state[f"k.{layer}"]
            self._v[layer][: len(used), :, : self.layout.v_numbers] = state[f"v.{layer}"]
            hidden = state.get(f"hidden.{layer}")
            if hidden is not None:
                history = HiddenHistory(rows, self.rewind, hidden.to(self.device))
                history.load(hidden, state[f"known_hidden.{layer}"])
                self._hidden[layer] = history
        for pool, positions in zip(self._positions, kept, strict=True):
            pool[: len(used)] = positions
        self._source = {sequence: row for row, sequence in enumerate(self.sequences)}

    # ---------------------------------------------------------------------------------------------- checks

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layout.num_layers:
            raise IndexError(f"layer must be in [0, {self.layout.num_layers}), got {layer!r}")

    def _check_sequence(self, sequence: int) -> None:
        if sequence not in self._host.blocks:
            raise KeyError(f"sequence must be one of {self.sequences}, got {sequence!r}")

    def _check_rows(self) -> None:
        if self.max_len is not None and len(self.sequences) >= self._most:
            raise ValueError(
                f"a cache of fixed shape has at most batch = {self._most} sequences, got one more"
            )
