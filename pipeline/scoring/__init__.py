"""Judges predictions on plain arrays: agreement, splits, floors, intervals, advice."""
