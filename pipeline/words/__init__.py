"""What is printed: plans before a training, results after it."""
