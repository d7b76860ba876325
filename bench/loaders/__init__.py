"""The reading benchmark: a module for each family of formats, and what measures them. See bench/loader.py."""
