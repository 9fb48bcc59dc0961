"""Variance-dependent regret lower bounds for linear contextual bandits, as programs.

Implements He and Gu, "Variance-Dependent Regret Lower Bounds for Contextual Bandits" (arXiv 2503.12020).
"""

__version__ = "0.1.0"
