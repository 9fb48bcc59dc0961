"""Small nnx models of any width that the flax tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(build, seed=0):
    """What `build()` makes, with values of size 1/4 by NumPy: to compile initializers takes a second."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(build))

    def value(leaf):
        return jnp.array(rng.standard_normal(leaf.shape) / 4, leaf.dtype)

    return nnx.merge(graph, jax.tree.map(value, state))


class MLP(nnx.Module):
    """8 -> width -> 2 width -> 4."""

    def __init__(self, width, rngs, dtype=jnp.float32):
        self.enter = nnx.Linear(8, width, param_dtype=dtype, rngs=rngs)
        self.middle = nnx.Linear(width, 2 * width, param_dtype=dtype, rngs=rngs)
        self.leave = nnx.Linear(2 * width, 4, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.leave(jnp.tanh(self.middle(jnp.tanh(self.enter(x)))))


class Block(nnx.Module):
    """Attention and MLP before norms; the head dimension is a quarter of the width."""

    def __init__(self, width, rngs, attention_fn):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, width, decode=False, deterministic=True, attention_fn=attention_fn, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, h):
        h = h + self.attention(self.attention_norm(h))
        return h + self.down(nnx.gelu(self.up(self.norm(h))))


class Transformer(nnx.Module):
    """11 tokens in and out, tied or not."""

    def __init__(self, width, rngs, *, tied=False, attention_fn=nnx.dot_product_attention):
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (6, width)))
        self.block = Block(width, rngs, attention_fn)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = None if tied else nnx.Linear(width, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        h = self.norm(self.block(self.embed(tokens) + self.positions[...]))
        return self.embed.attend(h) if self.head is None else self.head(h)


class Residual(nnx.Module):
    """8 -> width, blocks added to it with a factor, -> 4."""

    def __init__(self, width, layers, branch, rngs, dtype=jnp.float32):
        self.enter = nnx.Linear(8, width, param_dtype=dtype, rngs=rngs)
        blocks = [nnx.Linear(width, width, param_dtype=dtype, rngs=rngs) for _ in range(layers)]
        # flax before 0.12 takes lists of modules as they are
        self.blocks = getattr(nnx, "List", list)(blocks)
        self.leave = nnx.Linear(width, 4, param_dtype=dtype, rngs=rngs)
        self.branch = branch

    def __call__(self, x):
        h = self.enter(x)
        for block in self.blocks:
            h = h + self.branch * jnp.tanh(block(h))
        return self.leave(h)


class Layers(nnx.Module):
    """Every layer of flax that holds a kernel, each with a width on either side."""

    def __init__(self, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(width, width, (3,), feature_group_count=2, rngs=rngs)
        self.depthwise = nnx.Conv(width, width, (3,), feature_group_count=width, rngs=rngs)
        self.transposed = nnx.ConvTranspose(width, 5, (3,), rngs=rngs)
        self.flipped = nnx.ConvTranspose(width, 5, (3,), transpose_kernel=True, rngs=rngs)
        self.einsum = nnx.Einsum("bh,hkd->bkd", (width, 2, width), (2, width), rngs=rngs)
        self.into_heads = nnx.LinearGeneral(width, (2, width // 2), rngs=rngs)
        self.out_of_heads = nnx.LinearGeneral((2, width // 2), 7, axis=(-2, -1), rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=2, rngs=rngs)
        self.scalar = nnx.Param(jnp.ones(()))
