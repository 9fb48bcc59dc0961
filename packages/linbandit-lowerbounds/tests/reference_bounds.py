"""Lower bounds in float64, one step per line, with the equation numbers of He and Gu 2025 (arXiv 2503.12020).

Written for reading and from the formulas alone: rounds are looped over, groups are found with exact
fractions, visits and loads are counted by playing the construction. Sections are those of docs/proofs.md.
"""

import functools
import math
from fractions import Fraction

import numpy as np


# ---------------------------------------------------------------- divergences
def tail(x):
    """P(N(0, 1) > x)."""
    return math.erfc(x / math.sqrt(2)) / 2


def kl_bernoulli(p, q):
    """KL(Bernoulli(p) || Bernoulli(q)) for p, q strictly between 0 and 1."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# ---------------------------------------------------------------- Lemma 4.3, sections 1 and 2
def lemma_43(K, d, sigma=1.0, p0=1 / 3):
    """d sqrt(K p0) sigma / (8 sqrt 2), which is d sigma sqrt(K) / (8 sqrt 6) for p0 = 1/3."""
    if d**2 / (2 * p0) * (1 - 1e-15) > K:
        return 0.0
    return d * math.sqrt(K * p0) * sigma / (8 * math.sqrt(2))


def pinsker_half(K, d, sigma=1.0):
    """(1 - 1/sqrt(18)) / (4 sqrt 6) d sigma sqrt(K), p0 = 1/3."""
    return (1 - 1 / math.sqrt(18)) / (4 * math.sqrt(6)) * d * sigma * math.sqrt(K)


def tight(K, d, sigma=1.0, p0=1 / 3):
    """d gap sigma K (1 - TV), the divergence maximised over every action and base sum."""
    gap = math.sqrt(p0 / K) / (4 * math.sqrt(2))
    if d**2 / (2 * p0) * (1 - 1e-15) > K:
        gap = p0 / (4 * d)  # section 2
    kl = 0.0
    for others in range(-(d - 1), d, 2):  # sum of a_j mu_j / gap over the other signs
        low = p0 + others * gap - gap
        high = p0 + others * gap + gap
        kl = max(kl, kl_bernoulli(high, low), kl_bernoulli(low, high))
    kl = K * kl
    tv = min(math.sqrt(kl / 2), math.sqrt(1 - math.exp(-kl)))
    return d * gap * sigma * K * (1 - tv)


# ---------------------------------------------------------------- Section 4 of the paper: peeling
def number_of_groups(K):
    """L = ceil(log2 K) + 1 in integers."""
    L = 1
    while 2 ** (L - 1) < K:
        L += 1
    return L


@functools.cache
def group_of(sigma, K):
    """The group i with 2^(i-1)/K < sigma <= 2^i/K, exactly."""
    i = 0
    while Fraction(float(sigma)) * K > 2**i:
        i += 1
    return i


def equal_dims(d, members, L):
    """d over the members one by one, from the highest variance down, until it is used up."""
    dims = [0] * L
    order = sorted(members, reverse=True)
    for step in range(d):
        dims[order[step % len(order)]] += 1
    return dims


def lemma_sum(sigma, dims):
    """First line of (4.1), summed over i >= 1."""
    K = len(sigma)
    index = [group_of(s, K) for s in sigma]
    total = 0.0
    for i in range(1, number_of_groups(K)):
        K_i = index.count(i)
        if K_i >= 1.5 * dims[i] ** 2:
            total += dims[i] * math.sqrt(K_i) * (2 ** (i - 1) / K) / (8 * math.sqrt(6))
    return total


def eq42(sigma, d, subtrahend=4):
    """(4.2): d sqrt(sum of S_i) / (16 sqrt 6 L) - d^2 / (4 L^2)."""
    K = len(sigma)
    L = number_of_groups(K)
    noisy = math.fsum(s**2 for s in sigma if group_of(s, K) > 0)
    return d * math.sqrt(noisy) / (16 * math.sqrt(6) * L) - d**2 / (subtrahend * L**2)


def theorem_41(sigma, d):
    """d sqrt(S - 1) / (32 sqrt 6 L)."""
    S = math.fsum(s**2 for s in sigma)
    return d * math.sqrt(S - 1) / (32 * math.sqrt(6) * number_of_groups(len(sigma)))


# ---------------------------------------------------------------- sections 4 and 5: variance-scaled hypercube
def lb_end(variance, d, gap):
    """2 d D S tail(D sqrt S)."""
    S = math.fsum(variance)
    return 2 * d * gap * S * tail(gap * math.sqrt(S))


def lb_seq(variance, d, gap):
    """2 d D sum_k sigma_k^2 tail(D sqrt(V_{k-1}))."""
    V = 0.0
    total = 0.0
    for v in variance:
        total += v * tail(gap * math.sqrt(V))
        V += v
    return 2 * d * gap * total


def two_point(variance, d, gap):
    """D d S (1 - sqrt(4/3) D sqrt S)."""
    S = math.fsum(variance)
    return gap * d * S * (1 - math.sqrt(4 / 3) * gap * math.sqrt(S))


# ---------------------------------------------------------------- Theorem 5.2: weak adversary
def cyclic_visits(sigma, copies):
    """visits[i][j-1][b]: how often copy b of M_ij was visited, playing the cyclic order round by round."""
    K = len(sigma)
    L = number_of_groups(K)
    visits = np.zeros((L, L, copies), int)
    in_group = [0] * L
    in_sub = np.zeros((L, L), int)
    for s in sigma:
        i = group_of(s, K)
        j = 1 + in_group[i] % L
        b = in_sub[i, j - 1] % copies
        visits[i, j - 1, b] += 1
        in_sub[i, j - 1] += 1
        in_group[i] += 1
    return visits


def cyclic_bound(sigma, d, copies):
    """Half of Lemma 4.3 in the largest sub-instance that every copy completed, summed over groups i >= 1."""
    K = len(sigma)
    L = number_of_groups(K)
    block_dim = d // (L**2 * copies)
    visits = cyclic_visits(sigma, copies)
    K_i = visits.sum(axis=(1, 2))
    total = 0.0
    for i in range(1, L):
        for j in range(1, L + 1):
            horizon = 2 ** (j - 1) // copies
            if 2 ** (j - 1) * L <= K_i[i] < 2**j * L and horizon >= max(1, 1.5 * block_dim**2):
                assert visits[i, j - 1].min() >= horizon  # the copies did play their horizon
                total += block_dim * 2 ** (i - 1) / K * math.sqrt(horizon) / (16 * math.sqrt(6))
    return total


def least_loaded_loads(variance, blocks):
    """Variance per block when a round goes to the block with the least so far, ties to the lowest."""
    loads = np.zeros(blocks)
    for v in variance:
        loads[np.argmin(loads)] += v
    return loads


def least_loaded_bound(S, d, J, B, V1, x, rho):
    """(1/2) B d'' 2 x rho sqrt(V_j) for the largest V_j that every block is sure to have reached."""
    M = J * B
    block_dim = d // M
    best = 0.0
    for j in range(1, J + 1):
        V = V1 * 2 ** (j - 1)
        if S >= M * V + M - 1:
            best = 0.5 * B * block_dim * 2 * x * rho * math.sqrt(V)
    return best
