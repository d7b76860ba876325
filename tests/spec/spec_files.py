"""Where the specification is, and its reader as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SPEC = Path(__file__).parents[2] / "spec"
VALID = SPEC / "vectors/valid/1.0"
INVALID = SPEC / "vectors/invalid/1.0"

_found = importlib.util.spec_from_file_location("reference_reader", SPEC / "reference_reader.py")
assert _found is not None
assert _found.loader is not None
reference = importlib.util.module_from_spec(_found)
_found.loader.exec_module(reference)
