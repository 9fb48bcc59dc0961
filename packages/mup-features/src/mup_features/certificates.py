"""Certificates: upper bounds of the training loss from the gradient of the readout, without training further.

For f = W x with x the last features, K = X X'/n and chi_i = d loss / d f_i, the readout's gradient is
sum_i chi_i x_i', hence

    ||grad_W loss||^2 / n = tr(chi' K chi) >= lambda_min(K) ||chi||^2.

For the squared loss ||chi||^2 is the loss up to a factor, so a small gradient with independent features
bounds the loss itself, at any time, width and model. With all layers, Theta = K^L + sum_l GJ^l o K^{l-1}
takes the place of K and the loss' rate of descent that of the gradient: -d loss/d(eta t) = chi' Theta chi.

Eigenvalues are trusted to N eps ||K||: the bound is computed with lambda_min lowered by that much, and there
is no bound, rather than a huge one, where lambda_min is not clearly above it.

Source: this package (the readout identity behind corollary 4.6 of Chen et al. 2025, arXiv 2503.09565).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .spectra import EPS, as_gram

Reduction = Literal["mean", "sum"]
Loss = Literal["squared", "convex"]


@dataclass(frozen=True)
class Certificate:
    """What the gradient says about the distance to a global minimum.

    Attributes:
        value: the loss itself (squared loss), or ||chi|| (convex loss).
        bound: its upper bound; None if not certifiable.
        ratio: bound / value, at least 1; None if not certifiable, 1 at a loss of exactly zero.
        lambda_min: smallest eigenvalue of the kernel, raw.
        floor: what lambda_min has to exceed to be told from rounding.
        certifiable: whether it does.
        chi_norm: ||chi|| in Frobenius norm.
        chi_bound: upper bound of ||chi||; zero of it is a global minimum of any convex loss.
        reason: one sentence for the reader.
    """

    value: float
    bound: float | None
    ratio: float | None
    lambda_min: float
    floor: float
    certifiable: bool
    chi_norm: float
    chi_bound: float | None
    reason: str


@dataclass(frozen=True)
class TangentCertificate(Certificate):
    """A certificate through all layers.

    Attributes:
        layer_bounds: guaranteed share of each layer in lambda_min(Theta), first layer to readout:
            min_i lambda_min(GJ^l_ii) lambda_min(K^{l-1}), and lambda_min(K^L). Their sum is a lower bound.
    """

    layer_bounds: tuple[float, ...] = ()


def global_min_certificate(
    K: ArrayLike,
    chi: ArrayLike,
    reduction: Reduction = "mean",
    readout_grad_sq: float | None = None,
    *,
    loss: Loss = "squared",
    readout_multiplier: float = 1.0,
) -> Certificate:
    """Bounds the loss by the gradient of a linear readout and lambda_min of the last features' Gram.

    Squared loss 1/2 sum_i ||f_i - y_i||^2 ("sum"), or that divided by N ("mean": over samples, not outputs):

        loss <= ||grad||^2 / (2 n lambda_min(K)),  times N for "mean", where chi contains 1/N.

    Args:
        K: Gram of the last post-activations (samples, samples), divided by n.
        chi: derivative of the loss by the outputs, (samples,) or (samples, outputs), with the 1/N of a mean.
        reduction: how the loss adds up its samples.
        readout_grad_sq: ||grad||^2 / n of the readout weight, squared Frobenius norm. None computes it from K
            and chi. If K is not divided by n, neither is this.
        loss: "convex" for any other convex loss: value and bound are of ||chi||.
        readout_multiplier: factor m of f = m W x. The gradient of the stored W is m times that of the
            effective weight m W, and `readout_grad_sq` is divided by m^2.

    Raises:
        ValueError: if shapes disagree, entries are not finite, or an option is unknown.

    Warns:
        UserWarning: if readout_grad_sq is not tr(chi' K chi) within 1 %: a forgotten multiplier or 1/n,
            features of another layer, weight decay in the gradient.
    """
    K, chi = as_gram(K), _signal(chi, np.shape(K)[0])
    _check_options(reduction, loss, readout_multiplier)
    expected = float(np.sum(chi * (K @ chi)))
    grad_sq = expected
    if readout_grad_sq is not None:
        if not (np.isfinite(readout_grad_sq) and readout_grad_sq >= 0):
            raise ValueError(f"readout_grad_sq must be finite and >= 0, got {readout_grad_sq!r}")
        grad_sq = float(readout_grad_sq) / readout_multiplier**2
        # Below rounding of the sum there is nothing to compare.
        if abs(grad_sq - expected) > 0.01 * expected + 1e3 * EPS * float(np.trace(K)) * float(np.sum(chi**2)):
            warnings.warn(
                f"readout_grad_sq / readout_multiplier^2 = {grad_sq:.4g} should equal tr(chi' K chi) = "
                f"{expected:.4g}: check the multiplier, the division by n, and that K is of the layer before "
                "the readout",
                stacklevel=2,
            )
    return Certificate(**_bounds(np.linalg.eigvalsh(K), chi, grad_sq, reduction, loss))


def tangent_certificate(
    K: Sequence[ArrayLike],
    GJ: Sequence[ArrayLike],
    chi: ArrayLike,
    reduction: Reduction = "mean",
    *,
    loss: Loss = "squared",
) -> TangentCertificate:
    """Bounds the loss by its rate of descent -d loss / d(eta t) = chi' Theta chi, which uses all layers.

    Args:
        K: L + 1 Grams: of the inputs (not divided by their dimension) and of the post-activations of layers
            1..L (divided by n).
        GJ: L Grams of the backward signals J^l(i, c) = n df_c(i) / dh^l(i) of layers 1..L, divided by n:
            (samples, samples) for one output, else (samples, outputs, samples, outputs).
        chi: as in `global_min_certificate`.
        reduction: how the loss adds up its samples.
        loss: "squared" or "convex".

    Raises:
        ValueError: if numbers of layers or shapes disagree.
    """
    Theta = tangent_kernel(K, GJ)
    N = np.shape(K[0])[0]
    C = len(Theta) // N
    chi = _signal(chi, N)
    if chi.shape[1] != C:
        raise ValueError(f"chi must have {C} outputs as GJ, got {chi.shape[1]}")
    _check_options(reduction, loss, 1.0)
    flat = chi.reshape(-1)
    shares = [
        min(float(np.linalg.eigvalsh(block)[0]) for block in _diagonal_blocks(signals, N))
        * max(float(np.linalg.eigvalsh(as_gram(features))[0]), 0.0)
        for signals, features in zip(GJ, K, strict=False)
    ]
    shares.append(float(np.linalg.eigvalsh(as_gram(K[-1]))[0]))
    found = _bounds(np.linalg.eigvalsh(Theta), chi, float(flat @ Theta @ flat), reduction, loss)
    return TangentCertificate(**found, layer_bounds=tuple(shares))


def tangent_kernel(K: Sequence[ArrayLike], GJ: Sequence[ArrayLike]) -> Float[np.ndarray, "NC NC"]:
    """Theta = K^L + sum_{l=1..L} GJ^l o K^{l-1}, samples outermost: row i C + c is output c of sample i.

    With several outputs K^{l-1}_ij multiplies block ij of GJ^l, and the readout adds K^L to each output.

    Args:
        K: L + 1 Grams; see `tangent_certificate`.
        GJ: L Grams of backward signals.

    Raises:
        ValueError: if numbers of layers or shapes disagree.
    """
    if len(K) != len(GJ) + 1 or not GJ:
        raise ValueError(f"K must hold one Gram more than GJ (at least one), got {len(K)} and {len(GJ)}")
    grams = [as_gram(features, f"K[{layer}]") for layer, features in enumerate(K)]
    N = len(grams[0])
    signals = [_flat_signals(signal, f"GJ[{layer}]", N) for layer, signal in enumerate(GJ)]
    C = len(signals[0]) // N
    for layer, features in enumerate(grams):
        if len(features) != N:
            raise ValueError(f"K[{layer}] must have {N} samples as K[0], got {len(features)}")
    for layer, signal in enumerate(signals):
        if len(signal) != N * C:
            raise ValueError(f"GJ[{layer}] must have {C} outputs as GJ[0], got {len(signal) / N:g}")
    Theta = np.kron(grams[-1], np.eye(C))
    for features, signal in zip(grams, signals, strict=False):
        Theta += signal * np.kron(features, np.ones((C, C)))
    return Theta


def _bounds(values: np.ndarray, chi: np.ndarray, squared: float, reduction: Reduction, loss: Loss) -> dict:
    """The fields of a certificate from eigenvalues and ||gradient||^2; `squared` >= lambda_min ||chi||^2."""
    smallest, largest = float(values[0]), float(np.abs(values).max())
    rounding = len(values) * EPS * largest
    floor = max(10 * EPS * largest, 2 * rounding)
    chi_norm = float(np.linalg.norm(chi))
    factor = (len(chi) if reduction == "mean" else 1) / 2
    value = factor * chi_norm**2 if loss == "squared" else chi_norm
    known = {"value": value, "lambda_min": smallest, "floor": floor, "chi_norm": chi_norm}
    if smallest <= floor:
        reason = f"not certifiable: lambda_min = {smallest:.3g} is not above the rounding level {floor:.3g}"
        return known | {
            "bound": None,
            "ratio": None,
            "certifiable": False,
            "chi_bound": None,
            "reason": reason,
        }
    chi_bound = float(np.sqrt(max(squared, 0.0) / (smallest - rounding)))
    bound = factor * chi_bound**2 if loss == "squared" else chi_bound
    ratio = bound / value if value > 0 else 1.0
    what = "the loss" if loss == "squared" else "||chi||"
    reason = f"{what} is at most {bound:.4g} above its global minimum (it is {value:.4g})"
    return known | {
        "bound": bound,
        "ratio": ratio,
        "certifiable": True,
        "chi_bound": chi_bound,
        "reason": reason,
    }


def _signal(chi: ArrayLike, samples: int) -> Float[np.ndarray, "samples outputs"]:
    array = np.asarray(chi, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[0] != samples or not array.size:
        raise ValueError(f"chi must be ({samples},) or ({samples}, outputs), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"chi must be finite, got {(~np.isfinite(array)).sum()} entries that are not")
    return array.reshape(samples, -1)


def _flat_signals(signal: ArrayLike, name: str, N: int) -> Float[np.ndarray, "NC NC"]:
    array = np.asarray(signal, dtype=np.float64)
    if array.ndim == 4 and array.shape[0] == array.shape[2] == N and array.shape[1] == array.shape[3]:
        array = array.reshape(N * array.shape[1], -1)
    if array.ndim != 2 or array.shape[0] % N or array.shape[0] != array.shape[1]:
        expected = f"({N}, {N}) or ({N}, outputs, {N}, outputs)"
        raise ValueError(f"{name} must be {expected}, got shape {np.shape(signal)}")
    return as_gram(array, name)


def _diagonal_blocks(signal: ArrayLike, N: int) -> list[np.ndarray]:
    flat = _flat_signals(signal, "GJ", N)
    C = len(flat) // N
    return [flat[i * C : (i + 1) * C, i * C : (i + 1) * C] for i in range(N)]


def _check_options(reduction: str, loss: str, multiplier: float) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if loss not in get_args(Loss):
        raise ValueError(f"loss must be 'squared' or 'convex', got {loss!r}")
    if not (np.isfinite(multiplier) and multiplier != 0):
        raise ValueError(f"readout_multiplier must be finite and not 0, got {multiplier!r}")
