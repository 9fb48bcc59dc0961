"""T6: LLaMA's residual blocks around Tensor Product Attention, in torch alone.

    x <- x + Attention(RMSNorm(x)),    x <- x + SwiGLU(RMSNorm(x)),    logits = E RMSNorm(x)
    SwiGLU(x) = W3 (SiLU(W1 x) * W2 x),    hidden width floor(8/3 d)

As trained: norms without weight, embedding E tied to the output, no biases, no dropout, W^O and W3 start at
zero. Every mechanism of `ModelConfig` builds, the baselines too. `tpa_attention.torch.hf` wraps the same
blocks for Hugging Face; parameter names agree, so a state dict of one loads into the other.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 5 and Appendix H; initial values of W1, W2 and E as in
the authors' training code, where they are those of `nn.Linear`.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tpa_attention.config import INITS, ModelConfig

from .baselines import GQA, MHA, MLA, MQA
from .cache import CacheLayout, LayerCache
from .layers import TPAttention

NORMAL_STD = 0.02  # of init="normal"
TPA_OPTIONS = (
    *("v_head_dim", "shared_kv_b", "factor_dims", "head_activation", "a_bias", "rank_scale"),
    *("rotate_on_load", "out_norm", "factor_norm", "output_gate", "kv_shift", "fused_proj"),
)


class T6(nn.Module):
    """Decoder-only language model; the same parameter names as `T6ForCausalLM`.

    Args:
        config: sizes, mechanism and options of the layers.
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        place: Place = {"device": device, "dtype": dtype, "generator": generator}
        self.model = Decoder(config, **place)
        self.lm_head = output_projection(config, **place)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "..."] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T vocab"]:
        """Logits of the next token after each of the T given ones.

        Args:
            input_ids: token ids in [0, vocab_size).
            position_ids: (T,) or (B, T); by default they follow what the cache holds, or start at 0.
            cache: keeps the records of every layer, e.g. `FactorCache(model, batch, max_len)`; with it, pass
                the new tokens only.

        Raises:
            TypeError: if the ids are not integers.
            ValueError: if they have no shape (B, T).
        """
        return self.lm_head(self.model(input_ids, position_ids=position_ids, cache=cache))

    @property
    def cache_layout(self) -> CacheLayout:
        """What a `FactorCache` of this model holds."""
        return self.model.cache_layout


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: T6 without its output matrix."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        place: Place = {"device": device, "dtype": dtype, "generator": generator}
        self.embed_tokens, self.layers, self.norm = decoder_parts(config, **place)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "..."] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Hidden states after the final norm."""
        check_input_ids(input_ids)
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x, position_ids=position_ids, cache=cache)
        return self.norm(x)

    @property
    def cache_layout(self) -> CacheLayout:
        """That of one attention layer, times the number of layers."""
        return model_cache_layout(self.layers)


class T6Block(nn.Module):
    """One residual block: attention, then SwiGLU, each behind an RMSNorm.

    Args:
        config: sizes, mechanism and options.
        layer_idx: which records of a cache are this block's.
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        place: Place = {"device": device, "dtype": dtype, "generator": generator}
        start: dict[str, Any] = {"init": config.init, "zero_init_output": config.zero_init_output}
        self.layer_idx = layer_idx
        self.attn_norm = block_norm(config, device, dtype)
        self.attn = attention(config, **place)
        self.ffn_norm = block_norm(config, device, dtype)
        self.ffn = SwiGLU(config.hidden_size, config.ffn_dim, **start, **place)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        position_ids: Int[Tensor, "..."] | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T d"]:
        """The hidden states after this block; the arguments are those of the attention layer."""
        x = x + self.attn(
            self.attn_norm(x),
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache=cache,
            layer_idx=self.layer_idx,
        )
        return x + self.ffn(self.ffn_norm(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), times a weight if asked for; computed in float32 (float64 for float64).

    Args:
        width: size of the last axis, >= 1.
        affine: learn a weight per feature, starting at 1.
        eps: > 0; None for the epsilon of the type the norm is computed in, which is float32's for 16-bit
            input, as `torch.nn.functional.rms_norm` has it.
        device: where the weight lives.
        dtype: its type.

    Raises:
        ValueError: if `width` or `eps` is out of range.
    """

    def __init__(
        self,
        width: int,
        affine: bool = False,
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width!r}")
        if eps is not None and not eps > 0:
            raise ValueError(f"eps must be > 0 or None, got {eps!r}")
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype)) if affine else None

    def reset_parameters(self) -> None:
        """The weight, if there is one, becomes 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The normed rows, in the type of `x`."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps if self.eps is None else self.eps
        normed = functional.rms_norm(x.to(wide), (self.width,), eps=eps).to(x.dtype)
        return normed if self.weight is None else normed * self.weight

    def extra_repr(self) -> str:
        """Sizes for `print`."""
        return f"{self.width}, affine={self.weight is not None}, eps={self.eps}"


class SwiGLU(nn.Module):
    """W3 (SiLU(W1 x) * W2 x), without biases.

    Args:
        width: d.
        hidden: width between; None for floor(8/3 d).
        init: "t6" and "xavier" draw W1 and W2 from uniform(+-1/sqrt(fan_in)), the initial values of
            `nn.Linear` that the authors trained from (the paper's Xavier concerns the factor maps); "normal"
            has std 0.02.
        zero_init_output: W3 starts at zero instead of like the others.
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.

    Raises:
        ValueError: if a size is < 1 or `init` unknown.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        init: str = "t6",
        zero_init_output: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden = 8 * width // 3 if hidden is None else hidden
        for name, size in (("width", width), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {init!r}")
        self.init = init
        self.zero_init_output = zero_init_output
        self.w1 = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values anew; W3 becomes zero unless told otherwise."""
        init_matrix(self.w1.weight, self.init, generator)
        init_matrix(self.w2.weight, self.init, generator)
        if self.zero_init_output:
            nn.init.zeros_(self.w3.weight)
        else:
            init_matrix(self.w3.weight, self.init, generator)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What the block adds to each row."""
        return self.w3(functional.silu(self.w1(x)) * self.w2(x))


def param_groups(
    model: nn.Module, weight_decay: float = 0.1, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the paper decays every parameter; exceptions are named.

    Decay acts on A and B, of which only the product matters to the model, so it shrinks K and V twice; naming
    the factor maps, `no_decay=("a_k", "b_k", "a_v", "b_v")`, turns that off. Tied parameters appear once,
    frozen ones not at all.

    Args:
        model: any module.
        weight_decay: of the parameters not named, >= 0.
        no_decay: names of modules or parameters ("norm", "embed_tokens", "a_k") or patterns of whole names
            ("*.attn.b_*").

    Returns:
        One or two groups, decayed parameters first.

    Raises:
        ValueError: if `weight_decay` is negative or an entry of `no_decay` names no parameter.
        TypeError: if `no_decay` is a string.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}")
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay must be a sequence of names, got the string {no_decay!r}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for entry in no_decay:
        if not any(_is_named(name, entry) for name in parameters):
            raise ValueError(f"no_decay must name trainable parameters of the model, got {entry!r}")
    free = {name for name in parameters if any(_is_named(name, entry) for entry in no_decay)}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in free], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if name in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_named(name: str, entry: str) -> bool:
    return entry in name.split(".") or fnmatchcase(name, entry)


# ---------------------------------------------------------------------- pieces that hf.py builds from as well


class Place(TypedDict):
    """Where parameters live, of which type, and what draws their initial values."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    generator: torch.Generator | None


NOWHERE: Place = {"device": None, "dtype": None, "generator": None}


def decoder_parts(config: ModelConfig, **place: Unpack[Place]) -> tuple[nn.Embedding, nn.ModuleList, RMSNorm]:
    """Embedding, blocks and final norm of a model."""
    device, dtype = place["device"], place["dtype"]
    embedding = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
    init_matrix(embedding.weight, config.init, place["generator"])
    layers = nn.ModuleList(T6Block(config, i, **place) for i in range(config.num_hidden_layers))
    return embedding, layers, block_norm(config, device, dtype)


def output_projection(config: ModelConfig, **place: Unpack[Place]) -> nn.Linear:
    """The matrix from hidden states to logits, not yet tied."""
    device, dtype = place["device"], place["dtype"]
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
    init_matrix(head.weight, config.init, place["generator"])
    return head


def attention(config: ModelConfig, **place: Unpack[Place]) -> nn.Module:
    """The attention layer of the configured mechanism."""
    sizes = (config.hidden_size, config.num_attention_heads, config.head_dim)
    shared: dict[str, Any] = {
        "rope": config.rope,
        "init": config.init,
        "zero_init_output": config.zero_init_output,
        "impl": config.impl,
        **place,
    }
    if config.mechanism == "mha":
        return MHA(*sizes, **shared)
    if config.mechanism == "mqa":
        return MQA(*sizes, **shared)
    if config.mechanism == "gqa":
        return GQA(*sizes, num_kv_heads=config.kv_heads, **shared)
    if config.mechanism == "mla":
        latents = {name: getattr(config, name) for name in ("kv_latent", "q_latent", "rope_dim")}
        return MLA(*sizes, **latents, **shared)
    ranks = (config.q_rank, config.k_rank, config.v_rank)
    options = {name: getattr(config, name) for name in TPA_OPTIONS}
    return TPAttention(*sizes, *ranks, variant=config.layer_variant, **options, **shared)


def block_norm(config: ModelConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> RMSNorm:
    """The norm in front of attention, of SwiGLU and of the output matrix."""
    return RMSNorm(config.hidden_size, config.norm_affine, config.norm_eps, device=device, dtype=dtype)


def model_cache_layout(layers: nn.ModuleList) -> CacheLayout:
    """The layout of the first attention layer, for all layers: they are alike."""
    first: Any = layers[0]
    layout: CacheLayout = first.attn.cache_layout
    return replace(layout, num_layers=len(layers))


@torch.no_grad()
def init_matrix(weight: Tensor, init: str, generator: torch.Generator | None = None) -> None:
    """Uniform within +-1/sqrt(columns), or normal with std 0.02 under init="normal"."""
    if init == "normal":
        nn.init.normal_(weight, std=NORMAL_STD, generator=generator)
    else:
        bound = 1 / sqrt(weight.shape[1])
        nn.init.uniform_(weight, -bound, bound, generator=generator)


def check_input_ids(input_ids: Tensor) -> None:
    """Raise unless the ids are integers of shape (B, T)."""
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
