"""Every foreign format: its name, what is kept of it and lost, and the functions that read and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opd_store import Cache, InvalidArgumentError
from opd_tools.converters.record import Contents
from opd_tools.converters.source import Source


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


def all_formats() -> tuple[Format, ...]:
    """Those that more than one could read are asked in this order."""
    from opd_tools.converters import (
        axolotl,
        distillkit,
        jsonl,
        lightning,
        llamacpp,
        maxtext,
        megatron,
        nemo,
        openai,
        safetensors_export,
        sglang,
        table,
        table_export,
        torch_pile,
        vllm,
    )

    return (
        lightning.FORMAT,
        distillkit.FORMAT,
        axolotl.FORMAT,
        nemo.FORMAT,
        vllm.FORMAT,
        sglang.FORMAT,
        llamacpp.FORMAT,
        openai.FORMAT,
        maxtext.FORMAT,
        megatron.FORMAT,
        torch_pile.FORMAT,
        table.FORMAT,
        table_export.DATASETS,
        jsonl.FORMAT,
        safetensors_export.FORMAT,
    )


def by_name(name: str) -> Format:
    """The format with this name. Raises InvalidArgumentError."""
    for candidate in all_formats():
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in all_formats())
    raise InvalidArgumentError(f"{name!r:.60} is no format; known are {known}")


def detect(source: Source) -> Format:
    """The format that a source is in. Raises InvalidArgumentError where none or several fit."""
    found = [candidate for candidate in all_formats() if candidate.detect and candidate.detect(source)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(candidate.name for candidate in found or all_formats() if candidate.read)
    how = "could be several" if found else "not recognised"
    raise InvalidArgumentError(f"{source.uri}: format {how}; say which with --from: {names}")
