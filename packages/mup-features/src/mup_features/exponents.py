"""abc-parametrizations as numbers: presets, gauge, rates from alignment, and the regime they lead to.

Layer l of an MLP with L hidden layers of width n computes with W^l = n^{-a_l} w^l, where w^l starts with
standard deviation sigma n^{-b_l} and learns with rate eta n^{-c_l}. Only the effective numbers matter:

    Var(W^l) = sigma^2 n^{-v_l},  v_l = 2 (a_l + b_l);    effective rate  eta n^{-e_l},
    e_l = c_l + 2 a_l (SGD),  c_l + a_l (Adam, sign: updates of fixed size),  c_l (relative updates),

so a -> a + t, b -> b - t, c -> c - 2t (SGD), c - t (Adam), c (relative) changes nothing. An `Abc` holds one
number per place (input, hidden, output) or one per layer.

Source: Yang and Hu 2021 (arXiv 2011.14522), theorems 3.2 to 3.4; rates from alignment: Everett et al. 2024
(arXiv 2407.05872); IP: Hajjar, Chizat, Giraud 2021 (arXiv 2110.15596).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .width_rules import Optimizer

Alignments = Literal["full", "none"] | float | Sequence[float]
Exponents = Float[ndarray, "layers"]

__all__ = [
    "PRESETS",
    "Abc",
    "Alignments",
    "Exponents",
    "Regime",
    "alignment_exponents",
    "effective_rates",
    "gauge_step",
    "per_layer",
    "regime_of",
]


@dataclass(frozen=True)
class Abc:
    """Exponents of multiplier, initial size and rate: (input, hidden, output) each, or one per layer."""

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in (("a", self.a), ("b", self.b), ("c", self.c or self.a)):
            if len(values) < 2 or not all(isfinite(value) for value in values):
                raise ValueError(f"{name} must hold at least two finite exponents, got {values!r}")


PRESETS: dict[str, Abc] = {
    "mup": Abc((-0.5, 0.0, 0.5), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    "ip": Abc((0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    "mfp": Abc((0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    "ntp": Abc((0.0, 0.5, 0.5), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "sp": Abc((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (1.0, 1.0, 1.0)),
    "sp_const": Abc((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.0, 0.0, 0.0)),
}


def per_layer(name: str, values: Sequence[float], depth: int) -> Exponents:
    """One number per layer 1..depth+1, from as many, or from three for input, hidden and output.

    Raises:
        ValueError: if there are neither 3 nor depth + 1 numbers.
    """
    if len(values) == depth + 1:
        return np.asarray(values, dtype=np.float64)
    if len(values) == 3:
        first, hidden, last = values
        return np.asarray([first, *[hidden] * (depth - 1), last], dtype=np.float64)
    raise ValueError(
        f"{name} must hold 3 numbers (input, hidden, output) or one per layer, {depth + 1} at depth {depth}, "
        f"got {tuple(values)!r}"
    )


def gauge_step(optimizer: Optimizer) -> float:
    """How much c falls when a grows by one and b falls by one: 2 for SGD, 1 for Adam, 0 for relative updates.

    Raises:
        ValueError: for an unknown optimizer.
    """
    if optimizer not in get_args(Optimizer):
        raise ValueError(f"optimizer must be one of {', '.join(get_args(Optimizer))}, got {optimizer!r}")
    return {"sgd": 2.0, "adafactor": 0.0}.get(optimizer, 1.0)


def effective_rates(a: Exponents, c: Exponents, optimizer: Optimizer) -> Exponents:
    """e_l, the exponents of the rates as the products W^l see them."""
    return c + gauge_step(optimizer) * a


def alignment_exponents(
    a: Exponents, b: Exponents, *, optimizer: Optimizer, alignment: Alignments = "full"
) -> Exponents:
    """c_l with which every layer's update changes that layer's output by order one.

    An update meets its input with exponent alpha: 1 if the two are aligned, 1/2 if they are independent. With
    the backward signal n^{-g}, g = a_{L+1} + b_{L+1}:

        SGD:        c_1 = -2 a_1 - g,  c_l = alpha_l - 2 a_l - g,  c_{L+1} = alpha_{L+1} - 2 a_{L+1}
        Adam, sign: c_1 = -a_1,        c_l = alpha_l - a_l,        c_{L+1} = alpha_{L+1} - a_{L+1}
        relative:   Adam's minus b_l
        Muon:       c_l = -a_l for hidden layers (an orthogonal update has no need of alignment), else Adam's.

    Args:
        a: exponents of the multipliers of layers 1..L+1.
        b: exponents of the initial sizes.
        optimizer: the family of the updates.
        alignment: "full", "none", one alpha in [1/2, 1], or alpha_2..alpha_{L+1}.

    Raises:
        ValueError: for an unknown optimizer or an impossible alignment.

    Source: Everett et al. 2024, table 1.
    """
    alpha = alignment_per_layer(alignment, len(a) - 1)
    gauge_step(optimizer)
    if optimizer == "sgd":
        c = alpha - 2.0 * a - (a[-1] + b[-1])
        c[-1] = alpha[-1] - 2.0 * a[-1]
        return c
    c = alpha - a
    if optimizer == "adafactor":
        return c - b
    if optimizer == "muon":
        c[1:-1] = -a[1:-1]
    return c


def alignment_per_layer(alignment: Alignments, depth: int) -> Exponents:
    """Alpha of layers 1..L+1; 0 for the first, whose fan-in does not grow.

    Raises:
        ValueError: if an alpha lies outside [1/2, 1] or there are neither 2 (hidden, output) nor L of them.
    """
    if isinstance(alignment, str):
        if alignment not in ("full", "none"):
            raise ValueError(f"alignment must be 'full', 'none' or numbers in [0.5, 1], got {alignment!r}")
        alignment = 1.0 if alignment == "full" else 0.5
    if isinstance(alignment, (int, float)):
        alphas: Sequence[float] = [alignment] * depth
    elif len(alignment) == depth:
        alphas = alignment
    elif len(alignment) == 2:
        alphas = [alignment[0]] * (depth - 1) + [alignment[1]]
    else:
        raise ValueError(
            f"alignment must hold alpha of layers 2..{depth + 1}, or of (hidden, output), got {alignment!r}"
        )
    if not all(0.5 <= alpha <= 1.0 for alpha in alphas):
        raise ValueError(f"alignment must lie in [0.5, 1], got {alignment!r}")
    return np.asarray([0.0, *alphas], dtype=np.float64)


@dataclass(frozen=True)
class Regime:
    """What a parametrization does as the width grows.

    Attributes:
        stable: preactivations stay of order one at the start, and training neither blows up nor freezes the
            forward pass.
        nontrivial: the output moves.
        feature_learning: stable, and the features move by order one (r = 0).
        kernel: stable, nontrivial, and the features do not move (r > 0).
        r: features change by n^{-r}.
        init_vanishing: a hidden layer's initial output vanishes, as under IP.
        reasons: one sentence for each condition that fails, and for what follows.
    """

    stable: bool
    nontrivial: bool
    feature_learning: bool
    kernel: bool
    r: float
    init_vanishing: bool
    reasons: tuple[str, ...]


def regime_of(a: Exponents, b: Exponents, c: Exponents, optimizer: Optimizer = "sgd") -> Regime:
    """The regime of layers 1..L+1, each with a rate of its own.

    With e_l the effective rates and G = min(a_{L+1} + b_{L+1}, e_{L+1}) the exponent of the backward signal
    (that of the readout at the start, or of its update), a rank-one update of W^l by SGD changes h^l by
    n^{-e_l - G} <x, x>, where <x, x> ~ n except in the first layer: features change by n^{-r} with

        r = min_l r_l,    r_l = G + e_l - 1(l > 1),

    for equal c the formula of Yang and Hu. The output changes through the readout's update by n^{1 - e_{L+1}}
    and through the features by n^{1 - a_{L+1} - b_{L+1} - r}. Where updates have a size of their own (Adam,
    sign, relative ones), it replaces n^{-e_l - G}.

    Source: Yang and Hu 2021, theorems 3.2 to 3.4.
    """
    depth = len(a) - 1
    size = a + b
    update = update_exponents(a, b, c, optimizer)
    backward = min(size[-1], update[-1]) if optimizer == "sgd" else 0.0
    summed = np.arange(depth) > 0
    changes = update[:-1] - summed + backward
    if optimizer == "muon":
        changes[1:] += 1.0
    r = float(changes.min())
    reasons = []
    readout = f"a_{depth + 1} + b_{depth + 1}"
    vanishing = bool(np.any(size[1:-1] > 0.5 + _CLOSE))
    if not np.isclose(size[0], 0.0, atol=_CLOSE):
        reasons.append(f"a_1 + b_1 = {size[0]:g} is not 0: the first preactivations depend on the width")
    if vanishing:
        reasons.append("a_l + b_l > 1/2 in a hidden layer: its output vanishes at the start")
    if np.any(size[1:-1] < 0.5 - _CLOSE):
        reasons.append("a_l + b_l < 1/2 in a hidden layer: its output explodes at the start")
    if size[-1] < 0.5 - _CLOSE:
        reasons.append(f"{readout} = {size[-1]:g} < 1/2: the output explodes at the start")
    if r < -_CLOSE:
        reasons.append(f"r = {r:g} < 0: features explode in training")
    if update[-1] < 1.0 - _CLOSE:
        reasons.append(f"the readout's update grows the output by n^{1.0 - update[-1]:g}")
    if size[-1] + r < 1.0 - _CLOSE:
        reasons.append(f"{readout} + r = {size[-1] + r:g} < 1: the output explodes in training")
    stable = not reasons
    nontrivial = min(abs(size[-1] + r - 1.0), abs(update[-1] - 1.0)) <= _CLOSE
    moves = abs(r) <= _CLOSE
    if stable and moves:
        reasons.append("r = 0: features move by order one")
    elif stable:
        reasons.append(f"r = {r:g} > 0: features move by n^-{r:g}, as under a fixed kernel")
    if not nontrivial:
        reasons.append("no layer's update moves the output by order one")
    return Regime(
        stable=stable,
        nontrivial=bool(nontrivial),
        feature_learning=stable and moves,
        kernel=bool(stable and nontrivial and not moves),
        r=r,
        init_vanishing=vanishing,
        reasons=tuple(reasons),
    )


def update_exponents(a: Exponents, b: Exponents, c: Exponents, optimizer: Optimizer) -> Exponents:
    """Exponents of the entries of an update of W^l, for SGD without those of the backward signal."""
    rates = effective_rates(a, c, optimizer)
    return rates + a + b if optimizer == "adafactor" else rates


_CLOSE = 1e-9
