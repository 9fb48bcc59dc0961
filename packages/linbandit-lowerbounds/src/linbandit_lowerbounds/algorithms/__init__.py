"""Learners as pure functions; every factory returns an `Algorithm`."""

from .baselines import bayes_ucb, coordinate_oracle, epsilon_greedy, greedy, oracle, random, worst
from .explorers import oful_guard, span_explorer
from .ids import ids
from .oful import linucb, oful
from .save import save
from .suplinucb import sup_lin_ucb
from .thompson import lin_ts
from .voful import History, voful2, voful_contains
from .weighted import weighted_oful, weighted_oful_plus, weighted_ucb

__all__ = [
    "History",
    "bayes_ucb",
    "coordinate_oracle",
    "epsilon_greedy",
    "greedy",
    "ids",
    "lin_ts",
    "linucb",
    "oful",
    "oful_guard",
    "oracle",
    "random",
    "save",
    "span_explorer",
    "sup_lin_ucb",
    "voful2",
    "voful_contains",
    "weighted_oful",
    "weighted_oful_plus",
    "weighted_ucb",
    "worst",
]
