"""`opd.json`: which run a checkpoint or a trained model is of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd_store import MismatchError
from opd_train.model_identity import PROVENANCE_FILE


def write_provenance(directory: Path, provenance: dict[str, Any]) -> None:
    """Write `opd.json`. `opd_train.model_identity.read_provenance` reads it."""
    text = json.dumps(provenance, indent=1, ensure_ascii=True, allow_nan=False, sort_keys=True)
    (directory / PROVENANCE_FILE).write_text(text + "\n", "utf-8")


def check_same_run(where: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse what another run wrote. Raises MismatchError, which names the first field that differs."""
    for name, here, there in differences(expected, found):
        raise MismatchError(
            f"{where}: belongs to another run: {name} is {there!r:.200} there, "
            f"{here!r:.200} here. Choose another output directory, or delete this one.",
            field=name,
            expected=repr(here),
            found=repr(there),
        )


def check_ranks_agree(own: dict[str, Any], gathered: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks that would train different things. Raises MismatchError, which names the field."""
    for rank, other in enumerate(gathered):
        for name, here, there in differences(own, other):
            raise MismatchError(
                f"rank {rank} has {name} {there!r:.200}, another rank {here!r:.200}; "
                "give every rank the same student, cache and options",
                field=name,
                expected=repr(here),
                found=repr(there),
            )


def differences(left: object, right: object, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two JSON values differ: dotted name, left value, right value; None where one lacks the name."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            dotted = f"{prefix}.{name}" if prefix else name
            yield from differences(left.get(name), right.get(name), dotted)
    elif left != right:
        yield prefix, left, right
