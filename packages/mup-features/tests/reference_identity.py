"""The exact limit of deep linear nets under muP (R1), on a Fock space.

With phi = identity every limiting variable of layer l is a combination of Gaussian fields. Name fields
by walks on the layers 0..L+1: a walk starts at an input direction or at an output, steps up by a W^l or down
by a W^{l T}, and the walk that ends at layer l names a standard normal field on that layer. Fields of
different walks are independent. The rule Z^{Wx} = Zhat^{Wx} + Zdot^{Wx} (section c3) says

    W (walk) = sigma (walk + step)  +  sigma (walk without its last step, if that was W^T)

the first term being Zhat, the second Zdot = sigma^2 Z^y E[dZ^x / dZhat^{W^T y}]: a Gaussian matrix is
creation plus annihilation, as in free probability. Expectations of products are dot products of
coefficients, so nothing is sampled or integrated: the result is exact up to rounding.
"""

from collections import defaultdict

import numpy as np


def _product(vector, target, sigma, *, annihilate=True):
    """Initial matrix to the neighbouring layer `target`, times a vector {walk: coefficient}."""
    out = defaultdict(float)
    for walk, value in vector.items():
        out[(*walk, target)] += sigma * value
        if annihilate and walk[-2] == target:
            out[walk[:-1]] += sigma * value
    return out


def _add(vector, other, factor):
    for walk, value in other.items():
        vector[walk] += factor * value


def _dot(u, v):
    return sum(value * v.get(walk, 0.0) for walk, value in u.items())


def identity_limit(X, y, eta, depth, steps, *, sigma=1.0, zdot=True):
    """Outputs f [t, N, C] and last-layer Gram matrices [t, N, N] for t = 0..steps; loss 1/2 sum of squares.

    Args:
        X: inputs [N, d].
        y: targets [N, C].
        eta: rate.
        depth: number L of hidden layers.
        steps: number of updates.
        sigma: standard deviation of every layer.
        zdot: False leaves annihilation out, which is wrong and must be seen to be.
    """
    samples, outputs = range(len(X)), range(y.shape[1])
    V = [defaultdict(float, {(("out", c), depth): sigma}) for c in outputs]
    history = []  # (x_s, b_s) of the steps so far, each {(layer, sample): vector}
    f_all, K_all = [], []
    for _ in range(steps + 1):
        x, b = {}, {}
        for layer in range(1, depth + 1):
            for i in samples:
                if layer == 1:
                    h = defaultdict(float, {(("in", k), 1): sigma * v for k, v in enumerate(X[i])})
                else:
                    h = _product(x[layer - 1, i], layer, sigma, annihilate=zdot)
                for x_s, b_s in history:
                    for j in samples:
                        overlap = X[j] @ X[i] if layer == 1 else _dot(x_s[layer - 1, j], x[layer - 1, i])
                        _add(h, b_s[layer, j], -eta * overlap)
                x[layer, i] = h
        f = np.array([[_dot(V[c], x[depth, i]) for c in outputs] for i in samples])
        f_all.append(f)
        K_all.append([[_dot(x[depth, i], x[depth, j]) for j in samples] for i in samples])
        chi = f - y
        for layer in range(depth, 0, -1):
            for i in samples:
                if layer == depth:
                    b[layer, i] = defaultdict(float)
                    for c in outputs:
                        _add(b[layer, i], V[c], chi[i, c])
                else:
                    b[layer, i] = _product(b[layer + 1, i], layer, sigma, annihilate=zdot)
                    for x_s, b_s in history:
                        for j in samples:
                            _add(b[layer, i], x_s[layer, j], -eta * _dot(b_s[layer + 1, j], b[layer + 1, i]))
        for c in outputs:
            for i in samples:
                _add(V[c], x[depth, i], -eta * chi[i, c])
        history.append((x, b))
    return np.array(f_all), np.array(K_all)
