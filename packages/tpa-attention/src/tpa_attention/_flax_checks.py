"""What the attention layer for flax is given: options, masks, positions, checked before anything changes."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from . import _checks
from .config import HEAD_ACTIVATIONS, INITS, RopeConfig

if TYPE_CHECKING:
    from ._flax_layer import TPAttention

SIZES = ("d_model", "num_heads", "head_dim", "q_rank", "k_rank", "v_rank", "v_head_dim", "chunk")
IMPLEMENTATIONS = (None, "xla", "cudnn")


def layer_options(layer: "TPAttention") -> frozenset[str]:
    """Check the options of a layer; return the names in its `variant`.

    Raises:
        TypeError: if a size is no int or `rope` no `RopeConfig`.
        ValueError: if an option or a combination is not accepted.
    """
    for name in SIZES:
        _checks.positive_int(name, getattr(layer, name))
    names = _checks.variant_names(layer.variant)
    _checks.one_of("head_activation", layer.head_activation, HEAD_ACTIVATIONS)
    _checks.one_of("init", layer.init, INITS)
    _checks.one_of("implementation", layer.implementation, IMPLEMENTATIONS)
    if not isinstance(layer.rope, RopeConfig):
        raise TypeError(f"rope must be a RopeConfig (RopeConfig.none() for none), got {layer.rope!r}")
    if layer.shared_kv_b and (layer.k_rank, layer.head_dim) != (layer.v_rank, layer.v_head_dim):
        raise ValueError(
            f"shared_kv_b needs k_rank = v_rank and v_head_dim = head_dim, got ranks {layer.k_rank} and "
            f"{layer.v_rank}, widths {layer.v_head_dim} and {layer.head_dim}"
        )
    if layer.a_bias and "noncontextual_a" in names:
        raise ValueError(f"a_bias needs a contextual A, got variant {layer.variant!r}")
    if layer.factor_dims is not None:
        _checks.factor_dims(layer.factor_dims, layer.head_dim, layer.v_head_dim)
    layer.rope.rotary_dim(layer.head_dim if layer.factor_dims is None else layer.factor_dims[0])
    return names


def key_mask(mask: Array | None, batch: int, heads: int, new: int, keys: int) -> Array | None:
    """The caller's mask with four axes, boolean or a bias.

    Raises:
        TypeError: if a mask of two axes is floating: validity is 0 or 1.
        ValueError: if its shape fits neither (B, M) nor (B or 1, h or 1, T, M).
    """
    if mask is None:
        return None
    is_float = jnp.issubdtype(mask.dtype, jnp.floating)
    if mask.shape == (batch, keys):
        if is_float:
            raise TypeError(f"attention_mask (B, M) must be bool or integer, got {mask.dtype}")
        return mask.astype(bool)[:, None, None, :]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if fits and mask.shape[2:] == (new, keys):
        return mask if is_float else mask.astype(bool)
    raise ValueError(
        f"attention_mask must have shape (B, M) = {(batch, keys)} or (B or 1, h or 1, T, M) = "
        f"{(batch, heads, new, keys)}, got {mask.shape}"
    )


def given_positions(position_ids: ArrayLike, batch: int, new: int) -> Int[Array, "B T"]:
    """The caller's positions for every token.

    Raises:
        TypeError: if they are no integers.
        ValueError: if their shape is not (T,), (1, T) or (B, T).
    """
    given = jnp.asarray(position_ids)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"position_ids must be integers, got {given.dtype}")
    if given.shape not in ((new,), (1, new), (batch, new)):
        raise ValueError(f"position_ids must have shape ({new},) or ({batch}, {new}), got {given.shape}")
    return jnp.broadcast_to(given, (batch, new))
