"""Decision sets: a list of actions, or all sign vectors of a hypercube without listing them.

Both answer the questions a learner has (which action maximises <theta, x>, or <theta, x> + beta ||x||_P) and
turn a choice into features. A `SignSet` of n signs stands for 2^n actions and maximises a linear objective in
O(n); its upper confidence bound is enumerated in two halves, O(2^n n) instead of O(2^n n^2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MAX_SIGNS = 12
"""Sign sets up to this size may be enumerated (2^12 actions)."""

Choice = Int[Array, ""] | Float[Array, " signs"]
"""An index into a listed set, or the chosen signs (+1, -1)."""

Explore = Literal["enumerate", "coordinate_ascent"]
_ASCENT_SWEEPS = 8


def _static() -> Any:
    """A field that is part of the compiled program."""
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecisionSet:
    """Listed actions of one block.

    Args:
        actions: features inside the block, one row for each action.
        mask: which rows may be played; at least one.
        block: the block the actions live in; all other coordinates are zero.
        n_blocks: number of blocks of the problem.
    """

    actions: Float[Array, "A b"]
    mask: Bool[Array, " A"]
    block: Int[Array, ""]
    n_blocks: int = _static()

    def dense(self) -> Float[Array, "A n_blocks*b"]:
        """The actions in all coordinates of the problem (blocks one after the other)."""
        if self.n_blocks == 1:
            return self.actions
        count, width = self.actions.shape
        place = (jnp.arange(self.n_blocks) == self.block).astype(self.actions.dtype)
        return (place[None, :, None] * self.actions[:, None, :]).reshape(count, self.n_blocks * width)

    def in_one_block(self) -> DecisionSet:
        """The same set for a learner that keeps one Gram matrix for everything."""
        if self.n_blocks == 1:
            return self
        return DecisionSet(self.dense(), self.mask, jnp.zeros_like(self.block), 1)

    def enumerate(self) -> DecisionSet:
        """Itself: the actions are listed already."""
        return self

    def choice_of(self, index: Int[Array, ""]) -> Choice:
        """The choice that plays row `index`."""
        return jnp.asarray(index, jnp.int32)

    def allows(self, choice: Choice) -> Bool[Array, ""]:
        """Whether the choice is a row that may be played."""
        known = (choice >= 0) & (choice < self.mask.shape[0])
        return known & self.mask[choice]

    def is_empty(self) -> Bool[Array, ""]:
        """Whether no row may be played."""
        return ~self.mask.any()

    def features(self, choice: Choice) -> Float[Array, " b"]:
        """Features of a choice inside the block."""
        return self.actions[choice]

    def values(self, theta: Float[Array, " b"]) -> Float[Array, " A"]:
        """<theta, x> of every action, -inf for those that may not be played."""
        return jnp.where(self.mask, self.actions @ theta, -jnp.inf)

    def best_value(self, theta: Float[Array, " b"]) -> Float[Array, ""]:
        """Max <theta, x>."""
        return self.values(theta).max()

    def argmax(self, theta: Float[Array, " b"]) -> Choice:
        """The choice with the largest <theta, x>; ties go to the lowest index."""
        return jnp.argmax(self.values(theta)).astype(jnp.int32)

    def squared_norms(self, inverse: Float[Array, "b b"]) -> Float[Array, " A"]:
        """||x||^2 in the norm of a positive definite matrix, for every action."""
        return jnp.maximum(((self.actions @ inverse) * self.actions).sum(-1), 0.0)

    def argmax_ucb(
        self,
        theta: Float[Array, " b"],
        inverse: Float[Array, "b b"],
        beta: Float[Array, ""],
        explore: Explore = "enumerate",
    ) -> Choice:
        """The choice with the largest <theta, x> + beta ||x||; ties go to the lowest index."""
        scores = self.values(theta) + beta * jnp.sqrt(self.squared_norms(inverse))
        return jnp.argmax(scores).astype(jnp.int32)

    def pick(self, uniforms: Float[Array, " n"]) -> Choice:
        """A choice that is uniform over the playable actions.

        Args:
            uniforms: independent uniform numbers in [0, 1); the first is used.
        """
        playable = jnp.cumsum(self.mask)
        rank = jnp.floor(uniforms[0] * playable[-1]).astype(playable.dtype)
        return jnp.argmax(playable > rank).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignSet:
    """All x = bias e_c + scale * (signs at the active coordinates), a hypercube that is never listed.

    Args:
        scale: size of an active coordinate, >= 0.
        active: which of the n signs count; the others are padding.
        bias: value of the bias coordinate (0 without one).
        block: the block the actions live in.
        start: column of the first sign inside the block.
        bias_column: column of the bias coordinate inside the block.
        one_hot: instead of the hypercube, offer the unit vectors of the active coordinates (group 0 of the
            peeling construction); None where no round does.
        n_blocks: number of blocks.
        width: coordinates of a block.
        fills: the signs fill the block (after the bias, if there is one), so that nothing has to be sliced.
    """

    scale: Float[Array, ""]
    active: Bool[Array, " n"]
    bias: Float[Array, ""]
    block: Int[Array, ""]
    start: Int[Array, ""]
    bias_column: Int[Array, ""]
    one_hot: Bool[Array, ""] | None
    n_blocks: int = _static()
    width: int = _static()
    fills: bool = _static()

    @property
    def n_signs(self) -> int:
        """Number of signs, padding included."""
        return self.active.shape[-1]

    def in_one_block(self) -> SignSet:
        """The same set for a learner that keeps one Gram matrix for everything."""
        if self.n_blocks == 1:
            return self
        first = self.block * self.width
        return dataclasses.replace(
            self,
            block=jnp.zeros_like(self.block),
            start=first + self.start,
            bias_column=first + self.bias_column,
            n_blocks=1,
            width=self.n_blocks * self.width,
            fills=False,
        )

    def enumerate(self) -> DecisionSet:
        """The listed set: row i has sign +1 where bit j of i is set.

        Raises:
            ValueError: if there are more than `MAX_SIGNS` signs.
        """
        n = self.n_signs
        check_enumerable(n)
        signs = jnp.asarray(_sign_table(n), self.scale.dtype)
        rows = jax.vmap(self.features)(signs)
        mask = jnp.ones(2**n, bool)
        if self.one_hot is not None:
            units = (signs > 0).sum(-1) == 1
            mask = jnp.where(self.one_hot, units & ((signs > 0) & self.active).any(-1), mask)
        return DecisionSet(rows, mask, self.block, self.n_blocks)

    def choice_of(self, index: Int[Array, ""]) -> Choice:
        """The signs of row `index` of `enumerate()`."""
        bits = (jnp.asarray(index) >> jnp.arange(self.n_signs)) & 1
        return 2.0 * bits.astype(self.scale.dtype) - 1.0

    def allows(self, choice: Choice) -> Bool[Array, ""]:
        """Whether the choice is a vector of signs."""
        return (jnp.abs(choice) == 1.0).all()

    def is_empty(self) -> Bool[Array, ""]:
        """Whether there is nothing to play: never, without active signs there is the zero action."""
        return jnp.zeros((), bool)

    def features(self, choice: Choice) -> Float[Array, " b"]:
        """Features of chosen signs inside the block."""
        local = jnp.where(self.active, self.scale * choice, 0.0)
        if self.one_hot is not None:
            chosen = jnp.argmax(jnp.where(self.active, choice, -2.0))
            unit = ((jnp.arange(self.n_signs) == chosen) & self.active).astype(local.dtype)
            local = jnp.where(self.one_hot, unit, local)
        if self.fills:
            has_bias = self.width - self.n_signs
            return jnp.concatenate([self.bias[None], local]) if has_bias else local
        row = jnp.zeros(self.width, local.dtype)
        row = lax.dynamic_update_slice(row, local, (self.start,))
        # Without a bias coordinate the column is in use and its value zero.
        return row.at[self.bias_column].add(self.bias)

    def best_value(self, theta: Float[Array, " b"]) -> Float[Array, ""]:
        """Max <theta, x> = bias theta_c + scale * sum of |theta_j|."""
        local = self._signs_of(theta)
        best = self.scale * jnp.where(self.active, jnp.abs(local), 0.0).sum()
        if self.one_hot is not None:
            unit = jnp.where(self.active, local, -jnp.inf).max()
            best = jnp.where(self.one_hot, jnp.where(self.active.any(), unit, 0.0), best)
        return best + self.bias * self._bias_of(theta)

    def argmax(self, theta: Float[Array, " b"]) -> Choice:
        """The choice with the largest <theta, x>; ties go to -1, the lowest index."""
        return self._chosen(self._signs_of(theta))

    def argmax_ucb(
        self,
        theta: Float[Array, " b"],
        inverse: Float[Array, "b b"],
        beta: Float[Array, ""],
        explore: Explore = "enumerate",
    ) -> Choice:
        """The choice with the largest <theta, x> + beta ||x||.

        Args:
            theta: estimate in the block.
            inverse: inverse Gram matrix of the block.
            beta: confidence radius.
            explore: "enumerate" looks at all 2^n actions; "coordinate_ascent" flips single signs while that
                helps, from the signs of theta (a heuristic: it may stop at a local maximum).

        Raises:
            ValueError: if more than `MAX_SIGNS` signs are to be enumerated.
        """
        size = jnp.where(self.active, self.scale, 0.0)
        mean = size * self._signs_of(theta)
        form = size[:, None] * self._form_of(inverse) * size[None, :]
        cross = self.bias * size * self._signs_of(self._row_of(inverse))
        constant = self.bias**2 * self._bias_of(self._row_of(inverse))
        if explore == "enumerate":
            check_enumerable(self.n_signs)
            signs = self.choice_of(_argmax_in_halves(mean, form, cross, constant, beta))
        else:
            signs = _ascend(self.argmax(theta), mean, form, cross, constant, beta)
        if self.one_hot is None:
            return signs
        units = self._signs_of(theta) + beta * jnp.sqrt(jnp.diagonal(self._form_of(inverse)))
        return jnp.where(self.one_hot, self._unit(units), signs)

    def pick(self, uniforms: Float[Array, " n"]) -> Choice:
        """A choice that is uniform over the actions.

        Args:
            uniforms: independent uniform numbers in [0, 1), one for each sign.
        """
        return self._chosen(uniforms - 0.5)

    def _chosen(self, local: Float[Array, " n"]) -> Choice:
        signs = jnp.where(local > 0, 1.0, -1.0).astype(self.scale.dtype)
        return signs if self.one_hot is None else jnp.where(self.one_hot, self._unit(local), signs)

    def _unit(self, local: Float[Array, " n"]) -> Choice:
        best = jnp.argmax(jnp.where(self.active, local, -jnp.inf))
        return jnp.where(jnp.arange(self.n_signs) == best, 1.0, -1.0).astype(self.scale.dtype)

    def _signs_of(self, vector: Float[Array, " b"]) -> Float[Array, " n"]:
        if self.fills:
            return vector[self.width - self.n_signs :]
        return lax.dynamic_slice(vector, (self.start,), (self.n_signs,))

    def _bias_of(self, vector: Float[Array, " b"]) -> Float[Array, ""]:
        return vector[0] if self.fills else vector[self.bias_column]

    def _row_of(self, matrix: Float[Array, "b b"]) -> Float[Array, " b"]:
        return matrix[0] if self.fills else matrix[self.bias_column]

    def _form_of(self, matrix: Float[Array, "b b"]) -> Float[Array, "n n"]:
        n = self.n_signs
        if self.fills:
            return matrix[self.width - n :, self.width - n :]
        return lax.dynamic_slice(matrix, (self.start, self.start), (n, n))


def check_enumerable(n_signs: int) -> None:
    """Refuses to list more than 2^12 actions.

    Args:
        n_signs: number of signs.

    Raises:
        ValueError: if there are more than `MAX_SIGNS`.
    """
    if n_signs > MAX_SIGNS:
        raise ValueError(
            f"a hypercube of {n_signs} signs has more than 2**{MAX_SIGNS} actions and is not enumerated; "
            'learners that maximise an upper confidence bound accept explore="coordinate_ascent"'
        )


def _sign_table(n: int) -> np.ndarray:
    return 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1.0


def _argmax_in_halves(
    mean: Float[Array, " n"],
    form: Float[Array, "n n"],
    cross: Float[Array, " n"],
    constant: Float[Array, ""],
    beta: Float[Array, ""],
) -> Int[Array, ""]:
    """Argmax over signs a of <mean, a> + beta sqrt(constant + 2 <cross, a> + a' form a), as an index.

    a = (low, high): the quadratic form is a table over the low signs plus a table over the high signs plus
    twice the product of the two, which is one small matrix multiplication.
    """
    n = mean.shape[-1]
    half = n // 2
    low, high = (jnp.asarray(_sign_table(m), mean.dtype) for m in (half, n - half))

    def table(signs: Float[Array, "m k"], part: slice) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        square = ((signs @ form[part, part]) * signs).sum(-1) + 2.0 * (signs @ cross[part])
        return signs @ mean[part], square

    mean_low, square_low = table(low, slice(0, half))
    mean_high, square_high = table(high, slice(half, n))
    product = (high @ form[half:, :half]) @ low.T
    square = constant + square_high[:, None] + square_low[None, :] + 2.0 * product
    scores = mean_high[:, None] + mean_low[None, :] + beta * jnp.sqrt(jnp.maximum(square, 0.0))
    return jnp.argmax(scores.reshape(-1))


def _ascend(
    signs: Float[Array, " n"],
    mean: Float[Array, " n"],
    form: Float[Array, "n n"],
    cross: Float[Array, " n"],
    constant: Float[Array, ""],
    beta: Float[Array, ""],
) -> Float[Array, " n"]:
    """Flips the sign that raises the upper confidence bound most, until none does (at most 8 n flips)."""
    diagonal = jnp.diagonal(form)

    def flip(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        signs, value, square = state
        # Flipping j changes the form by -4 a_j (form a)_j + 4 form_jj, the cross term by -4 cross_j a_j.
        flipped = square - 4.0 * signs * (form @ signs + cross) + 4.0 * diagonal
        values = value - 2.0 * mean * signs
        scores = values + beta * jnp.sqrt(jnp.maximum(flipped, 0.0))
        j = jnp.argmax(scores)
        better = scores[j] > value + beta * jnp.sqrt(jnp.maximum(square, 0.0))
        here = better & (jnp.arange(signs.shape[-1]) == j)
        return (
            jnp.where(here, -signs, signs),
            jnp.where(better, values[j], value),
            jnp.where(better, flipped[j], square),
        )

    square = constant + 2.0 * (cross @ signs) + signs @ form @ signs
    state = (signs, mean @ signs, square)
    return lax.fori_loop(0, _ASCENT_SWEEPS * signs.shape[-1], flip, state)[0]
