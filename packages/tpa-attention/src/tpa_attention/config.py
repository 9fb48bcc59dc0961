"""What a T6 model is made of, as plain frozen data: RopeConfig, ModelConfig, trained sizes and recipes.

No framework is imported here; `tpa_attention.torch`, `tpa_attention.flax` and the accounting all read these.
The trained sizes choose the number of heads per mechanism so that attention has about the 4 d^2 parameters of
MHA:

    d (R_Q + R_K + R_V)(h + D) + d h D ~ 4 d^2        with D = 64 and ranks (6, 2, 2)

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 5, Appendix H, and the authors' released configurations.
"""

from dataclasses import dataclass, fields
from math import cos, pi
from typing import Any

from . import _checks
from ._checks import VARIANTS, one_of

MECHANISMS = ("tpa", "kvonly", "mha", "mqa", "gqa", "mla")

HEAD_ACTIVATIONS = ("none", "sigmoid", "softmax")
INITS = ("t6", "xavier", "normal")
IMPLS = ("auto", "reference", "sdpa", "flex", "triton")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the rows of B.

    Both signs and both layouts satisfy Theorem 3.1; they matter only to weights trained with one of them.

    Args:
        base: theta_i = base^(-2 i / rotary_dim); > 1.
        fraction: share of the features that turn, in [0, 1]; 0 switches RoPE off.
        layout: "half" pairs (i, i + D/2), "interleaved" pairs (2i, 2i + 1).
        sign: -1 is the paper's q T_t, +1 the convention of LLaMA and Hugging Face.
        scaling: None, or a dictionary as Hugging Face writes it: rope_type linear, ntk, yarn or llama3 and
            factor >= 1; for the last two also original_max_position_embeddings and, if wished, beta_fast (32)
            and beta_slow (1) for yarn, low_freq_factor (1) and high_freq_factor (4, above it) for llama3.
        dtype: precision to which cos and sin are rounded, None for float32 (float64 for float64 input);
            "bfloat16" reproduces the authors' rounding.

    Raises:
        ValueError: if a value is outside of what is listed above.
        TypeError: if a number or the dictionary is something else.

    Source: Zhang et al. 2025, (3.4)-(3.6), Theorem 3.1 and F.4; the scalings are not in the paper.
    """

    base: float = 10000.0
    fraction: float = 1.0
    layout: str = "half"
    sign: int = -1
    scaling: dict[str, Any] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        values = (self.base, self.fraction, self.layout, self.sign, self.scaling, self.dtype)
        names = ("base", "fraction", "layout", "sign", "scaling", "dtype")
        object.__setattr__(self, "scaling", _checks.rotation(values, names))

    def __hash__(self) -> int:
        scaling = None if self.scaling is None else tuple(sorted(self.scaling.items()))
        return hash((self.base, self.fraction, self.layout, self.sign, scaling, self.dtype))

    @classmethod
    def none(cls) -> "RopeConfig":
        """No rotation at all."""
        return cls(fraction=0.0)

    def rotary_dim(self, width: int) -> int:
        """How many leading features of a row of this width turn: 2 floor(floor(width fraction) / 2).

        Args:
            width: D, or the first of the factor widths, or MLA's d_R.

        Raises:
            ValueError: if the width is odd and RoPE is on, or too small for the ntk scaling.
        """
        if self.fraction == 0:
            return 0
        if width % 2:
            raise ValueError(
                f"the width that RoPE rotates must be even, got {width}; RopeConfig.none() is off"
            )
        turning = 2 * (int(width * self.fraction) // 2)
        if self.scaling is not None and self.scaling["rope_type"] == "ntk" and 0 < turning <= 2:
            raise ValueError(f"rope scaling 'ntk' needs more than 2 rotated features, got {turning}")
        return turning


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A T6 model: sizes, attention mechanism, options of the layer. The defaults are the trained `small` T6.

    Args:
        mechanism: "tpa", "kvonly" (queries not factored), "mha", "mqa", "gqa" or "mla".
        vocab_size: rows of the embedding.
        hidden_size: d.
        num_hidden_layers: blocks of attention and SwiGLU.
        num_attention_heads: h.
        head_dim: D, width of a query and key head.
        v_head_dim: E, width of a value head; None for D.
        q_rank: R_Q; not read under KV-only.
        k_rank: R_K.
        v_rank: R_V.
        num_key_value_heads: G, for "gqa", a divisor of h; otherwise None.
        kv_latent: d_c of "mla"; otherwise None.
        q_latent: d_c' of "mla"; otherwise None.
        rope_dim: d_R of "mla", even; otherwise None.
        intermediate_size: width of SwiGLU; None for floor(8/3 d).
        max_position_embeddings: longest context the model is made for.
        rope_theta: see `RopeConfig.base`.
        rope_sign: see `RopeConfig.sign`.
        rope_layout: see `RopeConfig.layout`.
        rope_fraction: see `RopeConfig.fraction`.
        rope_scaling: see `RopeConfig.scaling`.
        rope_dtype: see `RopeConfig.dtype`.
        tie_word_embeddings: the output matrix is the embedding.
        norm_affine: RMSNorm of the blocks has a weight.
        norm_eps: of RMSNorm; None for the epsilon of the dtype.
        variant: "contextual", or names joined by "+": kv_only, and one of noncontextual_a, noncontextual_b.
        shared_kv_b: V uses the rows b of K, unrotated; needs R_K = R_V and E = D.
        factor_dims: widths of the factors of a row of B (third order: two of them); their product is D = E.
        head_activation: "none", "sigmoid" or "softmax", on every contextual and free A.
        a_bias: a(x) = c + W x, which a converted layer needs to become contextual.
        rank_scale: 1/R in front of the sum over ranks.
        rotate_on_load: cache unrotated keys; forced where B_K is shared or free.
        out_norm: RMSNorm of each head's output.
        factor_norm: RMSNorm of the rows of B_Q and B_K before RoPE.
        output_gate: sigmoid gate in front of W^O.
        kv_shift: K and V read mu x_t + (1 - mu) x_{t-1}.
        fused_proj: one matrix product for all factors.
        init: "t6" (as trained), "xavier" (paper text) or "normal" (std 0.02).
        zero_init_output: W^O and the last matrix of SwiGLU start at zero.
        impl: "auto", "reference", "sdpa", "flex" or "triton".

    Raises:
        ValueError: if a value or a combination is not among those above, before anything is built.
        TypeError: if a size is no integer.

    Source: Zhang et al. 2025, Sections 3 to 5, Appendices C and G.
    """

    mechanism: str = "tpa"
    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 34
    head_dim: int = 64
    v_head_dim: int | None = None
    q_rank: int = 6
    k_rank: int = 2
    v_rank: int = 2
    num_key_value_heads: int | None = None
    kv_latent: int | None = None
    q_latent: int | None = None
    rope_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rope_sign: int = -1
    rope_layout: str = "half"
    rope_fraction: float = 1.0
    rope_scaling: dict[str, Any] | None = None
    rope_dtype: str | None = None
    tie_word_embeddings: bool = True
    norm_affine: bool = False
    norm_eps: float | None = None
    variant: str = "contextual"
    shared_kv_b: bool = False
    factor_dims: tuple[int, ...] | None = None
    head_activation: str = "none"
    a_bias: bool = False
    rank_scale: bool = True
    rotate_on_load: bool = False
    out_norm: bool = False
    factor_norm: bool = False
    output_gate: bool = False
    kv_shift: bool = False
    fused_proj: bool = True
    init: str = "t6"
    zero_init_output: bool = True
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.factor_dims is not None:
            object.__setattr__(self, "factor_dims", tuple(self.factor_dims))  # JSON knows lists only
        one_of("mechanism", self.mechanism, MECHANISMS)
        one_of("head_activation", self.head_activation, HEAD_ACTIVATIONS)
        one_of("init", self.init, INITS)
        one_of("impl", self.impl, IMPLS)
        names = ("rope_theta", "rope_fraction", "rope_layout", "rope_sign", "rope_scaling", "rope_dtype")
        scaling = _checks.rotation(tuple(getattr(self, name) for name in names), names)
        object.__setattr__(self, "rope_scaling", scaling)
        _checks.model(self)

    def __hash__(self) -> int:
        plain = (getattr(self, f.name) for f in fields(self) if f.name != "rope_scaling")
        return hash((*plain, self.rope))

    @property
    def rope(self) -> RopeConfig:
        """The rotation of all layers."""
        return RopeConfig(
            self.rope_theta,
            self.rope_fraction,
            self.rope_layout,
            self.rope_sign,
            self.rope_scaling,
            self.rope_dtype,
        )

    @property
    def value_dim(self) -> int:
        """E, the width of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def ffn_dim(self) -> int:
        """Hidden width of SwiGLU."""
        return 8 * self.hidden_size // 3 if self.intermediate_size is None else self.intermediate_size

    @property
    def layer_variant(self) -> str:
        """`variant` as the layer takes it: with kv_only where the mechanism says so, in a fixed order."""
        names = set(parse_variant(self.variant)) | ({"kv_only"} if self.mechanism == "kvonly" else set())
        return "+".join(name for name in VARIANTS if name in names) or "contextual"

    @property
    def kv_heads(self) -> int:
        """G: h for MHA, 1 for MQA, `num_key_value_heads` for GQA.

        Raises:
            ValueError: under the other mechanisms, which have no key and value heads.
        """
        groups = {"mha": self.num_attention_heads, "mqa": 1, "gqa": self.num_key_value_heads}.get(
            self.mechanism
        )
        if groups is None:
            raise ValueError(f"mechanism {self.mechanism!r} has no key and value heads")
        return groups


def parse_variant(variant: str) -> frozenset[str]:
    """The names of a variant; empty for "contextual".

    Raises:
        ValueError: for unknown or repeated names, and for both A and B free of the token.
    """
    return _checks.variant_names(variant)


# ------------------------------------------------------------------------------------ sizes that were trained

# name: layers, d, heads of MHA, MQA, GQA (2 groups), MLA (matched, paper), KV-only, TPA
_SIZES = {
    "small": (12, 768, 12, 23, 22, 13, 12, 22, 34),
    "medium": (24, 1024, 16, 31, 30, 11, 23, 29, 47),
    "large": (36, 1280, 20, 39, 38, 18, 34, 37, 61),
    "xl": (48, 1600, 25, 49, 48, 29, 49, 47, 78),
}
_LATENTS = {"small": (256, 512), "medium": (512, 1024), "large": (512, 1024), "xl": (512, 1024)}
_COLUMNS = ("mha", "mqa", "gqa", "mla_matched", "mla_paper", "kvonly", "tpa")
PRESETS = tuple(_SIZES)
PRESET_MECHANISMS = ("tpa", "kvonly", "mha", "mqa", "gqa", "mla", "mla_matched", "mla_paper")
RECIPES = ("config", "paper-text")


def preset(name: str, mechanism: str = "tpa", *, recipe: str = "config") -> ModelConfig:
    """A model of the size that was trained, with the head count of its mechanism.

    "mla" and "mla_matched" take the most heads whose attention does not exceed 4 d^2 parameters; "mla_paper"
    keeps the paper's table, whose medium to xl models carry 16 to 18 % more parameters in all than MHA's.

    Args:
        name: "small", "medium", "large" or "xl".
        mechanism: one of `PRESET_MECHANISMS`.
        recipe: "config" for the released configurations, "paper-text" for what the text states (Xavier on the
            weight matrices instead of the views; see also `training_recipe`).

    Raises:
        ValueError: if a name is not among those listed.

    Source: Zhang et al. 2025, Tables 5 and 6; App. G for the initial values of the text.
    """
    one_of("name", name, PRESETS)
    one_of("mechanism", mechanism, PRESET_MECHANISMS)
    one_of("recipe", recipe, RECIPES)
    layers, d, *heads = _SIZES[name]
    column = "mla_matched" if mechanism == "mla" else mechanism
    latent = mechanism.startswith("mla")
    kv_latent, q_latent = _LATENTS[name] if latent else (None, None)
    return ModelConfig(
        mechanism="mla" if latent else mechanism,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads[_COLUMNS.index(column)],
        num_key_value_heads=2 if mechanism == "gqa" else None,
        kv_latent=kv_latent,
        q_latent=q_latent,
        rope_dim=32 if latent else None,
        init="t6" if recipe == "config" else "xavier",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How a size was trained: AdamW with linear warm-up and a cosine to `min_lr`, on FineWeb-Edu-100B.

    Tokens are those of GPT-2's BPE. Weight decay acts on all parameters. A step sees
    micro_batch * accumulation * gpus sequences.
    """

    lr: float
    min_lr: float
    micro_batch: int
    accumulation: int
    gpus: int
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 2000
    steps: int = 100_000
    sequence_length: int = 1024
    autocast: str = "bfloat16"

    @property
    def batch(self) -> int:
        """Sequences per step."""
        return self.micro_batch * self.accumulation * self.gpus

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.batch * self.sequence_length * self.steps

    def learning_rate(self, step: int) -> float:
        """Rate of step 0, 1, ...: lr (step + 1) / warmup_steps, then a cosine that ends at min_lr.

        Raises:
            ValueError: if the step is negative.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.min_lr + 0.5 * (1 + cos(pi * done)) * (self.lr - self.min_lr)


_RATES = {"small": (6e-4, 3e-5), "medium": (6e-4, 3e-5), "large": (2e-4, 1e-5), "xl": (1e-4, 1e-5)}
_BATCHES = {"small": (24, 5, 4), "medium": (20, 3, 8), "large": (15, 4, 8), "xl": (6, 10, 8)}


def training_recipe(name: str, *, recipe: str = "config") -> TrainingRecipe:
    """How the models of a size were trained: 480 sequences of 1024 tokens for 100,000 steps.

    Args:
        name: "small", "medium", "large" or "xl".
        recipe: "config" for the released configurations; "paper-text" differs in the rates of medium
            (3e-4 to 6e-5 instead of 6e-4 to 3e-5).

    Raises:
        ValueError: if a name is not among those listed.

    Source: Zhang et al. 2025, Section 5.1 and Appendix H.
    """
    one_of("name", name, PRESETS)
    one_of("recipe", recipe, RECIPES)
    lr, min_lr = (3e-4, 6e-5) if (name, recipe) == ("medium", "paper-text") else _RATES[name]
    micro_batch, accumulation, gpus = _BATCHES[name]
    return TrainingRecipe(lr=lr, min_lr=min_lr, micro_batch=micro_batch, accumulation=accumulation, gpus=gpus)
