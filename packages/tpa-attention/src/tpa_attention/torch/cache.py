"""The factor cache: per layer and token one K record and one V record, preallocated and written in place.

A layer packs what decoding needs of a token into two rows of numbers (TPA: the factors A and B; GQA: the
key-value heads; MLA: latent and rotary key) and hands them to a cache, which hands back the rows of every
token so far. `LayerCache` is that conversation; `FactorCache` is the static, contiguous answer to it.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3: cached numbers per token R_K (h + D) + R_V (h + E).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.config import ModelConfig

from .arguments import readable
from .cache_protocol import LayerCache
from .hidden_history import REWIND, HiddenHistory

__all__ = ["CacheLayout", "FactorCache", "LayerCache", "layout_of", "padded_width"]

ALIGNMENT = 16  # bytes: a record starts where a vector load may start


@dataclass(frozen=True)
class CacheLayout:
    """How wide the records of a model are.

    Args:
        num_layers: attention layers, >= 1.
        k_numbers: numbers in a K record without padding, >= 0.
        v_numbers: numbers in a V record without padding, >= 0.
        keep_positions: whether the layers rotate keys on load and need the positions of stored tokens.

    Raises:
        ValueError: if a count is out of range.
    """

    num_layers: int
    k_numbers: int
    v_numbers: int
    keep_positions: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {self.num_layers!r}")
        for name in ("k_numbers", "v_numbers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")

    def widths(self, dtype: torch.dtype) -> tuple[int, int]:
        """Numbers per K and V record with the padding that `dtype` needs."""
        return padded_width(self.k_numbers, dtype.itemsize), padded_width(self.v_numbers, dtype.itemsize)


def padded_width(numbers: int, itemsize: int) -> int:
    """Record width in numbers: `numbers` rounded up to whole units of 16 bytes."""
    unit = ALIGNMENT // itemsize
    return -(-numbers // unit) * unit


def layout_of(config: CacheLayout | ModelConfig | Any) -> CacheLayout:
    """The cache layout of a layer, a model or its configuration.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(config, ModelConfig):
        from .model import attention  # the layer knows its records; on the meta device it costs nothing

        layer = attention(config, device="meta", dtype=None, generator=None)
        return replace(layout_of(layer), num_layers=config.num_hidden_layers)
    layout = config if isinstance(config, CacheLayout) else getattr(config, "cache_layout", None)
    if not isinstance(layout, CacheLayout):
        raise TypeError(
            f"config must be a CacheLayout, a ModelConfig or have the attribute cache_layout, got {config!r}"
        )
    return layout


class FactorCache:
    """Static cache: one buffer (batch, capacity, record width) per layer for K and one for V.

    `append` writes in place behind the tokens of each sequence, which may be unequally long (after `crop`
    with a tensor). Whether there is room is known on the host, so no call waits for the device, and a call
    that does not fit raises before it writes. Records are detached: a cache is for inference.

    With `fixed_shape`, `append` returns the whole buffers and the lengths, and all counts are on the device:
    every step has the same shapes and runs again from a CUDA graph or without compiling anew. On the CPU it
    still checks the room; on an accelerator, where that would wait, writing past the end is a device error.

    Args:
        config: a `CacheLayout`, a `ModelConfig`, or a layer or model with the attribute `cache_layout`.
        batch: sequences, >= 1.
        max_len: capacity in tokens, >= 1.
        device: where the buffers live; the default device if None.
        dtype: floating type of the buffers; the default dtype if None. Appended records are cast to it.
        fixed_shape: return whole buffers, see above.
        rewind: tokens that `crop` can take back under `kv_shift`, >= 0; one more hidden state is kept per
            sequence and layer, and none without the shift.

    Raises:
        TypeError: if `config` has no cache layout or `dtype` is not floating.
        ValueError: if `batch` or `max_len` is < 1 or `rewind` negative.
    """

    def __init__(
        self,
        config: CacheLayout | ModelConfig | Any,
        batch: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        fixed_shape: bool = False,
        rewind: int = REWIND,
    ) -> None:
        layout = layout_of(config)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        for name, value, least in (("batch", batch, 1), ("max_len", max_len, 1), ("rewind", rewind, 0)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        self.layout = layout
        self.batch = batch
        self.max_len = max_len
        self.fixed_shape = fixed_shape
        self.rewind = rewind
        self._allocate(torch.empty(0, device=device).device, dtype)
        self._used = [
            0
        ] * layout.num_layers  # host: length of the longest sequence; not kept under fixed_shape
        self._ragged = [False] * layout.num_layers

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        layers = range(self.layout.num_layers)
        rows = (self.batch, self.max_len)
        with torch.inference_mode(False):  # in-place writes must stay possible outside inference mode
            k_width, v_width = self.layout.widths(dtype)
            self._k = [torch.zeros(*rows, k_width, device=device, dtype=dtype) for _ in layers]
            self._v = [torch.zeros(*rows, v_width, device=device, dtype=dtype) for _ in layers]
            self._lengths = torch.zeros(len(layers), self.batch, device=device, dtype=torch.int32)
            self._positions = (
                [torch.zeros(*rows, device=device, dtype=torch.int32) for _ in layers]
                if self.layout.keep_positions
                else None
            )
            self._hidden: list[HiddenHistory | None] = [None for _ in layers]

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        return self._lengths.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the records."""
        return self._k[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all records, padding included; lengths, positions and hidden states are not counted."""
        return sum(buffer.numel() * buffer.itemsize for buffer in (*self._k, *self._v))

    @property
    def seq_lens(self) -> Int[Tensor, " B"]:
        """Tokens that every layer holds of each sequence, int32 on the cache's device."""
        return self._lengths.amin(dim=0)

    def past_length(self, layer: int) -> int | Int[Tensor, " B"]:
        """Tokens stored so far: an int where all sequences are equally long."""
        self._check_layer(layer)
        unequal = self.fixed_shape or self._ragged[layer]
        return self._lengths[layer].clone() if unequal else self._used[layer]

    def key_positions(self, layer: int) -> Int[Tensor, "B M"] | None:
        """Positions of the stored tokens; None unless the layout keeps them."""
        self._check_layer(layer)
        return None if self._positions is None else self._positions[layer][:, : self._extent(layer)]

    def last_hidden(self, layer: int) -> Float[Tensor, "B d"] | None:
        """Input of the layer at the last token; None before the first token of all, 0 after `reset`."""
        self._check_layer(layer)
        history = self._hidden[layer]
        return None if history is None else history.last

    def set_last_hidden(self, layer: int, hidden: Float[Tensor, "B T d"]) -> None:
        """Take the inputs of the layer at the T new tokens; `kv_shift` reads the last one next time."""
        self._check_layer(layer)
        history = self._hidden[layer]
        if history is None:
            history = self._hidden[layer] = HiddenHistory(self.batch, self.rewind, hidden)
        history.push(hidden)

    # ------------------------------------------------------------------------------------------ what it does

    @torch.no_grad()
    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B M Pk"], Float[Tensor, "B M Pv"], Int[Tensor, " B"] | None]:
        """Write T records behind those of each sequence and return views of all records.

        Args:
            layer: index in [0, num_layers).
            k: K records, as wide as the layout says, padded or not.
            v: V records, alike.
            positions: positions of the tokens; their place in the sequence if None. Kept only if the layout
                says so.

        Returns:
            Views of K records and V records up to the longest sequence, and the lengths (int32) or None if
            all sequences are equally long.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if a shape does not fit, or the tokens do not; nothing has been written then.
        """
        self._check_layer(layer)
        new = k.shape[1]
        self._check_records("k", k, self.layout.k_numbers, self._k[layer].shape[-1], new)
        self._check_records("v", v, self.layout.v_numbers, self._v[layer].shape[-1], new)
        if positions is not None and positions.shape != (self.batch, new):
            raise ValueError(f"positions must have shape {(self.batch, new)}, got {tuple(positions.shape)}")
        self._check_room(layer, new)
        place = self._lengths[layer][:, None] + torch.arange(new, device=self.device)  # (B, T)
        for buffer, records in ((self._k[layer], k), (self._v[layer], v)):
            self._write(buffer[..., : records.shape[-1]], records, place, layer)
        if self._positions is not None:
            self._write(self._positions[layer], place if positions is None else positions, place, layer)
        self._lengths[layer] += new
        if not self.fixed_shape:
            self._used[layer] += new
        extent = self._extent(layer)
        unequal = self.fixed_shape or self._ragged[layer]
        lengths = self._lengths[layer] if unequal else None
        return self._k[layer][:, :extent], self._v[layer][:, :extent], lengths

    def _extent(self, layer: int) -> int:
        """How far into the buffer tokens may lie."""
        return self.max_len if self.fixed_shape else self._used[layer]

    def _write(self, buffer: Tensor, new: Tensor, place: Tensor, layer: int) -> None:
        if self.fixed_shape or self._ragged[layer]:
            rows = torch.arange(self.batch, device=self.device)[:, None]
            buffer[rows, place] = new.to(buffer.device, buffer.dtype)
        else:
            used = self._used[layer]
            buffer[:, used : used + new.shape[1]] = new

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self._lengths.zero_()
        self._used = [0] * self.layout.num_layers
        self._ragged = [False] * self.layout.num_layers
        for history in self._hidden:
            if history is not None:
                history.clear()

    def crop(self, n: int | Int[Tensor, " B"]) -> None:
        """Keep the first `n` tokens of each sequence; a tensor (batch,) of lengths makes the batch ragged.

        Reading a tensor waits for the device once.

        Raises:
            ValueError: if a length is negative or the shape is wrong, or under `kv_shift` if more tokens
                would go than there are hidden states kept (`rewind`); nothing changes then.
        """
        limits = torch.as_tensor(n, device=self.device)
        if limits.shape not in ((), (self.batch,)) or limits.is_floating_point():
            raise ValueError(f"n must be an int or an integer tensor of shape ({self.batch},), got {n!r}")
        lengths = torch.minimum(self._lengths, limits.to(torch.int32))
        host = lengths.tolist()
        if any(length < 0 for row in host for length in row):
            raise ValueError(f"n must be >= 0, got {n!r}")
        kept = [
            (history, [old - new for old, new in zip(before, after, strict=True)], after)
            for history, before, after in zip(self._hidden, self._lengths.tolist(), host, strict=True)
            if history is not None
        ]
        for history, back, left in kept:
            history.check_rewind(back, left)
        for history, back, left in kept:
            history.rewind(back, left)
        self._set_lengths(lengths, host)

    def _set_lengths(self, lengths: Tensor, host: list[list[int]]) -> None:
        self._lengths.copy_(lengths)
        self._used = [max(row) for row in host]
        self._ragged = [min(row) != max(row) for row in host]

    def reorder(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was.

        Raises:
            ValueError: if there is not one integer index per sequence.
        """
        if beam_idx.shape != (self.batch,) or beam_idx.is_floating_point():
            raise ValueError(
                f"beam_idx must hold {self.batch} integers, got {beam_idx.dtype} of shape "
                f"{tuple(beam_idx.shape)}"
            )
        index = beam_idx.to(self.device)
        buffers = [*self._k, *self._v, *(self._positions or [])]
        for layer, buffer in enumerate(buffers):
            stored = buffer[:, : self._extent(layer % self.layout.num_layers)]
            stored.copy_(stored.index_select(0, index))
        self._lengths.copy_(self._lengths.index_select(1, index))
        for history in self._hidden:
            if history is not None:
                history.reorder(index)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FactorCache":
        """Move the buffers and return the cache itself; another `dtype` re-lays the records.

        Raises:
            TypeError: if `dtype` is not floating.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        state = self.state_dict()
        target = self.device if device is None else torch.device(device)
        self._allocate(target, self.dtype if dtype is None else dtype)
        self.load_state_dict(state)
        return self

    # ----------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the stored records without padding, lengths, positions and last hidden states."""
        state = {"lengths": self._lengths.clone()}
        for layer, used in enumerate(self._lengths.amax(dim=1).tolist()):
            state[f"k.{layer}"] = self._k[layer][:, :used, : self.layout.k_numbers].clone()
            state[f"v.{layer}"] = self._v[layer][:, :used, : self.layout.v_numbers].clone()
            if self._positions is not None:
                state[f"positions.{layer}"] = self._positions[layer][:, :used].clone()
            history = self._hidden[layer]
            if history is not None:
                state[f"hidden.{layer}"], state[f"known_hidden.{layer}"] = history.state()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over stored tokens; capacity, device and dtype stay those of this cache.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit the layout, the batch or the capacity; nothing changes then.
        """
        lengths = state["lengths"]
        layers = range(self.layout.num_layers)
        if lengths.shape != self._lengths.shape:
            raise ValueError(
                f"lengths must have shape {tuple(self._lengths.shape)}, got {tuple(lengths.shape)}"
            )
        host = lengths.tolist()
        used = [max(row) for row in host]
        if max(used) > self.max_len:
            raise ValueError(f"capacity must be >= the {max(used)} stored tokens, got {self.max_len}")
        names = ["k", "v", *(["positions"] if self._positions is not None else [])]
        for name in names:
            numbers = {"k": (self.layout.k_numbers,), "v": (self.layout.v_numbers,)}.get(name, ())
            for layer in layers:
                expected, got = (self.batch, used[layer], *numbers), tuple(state[f"{name}.{layer}"].shape)
                if got != expected:
                    raise ValueError(f"{name}.{layer} must have shape {expected}, got {got}")
        for layer in layers:
            hidden = state.get(f"hidden.{layer}")
            if hidden is not None and (hidden.ndim != 3 or hidden.shape[0] != self.batch):
                raise ValueError(
                    f"hidden.{layer} must have shape ({self.batch}, states, d), got {tuple(hidden.shape)}"
                )
        for layer in layers:
            self._k[layer][:, : used[layer], : self.layout.k_numbers] = state[f"k.{layer}"]
            self._v[layer][:, : used[layer], : self.layout.v_numbers] = state[f"v.{layer}"]
            if self._positions is not None:
                self._positions[layer][:, : used[layer]] = state[f"positions.{layer}"]
            hidden = state.get(f"hidden.{layer}")
            if hidden is not None:
                history = HiddenHistory(self.batch, self.rewind, hidden.to(self.device))
                history.load(hidden, state[f"known_hidden.{layer}"])
                self._hidden[layer] = history
            else:
                self._hidden[layer] = None
        self._set_lengths(lengths, host)

    # ---------------------------------------------------------------------------------------------- checks

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layout.num_layers:
            raise IndexError(f"layer must be in [0, {self.layout.num_layers}), got {layer!r}")

    def _check_room(self, layer: int, new: int) -> None:
        if not self.fixed_shape:
            used = self._used[layer]
        elif readable(self._lengths):
            used = int(self._lengths[layer].max())
        else:
            return
        if used + new > self.max_len:
            raise ValueError(
                f"cache of capacity {self.max_len} holds {used} tokens of layer {layer}: "
                f"no room for {new} more"
            )

    def _check_records(self, name: str, records: Tensor, numbers: int, width: int, new: int) -> None:
        fits = records.dim() == 3 and records.shape[:2] == (self.batch, new)
        if not fits or not numbers <= records.shape[2] <= width:
            raise ValueError(
                f"{name} must have shape (batch, tokens, width) = ({self.batch}, {new}, {numbers}..{width}), "
                f"got {tuple(records.shape)}"
            )
