"""Standard normal fields on a population of M points: what the entries of an infinite random matrix become.

In the limit, coordinates of a wide layer are independent copies of a random variable. A layer is therefore a
population of M points of equal weight, a vector of the layer is a column of M numbers, and <u, v> is the mean
of u v over the population. A field is a column of standard normal numbers that is independent of the fields
before it. Scrambled Sobol points, one dimension per field, make it uniform; moment matching makes it exactly
orthonormal to the constant and to all earlier fields of its population, so that whatever is linear in the
fields is integrated without any error, at every M.

Every field is a function of (key, replica, population, index) alone: results depend neither on the number of
devices nor on how many fields are drawn at once.

Source: Joe and Kuo 2008 (direction numbers, those of scipy); Matousek 1998 (linear scrambling and shift).
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32
from scipy.stats import qmc

from .columns import Columns, combined, inner, inverse_transpose, without

Sampler = Literal["sobol", "normal"]

MAX_SOBOL_DIMS = qmc.Sobol.MAXDIM
BITS = 32

__all__ = ["MAX_SOBOL_DIMS", "FieldSource", "Sampler", "match_moments"]


class FieldSource(NamedTuple):
    """Where the fields of one population come from.

    Attributes:
        key: key of the run.
        replica: number of the replica.
        population: number of the layer whose population this is.
        samples: M, points of the population; a power of two for "sobol".
        sampler: "sobol" or "normal".
        qmc_dims: how many of the first fields are Sobol's; the others are plain normal draws.
        sharding: how the points lie on devices; None for the default device.
    """

    key: Array
    replica: int
    population: int
    samples: int
    sampler: Sampler = "sobol"
    qmc_dims: int = MAX_SOBOL_DIMS
    sharding: jax.sharding.Sharding | None = None

    def draw(self, start: int, count: int) -> Columns:
        """Fields number start to start + count - 1, not yet moment matched."""
        index = points(self.samples, self.sharding)
        sobol = min(max(self.qmc_dims - start, 0), count) if self.sampler == "sobol" else 0
        parts = []
        if sobol:
            directions, shifts = self._scrambled(start, sobol)
            parts.append(_sobol_normal(index, jnp.asarray(directions), jnp.asarray(shifts)))
        if sobol < count:
            parts.append(_plain_normal(index, self._key(), start + sobol, count - sobol))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def _key(self) -> Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, self.replica), self.population)

    def _scrambled(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Direction numbers after a random lower-triangular map, [bits, count]; digital shifts, [count]."""
        entropy = [int(word) for word in np.asarray(jax.random.key_data(self.key)).ravel()]
        bits = max(self.samples.bit_length() - 1, 1)
        plain = _direction_numbers(start + count, bits)[start:]
        words = np.empty((count, BITS + 1), dtype=np.uint32)
        for column in range(count):
            rng = np.random.default_rng([*entropy, self.replica, self.population, start + column])
            words[column] = rng.integers(0, 2**BITS, size=BITS + 1, dtype=np.uint32)
        rows = (words[:, :BITS] & _STRICTLY_LOWER) | _DIAGONAL
        parity = np.bitwise_count(rows[:, :, None] & plain[:, None]) & np.uint32(1)
        scrambled = np.bitwise_or.reduce(parity.astype(np.uint32) << _PLACES[:, None], axis=1).T
        return scrambled, words[:, BITS]


# Row i of a scrambling matrix makes bit i, counted from the most significant; it may see bits 0 to i.
_PLACES = np.arange(BITS - 1, -1, -1, dtype=np.uint32)
_DIAGONAL = np.uint32(1) << _PLACES
_STRICTLY_LOWER = (~((np.uint64(1) << (_PLACES.astype(np.uint64) + np.uint64(1))) - np.uint64(1))).astype(
    np.uint32
)


@lru_cache(maxsize=8)
def _first_points(dims: int, bits: int) -> np.ndarray:
    """The first 2**bits Sobol points of `dims` dimensions at powers of two, as integers: [dims, bits]."""
    with np.errstate(all="ignore"):
        engine = qmc.Sobol(dims, scramble=False, bits=BITS)
        values = np.empty((bits, dims))
        seen = 0
        for bit in range(bits):
            # scipy runs through the points in Gray order: number 2^k - 1 has only direction k - 1 in it.
            engine.fast_forward((2 << bit) - 1 - seen)
            values[bit] = engine.random(1)[0]
            seen = 2 << bit
    return np.ascontiguousarray((values * 2.0**BITS).astype(np.uint32).T)


def _direction_numbers(dims: int, bits: int) -> np.ndarray:
    """Direction numbers of the first dimensions, [dims, bits]."""
    size = min(max(64, 1 << (dims - 1).bit_length()), MAX_SOBOL_DIMS)
    return _first_points(size, bits)[:dims]


@lru_cache(maxsize=8)
def points(samples: int, sharding: jax.sharding.Sharding | None) -> UInt32[Array, " points"]:
    """Numbers of the points, laid out over the devices; everything else follows its layout."""
    index = np.arange(samples, dtype=np.uint32)
    if sharding is None:
        return jnp.asarray(index)
    return jax.make_array_from_callback(index.shape, sharding, lambda part: index[part])


@jax.jit
def _sobol_normal(
    index: UInt32[Array, " points"],
    directions: UInt32[Array, "bits columns"],
    shifts: UInt32[Array, " columns"],
) -> Columns:
    """Points of each dimension, XOR of the directions at the set bits of the index, through the quantile."""
    value = jnp.broadcast_to(shifts, (index.shape[0], shifts.shape[0]))
    for bit in range(directions.shape[0]):
        chosen = (index >> bit) & jnp.uint32(1)
        value = value ^ (chosen[:, None] * directions[bit])
    # The middle of each cell of width 2^-32, so that the quantile of neither 0 nor 1 is asked for.
    uniform = (value.astype(jnp.float64) + 0.5) * 2.0**-BITS
    return jax.scipy.special.ndtri(uniform)


@partial(jax.jit, static_argnums=3)
def _plain_normal(index: UInt32[Array, " points"], key: Array, start: int, count: int) -> Columns:
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(start + jnp.arange(count))
    bits = jax.vmap(lambda k: jax.random.bits(k, index.shape, jnp.uint32))(keys).T
    uniform = (bits.astype(jnp.float64) + 0.5) * 2.0**-BITS
    # Adding zeros that are laid out as the points are lays out the fields.
    return jax.scipy.special.ndtri(uniform + 0.0 * index[:, None])


def match_moments(new: Columns, earlier: Sequence[Columns]) -> Columns:
    """The columns made orthonormal to the constant, to earlier fields and to one another.

    Within the block by Cholesky, which is Gram-Schmidt in the order of the columns, so a field does not
    depend on those drawn after it in the same block. Zero columns among the earlier ones do no harm. Once
    more if little was left of a column, for then rounding was a large part of it.
    """
    left = 0.0
    # Columns have size 1 before; where at least half of it is left, once is as exact as twice.
    while left < 0.5:
        new = without(_centred(new), earlier)
        lower = np.linalg.cholesky(inner((new,), new))
        small, left = inverse_transpose(lower), np.diag(lower).min()
        new = combined(new, small)
    return new


@jax.jit
def _centred(new: Columns) -> Columns:
    return new - new.mean(axis=0)
