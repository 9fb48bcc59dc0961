"""NNGP and NTK recursions by two-dimensional trapezoids, for any activation (section c5, R4)."""

import numpy as np
from reference_single_input import gaussian_grid


def expectation(g, a, b, c):
    """E[g(u, v)] for (u, v) normal with variances a, b and covariance c."""
    (z1, z2), w = gaussian_grid(2)
    u = np.sqrt(a) * z1
    v = c / np.sqrt(a) * z1 + np.sqrt(max(b - c**2 / a, 0.0)) * z2
    return np.sum(w * g(u, v))


def kernels(X, depth, phi, dphi, *, w_std=1.0, b_std=0.0):
    """K^L and the contributions of layers 1..L+1 to Theta, each [N, N]."""
    K = X @ X.T
    layers = [K]
    for _ in range(depth):
        new, slope = np.empty_like(K), np.empty_like(K)
        for i, j in np.ndindex(*K.shape):
            a, b, c = K[i, i], K[j, j], K[i, j]
            new[i, j] = w_std**2 * expectation(lambda u, v: phi(u) * phi(v), a, b, c) + b_std**2
            slope[i, j] = w_std**2 * expectation(lambda u, v: dphi(u) * dphi(v), a, b, c)
        layers = [layer * slope for layer in layers] + [new]
        K = new
    return K, layers
