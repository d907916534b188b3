"""Heads that turn embeddings into quality and consistency, their start and their losses; pure torch."""
