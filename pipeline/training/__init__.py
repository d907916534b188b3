"""The training loop and what it needs: batches, optimizer, schedules; receives tensors, knows no files."""
