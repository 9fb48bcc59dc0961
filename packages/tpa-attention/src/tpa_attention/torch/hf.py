"""T6 for Hugging Face: T6Config, T6Model, T6ForCausalLM, known to the Auto classes as model type "t6".

The blocks are those of `tpa_attention.torch.model`, the caches those of transformers (`hf_cache.py`).
transformers renamed `past_key_values` to `cache` within version 5: both names are accepted, the output has
the one that the installed version uses.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 for what is cached, Section 5 for the model.
"""

import difflib
from dataclasses import asdict, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        Cache,
        DynamicCache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpa_attention.torch.hf needs transformers, and {error.name} is not installed: "
        'pip install "tpa-attention[hf]"',
        name=error.name,
    ) from error

from tpa_attention.config import ModelConfig, preset

from .hf_cache import RecordsInCache, all_valid, is_static, key_mask, key_positions, mask_length
from .model import (
    NOWHERE,
    check_input_ids,
    decoder_parts,
    init_matrix,
    model_cache_layout,
    output_projection,
)

MODEL_FIELDS = tuple(f.name for f in fields(ModelConfig))
CACHE_FIELD = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


class T6Config(PreTrainedConfig):
    """The fields of `tpa_attention.config.ModelConfig`, flat, with those every Hugging Face model has.

    Args:
        use_cache: keep records while generating; False by default under `kv_shift`, whose last hidden state
            has no place in a Hugging Face cache.
        pad_token_id: token that pads a batch.
        bos_token_id: token that begins a text.
        eos_token_id: token, or tokens, that end a text.
        options: fields of `ModelConfig`, and those of `PreTrainedConfig`.

    Raises:
        ValueError: if a field of `ModelConfig` is out of range.
        TypeError: if an option is a misspelt field of `ModelConfig`.
    """

    model_type = "t6"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a class list)
    rope_scaling: Any = None  # an attribute: the base class has a property that warns and renames

    def __init__(
        self,
        *,
        use_cache: bool | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **options: Any,
    ) -> None:
        _reject_misspelt(options)
        own = {name: options.pop(name) for name in MODEL_FIELDS if name in options}
        model_config = ModelConfig(**own)
        for name in MODEL_FIELDS:
            setattr(self, name, getattr(model_config, name))
        tied = self.tie_word_embeddings
        super().__init__(**options)
        self.tie_word_embeddings = tied
        self.use_cache = not self.kv_shift if use_cache is None else use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @classmethod
    def preset(
        cls, name: str, mechanism: str = "tpa", *, recipe: str = "config", **options: Any
    ) -> "T6Config":
        """The configuration of a size that was trained; see `tpa_attention.config.preset`.

        Args:
            name: "small", "medium", "large" or "xl".
            mechanism: "tpa", "kvonly", "mha", "mqa", "gqa", "mla", "mla_matched" or "mla_paper".
            recipe: "config" or "paper-text".
            options: what to change in it.
        """
        return cls(**{**asdict(preset(name, mechanism, recipe=recipe)), **options})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **options: Any) -> "T6Config":
        """The same model for Hugging Face."""
        return cls(**{**asdict(config), **options})

    def to_model_config(self) -> ModelConfig:
        """The fields of the model alone, checked again."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_FIELDS})

    def __eq__(self, other: object) -> bool:
        """The same model and tokens; newer base classes would compare the fields of the base class alone."""
        names = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
        return (
            isinstance(other, T6Config)
            and self.to_model_config() == other.to_model_config()
            and all(getattr(self, name) == getattr(other, name) for name in names)
        )

    __hash__ = None  # type: ignore[assignment]


def _reject_misspelt(options: dict[str, Any]) -> None:
    """PreTrainedConfig keeps any option as an attribute; a near miss of one of ours is an error instead."""
    for name in options:
        if name in MODEL_FIELDS or hasattr(PreTrainedConfig, name):
            continue
        if close := difflib.get_close_matches(name, MODEL_FIELDS, n=1, cutoff=0.85):
            raise TypeError(f"T6Config has no option {name!r}; did you mean {close[0]!r}?")


class T6PreTrainedModel(PreTrainedModel):
    """What T6Model and T6ForCausalLM share.

    `attn_implementation` of transformers changes nothing here: `config.impl` says how attention is computed.
    """

    config: T6Config
    config_class = T6Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["T6Block"]  # noqa: RUF012 (transformers reads class attributes)
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        # transformers passes over modules of foreign code that own no parameter, and so over the attention
        # layers, which draw the values of all their maps; `_init_weights` leaves alone what was loaded
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values, for a new model and for what a checkpoint lacks; what was loaded stays as it is."""
        parameters = dict(module.named_parameters())
        loaded = {n: p.clone() for n, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
        if len(loaded) == len(parameters):
            return
        if isinstance(module, nn.Embedding | nn.Linear):
            init_matrix(module.weight, self.config.init)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        for name, value in loaded.items():
            parameters[name].copy_(value)

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, **context: Any
    ) -> Tensor | None:
        """The key mask of a static cache, of one size for all steps; `generate` calls it before each.

        Args:
            attention_mask: (B, n), 1 for valid tokens.
            context: the other arguments of transformers' function; the cache is read.
        """
        cache = context.get(CACHE_FIELD)
        if attention_mask is None or attention_mask.ndim != 2 or cache is None:
            return attention_mask
        mask = key_mask(attention_mask, mask_length(cache, attention_mask[0]), static=True)
        return None if all_valid(mask) else mask


class T6Model(T6PreTrainedModel):
    """Embedding, blocks and final norm; the parameter names of `tpa_attention.torch.model.Decoder`."""

    def __init__(self, config: T6Config) -> None:
        super().__init__(config)
        self.embed_tokens, self.layers, self.norm = decoder_parts(config.to_model_config(), **NOWHERE)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "..."] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Int[Tensor, " T"] | None = None,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: tokens; or `inputs_embeds`, one of the two.
            attention_mask: (B, M) with 1 for valid keys, cached ones included, padding on either side; or a
                ready mask (B, 1 or H, T, M), boolean or additive.
            position_ids: (T,) or (B, T); by default the places in the cache.
            past_key_values: a cache of transformers, under the name of version 5.0.
            inputs_embeds: embeddings instead of tokens.
            use_cache: create a DynamicCache if none is given; by default `config.use_cache`, and not in
                training.
            output_hidden_states: also return what enters each block and the final hidden states.
            output_attentions: not available: attention weights are never formed.
            cache_position: places of the new tokens in the cache, as `generate` of version 5.0 passes them.
            cache: a cache of transformers, under its newer name.

        Raises:
            ValueError: if inputs, mask or cache do not fit together, under `kv_shift` with a cache, and for
                attention weights.
        """
        x = self._embed(input_ids, inputs_embeds)
        if output_attentions:
            raise ValueError("output_attentions must be False: T6 forms no attention weights, got True")
        kept = self._cache_to_use(past_key_values if cache is None else cache, use_cache)
        slots = torch.arange(x.shape[1], device=x.device)
        if kept is not None:
            slots = slots + kept.get_seq_length() if cache_position is None else cache_position
        positions = slots if position_ids is None else position_ids
        keys = x.shape[1] if kept is None else mask_length(kept, slots)
        mask = attention_mask
        if mask is not None and mask.ndim == 2:
            mask = key_mask(mask, keys, static=kept is not None and is_static(kept))
        layer_cache = None
        if kept is not None:
            at = key_positions(slots, positions, mask, keys, x.shape[0]) if self._rotates_on_load else None
            layer_cache = RecordsInCache(kept, slots, x.shape[0], at)
        if mask is not None and mask.ndim == 2 and all_valid(mask):
            mask = None

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []
        for block in self.layers:
            if wanted:
                states.append(x)
            if self._checkpointing:
                x = self._gradient_checkpointing_func(block.__call__, x, positions, mask, layer_cache)
            else:
                x = block(x, positions, mask, layer_cache)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=(*states, x) if wanted else None, **cache_output(kept)
        )

    @property
    def _rotates_on_load(self) -> bool:
        return model_cache_layout(self.layers).keep_positions

    @property
    def _checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds must be given, got "
                f"{'neither' if input_ids is None else 'both'}"
            )
        if input_ids is None:
            return inputs_embeds  # pyright: ignore[reportReturnType]
        check_input_ids(input_ids)
        return self.embed_tokens(input_ids)

    def _cache_to_use(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache given, a new one, or none; checkpointed blocks run twice and would append twice."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is not None and self._checkpointing:
            raise ValueError("cache must be None under gradient checkpointing in training mode, got a cache")
        if self.config.kv_shift and (use_cache or cache is not None):
            raise ValueError(
                "use_cache must be False under kv_shift: a Hugging Face cache has no place for the last "
                "hidden state, got a cache or use_cache=True; T6 with a FactorCache decodes such models"
            )
        wanted = use_cache and cache is None and not self._checkpointing
        return DynamicCache(config=self.config) if wanted else cache


class T6ForCausalLM(T6PreTrainedModel, GenerationMixin):
    """T6 with its output matrix, loss and `generate`; the parameter names of `T6` in `model.py`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: T6Config) -> None:
        super().__init__(config)
        self.model = T6Model(config)
        self.lm_head = output_projection(config.to_model_config(), **NOWHERE)
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: D417 (the other arguments are described at T6Model)
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "..."] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Int[Tensor, " T"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        cache: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if labels are given. Arguments not listed here are those of `T6Model`.

        Args:
            labels: tokens, usually the input itself: logits at t are compared with the label at t + 1;
                -100 is ignored. The loss is the mean cross-entropy in nats, computed in float32.
            logits_to_keep: compute logits of the last so many positions only, 0 for all; or indices (kept,).

        Raises:
            ValueError: if labels come with `logits_to_keep` or have another shape than the input, and as
                `T6Model` does.
        """
        everywhere = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not everywhere:
            raise ValueError(f"logits_to_keep must be 0 when labels are given, got {logits_to_keep!r}")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cache_position=cache_position,
            cache=cache,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif not everywhere:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        return CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **cache_output(getattr(outputs, CACHE_FIELD)),
        )


def cache_output(cache: Cache | None) -> dict[str, Any]:
    """The cache under the name that outputs of the installed transformers have for it."""
    return {CACHE_FIELD: cache}


def next_token_loss(logits: Float[Tensor, "B T vocab"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each label given the logits one place before it, in float32; -100 is ignored."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


AutoConfig.register("t6", T6Config, exist_ok=True)
AutoModel.register(T6Config, T6Model, exist_ok=True)
AutoModelForCausalLM.register(T6Config, T6ForCausalLM, exist_ok=True)
