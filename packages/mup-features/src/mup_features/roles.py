"""What each parameter is to the width of a model: its role, found by comparing shapes with a base model's.

Framework-free: models come in as dictionaries from parameter name to shape. `mup_features.torch` and
`mup_features.flax` know which axes of their layers are fan-in and fan-out and build the roles.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

Kind = Literal["input", "hidden", "output"]


@dataclass(frozen=True)
class Role:
    """The place of one parameter.

    Attributes:
        kind: "input" if only the fan-out is a width (also biases, gains, embeddings, and parameters with no
            width at all), "hidden" if both are, "output" if only the fan-in is.
        fan_in_mult: m_in, fan-in over fan-in at base width; 1 where the fan-in is no width.
        fan_out_mult: m_out, fan-out over fan-out at base width; 1 where the fan-out is no width.
        matrix: whether the parameter is one two-dimensional matrix (what Muon may orthogonalise).
        scalable: whether a multiplier can stand in front of it in the forward pass: weights of linear,
            convolution and embedding layers; not biases, gains or free parameters.
        tied: whether it is both the embedding and the readout; its multiplier then belongs to the readout.
        base_std: standard deviation of the parameter in the base model, None where that was not at hand.
    """

    kind: Kind
    fan_in_mult: float = 1.0
    fan_out_mult: float = 1.0
    matrix: bool = True
    scalable: bool = True
    tied: bool = False
    base_std: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("fan_in_mult", "fan_out_mult"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value!r}")
