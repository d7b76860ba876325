"""A cache that the tests of rewriting verbs start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.rewrite.making import make, rich_rollouts


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rollouts, K = 12 in two bands of ladder/128. Never written to by a test."""
    path = tmp_path_factory.mktemp("rewrite") / "source"
    make(path, rich_rollouts(12))
    return path
