"""Trainings of the stages: heads, stacks of heads, heads with towers; what they are given and what they leave."""
