"""Sweeps, named settings, and the checks before anything starts."""
