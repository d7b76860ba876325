"""The loop, and what surrounds it: checks, checkpoints, ranks, drift."""
