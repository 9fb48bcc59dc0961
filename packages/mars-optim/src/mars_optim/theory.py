"""What can be said about MARS without running it, in NumPy.

Write eps_t = m_t - grad F(x_t) for the error of the momentum, Delta = grad f(x_{t+1}, xi) - grad f(x_t, xi)
for the change of one sample's gradient in one step, and beta for beta1. The exact form without clipping obeys

    eps_{t+1} = (1 - beta) (grad f(x_{t+1}, xi) - grad F(x_{t+1})) + beta eps_t + beta (gamma Delta - E Delta)

`one_step_error` is the mean square of it, `gamma_star` the strength that minimises that, `storm_schedule` the
step sizes of the convergence theorem, `noise_ratio` the price of the approximate form, and the functions that
return an `Equivalent` say which (beta1, gamma) turns MARS into a method that is already known.

Source: Yuan et al. 2025 (arXiv 2411.10438), Section 3.1, Lemmas 3.4, C.2, D.1, Theorems B.5, B.6, eq. D.14.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


def gamma_star(delta: FloatArray, grad: FloatArray, eps: FloatArray, beta1: float) -> float:
    """Correction strength that minimises the momentum's next mean square error, for a finite sum.

    gamma* = 1 - [G + beta (E||Delta||^2 - ||E Delta||^2)] / (beta E||Delta||^2), with
    G = (1 - beta) E<Delta, grad f - grad F> + beta <E Delta, eps>. It may lie far outside [0, 1] and changes
    from step to step: a diagnostic, not a default. The paper prints G twice with a slip (Section 3.1 drops
    the factor beta of eps, eq. C.2 flips the sign of that term); this form minimises `one_step_error`.

    Args:
        delta: shape (samples, dimension); row i is grad f_i(x_{t+1}) - grad f_i(x_t).
        grad: shape (samples, dimension); row i is grad f_i(x_{t+1}).
        eps: shape (dimension,); the momentum's present error m_t - grad F(x_t).
        beta1: momentum decay in (0, 1).

    Raises:
        ValueError: if shapes do not fit, beta1 is outside (0, 1), or delta is zero (no gamma is then best).

    Source: eq. D.14, Lemma C.2.
    """
    delta, grad, eps = _validated(delta, grad, eps, beta1)
    mean_square = float(np.mean(np.sum(delta**2, axis=1)))
    if mean_square == 0.0:
        raise ValueError("delta must not be zero: without movement every gamma gives the same error")
    mean_delta = delta.mean(axis=0)
    noise_overlap = float(np.mean(np.sum(delta * (grad - grad.mean(axis=0)), axis=1)))
    overlap = (1 - beta1) * noise_overlap + beta1 * float(mean_delta @ eps)
    variance = mean_square - float(mean_delta @ mean_delta)
    return 1 - (overlap + beta1 * variance) / (beta1 * mean_square)


def one_step_error(delta: FloatArray, grad: FloatArray, eps: FloatArray, beta1: float, gamma: float) -> float:
    """E||eps_{t+1}||^2 of the exact form, by enumerating every sample of a finite sum.

    Args:
        delta: shape (samples, dimension); row i is grad f_i(x_{t+1}) - grad f_i(x_t).
        grad: shape (samples, dimension); row i is grad f_i(x_{t+1}).
        eps: shape (dimension,); the momentum's present error m_t - grad F(x_t).
        beta1: momentum decay in (0, 1).
        gamma: correction strength, any finite number.

    Raises:
        ValueError: if shapes do not fit, beta1 is outside (0, 1) or gamma is not finite.

    Source: Section 3.1 (the recursion in this module's docstring).
    """
    delta, grad, eps = _validated(delta, grad, eps, beta1)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma!r}")
    noise = grad - grad.mean(axis=0)
    next_eps = (1 - beta1) * noise + beta1 * eps + beta1 * (gamma * delta - delta.mean(axis=0))
    return float(np.mean(np.sum(next_eps**2, axis=1)))


def storm_schedule(s: float, c: float) -> Iterator[tuple[float, float, float]]:
    """Endless (eta_t, beta1_t, beta2_t) of the convergence theorem, for t = 1, 2, ...

    eta_t = (s + t)^(-1/3), beta1_{t+1} = 1 - c eta_t^2, beta2_{t+1} = 1 - eta_t^6, and eta_0 = s^(-1/3) in
    the first betas. With smoothness L and H_t >= rho I the theorem asks for s >= 8 L^3 / rho^3 (with decay
    lambda also s >= 64 lambda^3) and c >= 32 L^2 / rho^2 + 1; the mean of E||grad F(x_t) - m_t||^2 is then
    O(log T / T^(2/3)).

    Args:
        s: offset of the step sizes, >= 1 (so that every beta2 is in [0, 1)).
        c: speed at which beta1 approaches 1, > 0.

    Raises:
        ValueError: if s < 1, c <= 0, or c s^(-2/3) >= 1 (the first beta1 would not be positive).

    Source: Theorems B.5 and B.6.
    """
    if not (math.isfinite(s) and s >= 1):
        raise ValueError(f"s must be finite and >= 1, got {s!r}")
    if not (math.isfinite(c) and c > 0):
        raise ValueError(f"c must be finite and > 0, got {c!r}")
    first = c * s ** (-2 / 3)
    if first >= 1:
        raise ValueError(f"c * s**(-2/3) must be < 1 for the first beta1 to be positive, got {first!r}")
    return _storm_terms(s, c)


def _storm_terms(s: float, c: float) -> Iterator[tuple[float, float, float]]:
    eta, t = s ** (-1 / 3), 0
    while True:
        t += 1
        beta1, beta2 = 1 - c * eta**2, 1 - eta**6
        eta = (s + t) ** (-1 / 3)
        yield eta, beta1, beta2


def noise_ratio(beta1: float, gamma: float) -> float:
    """Stationary Var(m) of the approximate form over that of the plain moving average, for i.i.d. gradients.

    The approximate momentum is m_t = gamma g_t + (1 - gamma) e_t with e_t the moving average, hence
    (1 + beta)/(1 - beta) [gamma^2 + 2 gamma (1 - gamma)(1 - beta) + (1 - gamma)^2 (1 - beta)/(1 + beta)] >= 1
    for gamma in [0, 1]: it never reduces noise, it trades a little of it for less lag. Clipping is ignored.

    Args:
        beta1: momentum decay in [0, 1).
        gamma: correction strength, >= 0.

    Raises:
        ValueError: if beta1 is outside [0, 1) or gamma is negative or not finite.

    Source: derived here from quasi-hyperbolic momentum (Ma and Yarats 2019); not in the paper.
    """
    _check_decay("beta1", beta1)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be finite and >= 0, got {gamma!r}")
    fresh, kept = 1 - beta1, 1 - gamma
    variance = gamma**2 + 2 * gamma * kept * fresh + kept**2 * fresh / (1 + beta1)
    return variance * (1 + beta1) / fresh


class Equivalent(NamedTuple):
    """The MARS setting that reproduces a known method (clip=None; if approximate, prev_grad_init="zero").

    Attributes:
        mars_type: the `mars_type` to use.
        beta1: the momentum decay to use as betas[0].
        gamma: the correction strength to use.
        is_approx: the form to use.
        scale: the known method's momentum divided by MARS's. Where the update is linear in the momentum, the
            learning rate has to be multiplied by it.
    """

    mars_type: str
    beta1: float
    gamma: float
    is_approx: bool
    scale: float


def linear_momentum(
    a1: float, a2: float, b1: float, b2: float, *, updated_first: bool = False
) -> tuple[float, float, float]:
    """(beta1, gamma, scale) with which MARS-approx reproduces a two-term linear momentum.

    The method averages u_{t+1} = a1 u_t + a2 g_t and moves along n_t = b1 u_t + b2 g_t, or along
    b1 u_{t+1} + b2 g_t if the average is `updated_first`. Then
    n_t = a1 n_{t-1} + (b1 a2 - a1 b2 + b2) g_t + q (g_t - g_{t-1}) with q = a1 b2 - b1 a2, or q = a1 b2 if
    updated first: scale times MARS's m_t = beta1 m_{t-1} + (1 - beta1) g_t + gamma beta1 (g_t - g_{t-1}).

    Args:
        a1: decay of the average, in (0, 1).
        a2: weight of the gradient in the average.
        b1: weight of the average in the momentum.
        b2: weight of the gradient in the momentum.
        updated_first: whether the momentum uses the average that already contains g_t.

    Raises:
        ValueError: if a1 is outside (0, 1), the weight of g_t is not positive, or gamma would be negative.

    Source: Lemma 3.4; with `updated_first` Lemma D.1.
    """
    if not 0 < a1 < 1:
        raise ValueError(f"a1 must be in (0, 1), got {a1!r}")
    weight = b1 * a2 - a1 * b2 + b2
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"b1*a2 - a1*b2 + b2 must be finite and > 0, got {weight!r}")
    change = a1 * b2 if updated_first else a1 * b2 - b1 * a2
    gamma = change / weight * ((1 - a1) / a1)  # in this order, tiny weights do not underflow to 0 / 0
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"b1*a2 must not exceed a1*b2: gamma must be finite and >= 0, got {gamma!r}")
    return a1, gamma, weight / (1 - a1)


def lion_equivalent(beta1: float, beta2: float) -> Equivalent:
    """Lion(beta1, beta2) as MARS-Lion: beta1 := beta2, gamma = (beta2 - beta1) / beta2.

    Args:
        beta1: Lion's interpolation factor, in [0, beta2].
        beta2: Lion's momentum decay, in (0, 1).

    Raises:
        ValueError: if beta2 is outside (0, 1), beta1 outside [0, 1) or beta1 > beta2.

    Source: eqs. 3.18-3.19, Lemma 3.4.
    """
    _check_decay("beta1", beta1)
    if not 0 < beta2 < 1:
        raise ValueError(f"beta2 must be in (0, 1), got {beta2!r}")
    if beta1 > beta2:
        raise ValueError(f"beta1 must be <= beta2 (gamma would be negative), got {beta1!r} > {beta2!r}")
    return Equivalent("mars-lion", beta2, (beta2 - beta1) / beta2, is_approx=True, scale=1.0)


def muon_equivalent(momentum: float) -> Equivalent:
    """Muon with Nesterov momentum as MARS-Shampoo: beta1 = momentum, gamma = 1 - momentum.

    Args:
        momentum: Muon's momentum, in (0, 1).

    Raises:
        ValueError: if momentum is outside (0, 1).

    Source: eqs. 3.22-3.25, Lemma D.1.
    """
    return nesterov_equivalent(momentum)._replace(mars_type="mars-shampoo")


def nesterov_equivalent(momentum: float) -> Equivalent:
    """SGD with Nesterov momentum as MARS-SGD: beta1 = momentum, gamma = 1 - momentum, rate / (1 - momentum).

    Args:
        momentum: weight of the old buffer, in (0, 1).

    Raises:
        ValueError: if momentum is outside (0, 1).

    Source: eq. B.1, Lemma D.1.
    """
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must be in (0, 1), got {momentum!r}")
    return Equivalent("mars-sgd", momentum, 1 - momentum, is_approx=True, scale=1 / (1 - momentum))


def storm_equivalent(beta1: float) -> Equivalent:
    """STORM with momentum parameter 1 - beta1 as exact MARS-SGD: gamma = 1.

    Args:
        beta1: weight of the old estimate, in [0, 1).

    Raises:
        ValueError: if beta1 is outside [0, 1).

    Source: eqs. 2.4-2.5 (Cutkosky and Orabona 2019).
    """
    _check_decay("beta1", beta1)
    return Equivalent("mars-sgd", beta1, 1.0, is_approx=False, scale=1.0)


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def _validated(
    delta: FloatArray, grad: FloatArray, eps: FloatArray, beta1: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    delta, grad, eps = (np.asarray(array, dtype=np.float64) for array in (delta, grad, eps))
    if delta.ndim != 2 or len(delta) == 0:
        raise ValueError(f"delta must have shape (samples, dimension) with samples >= 1, got {delta.shape}")
    if grad.shape != delta.shape:
        raise ValueError(f"grad must have delta's shape {delta.shape}, got {grad.shape}")
    if eps.shape != delta.shape[1:]:
        raise ValueError(f"eps must have shape {delta.shape[1:]}, got {eps.shape}")
    if not 0 < beta1 < 1:
        raise ValueError(f"beta1 must be in (0, 1), got {beta1!r}")
    return delta, grad, eps
