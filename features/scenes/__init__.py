"""Drawn scenes with prompts and labels: pictures and a CSV; knows nothing of CLIP or manifests."""
