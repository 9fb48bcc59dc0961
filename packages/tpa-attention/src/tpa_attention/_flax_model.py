"""T6 for flax: LLaMA's residual blocks around Tensor Product Attention.

    x <- x + Attention(RMSNorm(x)),    x <- x + SwiGLU(RMSNorm(x)),    logits = E RMSNorm(x)
    SwiGLU(x) = W3 (SiLU(W1 x) * W2 x),    hidden width floor(8/3 d)

As trained: norms without weight, embedding E tied to the output, no biases, no dropout, W^O and W3 start at
zero. Modules and parameters are named as in `tpa_attention.torch.model`, so a state dict of the torch model
loads by name.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 5 and Appendix H; initial values of W1, W2 and E as in
the authors' training code, where they are those of `nn.Linear`.
"""

from math import sqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from ._checks import one_of
from ._flax_cache import FactorCache, LayerCache
from ._flax_layer import TPAttention
from ._flax_maps import drawn
from ._flax_norm import RMSNorm
from ._flax_versions import module_list
from .config import ModelConfig

LAYER_OPTIONS = (
    *("v_head_dim", "shared_kv_b", "factor_dims", "head_activation", "a_bias", "rank_scale"),
    *("rotate_on_load", "out_norm", "factor_norm", "output_gate", "kv_shift", "rope", "init"),
    "zero_init_output",
)


class T6(nnx.Module):
    """Decoder-only language model.

    Args:
        config: sizes and options of the layers. `fused_proj` has no effect here: XLA fuses products.
        implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
        chunk: cached tokens that a decode step reads at a time.
        dtype: type of the computation; None for that of the parameters.
        param_dtype: type of the parameters.
        rngs: source of the initial values, its stream `params`.

    Raises:
        ValueError: if the mechanism is not "tpa" or "kvonly", or `impl` not "auto".
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        implementation: Literal["xla", "cudnn"] | None = None,
        chunk: int = 512,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        one_of("mechanism", config.mechanism, ("tpa", "kvonly"))
        if config.impl != "auto":
            raise ValueError(
                f"impl must be 'auto' for flax, where `implementation` chooses, got {config.impl!r}"
            )
        self.config = config
        self.model = Decoder(
            config,
            implementation=implementation,
            chunk=chunk,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        sizes = (config.hidden_size, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(*sizes, config.init, param_dtype, rngs)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        position_ids: Int[ArrayLike, "..."] | None = None,
        attention_mask: ArrayLike | None = None,
        cache: FactorCache | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Logits of the next token after each of the T given ones.

        Args:
            input_ids: token ids in [0, vocab_size).
            position_ids: (T,) or (B, T); by default they follow what the cache holds, or start at 0.
            attention_mask: as `TPAttention` takes it.
            cache: keeps the factors of every layer, see `init_cache`; with it, pass the new tokens only.

        Raises:
            TypeError: if the ids are not integers.
            ValueError: if they have no shape (B, T), or the cache has no room.
        """
        x = self.model(input_ids, position_ids, attention_mask, cache)
        if self.lm_head is None:
            return x @ self.model.embed_tokens.embedding[...].astype(x.dtype).T
        return self.lm_head(x)

    def init_cache(self, batch: int, max_len: int, dtype: DTypeLike | None = None) -> FactorCache:
        """An empty cache for all layers.

        Args:
            batch: sequences, >= 1.
            max_len: capacity in tokens, >= 1.
            dtype: floating type of the factors; None for that of the computation.
        """
        return FactorCache([block.attn.init_cache(batch, max_len, dtype) for block in self.model.layers])


class Decoder(nnx.Module):
    """Embedding, blocks and the final norm: T6 without its output matrix. The arguments are those of `T6`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.dtype, self.param_dtype = options["dtype"], options["param_dtype"]
        self.embed_tokens = Embedding(config, self.param_dtype, rngs)
        self.layers = module_list(
            [T6Block(config, rngs=rngs, **options) for _ in range(config.num_hidden_layers)]
        )
        self.norm = _block_norm(config, self.param_dtype)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        position_ids: Int[ArrayLike, "..."] | None = None,
        attention_mask: ArrayLike | None = None,
        cache: FactorCache | None = None,
    ) -> Float[Array, "B T d"]:
        """Hidden states after the final norm."""
        ids = jnp.asarray(input_ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"input_ids must be integers, got {ids.dtype}")
        if ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (B, T), got {ids.shape}")
        x = self.embed_tokens.embedding[...][ids]
        x = x if self.dtype is None else x.astype(self.dtype)
        caches = [None] * len(self.layers) if cache is None else list(cache.layers)
        if len(caches) != len(self.layers):
            raise ValueError(f"cache must have {len(self.layers)} layers, got {len(caches)}")
        for block, layer_cache in zip(self.layers, caches, strict=True):
            x = block(x, position_ids, attention_mask, layer_cache)
        return self.norm(x)


class T6Block(nnx.Module):
    """One residual block: attention, then SwiGLU, each behind an RMSNorm."""

    def __init__(
        self, config: ModelConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs, **options: Any
    ) -> None:
        self.attn_norm = _block_norm(config, param_dtype)
        self.attn = TPAttention(
            *(config.hidden_size, config.num_attention_heads, config.head_dim),
            *(config.q_rank, config.k_rank, config.v_rank),
            variant=config.layer_variant,
            **{name: getattr(config, name) for name in LAYER_OPTIONS},
            **options,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.ffn_norm = _block_norm(config, param_dtype)
        self.ffn = SwiGLU(config, param_dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T d"],
        position_ids: Int[ArrayLike, "..."] | None = None,
        attention_mask: ArrayLike | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Array, "B T d"]:
        """The hidden states after this block; the arguments are those of the attention layer."""
        x = x + self.attn(self.attn_norm(x), position_ids, attention_mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class SwiGLU(nnx.Module):
    """W3 (SiLU(W1 x) * W2 x), without biases; W3 starts at zero unless told otherwise."""

    def __init__(self, config: ModelConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        d, hidden = config.hidden_size, config.ffn_dim
        self.w1 = Linear(d, hidden, config.init, param_dtype, rngs, split_axis=1)
        self.w2 = Linear(d, hidden, config.init, param_dtype, rngs, split_axis=1)
        init = "zero" if config.zero_init_output else config.init
        self.w3 = Linear(hidden, d, init, param_dtype, rngs, split_axis=0)

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """What the block adds to each token."""
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))


class Linear(nnx.Module):
    """x W with W (in, out): uniform within 1/sqrt(in), N(0, 0.02^2) under "normal", or zero.

    `split_axis` is the axis along which `shard_heads` cuts it, if that goes evenly.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        init: str,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        split_axis: int | None = None,
    ) -> None:
        like = jax.ShapeDtypeStruct((fan_in, fan_out), param_dtype)
        zero = init == "zero"
        value = (
            jnp.zeros(like.shape, like.dtype) if zero else drawn(rngs.params(), like, _bound(init, fan_in))
        )
        self.kernel = nnx.Param(value, split_axis=split_axis, input_axes=1)

    def __call__(self, x: Float[Array, "*rows fan_in"]) -> Float[Array, "*rows fan_out"]:
        """The product, in the type of `x`."""
        return x @ self.kernel[...].astype(x.dtype)


class Embedding(nnx.Module):
    """The rows of the vocabulary, (vocab, d)."""

    def __init__(self, config: ModelConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        like = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), param_dtype)
        self.embedding = nnx.Param(drawn(rngs.params(), like, _bound(config.init, config.hidden_size)))


def _bound(init: str, fan_in: int) -> float | None:
    return None if init == "normal" else 1 / sqrt(fan_in)


def _block_norm(config: ModelConfig, param_dtype: DTypeLike) -> RMSNorm:
    """The norm in front of attention, of SwiGLU and of the output matrix."""
    return RMSNorm(config.hidden_size, config.norm_affine, config.norm_eps, param_dtype=param_dtype)
