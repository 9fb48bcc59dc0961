"""The mechanisms TPA is compared with, called alike and cached alike: MHA, MQA, GQA and MLA.

    GQA, G groups    q_i = W^Q_i x,  k_g = W^K_g x,  v_g = W^V_g x,  head i reads group floor(i / (h / G))
    MHA, MQA         G = h, G = 1
    MLA              c = norm(W^DKV x),  k_i = [W^UK_i c ; RoPE(W^KR x)],  v_i = W^UV_i c,
                     c' = norm(W^DQ x),  q_i = [W^UQ_i c' ; RoPE(W^QR_i c')],  scale 1/sqrt(D + d_R)

GQA is also TPA with a free A, a_g = G mask_g (Section 4): `GQA.as_tpa` writes it so. MLA caches c and the one
rotary key, d_c + d_R numbers per token, and decodes with W^UK absorbed in the query and W^UV behind the sum.

Source: Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023 (arXiv 2305.13245); DeepSeek-V2 (arXiv
2405.04434). Letters as in Table 1 of Zhang et al. 2025 (arXiv 2501.06425).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tpa_attention import _checks
from tpa_attention.config import IMPLS, INITS, RopeConfig

from . import inputs
from .arguments import MAX_DECODE_TOKENS
from .cache import CacheLayout, LayerCache
from .factor_maps import empty_linear, init_linear
from .layers import TPAttention
from .masks import packed_places, ragged_mask
from .reference import softmax_and_lse
from .rope import rope as apply_rope
from .rows import NORM_EPS, rms_norm
from .sdpa import without_dead_rows


class GQA(nn.Module):
    """Causal grouped-query attention with RoPE: h query heads share G key and value heads.

    Args:
        d_model: d, width of the hidden states.
        num_heads: h.
        head_dim: D, width of every head.
        num_kv_heads: G, a divisor of h.
        rope: rotation of queries and keys.
        init: "normal" (std 0.02); "t6" and "xavier" are both Xavier on the weight matrices.
        zero_init_output: W^O starts at zero.
        impl: "reference" computes plainly; every other one uses torch's scaled_dot_product_attention.
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.

    Raises:
        TypeError: if a size is no int.
        ValueError: if an option is not among those above or G does not divide h.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        *,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
        init: str = "t6",
        zero_init_output: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "head_dim": head_dim}
        check_options(sizes | {"num_kv_heads": num_kv_heads}, rope, head_dim, init, impl)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.num_kv_heads, self.rope = num_kv_heads, rope
        self.init, self.zero_init_output, self.impl = init, zero_init_output, impl
        place = {"device": device, "dtype": dtype}
        self.q = empty_linear(d_model, num_heads * head_dim, **place)
        self.k = empty_linear(d_model, num_kv_heads * head_dim, **place)
        self.v = empty_linear(d_model, num_kv_heads * head_dim, **place)
        self.o = empty_linear(num_heads * head_dim, d_model, **place)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values anew; W^O becomes zero unless told otherwise."""
        init_all((self.q, self.k, self.v), self.o, self.init, self.zero_init_output, generator)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a `FactorCache` of this layer alone holds: G heads of keys, G of values."""
        numbers = self.num_kv_heads * self.head_dim
        return CacheLayout(1, numbers, numbers)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        position_ids: Int[Tensor, "..."] | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_idx: int = 0,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Attend causally; the arguments are those of `TPAttention.forward`."""
        past = None if cache is None else cache.past_length(layer_idx)
        inputs.check_input(x, self.d_model, position_ids, attention_mask, past, cu_seqlens)
        batch, new, _ = x.shape
        positions = (
            inputs.new_positions(past, batch, new, x.device, cu_seqlens)
            if position_ids is None
            else position_ids.expand(batch, new)
        )
        q = apply_rope(self._heads(self.q(x)), positions, self.rope)
        k = apply_rope(self._heads(self.k(x)), positions, self.rope)
        v = self._heads(self.v(x))
        seq_lens = None
        if cache is not None:
            k, v, seq_lens = cache.append(layer_idx, k.flatten(2), v.flatten(2), positions)
            k, v = (self._heads(r[..., : self.num_kv_heads * self.head_dim]) for r in (k, v))
        mask = visibility(attention_mask, batch, new, k.shape[1], seq_lens, cu_seqlens, x.device)
        heads = attend(q.to(k.dtype), k, v, mask, self.head_dim**-0.5, plain=self.impl == "reference")
        return self.o(heads.flatten(2).to(x.dtype))

    def _heads(self, flat: Float[Tensor, "B T n"]) -> Float[Tensor, "B T G D"]:
        return flat.unflatten(-1, (-1, self.head_dim))

    @torch.no_grad()
    def as_tpa(self, *, kv_only: bool = True) -> TPAttention:
        """The same map as tensor product attention with a free A: a_g = G mask_g, R_K = R_V = G (Section 4).

        Args:
            kv_only: keep Q unfactored; otherwise R_Q = h with a_i = h e_i.

        Returns:
            A layer with copies of these weights.
        """
        h, groups = self.num_heads, self.num_kv_heads
        weight = self.o.weight
        layer = TPAttention(
            *(self.d_model, h, self.head_dim, h, groups, groups),
            variant="kv_only+noncontextual_a" if kv_only else "noncontextual_a",
            rope=self.rope,
            impl=self.impl,
            device=weight.device,
            dtype=weight.dtype,
        )
        eye = torch.eye(groups, device=weight.device, dtype=weight.dtype)
        masks = groups * eye.repeat_interleave(h // groups, dim=1)
        for head_map in (layer.a_k, layer.a_v):
            head_map.set_constant(masks)
        if layer.a_q is not None:
            layer.a_q.set_constant(h * torch.eye(h, device=weight.device, dtype=weight.dtype))
        for target, source in ((layer.b_q, self.q), (layer.b_k, self.k), (layer.b_v, self.v)):
            if target is None:  # only where V shares K's rows
                continue
            target.matrix.copy_(source.weight)
        layer.o.weight.copy_(weight)
        return layer


class MHA(GQA):
    """Causal multi-head attention: GQA with G = h. Arguments as for `GQA`, without `num_kv_heads`."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
        init: str = "t6",
        zero_init_output: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            *(d_model, num_heads, head_dim, num_heads),
            rope=rope,
            init=init,
            zero_init_output=zero_init_output,
            impl=impl,
            device=device,
            dtype=dtype,
            generator=generator,
        )


class MQA(GQA):
    """Causal multi-query attention: GQA with G = 1. Arguments as for `GQA`, without `num_kv_heads`."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
        init: str = "t6",
        zero_init_output: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            *(d_model, num_heads, head_dim, 1),
            rope=rope,
            init=init,
            zero_init_output=zero_init_output,
            impl=impl,
            device=device,
            dtype=dtype,
            generator=generator,
        )


class MLA(nn.Module):
    """Causal multi-head latent attention with a decoupled rotary key and a cache of latents.

    Against a cache, up to 16 new tokens attend in latent space (absorbed weights); longer chunks materialise
    keys and values.

    Args:
        d_model: d, width of the hidden states.
        num_heads: h.
        head_dim: D, width of the content part of a key, and of a value.
        kv_latent: d_c.
        q_latent: d_c'.
        rope_dim: d_R, even.
        rope: rotation of the parts of width d_R.
        init: "normal" (std 0.02); "t6" and "xavier" are both Xavier on the weight matrices.
        zero_init_output: W^O starts at zero.
        impl: "reference" computes plainly; every other one uses torch's scaled_dot_product_attention.
        device: where parameters live.
        dtype: their type.
        generator: source of the initial values; torch's default one if None.

    Raises:
        TypeError: if a size is no int.
        ValueError: if an option is not among those above.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        kv_latent: int,
        q_latent: int,
        rope_dim: int,
        *,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
        init: str = "t6",
        zero_init_output: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "head_dim": head_dim}
        latents = {"kv_latent": kv_latent, "q_latent": q_latent, "rope_dim": rope_dim}
        check_options(sizes | latents, rope, rope_dim, init, impl)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.kv_latent, self.q_latent, self.rope_dim, self.rope = kv_latent, q_latent, rope_dim, rope
        self.init, self.zero_init_output, self.impl = init, zero_init_output, impl
        place = {"device": device, "dtype": dtype}

        def linear(inward: int, outward: int) -> nn.Linear:
            return empty_linear(inward, outward, **place)

        width = num_heads * head_dim
        self.q_down, self.q_norm = linear(d_model, q_latent), nn.RMSNorm(q_latent, eps=NORM_EPS, **place)
        self.q_up, self.q_rope = linear(q_latent, width), linear(q_latent, num_heads * rope_dim)
        self.kv_down, self.kv_norm = linear(d_model, kv_latent), nn.RMSNorm(kv_latent, eps=NORM_EPS, **place)
        self.k_up, self.v_up = linear(kv_latent, width), linear(kv_latent, width)
        self.k_rope = linear(d_model, rope_dim)
        self.o = linear(width, d_model)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values anew; W^O becomes zero unless told otherwise, norms become 1."""
        maps = (self.q_down, self.q_up, self.q_rope, self.kv_down, self.k_up, self.v_up, self.k_rope)
        init_all(maps, self.o, self.init, self.zero_init_output, generator)
        for norm in (self.q_norm, self.kv_norm):
            nn.init.ones_(norm.weight)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a `FactorCache` of this layer alone holds: the rotary key as K, the latent as V."""
        return CacheLayout(1, self.rope_dim, self.kv_latent)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        position_ids: Int[Tensor, "..."] | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_idx: int = 0,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Attend causally; the arguments are those of `TPAttention.forward`."""
        past = None if cache is None else cache.past_length(layer_idx)
        inputs.check_input(x, self.d_model, position_ids, attention_mask, past, cu_seqlens)
        batch, new, _ = x.shape
        positions = (
            inputs.new_positions(past, batch, new, x.device, cu_seqlens)
            if position_ids is None
            else position_ids.expand(batch, new)
        )
        c_q = rms_norm(self.q_down(x), self.q_norm.weight)
        q_content = self.q_up(c_q).unflatten(-1, (self.num_heads, self.head_dim))
        q_rope = apply_rope(self.q_rope(c_q).unflatten(-1, (self.num_heads, -1)), positions, self.rope)
        k_rope = apply_rope(self.k_rope(x)[:, :, None], positions, self.rope)[:, :, 0]
        latent = rms_norm(self.kv_down(x), self.kv_norm.weight)
        seq_lens = None
        if cache is not None:
            k_rope, latent, seq_lens = cache.append(layer_idx, k_rope, latent, positions)
            k_rope, latent = k_rope[..., : self.rope_dim], latent[..., : self.kv_latent]
        mask = visibility(attention_mask, batch, new, latent.shape[1], seq_lens, cu_seqlens, x.device)
        absorbed = cache is not None and new <= MAX_DECODE_TOKENS
        inside = self._attend_latent if absorbed else self._attend_materialized
        heads = inside(q_content.to(latent.dtype), q_rope.to(latent.dtype), k_rope, latent, mask)
        return self.o(heads.flatten(2).to(x.dtype))

    def _attend_materialized(
        self, q_content: Tensor, q_rope: Tensor, k_rope: Tensor, latent: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "B T h D"]:
        k_weight, v_weight = self.k_up.weight.to(latent.dtype), self.v_up.weight.to(latent.dtype)
        k_content = functional.linear(latent, k_weight).unflatten(-1, (self.num_heads, self.head_dim))
        v = functional.linear(latent, v_weight).unflatten(-1, (self.num_heads, self.head_dim))
        k = torch.cat([k_content, k_rope[:, :, None].expand(-1, -1, self.num_heads, -1)], dim=-1)
        q = torch.cat([q_content, q_rope], dim=-1)
        return attend(q, k, v, mask, self._scale, plain=self.impl == "reference")

    def _attend_latent(
        self, q_content: Tensor, q_rope: Tensor, k_rope: Tensor, latent: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "B T h D"]:
        """One key and one value for all heads: the records themselves."""
        k_up, v_up = (
            m.weight.to(latent.dtype).unflatten(0, (self.num_heads, self.head_dim))
            for m in (self.k_up, self.v_up)
        )
        q = torch.cat([torch.einsum("bthn,hnc->bthc", q_content, k_up), q_rope], dim=-1)
        k = torch.cat([latent, k_rope], dim=-1)[:, :, None]
        summed = attend(q, k, latent[:, :, None], mask, self._scale, plain=self.impl == "reference")
        return torch.einsum("bthc,hnc->bthn", summed, v_up)

    @property
    def _scale(self) -> float:
        return (self.head_dim + self.rope_dim) ** -0.5


# ---------------------------------------------------------------------------------------- shared by all four


def attend(
    q: Float[Tensor, "B T h D"],
    k: Float[Tensor, "B M G D"],
    v: Float[Tensor, "B M G E"],
    mask: Tensor | None,
    scale: float,
    *,
    plain: bool,
) -> Float[Tensor, "B T h E"]:
    """Softmax attention of h query heads on G groups; a row without a key gives 0.

    Without a mask it is causal: T = M, or a single query that sees everything.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    square = q.shape[2] == k.shape[2]
    share = q.shape[1] // k.shape[1]
    if plain:
        logits = scale * q @ k.repeat_interleave(share, dim=1).mT
        if mask is None and square:
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights, _ = softmax_and_lse(logits, dim=-1)  # 0 in a row without keys
        return (weights @ v.repeat_interleave(share, dim=1)).transpose(1, 2)
    dead, safe = without_dead_rows(mask, q.dtype)
    causal = mask is None and square
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=safe, is_causal=causal, scale=scale, enable_gqa=share > 1
    )
    return (out if dead is None else out.masked_fill(dead, 0)).transpose(1, 2)


def visibility(
    attention_mask: Tensor | None,
    batch: int,
    new: int,
    keys: int,
    seq_lens: Int[Tensor, " B"] | None,
    cu_seqlens: Int[Tensor, " boundaries"] | None,
    device: torch.device,
) -> Tensor | None:
    """The whole mask, causality included; None where `attend` needs none."""
    mask = inputs.key_mask(attention_mask, batch, new, keys)
    if mask is None and seq_lens is None and cu_seqlens is None and new in (keys, 1):
        return None
    if seq_lens is None:
        seq_lens = torch.full((1,), keys, device=device)
    visible = ragged_mask(new, keys, seq_lens)
    if cu_seqlens is not None:
        sequence, _ = packed_places(cu_seqlens.to(device), new)
        visible = visible & (sequence[:, None] == sequence)
    return inputs.combine(mask, visible)


def check_options(sizes: dict[str, int], rope: RopeConfig, rotated: int, init: str, impl: str) -> None:
    """Rules that the constructors share."""
    for name, size in sizes.items():
        _checks.positive_int(name, size)
    _checks.one_of("init", init, INITS)
    _checks.one_of("impl", impl, IMPLS)
    if not isinstance(rope, RopeConfig):
        raise TypeError(f"rope must be a RopeConfig (RopeConfig.none() for none), got {rope!r}")
    rope.rotary_dim(rotated)


def init_all(
    maps: tuple[nn.Linear, ...],
    output: nn.Linear,
    init: str,
    zero_init_output: bool,
    generator: torch.Generator | None,
) -> None:
    """Initial values of all matrices of a layer, W^O zero if so asked."""
    for linear in maps:
        init_linear(linear.weight, init, generator)
    if zero_init_output:
        nn.init.zeros_(output.weight)
    else:
        init_linear(output.weight, init, generator)
