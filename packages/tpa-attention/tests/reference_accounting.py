"""Exact counts in plain integers: cached numbers, parameters, multiply-adds, initial bounds, the sizes of T6.

One multiply-add (MAC) is counted per term of a product of matrices. The products with A_K and A_V, which are
elementwise in the heads (h R_K and h R_V per pair of tokens), exponentials and W^O are left out, as in A.4.

Source: Zhang et al. 2025 (arXiv 2501.06425), Table 1, Appendices A.4, F.4 (MFA) and G (initial bounds).
"""

from dataclasses import dataclass, replace
from math import sqrt


@dataclass(frozen=True)
class Shape:
    """One attention layer in the letters of Table 1; D is also the value width, `dims` are its factors."""

    kind: str
    d: int = 0
    h: int = 0
    D: int = 0
    G: int = 0
    rq: int = 0
    rk: int = 0
    rv: int = 0
    d_c: int = 0
    d_cq: int = 0
    d_r: int = 0
    dims: tuple[int, ...] = ()


# ----------------------------------------------------------------------------------------- cache, parameters


def cache_numbers(s: Shape) -> int:
    """Numbers cached per token and layer (Table 1)."""
    r = s.rk + s.rv
    return {
        "mha": 2 * s.h * s.D,
        "mqa": 2 * s.D,
        "gqa": 2 * s.G * s.D,
        "mla": s.d_c + s.d_r,
        "tpa": r * (s.h + s.D),
        "kv_only": r * (s.h + s.D),
        "noncontextual_a": r * s.D,
        "noncontextual_b": r * s.h,
        "shared_b": s.rk * (2 * s.h + s.D),
        "higher_order": r * (s.h + sum(s.dims)),
        "mfa": 2 * s.d_c,
    }[s.kind]


def parameters(s: Shape) -> int:
    """Parameters of one attention layer (Table 1); MLA without its two latent norms."""
    d, h, D = s.d, s.h, s.D
    r = s.rq + s.rk + s.rv
    out = d * h * D
    return {
        "mha": 4 * d * h * D,
        "mqa": 2 * d * D * (h + 1),
        "gqa": 2 * d * D * (h + s.G),
        "mla": s.d_cq * (d + h * D + h * s.d_r) + s.d_c * (d + 2 * h * D) + d * (h * D + s.d_r),
        "tpa": d * r * (h + D) + out,
        "kv_only": d * (s.rk + s.rv) * (h + D) + 2 * out,
        "noncontextual_a": r * (d * D + h) + out,
        "noncontextual_b": r * (d * h + D) + out,
        "shared_b": d * (s.rq * (h + D) + s.rk * (2 * h + D)) + out,
        "higher_order": d * r * (h + sum(s.dims)) + out,
        "mfa": d * s.d_c + h * s.d_c**2 + 2 * d * s.d_c + h * s.d_c * d,
    }[s.kind]


def latent_norms(s: Shape) -> int:
    """Weights of MLA's two latent RMSNorms."""
    return s.d_c + s.d_cq if s.kind == "mla" else 0


def cache_per_device(s: Shape, tensor_parallel: int) -> int:
    """Heads are divided, B factors are replicated: R_K (h/p + D) + R_V (h/p + D)."""
    return (s.rk + s.rv) * (s.h // tensor_parallel + s.D)


# ------------------------------------------------------------------------------------------- multiply-adds


def decode_projection(s: Shape) -> int:
    """MACs of the projections of one decode step, W^O left out (A.4)."""
    d, h, D = s.d, s.h, s.D
    return {
        "mha": 3 * d * h * D,
        "mqa": d * D * (h + 2),
        "gqa": d * D * (h + 2 * s.G),
        "mla": d * s.d_cq + s.d_cq * h * (D + s.d_r) + d * (s.d_c + s.d_r) + h * s.d_c * D,
        "tpa": d * (s.rq + s.rk + s.rv) * (h + D),
    }[s.kind]


def decode_slope(s: Shape) -> int:
    """MACs per cached token of one decode step (A.4)."""
    return {
        "mha": 2 * s.h * s.D,
        "mqa": 2 * s.h * s.D,
        "gqa": 2 * s.h * s.D,
        "mla": s.h * (2 * s.d_c + s.d_r),
        "tpa": s.rq * s.rk * s.D + s.h * s.rq * s.rk + s.h * s.rv * s.D,
        "kv_only": s.rk * s.h * s.D + s.rv * s.h * s.D,
    }[s.kind]


def training_macs(s: Shape, T: int) -> int:
    """Factor-space attention over a sequence: T^2 times what a decode step pays per token (A.4)."""
    return T**2 * decode_slope(s)


def factor_space_is_cheaper(s: Shape) -> bool:
    """(A.4) against materialised heads."""
    return decode_slope(s) < 2 * s.h * s.D


def saved_activations(s: Shape, *, materialised: bool) -> int:
    """Numbers kept per token for the backward pass: factors, O, LSE (and Q, K, V)."""
    factors = (s.rq + s.rk + s.rv) * (s.h + s.D)
    return factors + s.h * s.D + s.h + (3 * s.h * s.D if materialised else 0)


# --------------------------------------------------------------------------------------------- initial bounds


def init_bounds(scheme: str, d: int, h: int, D: int, rank: int) -> tuple[float, float]:
    """Bounds of the uniform initial values of W^a and W^b."""
    if scheme == "t6":  # Xavier on the views (d, h, R) and (d, R, D)
        return sqrt(6 / ((h + d) * rank)), sqrt(6 / ((rank + d) * D))
    return sqrt(6 / (d + rank * h)), sqrt(6 / (d + rank * D))  # Xavier on the matrices (App. G)


def initial_entry_std(scheme: str, d: int, h: int, D: int, rank: int) -> float:
    """Standard deviation of an entry of (1/R) A^T B for x of unit variance: (1/R) sqrt(R var(a) var(b))."""
    bound_a, bound_b = init_bounds(scheme, d, h, D, rank)
    var_a = d * bound_a**2 / 3
    var_b = d * bound_b**2 / 3
    return sqrt(var_a * var_b / rank)


# ------------------------------------------------------------------------------------------ the T6 models

VOCABULARY = 50304
LAYERS = {"small": 12, "medium": 24, "large": 36, "xl": 48}
WIDTH = {"small": 768, "medium": 1024, "large": 1280, "xl": 1600}
HEADS = {
    "small": {"mha": 12, "mqa": 23, "gqa": 22, "mla_paper": 12, "mla_matched": 13, "kv_only": 22, "tpa": 34},
    "medium": {"mha": 16, "mqa": 31, "gqa": 30, "mla_paper": 23, "mla_matched": 11, "kv_only": 29, "tpa": 47},
    "large": {"mha": 20, "mqa": 39, "gqa": 38, "mla_paper": 34, "mla_matched": 18, "kv_only": 37, "tpa": 61},
    "xl": {"mha": 25, "mqa": 49, "gqa": 48, "mla_paper": 49, "mla_matched": 29, "kv_only": 47, "tpa": 78},
}
KV_LATENT = {"small": 256, "medium": 512, "large": 512, "xl": 512}
Q_LATENT = {"small": 512, "medium": 1024, "large": 1024, "xl": 1024}


def preset(name: str, mechanism: str) -> Shape:
    """The attention layer of a trained model: D = 64, ranks (6, 2, 2), two KV heads for GQA, d_R = 32."""
    base = Shape(mechanism, d=WIDTH[name], h=HEADS[name][mechanism], D=64)
    if mechanism == "gqa":
        return replace(base, G=2)
    if mechanism in ("tpa", "kv_only"):
        return replace(base, rq=6, rk=2, rv=2)
    if mechanism.startswith("mla"):
        return replace(base, kind="mla", d_c=KV_LATENT[name], d_cq=Q_LATENT[name], d_r=32)
    return base


def hidden_width(d: int) -> int:
    """SwiGLU's hidden width floor(8/3 d)."""
    return 8 * d // 3


def model_parameters(name: str, layer: Shape) -> int:
    """Tied embedding, attention, SwiGLU; norms have no weight except MLA's latent ones."""
    per_layer = parameters(layer) + latent_norms(layer) + 3 * layer.d * hidden_width(layer.d)
    return VOCABULARY * layer.d + LAYERS[name] * per_layer


def matched_mla_heads(name: str) -> int:
    """The most heads for which MLA has no more attention parameters than MHA's 4 d^2."""
    layer = preset(name, "mla_paper")
    h = 1
    while parameters(replace(layer, h=h + 1)) <= 4 * layer.d**2:
        h += 1
    return h


def decode_bytes(s: Shape, tokens: int, itemsize: int) -> int:
    """The bandwidth floor of one decode step: every cached number is read once."""
    return cache_numbers(s) * tokens * itemsize
