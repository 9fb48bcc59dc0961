"""Float64 NumPy truth of the layered algorithms: SupLinUCB and SAVE (theory and practical presets).

Same conventions as reference.py: `k` is the index of the coming round, ties go to the lowest index, stored
radii are unscaled and `radius_scale` acts where a radius is used.
"""

import math

import numpy as np
from reference import Ridge


def pick_wide(wide, norms, ucb, explore):
    """One index among those with wide[i] true: rule (c) of SAVE leaves the choice open."""
    if explore == "first":
        return int(np.argmax(wide))
    value = norms if explore == "max_norm" else ucb
    return int(np.argmax(np.where(wide, value, -np.inf)))


class SupLinUCB:
    """Chu, Li, Reyzin, Schapire 2011, Algorithms 3 and 4: floor(ln K) stages, each with its own data."""

    def __init__(self, d, *, K, n_actions, delta=0.01, lam=1.0, explore="max_norm", radius_scale=1.0):
        self.K = K
        self.alpha = math.sqrt(0.5 * math.log(2 * n_actions * K / delta))
        self.stages = max(1, math.floor(math.log(K)))
        self.ridge = [Ridge(d, lam=lam) for _ in range(self.stages)]
        self.explore = explore
        self.radius_scale = radius_scale
        self.k = 1
        self.stage = None  # 1-based stage that the coming update belongs to; None: exploit, no update

    @property
    def beta(self):
        """Factor of the width."""
        return self.alpha + 1

    @property
    def theta(self):
        """Estimates [stages, d]."""
        return np.array([ridge.theta for ridge in self.ridge])

    @property
    def gram(self):
        """Gram matrices [stages, d, d]."""
        return np.array([ridge.gram for ridge in self.ridge])

    def act(self, actions, sigma=None):
        actions = np.asarray(actions, dtype=np.float64)
        alive = np.ones(len(actions), dtype=bool)
        for s in range(1, self.stages + 1):
            ridge = self.ridge[s - 1]
            width = self.radius_scale * self.beta * ridge.norm(actions)
            ucb = actions @ ridge.theta + width
            best = np.max(ucb[alive])
            narrow = np.all(width[alive] <= 2.0**-s)
            # at the last stage 2^-s <= 1/sqrt(K) but for K in {5, 6, 7, 17, ..., 20}: exploit there too
            if np.all(width[alive] <= 1 / math.sqrt(self.K)) or (narrow and s == self.stages):
                self.stage = None
                return int(np.argmax(np.where(alive, ucb, -np.inf)))
            if narrow:
                alive = alive & (ucb >= best - 2.0 ** (1 - s))
                continue
            self.stage = s
            return pick_wide(alive & (width > 2.0**-s), width, ucb, self.explore)
        raise AssertionError("the last stage always decides")

    def update(self, x, reward, sigma=None):
        self.k = self.k + 1
        if self.stage is not None:
            self.ridge[self.stage - 1].absorb(x, reward, 1.0)


class SAVE:
    """Zhao, He, Zhou, Zhang, Gu 2023 (arXiv 2302.10371), Algorithm 1.

    preset="theory": radii with the constants of the specification (docs/radii.md says which are derived), all
    layers refreshed after every round. preset="practical": no proof; the empirical variance at every layer,
    optimistic choice, only the updated layer refreshed.
    """

    def __init__(
        self,
        d,
        *,
        K,
        delta=0.01,
        R=1.0,
        preset="theory",
        explore=None,
        c=1.0,
        radius_scale=1.0,
    ):
        self.d = d
        self.delta = delta
        self.R = R
        self.preset = preset
        self.explore = explore or ("max_norm" if preset == "theory" else "optimistic")
        self.c = c
        self.radius_scale = radius_scale
        self.alpha = 1 / (R * K**1.5)
        self.layers = n_layers(R, K)
        self.k = 1
        self.layer = None  # 1-based layer that the coming update belongs to; None: exploit, no update
        self.scale = 2.0 ** -np.arange(1, self.layers + 1)  # 2^{-l}
        self.gram = np.array([s**2 * np.eye(d) for s in self.scale])  # Sigma_l = 2^{-2l} I
        self.b = np.zeros((self.layers, d))
        self.count = np.zeros(self.layers, dtype=int)  # |Psi_l|
        self.squares = np.zeros(self.layers)  # sum w^2 r^2
        self.history = [[] for _ in range(self.layers)]  # (w, x, r), for the direct sum
        self.beta = 2 * self.scale  # beta_{1,l} = 2^{1-l}
        if preset == "practical":
            log_1 = math.log(4 * self.layers / delta)
            self.beta = c * self.scale * math.sqrt(R**2 * log_1) + self.scale

    @property
    def theta(self):
        """Estimates [layers, d]."""
        return np.array([np.linalg.solve(g, b) for g, b in zip(self.gram, self.b, strict=True)])

    def norms(self, layer, actions):
        """||x|| in Sigma_l^{-1} of each row."""
        solved = np.linalg.solve(self.gram[layer - 1], actions.T).T
        return np.sqrt(np.sum(actions * solved, axis=-1))

    def act(self, actions, sigma=None):
        actions = np.asarray(actions, dtype=np.float64)
        alive = np.ones(len(actions), dtype=bool)
        for layer in range(1, self.layers + 1):
            norms = self.norms(layer, actions)
            beta = self.radius_scale * self.beta[layer - 1]
            mean = actions @ self.theta[layer - 1]
            ucb = mean + beta * norms
            narrow = np.all(norms[alive] <= 2.0**-layer)
            # (a) 2^{-Lambda} <= alpha, so the last layer can only end here or in (c)
            if np.all(norms[alive] <= self.alpha) or (narrow and layer == self.layers):
                self.layer = None
                return int(np.argmax(np.where(alive, ucb, -np.inf)))
            # (b) eliminate with twice the confidence width
            if narrow:
                threshold = np.max(mean[alive]) - 2 * 2.0**-layer * beta
                alive = alive & (mean >= threshold)
                continue
            # (c) explore
            self.layer = layer
            return pick_wide(alive & (norms > 2.0**-layer), norms, ucb, self.explore)
        raise AssertionError("the last layer always decides")

    def update(self, x, reward, sigma=None):
        if self.layer is not None:
            self.absorb(self.layer, np.asarray(x, dtype=np.float64), reward)
        self.k = self.k + 1
        if self.preset == "theory":
            self.beta = np.array([self.theory_radius(layer) for layer in range(1, self.layers + 1)])
        elif self.layer is not None:
            self.beta = self.beta.copy()
            self.beta[self.layer - 1] = self.practical_radius(self.layer)

    def absorb(self, layer, x, reward):
        """Weighted update of one layer: w = 2^{-l} / ||x||, the norm before the update."""
        w = 2.0**-layer / self.norms(layer, x[None])[0]
        self.gram[layer - 1] += w**2 * np.outer(x, x)
        self.b[layer - 1] += w**2 * reward * x
        self.squares[layer - 1] += w**2 * reward**2
        self.count[layer - 1] += 1
        self.history[layer - 1].append((w, x, reward))

    def empirical_variance(self, layer):
        """V = sum w^2 (r - <theta, x>)^2 = sum w^2 r^2 - b^T theta - 2^{-2l} ||theta||^2, clamped at 0."""
        theta = self.theta[layer - 1]
        bias = 2.0 ** (-2 * layer) * theta @ theta
        return max(0.0, self.squares[layer - 1] - self.b[layer - 1] @ theta - bias)

    def empirical_variance_direct(self, layer):
        """The same by the direct sum."""
        theta = self.theta[layer - 1]
        return sum(w**2 * (r - theta @ x) ** 2 for w, x, r in self.history[layer - 1])

    def variance_estimate(self, layer):
        """V-hat of the theory preset: empirical at deep layers, R^2 |Psi_l| at the others."""
        log_1 = math.log(4 * (self.k + 1) ** 2 * self.layers / self.delta)
        if 2.0**layer >= 64 * math.sqrt(log_1):
            return self.empirical_variance(layer)
        return self.R**2 * self.count[layer - 1]

    def theory_radius(self, layer):
        """beta_{k,l} for the coming round k."""
        scale = 2.0**-layer
        log_k = math.log(4 * self.k**2 * self.layers / self.delta)
        log_k1 = math.log(4 * (self.k + 1) ** 2 * self.layers / self.delta)
        # 16 2^{-l} sqrt((8 V + 6 R^2 ln(4 (k+1)^2 Lambda / delta) + 2^{-2l+4}) ln(4 k^2 Lambda / delta))
        variance = 8 * self.variance_estimate(layer) + 6 * self.R**2 * log_k1 + 16 * scale**2
        gaussian = 16 * scale * math.sqrt(variance * log_k)
        # + 6 2^{-l} R ln(4 k^2 Lambda / delta) + 2^{1-l}
        return gaussian + 6 * scale * self.R * log_k + 2 * scale

    def practical_radius(self, layer):
        """c 2^{-l} sqrt(V + 4^{-l} R^2 ln(4 k^2 Lambda / delta)) + 2^{-l} for the coming round k."""
        scale = 2.0**-layer
        log_k = math.log(4 * self.k**2 * self.layers / self.delta)
        variance = self.empirical_variance(layer) + scale**2 * self.R**2 * log_k
        return self.c * scale * math.sqrt(variance) + scale


def n_layers(R, K):
    """Lambda = ceil(log2(R K^{3/2})), at least 1, without rounding trouble at powers of two."""
    mantissa, exponent = math.frexp(R * K**1.5)  # mantissa in [1/2, 1)
    return max(1, exponent - 1 if mantissa == 0.5 else exponent)
