"""Losses and their derivatives with respect to the outputs: chi_t(i) = d loss / d f_t(xi_i), section c3."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Reduction = Literal["mean", "sum"]
SampleLoss = Callable[[Float[Array, " outputs"], Float[Array, " outputs"]], Float[Array, ""]]

__all__ = ["LOSSES", "Loss", "Reduction", "SampleLoss", "resolve_loss"]


def _squared(f: Float[Array, " outputs"], y: Float[Array, " outputs"]) -> Float[Array, ""]:
    return 0.5 * jnp.sum((f - y) ** 2)


def _cross_entropy(f: Float[Array, " outputs"], y: Float[Array, " outputs"]) -> Float[Array, ""]:
    """Targets are probabilities of the classes, one-hot as a rule."""
    return -jnp.sum(y * jax.nn.log_softmax(f))


def _logistic(f: Float[Array, " outputs"], y: Float[Array, " outputs"]) -> Float[Array, ""]:
    """Targets are signs, -1 or 1, one for each output."""
    return jnp.sum(jax.nn.softplus(-y * f))


LOSSES: dict[str, SampleLoss] = {"mse": _squared, "cross_entropy": _cross_entropy, "logistic": _logistic}


@dataclass(frozen=True)
class Loss:
    """A loss of one sample, added up or averaged over the batch.

    Attributes:
        name: its name.
        sample: loss of one sample, from outputs and targets of shape [C].
        reduction: "mean" or "sum" over the samples of the batch.
    """

    name: str
    sample: SampleLoss
    reduction: Reduction

    def value(self, f: Float[Array, "batch outputs"], y: Float[Array, "batch outputs"]) -> Float[Array, ""]:
        """Loss of the batch."""
        losses = jax.vmap(self.sample)(f, y)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    def chi(
        self, f: Float[Array, "batch outputs"], y: Float[Array, "batch outputs"]
    ) -> Float[Array, "batch outputs"]:
        """Derivative of the loss of the batch with respect to the outputs; 1/batch included for "mean"."""
        gradient = jax.vmap(jax.grad(self.sample))(f, y)
        return gradient / f.shape[0] if self.reduction == "mean" else gradient


def resolve_loss(loss: str | SampleLoss, reduction: Reduction = "mean") -> Loss:
    """The loss of that name ("mse" is 1/2 squared error), or around a function of one sample's f and y.

    Raises:
        ValueError: for an unknown name or reduction.
        TypeError: for a loss that is neither a name nor a function.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(sorted(LOSSES))} or a function, got {loss!r}")
        return Loss(loss, LOSSES[loss], reduction)
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function of f [C] and y [C], got {loss!r}")
    return Loss(getattr(loss, "__name__", type(loss).__name__), loss, reduction)
