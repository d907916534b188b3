"""Run directories: what is written, measured, recorded and read again."""
