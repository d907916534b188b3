"""The only place that knows open_clip."""
