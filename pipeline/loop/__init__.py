"""The training loop and what it needs; receives tensors, knows no files but its own state."""
