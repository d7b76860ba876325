"""The fuzz targets are shared with `fuzz/run.py`, which is beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
