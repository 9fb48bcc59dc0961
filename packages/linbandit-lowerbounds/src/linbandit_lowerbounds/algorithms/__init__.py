"""Learners as pure functions; every factory returns an `Algorithm`."""

from .oful import linucb, oful

__all__ = ["linucb", "oful"]
