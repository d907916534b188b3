"""Cached tensors to scores. A file here is a stage and a command."""
