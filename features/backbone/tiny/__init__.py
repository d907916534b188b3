"""Bundled weights and configuration of `tiny`; the recipe is `features/backbone/train_tiny.py`."""
