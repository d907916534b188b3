"""Run directories and the scorer that is loaded from one."""
