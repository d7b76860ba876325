"""Verbs that sample, score and train, and the page of a training run."""
