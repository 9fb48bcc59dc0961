"""MARS optimisers (Yuan et al. 2025, arXiv 2411.10438); importing this package imports no framework."""

__version__ = "0.1.0"
