"""Verbs that look inside and write nothing there: inspect, cat, head, stats, diff, report, verify."""
