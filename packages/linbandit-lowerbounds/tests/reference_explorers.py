"""Float64 NumPy truth of the learners of the proofs: SpanExplorer (Theorem 5.4) and OFULGuard (Lemma A.1)."""

import math

import numpy as np


class SpanExplorer:
    """Explore the first action outside the span of what was explored; else play the exact linear prediction.

    An orthonormal basis q_1..q_m by modified Gram-Schmidt carries the values <theta, q_j>, so a prediction is
    <theta, x> = sum_j <q_j, x> value_j. x lies outside the span if its residual exceeds rtol ||x||.
    """

    def __init__(self, d, *, rtol=1e-8):
        self.d = d
        self.rtol = rtol
        self.basis = []  # q_j
        self.values = []  # <theta, q_j>, exact as long as exploration rounds are noiseless

    def residual(self, x):
        """(x minus its projection on the span, <theta, projection>)."""
        rest = np.array(x, dtype=np.float64)
        value = 0.0
        for q, v in zip(self.basis, self.values, strict=True):
            coefficient = q @ rest  # modified Gram-Schmidt: project what is left, not x
            rest = rest - coefficient * q
            value = value + coefficient * v
        return rest, value

    def is_new(self, x):
        """True if x lies outside the span."""
        rest, _ = self.residual(x)
        return bool(np.linalg.norm(rest) > self.rtol * np.linalg.norm(x))

    @property
    def theta(self):
        """Estimate: the least-norm vector that explains what was explored."""
        return sum((v * q for q, v in zip(self.basis, self.values, strict=True)), np.zeros(self.d))

    def explores(self, actions):
        """Index of the first action outside the span, or None."""
        return next((i for i, x in enumerate(actions) if self.is_new(x)), None)

    def act(self, actions, sigma=None):
        new = self.explores(actions)
        if new is not None:
            return new
        return int(np.argmax([self.residual(x)[1] for x in actions]))

    def update(self, x, reward, sigma=None):
        if not self.is_new(x):
            return
        rest, value = self.residual(x)
        length = np.linalg.norm(rest)
        self.basis.append(rest / length)
        self.values.append((reward - value) / length)


class OFULGuard:
    """The auxiliary algorithm of Lemma A.1: follow `inner` until its pseudo-regret is large, then `fallback`.

    Pseudo-regret sum_i (sigma (p0 + d Delta) - r_i), Delta = sqrt(p0 / K) / (4 sqrt(2)), 1/sqrt(96 K) at
    p0 = 1/3; the paper forgets the factor sigma in front of the bracket (discrepancy 2). Threshold
    d sigma sqrt(K p0) / (8 sqrt(2)) + sigma sqrt(2 K ln(2 K / delta)). The fallback starts empty.
    """

    def __init__(self, inner, fallback, *, d, K, sigma=1.0, p0=1 / 3, delta=0.01):
        self.inner = inner
        self.fallback = fallback
        gap = math.sqrt(p0 / K) / (4 * math.sqrt(2))
        self.best_mean = sigma * (p0 + d * gap)
        lemma = d * sigma * math.sqrt(K * p0) / (8 * math.sqrt(2))
        self.threshold = lemma + sigma * math.sqrt(2 * K * math.log(2 * K / delta))
        self.pseudo_regret = 0.0
        self.switched = False

    @property
    def current(self):
        """The algorithm that plays the coming round."""
        return self.fallback if self.switched else self.inner

    @property
    def theta(self):
        """Estimate of the algorithm in charge."""
        return self.current.theta

    def act(self, actions, sigma=None):
        return self.current.act(actions, sigma)

    def update(self, x, reward, sigma=None):
        self.current.update(x, reward, sigma)
        self.pseudo_regret = self.pseudo_regret + self.best_mean - reward
        self.switched = self.switched or self.pseudo_regret > self.threshold
