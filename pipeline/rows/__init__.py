"""Rows of a cache, their split, and what a training learns from."""
