"""What a foreign format is: its name, what is kept and lost, and the functions that read and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opd_store import Cache
from opd_tools.converters.core.record import Contents
from opd_tools.converters.core.source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """What a file cannot tell, as far as the user does."""

    vocab_size: int
    tokenizer: Path | None = None
    """tokenizer.json, for formats that hold text."""
    topk: int | None = None
    """Ranks to keep; None keeps all that there are."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """For tables: field of `Record` to name of the column, where names differ."""
    config: Path | None = None
    """For DistillKit: the compression config, if it does not lie beside the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteSettings:
    """How a foreign file is written."""

    tokenizer: Path | None = None
    topk: int | None = None

    def ranks(self, cache: Cache) -> int | None:
        """As `Cache.scan` takes it."""
        return None if self.topk is None or self.topk >= cache.topk else self.topk


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One foreign format."""

    name: str
    """As `--from` and `--to` take it."""
    title: str
    alignment: str
    """Which token a row of the file is about."""
    keeps: str
    loses: str
    tested: str
    """Against what: files that the project's own code made, or files built from its documented layout."""
    detect: Callable[[Source], bool] | None = None
    """Whether a source looks like it; reads heads of files only."""
    read: Callable[[Source, ReadSettings], Contents] | None = None
    write: Callable[[Cache, Path, WriteSettings, Callable[[int, int], None]], None] | None = None
    """Writes a new file or directory; called with rollouts done and in all."""
