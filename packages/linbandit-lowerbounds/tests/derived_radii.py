"""Radii that docs/radii.md derives, beside the ones the papers print (reference.py).

Notation of docs/radii.md: n observations made, z_i = ||x_i|| in the inverse Gram matrix before update i, D a
bound on ln det(Z_n) - ln det(lam I), l a log of one over a probability. Pure functions in float64.
"""

import math

L_MIN = math.log(4)  # smallest l = ln(4 n^2 / delta) with n >= 1 and delta <= 1
C_GAUSS = math.sqrt(2) + math.sqrt(2 + 1 / L_MIN)  # 3.0639: root of c^2 = 2 sqrt(2) c + 1 / L_MIN


def range_constant(step):
    """Positive root of c^2 = step c + 2 / (3 L_MIN): the factor of range * l in the Bernstein radius.

    step = 2/3 when |noise| <= range (2 z / (1 + z^2) <= 1), 4/3 when |noise| z <= range.
    """
    return step / 2 + math.sqrt(step**2 / 4 + 2 / (3 * L_MIN))


C_RANGE = range_constant(2 / 3)  # 1.1037
C_PRODUCT = range_constant(4 / 3)  # 1.6290


def weighted_oful_radius(n, d, *, delta, lam=1.0, R=1.0, X=1.0, S_theta=1.0):
    """Weighted OFUL after n observations: 3.07 sqrt(D l) + 1.11 sqrt(d) l + sqrt(lam) S."""
    bias = math.sqrt(lam) * S_theta
    if n == 0:
        return bias
    log_n = math.log(4 * n**2 / delta)
    log_det = d * math.log(1 + n * X**2 / (lam * R**2))
    return C_GAUSS * math.sqrt(log_det * log_n) + C_RANGE * math.sqrt(d) * log_n + bias


def weighted_oful_plus_radius(n, d, *, delta, lam, alpha, gamma, R=1.0, X=1.0, S_theta=1.0):
    """Weighted OFUL+ after n observations: 3.07 sqrt(D l) + 1.63 l R / gamma^2 + sqrt(lam) S."""
    bias = math.sqrt(lam) * S_theta
    if n == 0:
        return bias
    log_n = math.log(4 * n**2 / delta)
    log_det = d * math.log(1 + n * X**2 / (alpha**2 * d * lam))
    return C_GAUSS * math.sqrt(log_det * log_n) + C_PRODUCT * log_n * R / gamma**2 + bias


def save_bernstein_radius(n, layer, *, layers, delta, variance=None, R=1.0, S_theta=1.0):
    """One SAVE layer after n updates; variance (R^2 n if None) is a fixed bound on sum w^2 sigma^2."""
    scale = 2.0**-layer
    if n == 0:
        return scale * S_theta
    log_n = math.log(4 * n**2 * layers / delta)
    variance = R**2 * n if variance is None else variance
    return scale * (C_GAUSS * math.sqrt(variance * log_n) + C_PRODUCT * R * log_n + S_theta)


def save_mixture_radius(n, layer, *, layers, delta, R=1.0, S_theta=1.0):
    """The same by the method of mixtures: every update multiplies the determinant by exactly 1 + 4^{-l}."""
    log_det = n * math.log1p(4.0**-layer)
    return R * math.sqrt(log_det + 2 * math.log(layers / delta)) + 2.0**-layer * S_theta


def sup_lin_ucb_alpha(K, n_actions, *, stages, delta, R=1.0):
    """Deviation factor of SupLinUCB for |noise| <= R, over all rounds, actions and stages."""
    return R * math.sqrt(2 * math.log(2 * n_actions * K * stages / delta))


def voful_radius(squares, level, *, directions, layers, K, delta, R=1.0):
    """VOFUL test of one direction mu: bound on |sum clip(<x, mu>, 2^{-level}) noise|.

    With squares = sum clip^2 noise^2 and b = 2^{-level} R: 3 / sqrt(2) sqrt(squares l) + 4 b l, where
    l = ln(2 J directions layers / delta) and J = 1 + ceil(log2(K) / 2) tuning values. For all n <= K at once.
    """
    grid = 1 + math.ceil(0.5 * math.log2(K))
    log_n = math.log(2 * grid * directions * layers / delta)
    bound = 2.0**-level * R
    return 3 / math.sqrt(2) * math.sqrt(squares * log_n) + 4 * bound * log_n
