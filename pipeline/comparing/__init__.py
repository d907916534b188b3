"""Runs, variants and baselines against each other."""
