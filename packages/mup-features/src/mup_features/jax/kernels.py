"""Kernels of infinitely wide nets and gradient descent with them.

K^0 = xi . xi', K^l = w_std^2 E[phi(u) phi(v)] + b_std^2 and Kdot^l = w_std^2 E[phi'(u) phi'(v)] with (u, v)
normal with the covariance of K^{l-1}. NNGP: K^L. NTK: the contributions start as [K^0]; every layer
multiplies them by Kdot^l and appends K^l; Theta is their sum (Jacot, Gabriel, Hongler 2018). Kernel gradient
descent: f_t - y = (I - lr Theta)^t (f_0 - y). These are the limits of the NTP and SP schemes; muP has no
fixed kernel.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .activations import Elementwise, resolve
from .dual_activations import POINTS
from .kernel_recursion import Kind, stacked_kernels

KernelRegime = Literal["ntp", "sp"]

__all__ = ["KernelGD", "KernelPrediction", "KernelRegime", "limiting_kernel", "nngp", "ntk"]


def nngp(
    X1: Float[ArrayLike, "n1 d"],
    X2: Float[ArrayLike, "n2 d"] | None = None,
    *,
    depth: int,
    activation: str | Elementwise,
    w_std: float = 1.0,
    b_std: float = 0.0,
    return_layers: bool = False,
    points: int = POINTS,
) -> Float[Array, "n1 n2"] | list[Float[Array, "n1 n2"]]:
    """Covariance K^L of the features of the last hidden layer at initialization.

    Args:
        X1: inputs, one a row.
        X2: other inputs; None is X1, which halves the work.
        depth: number L >= 1 of hidden layers.
        activation: name or elementwise function.
        w_std: standard deviation of the weights of layers 2..L+1, times root of width; > 0.
        b_std: standard deviation of the biases, >= 0.
        return_layers: give the list K^0, ..., K^L instead.
        points: points per axis of the quadrature, for activations without closed form that Mehler's series
            does not give to rounding: those with kinks, or with variances above about 5 (tanh), 20 (SiLU).
            It takes minutes at N = 1000, as each pair of each layer is a two-dimensional integral.

    Raises:
        ValueError: for bad shapes, values that are not finite, or arguments out of range.
    """
    stack = _kernels(X1, X2, depth, activation, w_std, b_std, points, "nngp", return_layers)
    return list(stack) if return_layers else stack[0]


def ntk(
    X1: Float[ArrayLike, "n1 d"],
    X2: Float[ArrayLike, "n2 d"] | None = None,
    *,
    depth: int,
    activation: str | Elementwise,
    w_std: float = 1.0,
    b_std: float = 0.0,
    return_layers: bool = False,
    points: int = POINTS,
) -> Float[Array, "n1 n2"] | list[Float[Array, "n1 n2"]]:
    """Neural tangent kernel Theta, or with `return_layers` its L + 1 terms, one for each layer of weights.

    Args:
        X1: inputs, one a row.
        X2: other inputs; None is X1, which halves the work.
        depth: number L >= 1 of hidden layers.
        activation: name or elementwise function.
        w_std: standard deviation of the weights of layers 2..L+1, times root of width; > 0.
        b_std: standard deviation of the biases, >= 0.
        return_layers: give the list of contributions of layers 1..L+1 instead of their sum.
        points: as in `nngp`.

    Raises:
        ValueError: for bad shapes, values that are not finite, or arguments out of range.
    """
    stack = _kernels(X1, X2, depth, activation, w_std, b_std, points, "ntk", return_layers)
    return list(stack) if return_layers else stack[0]


def limiting_kernel(
    X1: Float[ArrayLike, "n1 d"],
    X2: Float[ArrayLike, "n2 d"] | None = None,
    *,
    depth: int,
    activation: str | Elementwise,
    parametrization: KernelRegime = "ntp",
    sigma: float | Sequence[float] = 1.0,
    points: int = POINTS,
) -> Float[Array, "n1 n2"]:
    """Kernel with which an infinitely wide net trains by SGD with rate eta in the NTP or SP scheme.

    NTP: every layer contributes. SP with its stable rate eta / n: the first layer, which would need rate eta
    to move the outputs, does not. Here eta is not absorbed: use it as `lr` of `KernelGD`, divided by the
    number of samples if the loss is their mean.

    Args:
        X1: inputs, one a row.
        X2: other inputs; None is X1.
        depth: number L >= 1 of hidden layers.
        activation: name or elementwise function.
        parametrization: "ntp" or "sp".
        sigma: standard deviation of every layer, or of each of the L + 1 layers.
        points: as in `nngp`.

    Raises:
        ValueError: for another parametrization, a wrong number of sigmas, or what `ntk` refuses.
    """
    if parametrization not in get_args(KernelRegime):
        raise ValueError(f"parametrization must be 'ntp' or 'sp', got {parametrization!r}")
    sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), _sigma_shape(sigma, depth))
    if not (np.isfinite(sigmas).all() and (sigmas > 0).all()):
        raise ValueError(f"sigma must be finite and > 0, got {sigma!r}")
    X1 = jnp.asarray(X1) * float(sigmas[0])
    X2 = None if X2 is None else jnp.asarray(X2) * float(sigmas[0])
    # The recursion counts weights sigma w with w trained; the schemes train the weights themselves.
    terms = _kernels(X1, X2, depth, activation, tuple(map(float, sigmas[1:])), 0.0, points, "ntk", True)
    terms = terms / jnp.asarray(sigmas**2, terms.dtype)[:, None, None]
    return terms[1:].sum(axis=0) if parametrization == "sp" else terms.sum(axis=0)


class KernelPrediction(NamedTuple):
    """Outputs of kernel gradient descent on the training inputs and, if there are any, the test inputs."""

    train: Float[Array, "*steps n outputs"]
    test: Float[Array, "*steps m outputs"] | None


class KernelGD:
    """Gradient descent on 1/2 the sum of squared errors, with a fixed kernel, solved by its eigenvectors.

    Args:
        theta_train: kernel of the training inputs, symmetric.
        theta_test: kernel between test inputs (rows) and training inputs (columns).
        lr: rate > 0. For the mean of the losses divide it by the number of training inputs.

    Raises:
        ValueError: for wrong shapes, a kernel that is not symmetric or not finite, or lr <= 0.
    """

    def __init__(
        self,
        theta_train: Float[ArrayLike, "n n"],
        theta_test: Float[ArrayLike, "m n"] | None = None,
        *,
        lr: float,
    ) -> None:
        theta = jnp.asarray(theta_train)
        if theta.ndim != 2 or theta.shape[0] != theta.shape[1]:
            raise ValueError(f"theta_train must be square, got shape {theta.shape}")
        if not bool(jnp.isfinite(theta).all()):
            raise ValueError("theta_train must be finite, got nan or inf among its entries")
        skew = float(jnp.abs(theta - theta.T).max())
        if skew > 100 * float(jnp.finfo(theta.dtype).eps) * float(jnp.abs(theta).max()):
            raise ValueError(f"theta_train must be symmetric, got entries that differ by {skew:.3g}")
        if not (np.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be finite and > 0, got {lr!r}")
        self.lr = float(lr)
        self.theta_test = None if theta_test is None else jnp.asarray(theta_test)
        if self.theta_test is not None and self.theta_test.shape[1:] != theta.shape[1:]:
            raise ValueError(f"theta_test must be [m, {len(theta)}], got shape {self.theta_test.shape}")
        self.eigenvalues, self.eigenvectors = jnp.linalg.eigh((theta + theta.T) / 2)

    def predict(
        self,
        y: Float[ArrayLike, "n *outputs"],
        steps: int | float | Sequence[float] | np.ndarray,
        f0: float | Float[ArrayLike, "n *outputs"] = 0.0,
        *,
        f0_test: float | Float[ArrayLike, "m *outputs"] = 0.0,
        continuous: bool = False,
    ) -> KernelPrediction:
        """Outputs after that many steps, f_t = y + (I - lr Theta)^t (f_0 - y), or for each of several.

        Test outputs follow from the residuals on the training inputs: f_0 - lr Theta_test sum_{s<t} r_s.

        Args:
            y: targets, [n] or [n, C].
            steps: number of steps >= 0, or a list of them, which adds a leading axis; whole numbers unless
                `continuous`.
            f0: outputs at step 0 on the training inputs.
            f0_test: outputs at step 0 on the test inputs.
            continuous: gradient flow, exp(-lr Theta t), instead of steps.

        Raises:
            ValueError: for wrong shapes, or negative or fractional steps.
        """
        y = jnp.asarray(y, self.eigenvalues.dtype)
        if y.ndim not in (1, 2) or len(y) != len(self.eigenvalues):
            raise ValueError(f"y must be [{len(self.eigenvalues)}] or [..., C], got shape {y.shape}")
        times = np.asarray(steps, dtype=np.float64)
        if not np.isfinite(times).all() or (times < 0).any():
            raise ValueError(f"steps must be finite and >= 0, got {steps!r}")
        if not continuous and (times != np.floor(times)).any():
            raise ValueError(f"steps must be whole numbers unless continuous=True, got {steps!r}")
        return _descended(
            self.eigenvalues,
            self.eigenvectors,
            self.theta_test,
            self.lr,
            y,
            jnp.asarray(f0, y.dtype),
            jnp.asarray(f0_test, y.dtype),
            jnp.asarray(times, y.dtype),
            continuous,
        )


@partial(jax.jit, static_argnames="continuous")
def _descended(
    eigenvalues: Float[Array, " n"],
    eigenvectors: Float[Array, "n n"],
    theta_test: Float[Array, "m n"] | None,
    lr: float,
    y: Float[Array, "n *outputs"],
    f0: Float[Array, "..."],
    f0_test: Float[Array, "..."],
    times: Float[Array, "*steps"],
    continuous: bool,
) -> KernelPrediction:
    """The outputs, with all steps in one program."""
    modes = eigenvectors.T @ (jnp.broadcast_to(f0, y.shape) - y).reshape(len(y), -1)
    decay, passed = _spectral_factors(lr * eigenvalues, times, continuous)
    train = y + (eigenvectors @ (decay[..., None] * modes)).reshape(*times.shape, *y.shape)
    if theta_test is None:
        return KernelPrediction(train, None)
    summed = lr * eigenvectors @ (passed[..., None] * modes)
    shape = len(theta_test), *y.shape[1:]
    moved = (theta_test @ summed).reshape(*times.shape, *shape)
    return KernelPrediction(train, jnp.broadcast_to(f0_test, shape) - moved)


def _spectral_factors(
    x: Float[Array, " n"], times: Float[Array, "*steps"], continuous: bool
) -> tuple[Float[Array, "*steps n"], Float[Array, "*steps n"]]:
    """What is left of a mode with lr lambda = x at those times, and the sum of what was there before.

    Discrete: (1 - x)^t and (1 - (1 - x)^t) / x; continuous: exp(-x t) and (1 - exp(-x t)) / x. Small x takes
    expm1 and log1p, so that nearly null directions keep their digits.
    """
    t = times[..., None]
    if continuous:
        decay, gone = jnp.exp(-x * t), -jnp.expm1(-x * t)
    else:
        gentle = x < 0.5
        exponent = t * jnp.log1p(-jnp.where(gentle, x, 0))
        decay = jnp.where(gentle, jnp.exp(exponent), (1 - x) ** t)
        gone = jnp.where(gentle, -jnp.expm1(exponent), 1 - decay)
    return decay, jnp.where(x == 0, t, gone / jnp.where(x == 0, 1, x))


def _sigma_shape(sigma: float | Sequence[float], depth: int) -> tuple[int]:
    if np.ndim(sigma) and np.shape(sigma) != (depth + 1,):
        raise ValueError(f"sigma must be one number or depth + 1 = {depth + 1}, got {sigma!r}")
    return (depth + 1,)


def _kernels(
    X1: Float[ArrayLike, "n1 d"],
    X2: Float[ArrayLike, "n2 d"] | None,
    depth: int,
    activation: str | Elementwise,
    w_std: float | tuple[float, ...],
    b_std: float,
    points: int,
    kind: Kind,
    layers: bool,
) -> Float[Array, "layers n1 n2"]:
    """Checks arguments, then runs the recursion."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be an integer >= 1, got {depth!r}")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise ValueError(f"points must be an integer >= 3, got {points!r}")
    stds = np.broadcast_to(np.asarray(w_std, dtype=np.float64), (depth,))
    if not (np.isfinite(stds).all() and (stds > 0).all()):
        raise ValueError(f"w_std must be finite and > 0, got {w_std!r}")
    if not (np.isfinite(b_std) and b_std >= 0):
        raise ValueError(f"b_std must be finite and >= 0, got {b_std!r}")
    inputs = [_inputs("X1", X1)] + ([] if X2 is None else [_inputs("X2", X2)])
    if inputs[-1].shape[1] != inputs[0].shape[1]:
        raise ValueError(f"X2 must have {inputs[0].shape[1]} columns like X1, got {inputs[-1].shape[1]}")
    return stacked_kernels(inputs, stds, float(b_std), resolve(activation), points, kind, layers)


def _inputs(name: str, X: Float[ArrayLike, "n d"]) -> Float[Array, "n d"]:
    X = jnp.asarray(X)
    # 16 bits hold neither a kernel's small eigenvalues nor the coefficients of a series.
    X = X.astype(jnp.promote_types(X.dtype, jnp.float32) if jnp.issubdtype(X.dtype, jnp.floating) else float)
    if X.ndim != 2 or not len(X):
        raise ValueError(f"{name} must be [samples, features] with a sample or more, got shape {X.shape}")
    if not bool(jnp.isfinite(X).all()):
        raise ValueError(f"{name} must be finite, got nan or inf among its entries")
    return X
