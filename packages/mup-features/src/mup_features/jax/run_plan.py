"""What runs of all methods share: checks of data and settings, batches, rates, and the steps to record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from mup_features.parametrization import Parametrization

from .activations import Activation, Elementwise, resolve
from .losses import Loss, Reduction, SampleLoss, resolve_loss

RECORDABLE = ("f", "K", "G", "change")

__all__ = [
    "RECORDABLE",
    "Data",
    "Settings",
    "batch_at",
    "checked_count",
    "checked_data",
    "recorded_steps",
    "require_float64",
    "settings",
]


@dataclass(frozen=True)
class Settings:
    """Arguments that every method has, checked and resolved.

    Attributes:
        depth: L, hidden layers.
        activations: one for each hidden layer.
        input_dim: d.
        output_dim: C.
        loss: loss with its reduction.
        parametrization: sizes and rates.
        lr: eta.
        lr_schedule: factor of eta at each step, or None.
        batch: samples in a step, or None for all.
        momentum: decay of the velocity.
        weight_decay: a step multiplies weights by 1 - rate * weight_decay.
        replicas: R.
    """

    depth: int
    activations: tuple[Activation, ...]
    input_dim: int
    output_dim: int
    loss: Loss
    parametrization: Parametrization
    lr: float
    lr_schedule: Callable[[int], float] | None
    batch: int | None
    momentum: float
    weight_decay: float
    replicas: int

    def rate(self, step: int) -> float:
        """Eta of a step, by the schedule."""
        return self.lr * (1.0 if self.lr_schedule is None else float(self.lr_schedule(step)))


@dataclass(frozen=True)
class Data:
    """Training and test data, checked; targets [n, C]; no rows where there is no test set."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray

    def coordinates(self) -> np.ndarray:
        """Inputs, training first, in an orthonormal basis of their span: [n + m, rank]."""
        return _principal(np.concatenate([self.X, self.X_test]), 0.0)[0]

    def coordinates_apart(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs in a basis of the training inputs' span, and what of the test inputs is beyond it.

        Returns:
            Training inputs, [n, rank], and test inputs, [m, rank], in the same basis; the rest of the test
            inputs in a basis of its own, [m, its rank], without columns if there is no rest.
        """
        train, directions = _principal(self.X, 0.0)
        test = self.X_test @ directions.T
        largest = max(np.abs(self.X).max(), np.abs(self.X_test).max(initial=0.0))
        beyond, _ = _principal(self.X_test - test @ directions, 1e-12 * largest)
        return train, test, beyond if np.abs(beyond).max(initial=0.0) > 1e-12 * largest else beyond[:, :0]


def settings(
    *,
    depth: int,
    activation: str | Elementwise | Sequence[str | Elementwise],
    input_dim: int,
    output_dim: int,
    loss: str | SampleLoss,
    reduction: Reduction,
    parametrization: str | Parametrization,
    sigma: float | tuple[float, ...],
    lr: float,
    lr_schedule: Callable[[int], float] | None,
    batch: int | None,
    momentum: float,
    weight_decay: float,
    replicas: int,
) -> Settings:
    """The settings of a run.

    Raises:
        ValueError: for arguments out of range, or if jax is not set to float64.
    """
    require_float64()
    counts = {"depth": depth, "input_dim": input_dim, "output_dim": output_dim, "replicas": replicas}
    for name, value in (counts | ({} if batch is None else {"batch": batch})).items():
        checked_count(name, value, 1)
    if not (np.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and > 0, got {lr!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if not (np.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
    if isinstance(activation, Sequence) and not isinstance(activation, str):
        names = tuple(activation)
    else:
        names = (activation,) * depth
    if len(names) != depth:
        raise ValueError(f"activation must be one or depth = {depth} of them, got {len(names)}")
    activations = tuple(resolve(name) for name in names)
    if isinstance(parametrization, str):
        parametrization = Parametrization(parametrization, sigma=sigma)
    elif sigma != 1.0:
        raise ValueError(f"sigma must be left to the Parametrization given, got {sigma!r}")
    if parametrization.optimizer != "sgd":
        raise NotImplementedError(
            f"parametrization must be that of SGD, got optimizer {parametrization.optimizer!r}: Adam has no "
            "such closed form; train real networks of several widths instead, mup_features.torch scales them"
        )
    if parametrization.name == "ip_llr" and any(a.at_zero != 0 for a in activations):
        raise ValueError(f"activation must have phi(0) = 0 for 'ip_llr', got {names!r}")
    return Settings(
        depth,
        activations,
        input_dim,
        output_dim,
        resolve_loss(loss, reduction),
        parametrization,
        float(lr),
        lr_schedule,
        batch,
        float(momentum),
        float(weight_decay),
        replicas,
    )


def checked_data(
    run: Settings,
    X: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "n *outputs"],
    X_test: Float[ArrayLike, "m d"] | None,
) -> Data:
    """Data for these settings.

    Raises:
        ValueError: for wrong shapes or values that are not finite, or if jax is not set to float64.
    """
    require_float64()
    X = _finite_matrix("X", X, run.input_dim)
    tests = (
        np.zeros((0, run.input_dim)) if X_test is None else _finite_matrix("X_test", X_test, run.input_dim)
    )
    y = np.asarray(y, dtype=np.float64)
    y = y[:, None] if y.ndim == 1 else y
    if y.shape != (len(X), run.output_dim):
        raise ValueError(f"y must be [{len(X)}, {run.output_dim}], got shape {y.shape}")
    if not np.isfinite(y).all():
        raise ValueError("y must be finite, got nan or inf among its entries")
    if run.batch is not None and run.batch > len(X):
        raise ValueError(f"batch must be at most the number of samples {len(X)}, got {run.batch!r}")
    return Data(X, y, tests)


def require_float64() -> None:
    """Refuse to compute in float32, where bases would fill with rounding.

    Raises:
        ValueError: if jax is not set to float64 here and now.
    """
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "jax_enable_x64 must be on, orthonormal bases need float64; use jax.enable_x64(True)"
        )


def checked_count(name: str, value: int, low: int) -> None:
    """Refuse what is no integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def recorded_steps(steps: int, every: int, record: Sequence[str]) -> list[int]:
    """Steps 0, every, 2 every, ... and the last.

    Raises:
        ValueError: for numbers out of range or names that cannot be recorded.
    """
    checked_count("steps", steps, 0)
    checked_count("every", every, 1)
    if not set(record) <= set(RECORDABLE):
        raise ValueError(f"record must be among {', '.join(RECORDABLE)}, got {tuple(record)!r}")
    return sorted({*range(0, steps, every), steps})


def batch_at(key: PRNGKeyArray, step: int, samples: int, batch: int | None) -> Int[Array, " batch"]:
    """Numbers of the samples of a step, drawn without replacement, in order; the same for all replicas."""
    if batch is None or batch == samples:
        return jnp.arange(samples)
    return jnp.sort(jax.random.choice(jax.random.fold_in(key, step), samples, (batch,), replace=False))


def _principal(inputs: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in an orthonormal basis of the span, [n, rank >= 1], and the basis, [rank, d]."""
    if not len(inputs):
        return np.zeros((0, 1)), np.eye(1, inputs.shape[1])
    left, singular, right = np.linalg.svd(inputs, full_matrices=False)
    rank = max(1, int(np.sum(singular > max(singular[0] * 1e-12, floor))))
    # The sign of each direction is free; the largest coordinate positive does not depend on the basis of the
    # input space.
    columns = left[:, :rank] * singular[:rank]
    largest = np.abs(columns).argmax(axis=0)
    signs = np.sign(columns[largest, np.arange(rank)] + (singular[:rank] == 0))
    return columns * signs, right[:rank] * signs[:, None]


def _finite_matrix(name: str, values: Float[ArrayLike, "n d"], columns: int) -> Float[np.ndarray, "n d"]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != columns or not len(matrix):
        raise ValueError(f"{name} must be [samples, input_dim = {columns}], got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got nan or inf among its entries")
    return matrix
