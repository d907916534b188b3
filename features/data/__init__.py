"""Manifests, labels and image files as users have them."""
