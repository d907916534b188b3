"""Parts of the stage `extract`."""
