"""Verbs that make caches from caches."""
