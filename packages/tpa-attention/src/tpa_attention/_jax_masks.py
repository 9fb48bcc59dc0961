"""Which key a query may attend to, as JAX arrays of four axes (B, H, T, M): True = attend, everywhere."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def causal_mask(T: int, M: int, window: int | None = None) -> Bool[Array, "1 1 {T} {M}"]:
    """Query j at M - T + j (bottom-right) sees itself and what precedes it, `window` keys at most."""
    distance = (jnp.arange(M - T, M)[:, None] - jnp.arange(M))[None, None]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def both(first: Bool[Array, "..."] | None, second: Bool[Array, "..."] | None) -> Bool[Array, "..."] | None:
    """Attend where both allow; None allows all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def split_mask(
    name: str, mask: ArrayLike | None, shape: tuple[int, int, int, int]
) -> tuple[Bool[Array, "#B #H #T #M"] | None, Float[Array, "#B #H #T #M"] | None]:
    """A user's mask as (mask, bias), with four axes.

    The entries -inf of a bias become a mask, so that no row of logits is -inf throughout.

    Args:
        name: of the argument, for messages.
        mask: boolean, or a bias on the logits.
        shape: (B, H, T, M).

    Raises:
        TypeError: if the mask is neither boolean nor floating.
        ValueError: if it does not broadcast to (B, H, T, M).
    """
    if mask is None:
        return None, None
    mask = jnp.asarray(mask)
    is_bias = jnp.issubdtype(mask.dtype, jnp.floating)
    if not is_bias and mask.dtype != jnp.bool:
        raise TypeError(f"{name} must be bool (True = attend) or a floating bias, got {mask.dtype}")
    fits = mask.ndim <= 4 and all(
        mine in (1, full) for mine, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to (B, H, T, M) = {shape}, got {mask.shape}")
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if not is_bias:
        return mask, None
    allowed = mask > -jnp.inf
    return allowed, jnp.where(allowed, mask, 0)
