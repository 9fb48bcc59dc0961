"""Pytest plugin of the workshop."""
