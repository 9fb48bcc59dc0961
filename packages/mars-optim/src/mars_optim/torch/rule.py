"""The update rule: every number and choice that one step of one list of tensors needs."""

from dataclasses import dataclass
from typing import Literal

import torch

from .orthogonalize import QUINTIC

Kind = Literal["adamw", "lion", "shampoo", "m", "sgd"]
ORTHOGONALISED = ("shampoo", "m")


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """The numbers and choices of one step for one list of tensors; `MARS` builds it anew each step.

    Args:
        kind: direction taken from the momentum: "adamw", "lion", "shampoo", "m" or "sgd".
        lr: step length eta of this list.
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the second moment, in [0, 1); kind "adamw".
        eps: added to the root of the second moment, or to the Frobenius norm for kind "shampoo".
        gamma: strength of the correction; it is not used where no reference gradient is given.
        clip: largest norm of the corrected gradient; None does not clip.
        decay: fraction of the parameter removed by the step, eta * lambda for decoupled decay.
        cautious_decay: decay only the entries that the step moves towards zero.
        cautious: drop entries whose step disagrees in sign with the gradient, and rescale the others.
        amsgrad: divide by the running maximum of the second moment.
        second_moment: "corrected" averages the squares of the clipped corrected gradient, "grad" of the
            gradient.
        eps_before_correction: add eps before the bias correction of the second moment (MARS-M release,
            AdamW part).
        batched: the leading dimensions of tensors of three or more count matrices, each with its own norm.
        quasi_hyperbolic: `exp_avg` keeps the plain average of the gradients and the momentum is
            gamma g_t + (1 - gamma) exp_avg: the approximate form without a buffer for the last gradient.
        orthogonalizer: "newton_schulz", "svd", "newton" or "cubic"; kinds "shampoo" and "m".
        ns_steps: number of Newton-Schulz steps.
        ns_coefficients: coefficients of the Newton-Schulz polynomial.
        ns_dtype: dtype of the Newton-Schulz products, None for the rule of `newton_schulz`.
        scale: factor of the orthogonal factor, "none", "sqrt_ratio", "rms" or a number.
    """

    kind: Kind
    lr: float
    beta1: float
    beta2: float = 0.0
    eps: float = 1e-8
    gamma: float = 0.0
    clip: float | None = None
    decay: float = 0.0
    cautious_decay: bool = False
    cautious: bool = False
    amsgrad: bool = False
    second_moment: Literal["corrected", "grad"] = "corrected"
    eps_before_correction: bool = False
    batched: bool = False
    quasi_hyperbolic: bool = False
    orthogonalizer: str = "newton_schulz"
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = QUINTIC
    ns_dtype: torch.dtype | None = None
    scale: str | float = "sqrt_ratio"

    @property
    def correction_factor(self) -> float:
        """Gamma beta1 / (1 - beta1), from the values of this step."""
        return self.gamma * self.beta1 / (1 - self.beta1)

    @property
    def has_second_moment(self) -> bool:
        """Whether the rule reads and writes `exp_avg_sqs`."""
        return self.kind == "adamw"
