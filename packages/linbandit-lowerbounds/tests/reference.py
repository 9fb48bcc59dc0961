"""Float64 NumPy truth of the linear bandit algorithms: one step per line, written for reading.

Every class speaks the object protocol: `act(actions[A, d], sigma=None) -> int`, then `update(x, reward,
sigma=None)`. Rounds count from 1: `self.k` is the index of the coming round, so `self.beta` is the radius
that round will use. Ties go to the lowest index (numpy.argmax). `radius_scale` multiplies a radius where
it is used; the stored radius stays unscaled. Layered algorithms (SupLinUCB, SAVE) are in
reference_layers.py, the learners of the proofs (SpanExplorer, OFULGuard) in reference_explorers.py.
Nothing here imports jax or the package.

Sources: section 3.7 of the specification names each paper; docs/radii.md derives each radius.
"""

import math
from statistics import NormalDist

import numpy as np


class Ridge:
    """Weighted least squares: V = lam I + sum w x x^T, b = sum w r x, theta = V^{-1} b."""

    def __init__(self, d, *, lam=1.0):
        self.d = d
        self.lam = lam
        self.gram = lam * np.eye(d)
        self.b = np.zeros(d)
        self.k = 1

    @property
    def theta(self):
        """Ridge estimate."""
        return np.linalg.solve(self.gram, self.b)

    def norm(self, x):
        """||x|| in the inverse Gram matrix, for one vector [d] or for rows [A, d]."""
        x = np.asarray(x, dtype=np.float64)
        solved = np.linalg.solve(self.gram, x.T).T
        return np.sqrt(np.sum(x * solved, axis=-1))

    def log_det_ratio(self):
        """ln det(V) - ln det(lam I)."""
        _, log_det = np.linalg.slogdet(self.gram)
        return log_det - self.d * math.log(self.lam)

    def absorb(self, x, reward, weight):
        """Add one observation of the given weight and go to the next round."""
        x = np.asarray(x, dtype=np.float64)
        self.gram = self.gram + weight * np.outer(x, x)
        self.b = self.b + weight * reward * x
        self.k = self.k + 1

    def update(self, x, reward, sigma=None):
        """Homoscedastic algorithms weigh every observation alike."""
        self.absorb(x, reward, 1.0)


class Greedy(Ridge):
    """Play argmax <theta, x> with the ridge estimate."""

    def act(self, actions, sigma=None):
        return int(np.argmax(np.asarray(actions) @ self.theta))


class Optimist(Ridge):
    """Play argmax <theta, x> + radius_scale * beta * ||x||."""

    def __init__(self, d, *, lam=1.0, radius_scale=1.0):
        super().__init__(d, lam=lam)
        self.radius_scale = radius_scale

    @property
    def beta(self):
        """Radius of the coming round, defined by each algorithm."""
        raise NotImplementedError

    def ucb(self, actions):
        """Upper confidence value of each row."""
        width = self.radius_scale * self.beta * self.norm(actions)
        return np.asarray(actions) @ self.theta + width

    def act(self, actions, sigma=None):
        return int(np.argmax(self.ucb(actions)))


class OFUL(Optimist):
    """Abbasi-Yadkori, Pal, Szepesvari 2011, Theorem 2 (both forms of the radius)."""

    def __init__(self, d, *, delta=0.01, lam=1.0, R=1.0, X=1.0, S_theta=1.0, radius="det", radius_scale=1.0):
        super().__init__(d, lam=lam, radius_scale=radius_scale)
        self.delta = delta
        self.R = R
        self.X = X
        self.S_theta = S_theta
        self.radius = radius

    def beta_at(self, delta):
        """Radius of the coming round at failure probability delta."""
        bias = math.sqrt(self.lam) * self.S_theta
        if self.radius == "det":
            # R sqrt(2 ln(det(V)^{1/2} det(lam I)^{-1/2} / delta)) + sqrt(lam) S
            log_ratio = 0.5 * self.log_det_ratio() - math.log(delta)
            return self.R * math.sqrt(2 * log_ratio) + bias
        # "trace": R sqrt(d ln((1 + k X^2 / lam) / delta)) + sqrt(lam) S, k the coming round
        log_ratio = math.log((1 + self.k * self.X**2 / self.lam) / delta)
        return self.R * math.sqrt(self.d * log_ratio) + bias

    @property
    def beta(self):
        return self.beta_at(self.delta)


class LinUCB(Optimist):
    """Li, Chu, Langford, Schapire 2010: the width has a constant factor alpha."""

    def __init__(self, d, *, alpha=1.0, lam=1.0, radius_scale=1.0):
        super().__init__(d, lam=lam, radius_scale=radius_scale)
        self.alpha = alpha

    @property
    def beta(self):
        return self.alpha


class LinTS(Ridge):
    """Linear Thompson sampling: theta~ = theta + v V^{-1/2} zeta, zeta ~ N(0, I) passed in.

    With the Cholesky factor V = C C^T the square root is C^{-T}: cov(C^{-T} zeta) = C^{-T} C^{-1} = V^{-1}.
    """

    def __init__(
        self,
        d,
        *,
        K,
        inflation="posterior",
        delta=0.01,
        lam=1.0,
        R=1.0,
        S_theta=1.0,
        radius_scale=1.0,
    ):
        super().__init__(d, lam=lam)
        self.K = K
        self.inflation = inflation
        self.delta = delta
        self.R = R
        self.S_theta = S_theta
        self.radius_scale = radius_scale

    @property
    def beta(self):
        """The inflation v of the coming round."""
        if self.inflation == "posterior":
            return self.R
        if self.inflation == "agrawal-goyal":
            # Agrawal, Goyal 2013, Algorithm 1: v = R sqrt(9 d ln(t / delta))
            return self.R * math.sqrt(9 * self.d * math.log(self.k / self.delta))
        # "abeille-lazaric" 2017: the OFUL radius at delta' = delta / (4 K)
        log_ratio = 0.5 * self.log_det_ratio() - math.log(self.delta / (4 * self.K))
        return self.R * math.sqrt(2 * log_ratio) + math.sqrt(self.lam) * self.S_theta

    @property
    def covariance(self):
        """Covariance of theta~ given the past."""
        v = self.radius_scale * self.beta
        return v**2 * np.linalg.inv(self.gram)

    def sample(self, zeta):
        """theta~ for a given standard normal vector zeta[d]."""
        chol = np.linalg.cholesky(self.gram)
        direction = np.linalg.solve(chol.T, np.asarray(zeta, dtype=np.float64))
        return self.theta + self.radius_scale * self.beta * direction

    def act(self, actions, sigma=None, *, zeta=None):
        zeta = np.zeros(self.d) if zeta is None else zeta
        return int(np.argmax(np.asarray(actions) @ self.sample(zeta)))


class WeightedOFUL(Optimist):
    """Zhou, Gu, Szepesvari 2021: weight 1 / sbar^2, sbar = max(R / sqrt(d), sigma), known after."""

    def __init__(self, d, *, delta=0.01, lam=1.0, R=1.0, X=1.0, S_theta=1.0, radius_scale=1.0):
        super().__init__(d, lam=lam, radius_scale=radius_scale)
        self.delta = delta
        self.R = R
        self.X = X
        self.S_theta = S_theta

    @property
    def beta(self):
        # 8 sqrt(d ln(1 + k X^2 / (lam R^2)) ln(4 k^2 / delta)) + 4 sqrt(d) ln(4 k^2 / delta) + sqrt(lam) S
        log_det = math.log(1 + self.k * self.X**2 / (self.lam * self.R**2))
        log_delta = math.log(4 * self.k**2 / self.delta)
        gaussian = 8 * math.sqrt(self.d * log_det * log_delta)
        bernstein = 4 * math.sqrt(self.d) * log_delta
        return gaussian + bernstein + math.sqrt(self.lam) * self.S_theta

    def sigma_bar(self, sigma):
        """Noise level that the weight uses."""
        return max(self.R / math.sqrt(self.d), sigma)

    def update(self, x, reward, sigma=None):
        self.absorb(x, reward, 1 / self.sigma_bar(sigma) ** 2)


class WeightedOFULPlus(Optimist):
    """Zhou, Gu 2022: sbar_k = max(sigma_k, alpha, gamma ||x_k||^{1/2}), the norm before the update."""

    def __init__(
        self,
        d,
        *,
        K,
        delta=0.01,
        lam=None,
        alpha=None,
        gamma=None,
        R=1.0,
        X=1.0,
        S_theta=1.0,
        radius_scale=1.0,
    ):
        super().__init__(d, lam=d / S_theta**2 if lam is None else lam, radius_scale=radius_scale)
        self.delta = delta
        self.alpha = 1 / math.sqrt(K) if alpha is None else alpha
        self.gamma = math.sqrt(R) / d**0.25 if gamma is None else gamma
        self.R = R
        self.X = X
        self.S_theta = S_theta
        self.levels = math.log(self.gamma**2 / self.alpha) + 1
        if self.levels <= 0:
            raise ValueError(f"ln(gamma^2 / alpha) + 1 must be > 0, got {self.levels!r}")

    @property
    def beta(self):
        # 12 sqrt(d ln(1 + k X^2 / (alpha^2 d lam)) iota) + 30 iota R / gamma^2 + sqrt(lam) S,
        # iota = ln(32 (ln(gamma^2 / alpha) + 1) k^2 / delta)
        iota = math.log(32 * self.levels * self.k**2 / self.delta)
        log_det = math.log(1 + self.k * self.X**2 / (self.alpha**2 * self.d * self.lam))
        gaussian = 12 * math.sqrt(self.d * log_det * iota)
        bernstein = 30 * iota * self.R / self.gamma**2
        return gaussian + bernstein + math.sqrt(self.lam) * self.S_theta

    def sigma_bar(self, x, sigma):
        """Noise level that the weight uses; self.gram is still the matrix before the update."""
        return max(sigma, self.alpha, self.gamma * math.sqrt(self.norm(x)))

    def update(self, x, reward, sigma=None):
        self.absorb(x, reward, 1 / self.sigma_bar(x, sigma) ** 2)


class WeightedUCB(Optimist):
    """Kirschner, Krause 2018: OFUL on data whitened by max(sigma, floor), known before."""

    def __init__(self, d, *, delta=0.01, lam=1.0, S_theta=1.0, floor=1e-3, radius_scale=1.0):
        super().__init__(d, lam=lam, radius_scale=radius_scale)
        self.delta = delta
        self.S_theta = S_theta
        self.floor = floor

    @property
    def beta(self):
        # the OFUL radius with R = 1: the whitened noise eps / max(sigma, floor) is 1-subgaussian
        log_ratio = 0.5 * self.log_det_ratio() - math.log(self.delta)
        return math.sqrt(2 * log_ratio) + math.sqrt(self.lam) * self.S_theta

    def update(self, x, reward, sigma=None):
        self.absorb(x, reward, 1 / max(sigma, self.floor) ** 2)


class IDS(WeightedUCB):
    """Information-directed sampling (Kirschner, Krause 2018), deterministic or by a mixture of two actions.

    gap(x) = max_x' UCB(x') - LCB(x); info(x) = ln(1 + ||x||^2 / sigma^2) / 2; minimise gap^2 / info.
    """

    def __init__(
        self, d, *, delta=0.01, lam=1.0, S_theta=1.0, floor=1e-3, randomised=False, radius_scale=1.0
    ):
        super().__init__(d, delta=delta, lam=lam, S_theta=S_theta, floor=floor, radius_scale=radius_scale)
        self.randomised = randomised

    def gap(self, actions):
        """Estimated gap of each row: optimistic value of the best minus pessimistic value of the row."""
        width = self.radius_scale * self.beta * self.norm(actions)
        lcb = np.asarray(actions) @ self.theta - width
        return np.max(self.ucb(actions)) - lcb

    def info(self, actions, sigma):
        """Information gain of each row in nats."""
        return 0.5 * np.log1p(self.norm(actions) ** 2 / max(sigma, self.floor) ** 2)

    def scores(self, actions, sigma):
        """gap^2 / info of each row; an uninformative row scores infinity."""
        gap = self.gap(actions)
        info = self.info(actions, sigma)
        return np.array([ids_ratio(g, i) for g, i in zip(gap, info, strict=True)])

    def mixture(self, actions, sigma):
        """(i, j, p, ratio): play i with probability p, else j; i = j and p = 1 when no mixture is better."""
        gap = self.gap(actions)
        info = self.info(actions, sigma)
        best = int(np.argmin(self.scores(actions, sigma)))
        i_best, j_best, p_best, ratio_best = best, best, 1.0, self.scores(actions, sigma)[best]
        for i in range(len(gap)):
            for j in range(i + 1, len(gap)):
                p, ratio = best_pair(gap[i], info[i], gap[j], info[j])
                if ratio < ratio_best:
                    i_best, j_best, p_best, ratio_best = i, j, p, ratio
        return i_best, j_best, p_best, ratio_best

    def act(self, actions, sigma=None, *, uniform=0.0):
        """`uniform` in [0, 1) decides the randomised choice: below p the first action of the pair."""
        if not self.randomised:
            return int(np.argmin(self.scores(actions, sigma)))
        i, j, p, _ = self.mixture(actions, sigma)
        return i if uniform < p else j


def ids_ratio(gap, info):
    """gap^2 / info, infinite where nothing is learned."""
    return gap**2 / info if info > 0 else math.inf


def best_pair(gap_1, info_1, gap_2, info_2):
    """Minimise f(p) = (p gap_1 + (1-p) gap_2)^2 / (p info_1 + (1-p) info_2) over p in [0, 1].

    f is convex (quadratic over linear). With b = gap_1 - gap_2 and e = info_1 - info_2, f'(p) = 0 where
    2 b (info_2 + e p) = e (gap_2 + b p); clipped to [0, 1] that is the minimum. Without b or e it is an end.
    """
    candidates = [1.0, 0.0]
    b = gap_1 - gap_2
    e = info_1 - info_2
    if b != 0 and e != 0:
        p = gap_2 / b - 2 * info_2 / e
        candidates.append(min(max(p, 0.0), 1.0))
    ratios = [ids_ratio(p * gap_1 + (1 - p) * gap_2, p * info_1 + (1 - p) * info_2) for p in candidates]
    best = int(np.argmin(ratios))
    return candidates[best], ratios[best]


class BayesUCB:
    """Bayes-UCB (Kaufmann, Cappe, Garivier 2012) with a Gaussian prior, a yardstick for the hypercubes.

    Prior theta ~ N(prior_mean, diag(prior_var)); on a hypercube of gap Delta the variance is Delta^2 for the
    hidden signs and 0 for a known bias coordinate. Noise variance of a round: sigma^2 where sigma is known,
    else noise^2. The posterior is updated in covariance form (Kalman), so zero variances are exact:
    gain = C x / (s^2 + x^T C x). Index: mean + z_k * standard deviation with z_k = Phi^{-1}(1 - 1 / (k + 1)):
    the paper's quantile of order 1 - 1/t (its c = 0), shifted by one round because order 0 at t = 1 is minus
    infinity; round 1 is then the median.
    """

    def __init__(self, d, *, gap, prior_mean=None, prior_var=None, noise=1.0, radius_scale=1.0):
        self.mean = np.zeros(d) if prior_mean is None else np.array(prior_mean, dtype=np.float64)
        variance = np.full(d, gap**2) if prior_var is None else np.array(prior_var, dtype=np.float64)
        self.covariance = np.diag(variance)
        self.noise = noise
        self.radius_scale = radius_scale
        self.k = 1

    @property
    def theta(self):
        """Posterior mean."""
        return self.mean

    @property
    def beta(self):
        """Quantile of the coming round."""
        return NormalDist().inv_cdf(1 - 1 / (self.k + 1))

    def act(self, actions, sigma=None):
        actions = np.asarray(actions, dtype=np.float64)
        variance = np.sum((actions @ self.covariance) * actions, axis=-1)
        deviation = np.sqrt(np.maximum(variance, 0.0))
        return int(np.argmax(actions @ self.mean + self.radius_scale * self.beta * deviation))

    def update(self, x, reward, sigma=None):
        x = np.asarray(x, dtype=np.float64)
        self.k = self.k + 1
        noise = self.noise if sigma is None else sigma
        cov_x = self.covariance @ x
        total = noise**2 + x @ cov_x
        if total == 0:  # a noiseless look at something already known teaches nothing
            return
        self.mean = self.mean + cov_x * (reward - x @ self.mean) / total
        self.covariance = self.covariance - np.outer(cov_x, cov_x) / total
