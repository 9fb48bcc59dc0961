"""Exact counts of one attention layer: the formulas of Table 1 and Appendix A.4 in plain integers.

A TPA layer is a set of factor maps, each R x n numbers made from a hidden state or held free:

    parameters  contextual d R n, free R n; W^O adds d h E
    cache       R n of every contextual map of K and V, 0 of a free one
    projection  the multiply-adds of the contextual maps, d R n

Appendix A.4 counts products of matrices per decode step and leaves out W^O, exponentials and the elementwise
products with A_K and A_V; so does this module. For MLA the value up-projection, applied after the sum over
tokens, is left out as well.

Source: Zhang et al. 2025 (arXiv 2501.06425), Table 1, Appendices A.4, C, F.4 (MFA) and G.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import _checks

MECHANISMS = (
    *("tpa", "kvonly", "noncontextual_a", "noncontextual_b", "shared_b", "higher_order"),
    *("mha", "mqa", "gqa", "mla", "mfa"),
)
# rows of Table 1 that are options of the TPA layer
ROWS = {
    "kvonly": ("variant", "kv_only"),
    "noncontextual_a": ("variant", "noncontextual_a"),
    "noncontextual_b": ("variant", "noncontextual_b"),
    "shared_b": ("shared_kv_b", True),
    "higher_order": ("factor_dims", None),
}


def _given(field: str) -> property:
    """Short name of a size, which raises where the size is needed and was not given."""

    def read(shape: "LayerShape") -> int:
        value = getattr(shape, field)
        if value is None:
            raise ValueError(f"{field} must be given for mechanism {shape.mechanism!r}, got None")
        return value

    return property(read, doc=f"{field}; ValueError if it was not given.")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one attention layer; what a count does not need may stay None.

    Args:
        mechanism: a row of Table 1, one of `MECHANISMS`.
        d_model: d.
        num_heads: h.
        head_dim: D.
        v_head_dim: E; None for D.
        q_rank: R_Q.
        k_rank: R_K.
        v_rank: R_V.
        num_kv_heads: G of GQA.
        kv_latent: d_c of MLA and MFA.
        q_latent: d_c' of MLA.
        rope_dim: d_R of MLA.
        factor_dims: widths of the factors of a row of B, for the third and higher orders.
        variant: as in `ModelConfig`; set by the mechanism where that names a variant.
        shared_kv_b: V uses the rows of K; set by mechanism "shared_b".
        a_bias: contextual head factors have a bias.
        out_norm: a weight of size E.
        output_gate: a gate of d x hE.
        kv_shift: a weight of size d.

    Raises:
        ValueError: if the mechanism is unknown, a size is below 1, or an option contradicts the mechanism.
        TypeError: if a size is no int.
    """

    mechanism: str
    d_model: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    q_rank: int | None = None
    k_rank: int | None = None
    v_rank: int | None = None
    num_kv_heads: int | None = None
    kv_latent: int | None = None
    q_latent: int | None = None
    rope_dim: int | None = None
    factor_dims: tuple[int, ...] | None = None
    variant: str = "contextual"
    shared_kv_b: bool = False
    a_bias: bool = False
    out_norm: bool = False
    output_gate: bool = False
    kv_shift: bool = False

    d = _given("d_model")
    h = _given("num_heads")
    D = _given("head_dim")
    RQ = _given("q_rank")
    RK = _given("k_rank")
    RV = _given("v_rank")
    d_c = _given("kv_latent")
    d_cq = _given("q_latent")
    d_r = _given("rope_dim")

    def __post_init__(self) -> None:
        _checks.one_of("mechanism", self.mechanism, MECHANISMS)
        for name in _SIZES:
            if getattr(self, name) is not None:
                _checks.positive_int(name, getattr(self, name))
        self._adopt_row()
        free = _checks.variant_names(self.variant)
        if not self.factored and (free or self.shared_kv_b or self.factor_dims is not None):
            raise ValueError(f"variant, shared_kv_b and factor_dims are of TPA, got {self.mechanism!r}")
        if self.factor_dims is not None:
            _checks.factor_dims(tuple(self.factor_dims), self.D, self.E)
        if self.shared_kv_b and self.k_rank != self.v_rank:
            raise ValueError(f"shared_kv_b needs k_rank = v_rank, got {self.k_rank} and {self.v_rank}")
        if self.shared_kv_b and self.v_head_dim not in (None, self.head_dim):
            raise ValueError(
                f"shared_kv_b needs v_head_dim = head_dim, got {self.v_head_dim} and {self.head_dim}"
            )
        if self.mechanism == "gqa" and self.h % self.G:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.G} and {self.h}")

    def _adopt_row(self) -> None:
        """Turn a row of Table 1 that is a TPA variant into the option it stands for."""
        option, value = ROWS.get(self.mechanism, (None, None))
        if self.mechanism == "higher_order" and self.factor_dims is None:
            raise ValueError("factor_dims must be given for mechanism 'higher_order', got None")
        if option == "shared_kv_b":
            object.__setattr__(self, option, value)
        elif option == "variant":
            names = _checks.variant_names(self.variant) | {str(value)}
            object.__setattr__(self, option, "+".join(sorted(names)))

    @property
    def factored(self) -> bool:
        """The layer is a TPA."""
        return self.mechanism in ("tpa", *ROWS)

    @property
    def E(self) -> int:  # noqa: N802  # the letter of the paper
        """Width of a value head."""
        return self.D if self.v_head_dim is None else self.v_head_dim

    @property
    def G(self) -> int:  # noqa: N802  # the letter of Table 1
        """Heads of K and V."""
        if self.mechanism == "gqa" and self.num_kv_heads is None:
            raise ValueError("num_kv_heads must be given for mechanism 'gqa', got None")
        return {"mha": self.h, "mqa": 1}.get(self.mechanism, self.num_kv_heads or 0)

    def free(self, part: str) -> bool:
        """Whether the factors of a part, "a" or "b", do not read the token."""
        return f"noncontextual_{part}" in _checks.variant_names(self.variant)

    @property
    def kv_only(self) -> bool:
        """Queries are not factored."""
        return "kv_only" in _checks.variant_names(self.variant)


_SIZES = (
    *("d_model", "num_heads", "head_dim", "v_head_dim", "q_rank", "k_rank", "v_rank"),
    *("num_kv_heads", "kv_latent", "q_latent", "rope_dim"),
)


class FactorMap(NamedTuple):
    """One map of a TPA layer: `rank` rows of `width` numbers for q, k or v, made from the token or free."""

    of: str
    part: str
    rank: int
    width: int
    contextual: bool


def factor_maps(s: LayerShape) -> Iterator[FactorMap]:
    """All maps of a TPA layer; the full query of KV-only counts as one map of h rows."""
    if s.kv_only:
        yield FactorMap("q", "b", s.h, s.D, True)
    else:
        yield from _pair(s, "q", s.RQ, s.D)
    yield from cached_maps(s)


def cached_maps(s: LayerShape) -> Iterator[FactorMap]:
    """The maps of K and V, of which the contextual ones are cached."""
    yield from _pair(s, "k", s.RK, s.D)
    for m in _pair(s, "v", s.RV, s.E):
        if not (m.part == "b" and s.shared_kv_b):
            yield m


def _pair(s: LayerShape, of: str, rank: int, width: int) -> Iterator[FactorMap]:
    yield FactorMap(of, "a", rank, s.h, not s.free("a"))
    yield FactorMap(of, "b", rank, width if s.factor_dims is None else sum(s.factor_dims), not s.free("b"))


# --------------------------------------------------------------------------------------------- Table 1


def record_widths(s: LayerShape, tp: int = 1) -> tuple[int, int]:
    """Numbers cached per token in the K and in the V record, on one of `tp` devices that divide the heads.

    Heads are divided with padding, ceil(h / tp); rows of B and latents are held by every device. MLA keeps
    its rotary key in the K record and its latent in the V record.
    """
    if s.mechanism == "mla":
        return s.d_r, s.d_c
    if s.mechanism == "mfa":
        return s.d_c, s.d_c
    if not s.factored:
        groups = -(-s.G // tp)
        return groups * s.D, groups * s.E
    width = {"k": 0, "v": 0}
    for m in cached_maps(s):
        if m.contextual:
            width[m.of] += m.rank * (-(-m.width // tp) if m.part == "a" else m.width)
    return width["k"], width["v"]


def parameters(s: LayerShape, *, latent_norms: bool = False) -> int:
    """Parameters of the layer; `latent_norms` counts the weights of MLA's two latent RMSNorms."""
    if s.mechanism == "mla":
        query = s.d_cq * (s.d + s.h * s.D + s.h * s.d_r)
        keys_values = s.d_c * (s.d + 2 * s.h * s.D) + s.d * s.d_r
        return query + keys_values + s.d * s.h * s.D + (s.d_c + s.d_cq if latent_norms else 0)
    if s.mechanism == "mfa":
        return 3 * s.d * s.d_c + s.h * s.d_c**2 + s.h * s.d_c * s.d
    out = s.d * s.h * s.E
    if not s.factored:
        return s.d * s.h * s.D + s.d * s.G * (s.D + s.E) + out
    maps = list(factor_maps(s))
    made = sum(m.rank * m.width * (s.d if m.contextual else 1) for m in maps)
    bias = sum(m.rank * m.width for m in maps if m.part == "a" and m.contextual) if s.a_bias else 0
    gate = s.d * s.h * s.E if s.output_gate else 0
    return made + bias + out + gate + (s.E if s.out_norm else 0) + (s.d if s.kv_shift else 0)


# ---------------------------------------------------------------------------------------- Appendix A.4


def decode_projection(s: LayerShape) -> int:
    """Multiply-adds per decode step that do not depend on the cache, W^O left out."""
    if s.mechanism == "mla":  # W^UK is absorbed in the query
        query = s.d * s.d_cq + s.d_cq * s.h * (s.D + s.d_r)
        return query + s.d * (s.d_c + s.d_r) + s.h * s.d_c * s.D
    if s.mechanism == "mfa":
        return 3 * s.d * s.d_c + s.h * s.d_c**2
    if not s.factored:
        return s.d * s.h * s.D + s.d * s.G * (s.D + s.E)
    gate = s.d * s.h * s.E if s.output_gate else 0
    return sum(s.d * m.rank * m.width for m in factor_maps(s) if m.contextual) + gate


def decode_slope(s: LayerShape, query: str = "factored") -> int:
    """Multiply-adds per decode step and cached token.

    Args:
        s: the layer.
        query: "factored" scores with A_Q and B_Q as A.4 does, "full" forms q = A_Q^T B_Q once, "auto" takes
            the cheaper. KV-only has the full form alone.
    """
    _checks.one_of("query", query, ("factored", "full", "auto"))
    if s.mechanism == "mla":
        return s.h * (2 * s.d_c + s.d_r)
    if s.mechanism == "mfa":
        return 2 * s.h * s.d_c
    if not s.factored:
        return s.h * (s.D + s.E)
    full = s.RK * s.h * s.D
    scores = full if s.kv_only else s.RQ * s.RK * (s.D + s.h)
    if not s.kv_only and query != "factored":
        scores = full if query == "full" else min(full, scores)
    return scores + s.h * s.RV * s.E


def saved_activations(s: LayerShape, *, materialised: bool) -> int:
    """Numbers per token that a training step of a TPA layer keeps for its backward pass.

    Factors, outputs of the heads and log-sum-exps; with `materialised` also Q, K and V.
    """
    if not s.factored:
        raise ValueError(f"saved activations are counted for TPA alone, got mechanism {s.mechanism!r}")
    factors = sum(m.rank * m.width for m in factor_maps(s) if m.contextual)
    heads = s.h * (2 * s.D + s.E)
    if s.kv_only:
        heads -= s.h * s.D  # the full query is among the factors already
    return factors + s.h * s.E + s.h + (heads if materialised else 0)
