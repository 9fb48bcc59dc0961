"""What width does to one parameter under muP: initial size, forward multiplier, rate, decay and epsilon.

Everything is relative to a model at base width, with m_in and m_out the factors by which a parameter's
fan-in and fan-out have grown (1 for a dimension that is no width). At base width every factor is 1, so the
model is the user's own. The three forms put the same function and the same training into different
coordinates: `mult` keeps a multiplier 1/m_in in front of the readout, `pure` has no multiplier, `symmetric`
splits the factors of input and readout between multiplier and weight.

Source: Yang et al. 2022 (arXiv 2203.03466), tables 3, 8 and 9; rates without alignment: Everett et al. 2024
(arXiv 2407.05872).
"""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal, get_args

from .roles import Role

Form = Literal["mult", "pure", "symmetric"]
Optimizer = Literal["sgd", "adam", "adamw", "adafactor", "sign", "muon"]
DecayMode = Literal["constant_product", "raw"]
Alignment = Literal["full", "none"] | float

__all__ = [
    "Alignment",
    "DecayMode",
    "Form",
    "Optimizer",
    "WidthScales",
    "readout_multiplier",
    "tied_readout_multiplier",
    "width_scales",
]


@dataclass(frozen=True)
class WidthScales:
    """Factors for one parameter, relative to base width.

    Attributes:
        init: factor on the standard deviation that the parameter has at base width.
        multiplier: constant in front of the parameter in the forward pass (never of a bias).
        lr: factor on the learning rate.
        weight_decay: factor on the weight decay coefficient of a decoupled decay (AdamW), which optimisers
            multiply by the learning rate.
        eps: factor on Adam's epsilon; that of the parameter's gradient.
    """

    init: float = 1.0
    multiplier: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def width_scales(
    role: Role,
    *,
    optimizer: Optimizer = "adam",
    form: Form = "mult",
    alignment: Alignment = "full",
    weight_decay_mode: DecayMode = "constant_product",
) -> WidthScales:
    """All factors of one parameter.

    Args:
        role: what the parameter is and how much it has grown.
        optimizer: the family of its update. "sign" has Adam's rates; "adamw" is "adam"; "muon" orthogonalises
            hidden matrices and moves everything else as Adam does; "adafactor" means an update proportional
            to the root mean square of the parameter.
        form: where input and readout factors live; see the module.
        alignment: how updates add up over the fan-in: "full" (exponent 1, the default), "none" (1/2), or an
            exponent in [1/2, 1] for this parameter.
        weight_decay_mode: "constant_product" keeps learning rate times decay at its value at base width;
            "raw" leaves the coefficient alone.

    Raises:
        ValueError: for an unknown optimizer, form, mode, or an alignment outside [1/2, 1].
    """
    for name, value, known in (
        ("optimizer", optimizer, Optimizer),
        ("form", form, Form),
        ("weight_decay_mode", weight_decay_mode, DecayMode),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    init, multiplier = _size(role, form)
    lr = _learning_rate(role, optimizer, _exponent(alignment)) * _form_rate(role, optimizer, multiplier)
    decay = 1.0 / lr if weight_decay_mode == "constant_product" else 1.0
    return WidthScales(init, multiplier, lr, decay, _gradient(role, multiplier))


def tied_readout_multiplier(role: Role, form: Form) -> float:
    """Multiplier in front of the readout that shares its weight with the embedding, in every form.

    It turns the embedding's size into the readout's, smaller by m: 1/m, in the symmetric form 1/sqrt(m).
    """
    return _size(role, form)[1] / role.fan_out_mult


def readout_multiplier(role: Role, form: Form = "mult") -> float:
    """Factor of a readout written by hand, as in `(x * factor) @ kernel` or `F.linear(x * factor, W)`.

    For an embedding it is that of the tied readout, `(x * factor) @ embedding.T`. Calls of layers have their
    multiplier after `apply_mup` or `init_rescale`; weights used without calling their layer have not.

    Args:
        role: of the readout's weight, or of the tied embedding.
        form: as given to `apply_mup` or `init_rescale`.

    Raises:
        ValueError: if the role is neither, or the form unknown.
    """
    if role.kind == "hidden":
        raise ValueError(f"role must be that of a readout or of an embedding, got {role}")
    if role.kind == "output":
        return width_scales(role, form=form).multiplier
    return tied_readout_multiplier(role, form)


def _exponent(alignment: Alignment) -> float:
    if alignment in ("full", "none"):
        return 1.0 if alignment == "full" else 0.5
    if isinstance(alignment, str) or not (isfinite(alignment) and 0.5 <= alignment <= 1.0):
        raise ValueError(f"alignment must be 'full', 'none' or a number in [0.5, 1], got {alignment!r}")
    return float(alignment)


def _size(role: Role, form: Form) -> tuple[float, float]:
    """Factor of the initial standard deviation, and the forward multiplier (1 where none can stand)."""
    m_in, m_out = role.fan_in_mult, role.fan_out_mult
    if role.kind == "hidden":
        return 1.0 / sqrt(m_in), 1.0
    if role.kind == "output":
        if form == "pure" or not role.scalable:
            return 1.0 / m_in, 1.0
        if form == "symmetric":
            return 1.0 / sqrt(m_in), 1.0 / sqrt(m_in)
        return 1.0, 1.0 / m_in
    if form == "symmetric" and role.scalable:
        return 1.0 / sqrt(m_out), sqrt(m_out)
    return 1.0, 1.0


def _learning_rate(role: Role, optimizer: Optimizer, alpha: float) -> float:
    """Rate in the mult form: what makes every layer's update change its output by order one."""
    m_in, m_out = role.fan_in_mult, role.fan_out_mult
    if role.kind == "input":
        return m_out if optimizer == "sgd" else 1.0
    if role.kind == "output":
        return m_in ** (2.0 - alpha) if optimizer == "sgd" else m_in ** (1.0 - alpha)
    if optimizer == "sgd":
        return m_out / m_in**alpha
    if optimizer == "adafactor":
        return m_in ** (0.5 - alpha)
    if optimizer == "muon" and role.matrix:
        return sqrt(m_out / m_in)
    return 1.0 / m_in**alpha


def _form_rate(role: Role, optimizer: Optimizer, multiplier: float) -> float:
    """Rate of a weight w in front of which the multiplier is `multiplier`, over that in the mult form.

    With W = multiplier * w, an update of W by SGD needs the rate of w divided by multiplier**2, one by an
    optimiser of fixed update size divided by multiplier, one relative to the size of w none at all.
    """
    mult_form = 1.0 / role.fan_in_mult if role.kind == "output" else 1.0
    ratio = mult_form / multiplier
    if optimizer == "sgd":
        return ratio**2
    return 1.0 if optimizer == "adafactor" else ratio


def _gradient(role: Role, multiplier: float) -> float:
    """Width factor of the gradient's entries with respect to the stored parameter."""
    if role.kind == "output":
        return multiplier
    return multiplier / role.fan_out_mult
