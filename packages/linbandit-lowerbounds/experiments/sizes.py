"""How large each claim is at each scale: rounds, dimensions, runs, learners.

quick fits two cores and a minute in all; laptop is the specification's default. full needs a GPU, where a
round costs the launch of its kernels whatever the number of runs. So the specification's 10^6 rounds stay
where the claim is about them (C2, and C7's many instances); C3, C4, C8 and C9 have 5 10^3 to 2 10^4 rounds
instead of 10^5 to 10^6, and many runs. Learners that list 2^d actions play at most 12 signs, so that C3 ends
at d = 12.
"""

from __future__ import annotations

from dataclasses import dataclass

import zoo

from linbandit_lowerbounds.weak import Construction


@dataclass(frozen=True)
class Cube:
    """The Bernoulli hypercube of C1 and C6: rounds, signs, runs, learners, and those that get fewer runs."""

    K: int
    d: int
    runs: int
    learners: tuple[str, ...]
    slow: tuple[str, ...] = ()
    slow_runs: int = 0


CUBE = {
    "quick": Cube(2000, 4, 200, ("greedy", *zoo.YARDSTICKS)),
    "laptop": Cube(2000, 4, 2000, tuple(n for n in zoo.ZOO if n != zoo.SAVE), (zoo.SAVE,), 300),
    "full": Cube(100_000, 16, 65_536, ("greedy", "LinTS", *zoo.YARDSTICKS)),
}


@dataclass(frozen=True)
class Copies:
    """The game of B copies: copies, rounds and signs of each, runs, learners; those judged on C1's runs."""

    B: tuple[int, ...]
    K: int
    d: int
    runs: int
    learners: tuple[str, ...]
    single: tuple[str, ...]


COPIES = {
    "quick": Copies((8,), 100, 4, 300, ("posterior signs",), ("greedy",)),
    "laptop": Copies((8, 39), 400, 4, 300, ("posterior signs", "Bayes-UCB"), zoo.ZOO),
    "full": Copies((88,), 200, 4, 1024, ("posterior signs", "Bayes-UCB"), CUBE["full"].learners),
}


@dataclass(frozen=True)
class Rates:
    """The sweeps of C3: rounds, dimensions, total variances, runs, learners with their largest dimension."""

    K: int
    dims: tuple[int, ...]
    S: tuple[float, ...]
    runs: int
    learners: dict[str, int]


RATES = {
    "quick": Rates(1000, (2, 4), (33, 1000), 200, {"greedy": 4, "Bayes-UCB": 4}),
    "laptop": Rates(
        1000,
        (2, 4, 8, 12),
        (33, 100, 300, 1000),
        400,
        {"greedy": 12, "LinTS": 12, "OFUL": 8, "Bayes-UCB": 12, zoo.SAVE: 4, zoo.SAVE_THEORY: 4},
    ),
    "full": Rates(10_000, (4, 8, 12), (300, 10_000), 1024, {"LinTS": 12, "Bayes-UCB": 12}),
}


@dataclass(frozen=True)
class Tight:
    """The hypercubes of C4: rounds, dimensions, runs of a batch, learners with their largest dimension.

    At quick scale batches share the compiled programs of C3.
    """

    K: int
    dims: tuple[int, ...]
    runs: int
    learners: dict[str, int]
    batches: int = 1


TIGHT = {
    "quick": Tight(1000, (4,), 200, {"greedy": 4, "Bayes-UCB": 4}, batches=5),
    "laptop": Tight(4000, (4, 8), 1000, {"greedy": 8, "LinTS": 8, "OFUL": 8, "Bayes-UCB": 8}),
    "full": Tight(10_000, (12, 32), 1024, {"posterior signs": 32, "LinTS": 32, "Bayes-UCB": 12}),
}


SIGN_RULE_RUNS = {"quick": 5000, "laptop": 100_000, "full": 10_000_000}


@dataclass(frozen=True)
class Weak:
    """C7: rounds, signs and runs of the single instance, and the games against many.

    Games are (construction, rounds, eta, runs, share of the rounds after which `Switching` stops). If
    patient, everything also meets the adversary that waits until all signs are known.
    """

    K: int
    d: int
    runs: int
    games: tuple[tuple[Construction, int, float, int, float], ...]
    patient: bool


WEAK = {
    "quick": Weak(1000, 4, 100, (("least_loaded", 20_000, 0.1, 50, 0.25),), False),
    "laptop": Weak(
        4000,
        4,
        300,
        (("least_loaded", 100_000, 0.05, 300, 0.25), ("paper", 4096, 0.05, 300, 0.5)),
        True,
    ),
    "full": Weak(
        20_000,
        4,
        4096,
        (("least_loaded", 1_000_000, 0.05, 4096, 0.25), ("paper", 16_384, 0.05, 1024, 0.5)),
        False,
    ),
}


@dataclass(frozen=True)
class Strong:
    """C8: dimension, rounds, actions, runs."""

    d: int
    K: int
    actions: int
    runs: int
    contextual: tuple[str, ...]


STRONG = {
    "quick": Strong(6, 400, 10, 50, ("posterior signs",)),
    "laptop": Strong(6, 400, 10, 400, ("span explorer", "Bayes-UCB")),
    "full": Strong(64, 20_000, 80, 1024, ("span explorer", "posterior signs")),
}


@dataclass(frozen=True)
class Adaptive:
    """C9: dimension, actions, rounds, levels of noise, runs, learners that are judged and others."""

    d: int
    actions: int
    K: int
    levels: tuple[float, ...]
    runs: int
    judged: tuple[str, ...]
    reported: tuple[str, ...]
    digits: tuple[str, ...]
    digits_runs: int


ADAPTIVE = {
    "quick": Adaptive(6, 10, 1000, (1.0, 0.03), 8, (zoo.SAVE, "weighted UCB"), (), (), 8),
    "laptop": Adaptive(
        6,
        10,
        2000,
        (1.0, 0.3, 0.1, 0.03),
        64,
        (zoo.SAVE, "weighted UCB"),
        (zoo.SAVE_THEORY, "OFUL"),
        ("weighted UCB", zoo.SAVE),
        16,
    ),
    "full": Adaptive(
        32,
        32,
        5_000,
        (1.0, 0.03),
        512,
        (zoo.SAVE, "weighted UCB"),
        (zoo.SAVE_THEORY,),
        ("weighted UCB",),
        512,
    ),
}
