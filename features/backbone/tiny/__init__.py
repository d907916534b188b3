"""Bundled weights and configuration of `tiny`; the recipe is `tools/tiny/train.py`."""
