"""From multi-head and grouped-query attention to TPA: exactly, or with fewer ranks than there are heads.

    K_t = (1/R) sum_r a_r (x) V_r x_t     in place of     K_{t,i} = W_i x_t,  i = 1 .. h

R >= number of key-value heads is exact (a_g = R mask_g, V_g = W_g); below it the factorisation is a truncated
SVD, of the weights or, with calibration tokens, of the weights as these tokens see them (`low_rank.py`). a
mixes heads and RoPE turns features, so both commute and the cache keeps turned rows as ever.

Purely linear contextual factors cannot stand in for a linear map: W^a x (x) V x is even in x. A converted
layer becomes contextual with a bias, a_r(x) = c_r + W_r x, starting from W = 0, where nothing has changed.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 4, for the exact route; the others are ours.
"""

from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, Union

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.config import RopeConfig

from .baselines import attend
from .conversion_checks import check_calibration, check_heads, check_rope, check_weights
from .conversion_report import ConversionReport, LayerReport, SideReport
from .layers import TPAttention
from .low_rank import (
    ContextualFactors,
    HeadFactors,
    SecondMoment,
    contextualise,
    group_exactly,
    heads_of,
    rebuild,
    refine,
    second_moment,
    singular_values,
    truncate,
    truncate_for,
)
from .rope import rope as apply_rope

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from .hf import T6ForCausalLM

__all__ = ["ConversionReport", "LayerReport", "SideReport", "convert_hf_llama", "mha_to_tpa"]


@torch.no_grad()
def mha_to_tpa(
    w_q: Float[Tensor, "hD d"],
    w_k: Float[Tensor, "GD d"],
    w_v: Float[Tensor, "GE d"],
    w_o: Float[Tensor, "d hE"],
    num_heads: int,
    num_kv_heads: int,
    *,
    k_rank: int,
    v_rank: int,
    q_rank: int | None = None,
    calibration: Float[Tensor, "*B T d"] | None = None,
    refine_steps: int = 0,
    a_bias: bool | None = None,
    rope: RopeConfig = RopeConfig(),  # noqa: B008 - frozen
    impl: str = "auto",
) -> tuple[TPAttention, ConversionReport]:
    """A TPA layer in place of an attention layer with the given weights, and what that costs.

    Exact where a rank reaches the number of heads that differ: `num_kv_heads` for K and V, `num_heads` for Q.
    Ranks beyond that are kept and add nothing to the result. Head factors are free of the token ("variant"
    with noncontextual_a), so the cache holds R_K D + R_V E numbers per token; with `a_bias` they are
    contextual, start where the free ones are, and the cache holds R_K (h + D) + R_V (h + E).

    Args:
        w_q: query weights, rows head by head.
        w_k: key weights; head i reads group floor(i / (h/G)), as repeat_interleave orders them.
        w_v: value weights, groups alike; E = rows / G.
        w_o: output weights.
        num_heads: h.
        num_kv_heads: G, a divisor of h: h for MHA, 1 for MQA.
        k_rank: R_K, 1 to h.
        v_rank: R_V, 1 to h.
        q_rank: R_Q, 1 to h; None leaves Q unfactored (KV-only).
        calibration: hidden states (B, T, d), or (T, d) of one sequence, as they enter the layer: truncation
            then minimises the error on these tokens, and the report has it and that of the output.
        refine_steps: steps of alternating least squares for contextual head factors on the calibration
            tokens, for every side whose rank was cut; a step that does not lower the error ends them. Takes
            several times d tokens to say something about others.
        a_bias: contextual head factors with a bias; None for those of a refinement alone.
        rope: the rotation the weights were trained with; RopeConfig(sign=1) with the base of the model for
            those of LLaMA and Hugging Face.
        impl: of the layer.

    Returns:
        The layer, of the weights' type and on their device, and the report.

    Raises:
        TypeError: if a weight or the calibration is not floating, or a count no int.
        ValueError: if shapes do not fit, G does not divide h, a rank exceeds h, weights or tokens are not
            finite, RoPE meets an odd D, or a refinement lacks calibration or `a_bias`.

    Source: Zhang et al. 2025, Section 4 (exact); Eckart and Young 1936 (truncation).
    """
    ranks = {"q_rank": q_rank, "k_rank": k_rank, "v_rank": v_rank}
    given = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    check_heads(num_heads, num_kv_heads, ranks)
    check_weights(given, num_heads, num_kv_heads)
    check_rope(rope, w_q.shape[0] // num_heads)
    check_calibration(calibration, w_q.shape[1], refine_steps, a_bias)

    weights = Weights(
        _double(w_q).unflatten(0, (num_heads, -1)),
        _double(w_k).unflatten(0, (num_kv_heads, -1)),
        _double(w_v).unflatten(0, (num_kv_heads, -1)),
        _double(w_o),
    )
    tokens = None if calibration is None else _double(calibration.detach()).to(weights.o.device)
    fit = Fit(
        num_heads,
        None if tokens is None else tokens.reshape(-1, tokens.shape[-1]),
        refine_steps,
    )
    contextual = refine_steps > 0 if a_bias is None else a_bias
    sides = {
        "q": None if q_rank is None else fit(weights.q, q_rank),
        "k": fit(weights.k, k_rank),
        "v": fit(weights.v, v_rank),
    }
    layer = _layer(weights, sides, contextual, rope, impl)
    report = LayerReport(
        k=sides["k"].report,
        v=sides["v"].report,
        q=None if sides["q"] is None else sides["q"].report,
        output_error=None if tokens is None else _output_error(weights, layer, tokens),
        cache_before=weights.k[..., 0].numel() + weights.v[..., 0].numel(),
        cache_after=layer.k_record.numbers + layer.v_record.numbers,
    )
    return layer.to(device=w_q.device, dtype=w_q.dtype), ConversionReport((report,))


def convert_hf_llama(
    model_or_dir: Union["LlamaForCausalLM", str, PathLike[str]],
    k_rank: int,
    v_rank: int,
    *,
    q_rank: int | None = None,
    calibration: Int[Tensor, "B T"] | None = None,
    refine_steps: int = 0,
    a_bias: bool | None = None,
) -> tuple["T6ForCausalLM", ConversionReport]:
    """A LLaMA of transformers with TPA in place of its attention: a T6ForCausalLM, and what that costs.

    T6 is LLaMA but for its attention, so the result is a model of this package with LLaMA's embedding, norms
    and feed-forward layers: it generates, saves (safetensors) and loads like any other, without transformers'
    LLaMA. RoPE is LLaMA's, sign +1 and half layout, with base and scaling of the configuration.

    Args:
        model_or_dir: a LlamaForCausalLM, which stays as it is, or where `from_pretrained` finds one.
        k_rank: R_K, 1 to h; from the number of key-value heads on the result is exact.
        v_rank: R_V, likewise.
        q_rank: R_Q, 1 to h; None leaves Q unfactored.
        calibration: token ids (B, T) without padding; each layer is fitted to the hidden states that the
            original model has there.
        refine_steps: see `mha_to_tpa`.
        a_bias: see `mha_to_tpa`.

    Returns:
        The model in eval mode, of the original's type and device, and a report of all layers.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: if the model is no LlamaForCausalLM or the token ids are no integers.
        ValueError: if the configuration has what T6 has not (biases, dropout, another activation, a RoPE
            scaling unknown here), and as `mha_to_tpa` does.
    """
    from . import llama  # needs transformers

    model = llama.load(model_or_dir)
    config = llama.t6_config(
        model.config, k_rank, v_rank, q_rank, bool(a_bias or (a_bias is None and refine_steps))
    )
    converted: dict[int, tuple[TPAttention, ConversionReport]] = {}

    def convert(index: int, hidden: Tensor | None) -> None:
        converted[index] = mha_to_tpa(
            *llama.attention_weights(model, index),
            model.config.num_attention_heads,
            llama.key_value_heads(model.config),
            k_rank=k_rank,
            v_rank=v_rank,
            q_rank=q_rank,
            calibration=hidden,
            refine_steps=refine_steps,
            a_bias=a_bias,
            rope=config.to_model_config().rope,
        )

    if calibration is None:
        for index in range(config.num_hidden_layers):
            convert(index, None)
    else:
        llama.visit_hidden_states(model, calibration, convert)
    layers = [converted[index] for index in range(config.num_hidden_layers)]
    new = llama.assemble(model, config, [layer for layer, _ in layers], shared=model is not model_or_dir)
    return new, ConversionReport(tuple(report.layers[0] for _, report in layers))


# --------------------------------------------------------------------------------------------------- fitting


class Weights(NamedTuple):
    """Of the original layer, head by head, float64."""

    q: Float[Tensor, "h D d"]
    k: Float[Tensor, "G D d"]
    v: Float[Tensor, "G E d"]
    o: Float[Tensor, "d hE"]


class Side(NamedTuple):
    """Q, K or V factored."""

    factors: ContextualFactors
    report: SideReport


class Fit:
    """Factors weights of heads for all tokens, or for those given, at any rank.

    Args:
        num_heads: h.
        x: calibration tokens.
        refine_steps: at most so many steps of refinement.
    """

    def __init__(self, num_heads: int, x: Float[Tensor, "N d"] | None, refine_steps: int) -> None:
        self._num_heads = num_heads
        self._x = x
        self._moment: SecondMoment | None = None if x is None else second_moment(x)
        self._refine_steps = refine_steps

    def __call__(self, w: Float[Tensor, "G D d"], rank: int) -> Side:
        """The factors of one side, and its report."""
        exact = rank >= w.shape[0]
        free = self._free(w, rank)
        wanted = w.repeat_interleave(self._num_heads // w.shape[0], dim=0)
        report = SideReport(
            rank=rank,
            exact=exact,
            singular_values=tuple(singular_values(w, self._num_heads).tolist()),
            weight_error=_relative(rebuild(free), wanted),
        )
        factors = contextualise(free)
        if self._x is None:
            return Side(factors, report)
        heads = (self._x @ wanted.flatten(0, 1).T).unflatten(-1, (self._num_heads, -1))
        if self._refine_steps and not exact:
            factors, errors = refine(factors, self._x, heads, self._refine_steps)
            size = heads.square().mean().item()
            report = replace(report, refinement=tuple((e / size) ** 0.5 if size else 0.0 for e in errors))
        return Side(factors, replace(report, token_error=_relative(heads_of(factors, self._x), heads)))

    def _free(self, w: Float[Tensor, "G D d"], rank: int) -> HeadFactors:
        if rank >= w.shape[0]:
            return group_exactly(w, self._num_heads, rank)
        if self._moment is None:
            return truncate(w, self._num_heads, rank)
        return truncate_for(w, self._num_heads, rank, self._moment)


def _layer(
    weights: Weights, sides: dict[str, Side | None], contextual: bool, rope: RopeConfig, impl: str
) -> TPAttention:
    """The layer, in float64."""
    h, D, d = weights.q.shape
    names = [*(["kv_only"] if sides["q"] is None else []), *([] if contextual else ["noncontextual_a"])]
    layer = TPAttention(
        *(d, h, D),
        *(h if side is None else side.report.rank for side in sides.values()),
        v_head_dim=weights.v.shape[1],
        variant="+".join(names) or "contextual",
        a_bias=contextual,
        rope=rope,
        impl=impl,
        device="meta",  # draws no initial values
        dtype=torch.float64,
    ).to_empty(device=weights.q.device)
    for name, side in sides.items():
        b = layer.get_parameter(f"b_{name}.weight")
        if side is None:
            b.copy_(weights.q.flatten(0, 1))
            continue
        b.copy_(side.factors.b.flatten(0, 1))
        layer.get_parameter(f"a_{name}.bias").copy_(side.factors.c.flatten())
        if contextual:
            layer.get_parameter(f"a_{name}.weight").copy_(side.factors.w.flatten(0, 1))
    layer.o.weight.copy_(weights.o)
    return layer


def _output_error(weights: Weights, layer: TPAttention, x: Float[Tensor, "*B T d"]) -> float:
    """Of the layer's output on the tokens, against the original attention on the same."""
    x = x if x.ndim == 3 else x[None]
    positions = torch.arange(x.shape[1], device=x.device)
    q, k, v = (torch.einsum("btd,hnd->bthn", x, w) for w in weights[:3])
    q, k = (apply_rope(heads, positions, layer.rope) for heads in (q, k))
    heads = attend(q, k, v, None, layer.head_dim**-0.5, plain=False)
    return _relative(layer(x), heads.flatten(2) @ weights.o.T)


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference, size = (found - wanted).norm().item(), wanted.norm().item()
    return difference / size if difference else 0.0


def _double(tensor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs lack."""
    return tensor.to(device="cpu" if tensor.device.type == "mps" else None, dtype=torch.float64)
