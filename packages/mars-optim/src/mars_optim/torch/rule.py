"""The update rule: every number and choice that one step of one list of tensors needs."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .orthogonalize import QUINTIC

Kind = Literal["adamw", "lion", "shampoo", "m", "sgd"]
ORTHOGONALISED = ("shampoo", "m")


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """The numbers and choices of one step for one list of tensors; `MARS` builds it anew each step.

    lr, beta1 and decay may be 0-d tensors, which a captured graph reads again at each replay.

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
        capturable: the step counters are on the device of the parameters and are never read by the host.
        stochastic_rounding: round bfloat16 parameters up or down at random, right in the mean.
    """

    kind: Kind
    lr: float | Tensor
    beta1: float | Tensor
    beta2: float = 0.0
    eps: float = 1e-8
    gamma: float = 0.0
    clip: float | None = None
    decay: float | Tensor = 0.0
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
    capturable: bool = False
    stochastic_rounding: bool = False

    @property
    def correction_factor(self) -> float | Tensor:
        """Gamma beta1 / (1 - beta1), from the values of this step."""
        return self.gamma * self.beta1 / (1 - self.beta1)

    @property
    def corrects(self) -> bool:
        """Whether the correction changes anything; a beta1 on the device is not read to find out."""
        return self.gamma != 0 and (isinstance(self.beta1, Tensor) or self.beta1 != 0)

    @property
    def has_second_moment(self) -> bool:
        """Whether the rule reads and writes `exp_avg_sqs`."""
        return self.kind == "adamw"

    @property
    def decays(self) -> bool:
        """Whether parameters are shrunk at all; a decay on the device is not read to find out."""
        return isinstance(self.decay, Tensor) or self.decay != 0

    @property
    def has_tensors(self) -> bool:
        """Whether one of the numbers is a tensor."""
        return any(isinstance(value, Tensor) for value in (self.lr, self.beta1, self.decay))

    def for_device(self, device: torch.device) -> "UpdateRule":
        """The rule with its tensors on a device; those of the CPU become numbers for any other device.

        A host number is fixed when a graph is captured, but copying it would be no better: pageable memory
        cannot be read by a graph.
        """
        if not self.has_tensors or torch.compiler.is_compiling():
            return self
        return replace(
            self,
            lr=_for_device(self.lr, device),
            beta1=_for_device(self.beta1, device),
            decay=_for_device(self.decay, device),
        )

    def on_host(self) -> "UpdateRule":
        """The rule with plain numbers, for kernels that take them as arguments."""
        if not self.has_tensors:
            return self
        return replace(self, lr=float(self.lr), beta1=float(self.beta1), decay=float(self.decay))


def _for_device(value: float | Tensor, device: torch.device) -> float | Tensor:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return float(value) if value.is_cpu else value.to(device)
