"""The experiments behind docs/results.md: a task with checkable answers, models, caches, methods, tables."""
