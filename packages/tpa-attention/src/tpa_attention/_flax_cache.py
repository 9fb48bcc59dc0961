"""The factor cache for flax: per layer the factors of every token, preallocated, written in place.

JAX arrays have no views to pack records into, so A and B are kept apart, which also lets A be sharded by
heads while B stays whole:

    A_K (B, M, R_K, h), B_K (B, M, R_K, D), A_V (B, M, R_V, h), B_V (B, M, R_V, E)

What does not depend on the token is not kept. Everything is an `nnx.Cache` variable of a fixed shape: pass
the cache to `nnx.jit` beside the model, and a decode step compiles once.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3: cached numbers per token R_K (h + D) + R_V (h + E).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from . import _checks
from ._flax_versions import assign, module_list


@dataclass(frozen=True)
class CacheShapes:
    """What one layer keeps of a token: shapes (R, n), or None for factors that are free or shared.

    Attributes:
        ak: (R_K, h).
        bk: (R_K, D), or the sum of the widths of its parts.
        av: (R_V, h).
        bv: (R_V, E).
        keep_positions: whether keys are rotated when they are loaded.
        last_width: width of the last hidden state, for `kv_shift`; None to keep none.
    """

    ak: tuple[int, int] | None
    bk: tuple[int, int] | None
    av: tuple[int, int] | None
    bv: tuple[int, int] | None
    keep_positions: bool = False
    last_width: int | None = None


class LayerCache(nnx.Module):
    """The factors of one layer; see `FactorCache`."""

    def __init__(self, shapes: CacheShapes, batch: int, max_len: int, dtype: DTypeLike) -> None:
        for name, value in (("batch", batch), ("max_len", max_len)):
            _checks.positive_int(name, value)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        self.batch, self.max_len, self.dtype = batch, max_len, jnp.dtype(dtype)

        def factor(shape: tuple[int, int] | None, head_axis: int | None) -> nnx.Cache | None:
            if shape is None:
                return None
            return nnx.Cache(jnp.zeros((batch, max_len, *shape), dtype), head_axis=head_axis)

        self.ak, self.bk = factor(shapes.ak, 3), factor(shapes.bk, None)
        self.av, self.bv = factor(shapes.av, 3), factor(shapes.bv, None)
        self.lengths = nnx.Cache(jnp.zeros(batch, jnp.int32))
        self.positions = nnx.Cache(jnp.zeros((batch, max_len), jnp.int32)) if shapes.keep_positions else None
        width = shapes.last_width
        self.last = None if width is None else nnx.Cache(jnp.zeros((batch, width), dtype))

    def check_room(self, batch: int, new: int) -> None:
        """Raise unless the tokens fit, as far as can be known: inside `jit` lengths have no values.

        Raises:
            ValueError: if the batch is another one or there is no room.
        """
        if batch != self.batch:
            raise ValueError(f"the batch of x must be that of the cache, {self.batch}, got {batch}")
        lengths = self.lengths[...]
        stored = 0 if isinstance(lengths, Tracer) else int(lengths.max())
        if stored + new > self.max_len:
            raise ValueError(
                f"cache of capacity {self.max_len} holds {stored} tokens: no room for {new} more"
            )

    def append(
        self,
        ak: Float[Array, "#B #T RK H"] | None,
        bk: Float[Array, "#B #T RK D"] | None,
        av: Float[Array, "#B #T RV H"] | None,
        bv: Float[Array, "#B #T RV E"] | None,
        positions: Int[Array, "B T"],
    ) -> Bool[Array, " B"]:
        """Write the tokens behind those of each sequence; factors that are not kept are passed over.

        Returns:
            Whether a sequence had room for all of them. Inside `jit`, where nothing can be raised, tokens
            that do not fit are dropped and the length stays.
        """
        new, lengths = positions.shape[1], self.lengths[...]
        place = lengths[:, None] + jnp.arange(new)
        fits = lengths + new <= self.max_len
        place = jnp.where(fits[:, None], place, self.max_len)  # out of range: dropped
        for variable, values in ((self.ak, ak), (self.bk, bk), (self.av, av), (self.bv, bv)):
            _write(variable, place, values)
        _write(self.positions, place, positions)
        assign(self.lengths, jnp.where(fits, lengths + new, lengths))
        return fits


class FactorCache(nnx.Module):
    """Static cache of a model: one `LayerCache` per attention layer.

    Made by `T6.init_cache`. In `append` beyond the capacity a call outside of `jit` raises before anything is
    written; inside of it nothing can be raised: the tokens are dropped and the outputs of that sequence NaN.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = module_list(layers)

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens that every layer holds of each sequence."""
        return jnp.stack([layer.lengths[...] for layer in self.layers]).min(axis=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors; lengths, positions and last hidden states are not counted."""
        factors = (f for layer in self.layers for f in (layer.ak, layer.bk, layer.av, layer.bv))
        return sum(f[...].nbytes for f in factors if f is not None)

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        for layer in self.layers:
            assign(layer.lengths, jnp.zeros_like(layer.lengths[...]))
            if layer.last is not None:
                assign(layer.last, jnp.zeros_like(layer.last[...]))

    def crop(self, n: int | Int[Array, " B"]) -> None:
        """Keep the first `n` tokens of each sequence; an array (batch,) makes the batch ragged.

        Raises:
            ValueError: if a last hidden state is kept (`kv_shift`): the one before it is not known.
        """
        if any(layer.last is not None for layer in self.layers):
            raise ValueError("crop cannot go back under kv_shift: only the last hidden state is kept")
        if isinstance(n, int) and n < 0:
            raise ValueError(f"n must be >= 0, got {n!r}")
        for layer in self.layers:
            assign(layer.lengths, jnp.minimum(layer.lengths[...], jnp.asarray(n, jnp.int32)))

    def reorder(self, beam_idx: Int[Array, " B"]) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        for layer in self.layers:
            variables = (layer.ak, layer.bk, layer.av, layer.bv, layer.positions, layer.lengths, layer.last)
            for variable in variables:
                if variable is not None:
                    assign(variable, variable[...][beam_idx])


def _write(variable: nnx.Cache | None, place: Int[Array, "B T"], values: Array | None) -> None:
    """Rows of the batch at their own places; places out of range are left out."""
    if variable is None or values is None:
        return
    buffer = variable[...]
    rows = jnp.arange(buffer.shape[0])[:, None]
    assign(variable, buffer.at[rows, place].set(values.astype(buffer.dtype), mode="drop"))
