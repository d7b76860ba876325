"""Caches in other people's trainers: one module a framework, which imports it; this package does not.

`neutral` holds what all of them share: rows of a cache as padded tensors under names of no framework.
"""
