"""Variance-dependent regret lower bounds for linear contextual bandits, as programs.

Implements He and Gu, "Variance-Dependent Regret Lower Bounds for Contextual Bandits" (arXiv 2503.12020): the
bounds as functions, the hard instances as environments, the learners they are about, a simulator that plays
many runs at once, and a certificate for anybody's learner. `linbandit_lowerbounds.gym` and
`linbandit_lowerbounds.plots` are imported on demand.
"""

from .adversaries import CooperativeStrong, Prefixed, RandomSigma, StopWhenLucky, Switching
from .algorithms import (
    History,
    bayes_ucb,
    coordinate_oracle,
    epsilon_greedy,
    greedy,
    ids,
    lin_ts,
    linucb,
    oful,
    oful_guard,
    oracle,
    random,
    save,
    span_explorer,
    sup_lin_ucb,
    voful2,
    voful_contains,
    weighted_oful,
    weighted_oful_plus,
    weighted_ucb,
    worst,
)
from .bounds import prefixed_bound
from .certify import Certificate, GapSweep, certify, gap_sweep
from .composites import JiaBudgetInstance, PeelingInstance
from .contexts import FixedSet, RandomContexts, fixed_set_counterexample
from .decision_sets import DecisionSet, SignSet
from .environment import Adversary, Algorithm, Instance, Observation, Reward, Spec, Transition, register
from .hypercube_bound import hypercube_bound
from .hypercubes import BernoulliHypercube, GaussianHypercube, VarianceScaledHypercube
from .interop import from_mabwiser, from_object, play_object
from .lower_bound import LowerBound
from .multi_instances import CyclicMultiInstance, LeastLoadedInstance
from .peeling import Peeling, groups
from .published_bounds import Rate, jia_bound, jia_rate, lattimore_szepesvari_bound, oful_upper_bound, rate
from .results import Checkpoints, Result, State
from .simulate import simulate
from .weak import required_dimension, weak_adversary_bound

__version__ = "0.1.0"

__all__ = [
    "Adversary",
    "Algorithm",
    "BernoulliHypercube",
    "Certificate",
    "Checkpoints",
    "CooperativeStrong",
    "CyclicMultiInstance",
    "DecisionSet",
    "FixedSet",
    "GapSweep",
    "GaussianHypercube",
    "History",
    "Instance",
    "JiaBudgetInstance",
    "LeastLoadedInstance",
    "LowerBound",
    "Observation",
    "Peeling",
    "PeelingInstance",
    "Prefixed",
    "RandomContexts",
    "RandomSigma",
    "Rate",
    "Result",
    "Reward",
    "SignSet",
    "Spec",
    "State",
    "StopWhenLucky",
    "Switching",
    "Transition",
    "VarianceScaledHypercube",
    "bayes_ucb",
    "certify",
    "coordinate_oracle",
    "epsilon_greedy",
    "fixed_set_counterexample",
    "from_mabwiser",
    "from_object",
    "gap_sweep",
    "greedy",
    "groups",
    "hypercube_bound",
    "ids",
    "jia_bound",
    "jia_rate",
    "lattimore_szepesvari_bound",
    "lin_ts",
    "linucb",
    "oful",
    "oful_guard",
    "oful_upper_bound",
    "oracle",
    "play_object",
    "prefixed_bound",
    "random",
    "rate",
    "register",
    "required_dimension",
    "save",
    "simulate",
    "span_explorer",
    "sup_lin_ucb",
    "voful2",
    "voful_contains",
    "weak_adversary_bound",
    "weighted_oful",
    "weighted_oful_plus",
    "weighted_ucb",
    "worst",
]
