"""Verbs that look inside a cache and write nothing to it: cat, head, stats, diff, and the page of report."""
