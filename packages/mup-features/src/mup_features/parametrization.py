"""Parametrizations by name or exponents: sizes, rates and multipliers of every layer, and the regime.

    name       Var(W), l=1 | 2..L | L+1    effective SGD rate
    mup        1 | 1/n   | 1/n^2           eta n | eta   | eta/n
    ip, mfp    1 | 1/n^2 | 1/n^2           eta n | eta   | eta/n     (mfp: one hidden layer)
    ntp        1 | 1/n   | 1/n             eta   | eta/n | eta/n
    sp         1 | 1/n   | 1/n             eta/n | eta/n | eta/n     (the largest stable rate)
    sp_const   1 | 1/n   | 1/n             eta   | eta   | eta       (unstable; the practice)

IP with three or more hidden layers and phi(0) = 0 starts at a stationary point of the limit: no layer has
both a forward and a backward signal. Three variants leave it: `ip_llr` enlarges the first step, `ip_bias`
starts with biases of order one, `ip_noncentered` with weights of non-zero mean.

Source: Yang and Hu 2021 (arXiv 2011.14522); Chen et al. 2025 (arXiv 2503.09565), section 3; Hajjar, Chizat,
Giraud 2021 (arXiv 2110.15596) for IP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, Literal, get_args

import numpy as np

from .exponents import (
    PRESETS,
    Abc,
    Alignments,
    Exponents,
    Regime,
    alignment_exponents,
    alignment_per_layer,
    effective_rates,
    gauge_step,
    per_layer,
    regime_of,
)
from .roles import Kind, Role
from .width_rules import Form, Optimizer, width_scales

__all__ = ["Abc", "Parametrization", "Regime", "alignment_exponents", "classify"]

_VARIANTS = ("ip_llr", "ip_bias", "ip_noncentered")
NAMES = (*PRESETS, *_VARIANTS)


def classify(parametrization: "str | Abc | Parametrization", depth: int | None = None) -> Regime:
    """Stability and regime of a parametrization trained by SGD with L = `depth` hidden layers.

    Args:
        parametrization: a preset's name, exponents, or a Parametrization (whose optimizer then counts).
        depth: number of hidden layers; default 3, for exponents per layer their number, 1 for "mfp".

    Raises:
        ValueError: for an unknown name or an impossible depth.
    """
    if not isinstance(parametrization, Parametrization):
        parametrization = Parametrization(parametrization)
    return parametrization.classify(depth)


@dataclass(frozen=True)
class Parametrization:
    """How the layers of a network scale with its width.

    Args:
        name: a preset (`mup`, `ip`, `mfp`, `ntp`, `sp`, `sp_const`, `ip_llr`, `ip_bias`, `ip_noncentered`) or
            exponents `Abc(a, b, c)`; with c = None the rates follow from `optimizer` and `alignment`.
        base_width: n0; all scalings are then relative to the network of this width, which is a standard one
            (Var 1/n0, rate eta, no multiplier). None takes the exponents as they are, as theory does.
        sigma: factor of the initial standard deviations; one, or (input, hidden, output), or one per layer.
        optimizer: the family of the updates; "adamw" is "adam", "sign" has Adam's rates.
        alignment: how updates meet their inputs, "full", "none", one exponent or alpha_2..alpha_{L+1}. SGD
            has its preset's rates at "full"; each hidden or readout rate grows by n^{1 - alpha}.
        form: for `mup`, which of three equivalent forms `init_std`, `lr` and `multiplier` speak of.
        input_scale: "fan_in" divides the variance of the first layer by the input dimension, for inputs whose
            norm is not of order one.

    Raises:
        ValueError: for an unknown name, or a value out of range.
    """

    name: str | Abc
    base_width: int | None = None
    sigma: float | tuple[float, ...] = 1.0
    optimizer: Optimizer = "sgd"
    alignment: Alignments = "full"
    form: Form = "mult"
    input_scale: Literal["fan_in"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and self.name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, or an Abc, got {self.name!r}")
        if not isinstance(self.name, (str, Abc)):
            raise TypeError(f"name must be a string or an Abc, got {type(self.name).__name__}")
        if self.base_width is not None and not (isinstance(self.base_width, int) and self.base_width >= 1):
            raise ValueError(f"base_width must be an integer >= 1 or None, got {self.base_width!r}")
        gauge_step(self.optimizer)
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        if self.form != "mult" and self.name != "mup":
            raise ValueError(f"form must be 'mult' unless the name is 'mup', got {self.form!r}: see `gauge`")
        if self.input_scale not in (None, "fan_in"):
            raise ValueError(f"input_scale must be 'fan_in' or None, got {self.input_scale!r}")
        if not isinstance(self.sigma, (int, float)):
            object.__setattr__(self, "sigma", tuple(map(float, self.sigma)))
        if not all(isfinite(sigma) and sigma >= 0 for sigma in self._sigmas()):
            raise ValueError(f"sigma must be finite and >= 0, got {self.sigma!r}")
        if not isinstance(self.alignment, (str, int, float)):
            object.__setattr__(self, "alignment", tuple(map(float, self.alignment)))
            alignment_per_layer(self.alignment, len(self.alignment))
        else:
            alignment_per_layer(self.alignment, 1)

    # ------------------------------------------------------------------ exponents

    def exponents(self, depth: int | None = None) -> tuple[Exponents, Exponents, Exponents]:
        """a, b, c of layers 1..L+1, in the gauge of the table.

        Raises:
            ValueError: if the parametrization has another number of layers.
        """
        depth = self._depth(depth)
        abc = self._abc()
        a, b = per_layer("a", abc.a, depth), per_layer("b", abc.b, depth)
        if abc.c is not None and (self.optimizer == "sgd" or isinstance(self.name, Abc)):
            c = per_layer("c", abc.c, depth)
            if self.optimizer == "sgd" and isinstance(self.name, str):
                c[1:] += alignment_per_layer(self.alignment, depth)[1:] - 1.0
            return a, b, c
        if self.name == "sp_const":
            return a, b, np.zeros(depth + 1)
        return a, b, alignment_exponents(a, b, optimizer=self.optimizer, alignment=self.alignment)

    def layer_exponents(self, depth: int | None = None) -> tuple[Exponents, Exponents]:
        """V and e of layers 1..L+1: Var(W^l) = sigma^2 n^{-v_l}, effective rate eta n^{-e_l}.

        The rate of an Adam-like optimiser is the size of an entry of the update of W^l, that of Adafactor's
        updates is relative to the size of W^l.
        """
        a, b, c = self.exponents(depth)
        return 2.0 * (a + b), effective_rates(a, c, self.optimizer)

    def first_step_exponents(self, depth: int | None = None) -> Exponents:
        """k_l: at the very first step the rate of layer l is larger by n^{k_l}; zero except for `ip_llr`.

        At the start of IP the forward signal of layer l is n^{-(l-1)/2} and the backward one n^{-(L-l)/2} of
        muP's, and the update meets an input that is of order one by then. Hence k_1 = k_{L+1} = (L-1)/2 and
        k_l = (L-2)/2 between them.

        Source: Hajjar, Chizat, Giraud 2021, section 4.
        """
        depth = self._depth(depth)
        if self.name != "ip_llr":
            return np.zeros(depth + 1)
        return 0.5 * per_layer("k", (depth - 1.0, depth - 2.0, depth - 1.0), depth)

    def gauge(self, theta: float | Sequence[float]) -> "Parametrization":
        """The same training in other coordinates: a + theta, b - theta, c - 2 theta (1 Adam, 0 relative).

        Args:
            theta: one number, or one per place or layer as in the exponents.
        """
        abc = self._abc()
        depth = 2 if len(abc.a) == 3 else len(abc.a) - 1
        a, b, c = self.exponents(depth)
        step = gauge_step(self.optimizer)
        shift = np.broadcast_to(np.asarray(theta, dtype=np.float64), a.shape)
        moved = Abc(*(tuple(map(float, x)) for x in (a + shift, b - shift, c - step * shift)))
        return Parametrization(
            moved,
            self.base_width,
            self.sigma,
            self.optimizer,
            self.alignment,
            input_scale=self.input_scale,
        )

    def classify(self, depth: int | None = None) -> Regime:
        """Stability and regime with L = `depth` hidden layers (default: see `classify`)."""
        return regime_of(*self.exponents(depth), optimizer=self.optimizer)

    # ------------------------------------------------------------------ networks of the theory

    def variances(self, width: int, depth: int, *, input_dim: int | None = None) -> list[float]:
        """Var of the entries of W^1..W^{L+1} at the start.

        Args:
            width: n >= 1.
            depth: L >= 1 hidden layers.
            input_dim: needed for input_scale="fan_in".

        Raises:
            ValueError: if a number is out of range or input_dim is missing.
        """
        v, _ = self.layer_exponents(depth)
        sigma = self._sigma_per_layer(depth)
        base = np.ones(depth + 1)
        if self.base_width is not None:
            base[1:] = 1.0 / self.base_width
        if self.input_scale == "fan_in":
            if input_dim is None or input_dim < 1:
                raise ValueError(f"input_dim must be >= 1 for input_scale='fan_in', got {input_dim!r}")
            base[0] /= input_dim
        return [float(x) for x in sigma**2 * base * self._relative(width) ** -v]

    def rates(self, width: int, depth: int, lr: float, *, step: int | None = None) -> list[float]:
        """Effective rates of W^1..W^{L+1}.

        Args:
            width: n >= 1.
            depth: L >= 1 hidden layers.
            lr: eta.
            step: index of the step; 0 is where `ip_llr` differs. None means any later step.
        """
        _, e = self.layer_exponents(depth)
        if step == 0:
            e = e - self.first_step_exponents(depth)
        return [float(x) for x in lr * self._relative(width) ** -e]

    def means(self, width: int, depth: int) -> list[float]:
        """Mean of the entries of W^1..W^{L+1} at the start: 1/n after the first for `ip_noncentered`."""
        depth = self._depth(depth)
        mean = 1.0 / self._relative(width) if self.name == "ip_noncentered" else 0.0
        return [0.0, *[mean] * depth]

    def bias_variances(self, depth: int) -> list[float]:
        """Var of the biases of layers 1..L+1 at the start: 1 in hidden layers for `ip_bias`, else no biases.

        They learn at the effective rate of the first layer, an input weight of a constant input.
        """
        depth = self._depth(depth)
        return [*[1.0 if self.name == "ip_bias" else 0.0] * depth, 0.0]

    # ------------------------------------------------------------------ layers of a model

    def init_std(self, role: Kind, fan_in: int, fan_out: int) -> float:
        """Initial standard deviation of the stored weight.

        Args:
            role: "input", "hidden" or "output".
            fan_in: its fan-in; the width for "hidden" and "output".
            fan_out: its fan-out; the width for "input".
        """
        index = self._index(role)
        std = self._sigma_per_place()[index]
        if self.base_width is not None and role != "input":
            std /= sqrt(self.base_width)
        if self.input_scale == "fan_in" and role == "input":
            std /= sqrt(fan_in)
        return std * self._scales(role, fan_in, fan_out)[0]

    def lr(self, role: Kind, base_lr: float, fan_in: int, fan_out: int) -> float:
        """Learning rate of the stored weight; arguments as in `init_std`."""
        return base_lr * self._scales(role, fan_in, fan_out)[2]

    def multiplier(self, role: Kind, fan_in: int, fan_out: int) -> float:
        """Constant in front of the stored weight; arguments as in `init_std`."""
        return self._scales(role, fan_in, fan_out)[1]

    def _scales(self, role: Kind, fan_in: int, fan_out: int) -> tuple[float, float, float]:
        """Width factors of standard deviation, multiplier and rate."""
        index = self._index(role)
        for name, value in (("fan_in", fan_in), ("fan_out", fan_out)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        m_in, m_out = self._relative(fan_in), self._relative(fan_out)
        if self.name == "mup":
            alpha = (1.0, *alignment_per_layer(self.alignment, 2)[1:])[index]
            place = Role(role, 1.0 if role == "input" else m_in, 1.0 if role == "output" else m_out)
            scales = width_scales(place, optimizer=self.optimizer, form=self.form, alignment=float(alpha))
            return scales.init, scales.multiplier, scales.lr
        a, b, c = (float(x[index]) for x in self.exponents(2))
        m = m_out if role == "input" else m_in
        return m**-b, m**-a, m**-c

    # ------------------------------------------------------------------ text and dictionaries

    def table(self) -> str:
        """Markdown table of the three places: effective sizes and rates, and the exponents behind them."""
        a, b, c = self.exponents(1 if self.name == "mfp" else None)
        v, e = 2.0 * (a + b), effective_rates(a, c, self.optimizer)
        n = "n" if self.base_width is None else f"(n/{self.base_width})"
        names = ["input", *[f"hidden {i}" for i in range(1, len(a) - 1)], "output"]
        if self._uniform() and len(a) == 4:
            keep = [0, 1, 3]
            names = ["input", "hidden", "output"]
            a, b, c, v, e = (x[keep] for x in (a, b, c, v, e))
        rows = ["| layer | Var(W) | rate of W | a | b | c |", "|---|---|---|---|---|---|"]
        for i, name in enumerate(names):
            cells = (_power("", n, -v[i]), _power("eta", n, -e[i]), *(f"{x[i]:g}" for x in (a, b, c)))
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        name = self.name
        if isinstance(name, Abc):
            name = {"a": list(name.a), "b": list(name.b), "c": None if name.c is None else list(name.c)}
        fields = {field: getattr(self, field) for field in self.__dataclass_fields__}
        lists = {key: list(value) for key, value in fields.items() if isinstance(value, tuple)}
        return {**fields, **lists, "name": name}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Parametrization":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a key is unknown or the name is missing.
        """
        unknown = set(content) - set(cls.__dataclass_fields__)
        if unknown or "name" not in content:
            raise ValueError(f"content must hold a name and no unknown keys, got {sorted(content)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        if isinstance(values["name"], Mapping):
            lists: dict[str, Any] = {key: value and tuple(value) for key, value in values["name"].items()}
            values["name"] = Abc(**lists)
        return cls(**values)

    # ------------------------------------------------------------------ small things

    def _abc(self) -> Abc:
        if isinstance(self.name, Abc):
            return self.name
        return PRESETS["ip" if self.name in _VARIANTS else self.name]

    def _uniform(self) -> bool:
        return len(self._abc().a) == 3 and (
            isinstance(self.alignment, (str, int, float)) or len(self.alignment) == 2
        )

    def _depth(self, depth: int | None) -> int:
        if depth is None:
            layers = len(self._abc().a)
            depth = 1 if self.name == "mfp" else 3 if layers == 3 else layers - 1
        if not (isinstance(depth, int) and depth >= 1):
            raise ValueError(f"depth must be an integer >= 1, got {depth!r}")
        if self.name == "mfp" and depth != 1:
            raise ValueError(f"depth must be 1 for 'mfp', got {depth!r}: for more hidden layers it is 'ip'")
        return depth

    def _relative(self, width: int) -> float:
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width!r}")
        return float(width) if self.base_width is None else width / self.base_width

    def _sigmas(self) -> tuple[float, ...]:
        return self.sigma if isinstance(self.sigma, tuple) else (float(self.sigma),) * 3

    def _sigma_per_layer(self, depth: int) -> Exponents:
        return per_layer("sigma", self._sigmas(), depth)

    def _sigma_per_place(self) -> Exponents:
        return per_layer("sigma", self._sigmas(), 2)

    @staticmethod
    def _index(role: str) -> int:
        if role not in get_args(Kind):
            raise ValueError(f"role must be one of {', '.join(get_args(Kind))}, got {role!r}")
        return get_args(Kind).index(role)


def _power(prefix: str, base: str, exponent: float) -> str:
    power = "" if exponent == 0 else base if exponent == 1 else f"{base}^{exponent:g}"
    return " ".join(filter(None, (prefix, power))) or "1"
