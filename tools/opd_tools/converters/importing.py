"""A foreign source into a cache: opened, normalised, written, and what was lost on the way put on record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import opd_store
from opd_store import (
    RENORMALISED_TOPK,
    CacheMeta,
    Cut,
    FormatError,
    InvalidArgumentError,
    ModelInfo,
    Rollout,
    Version,
)
from opd_tools.converters.core.alignment import checked, shifted
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.normalise import to_rollout
from opd_tools.converters.core.record import Contents, Tally, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.core.support import Target
from opd_tools.destination import REQUEST, build, request


def import_cache(
    source: Source,
    uri: str,
    how: Format,
    *,
    settings: ReadSettings,
    meta: CacheMeta,
    encoding: str,
    id_table: str,
    shift: int,
    commit_every: int | None,
    access: dict[str, Any],
    on_progress: Callable[[int, int | None], None],
) -> tuple[Version, bool, Tally]:
    """Convert everything in `source`.

    Args:
        meta: what the user knows; the format's own knowledge is added.
        shift: rows to move towards later tokens before anything else.
        on_progress: called with rollouts done, and in all where that is known.

    Returns:
        The version, whether it was there before, and what was lost.

    Raises:
        FormatError: the source is at fault, with file and row; nothing is kept.
        InvalidArgumentError: it needs settings that are missing.
        CacheExistsError: something else is at `uri`.
    """
    assert how.read is not None
    tally = Tally()
    contents = how.read(source, settings)
    topk = contents.topk if settings.topk is None else min(settings.topk, contents.topk)
    topk = min(topk, settings.vocab_size)
    target = Target(
        vocab_size=settings.vocab_size,
        topk=topk,
        values=contents.values,
        overfull=contents.overfull,
        max_error=contents.max_error,
    )
    digest = source.digest()
    asked = (_asked(settings), encoding, id_table, shift, commit_every, meta.to_json())
    extra = {
        **meta.extra,
        REQUEST: request("convert", opd_store.__version__, how.name, digest, *asked),
        "converted_from": how.title,
        "source_digest": digest,
    }
    meta = dataclasses.replace(_with_teacher(meta, contents), extra=extra)

    def rollouts() -> Iterator[Rollout]:
        found: Contents = how.read(source, settings)  # type: ignore[misc]
        moved = (shifted(record, shift, tally) for record in found.records)
        empty = True
        for record in checked((record for record in moved if record is not None), name=how.name):
            empty = False
            yield to_rollout(record, target, tally)
        tally.update(found.tally)
        if empty:
            left_out = "; ".join(f"{count:,} {what}" for what, count in sorted(tally.items()))
            raise FormatError(
                f"{source.uri}: no rollout in it" + (f" that could be used: {left_out}" if left_out else "")
            )

    def final_meta() -> CacheMeta:
        lost = [*contents.lost, *(f"{count:,} {what}" for what, count in sorted(tally.items()))]
        return dataclasses.replace(meta, extra={**extra, "lost": "; ".join(lost)} if lost else extra)

    version, existed = build(
        uri,
        rollouts,
        meta=meta,
        final_meta=final_meta,
        access=access,
        commit_every=commit_every,
        on_progress=lambda done: on_progress(done, contents.total),
        topk=topk,
        encoding=encoding,
        id_table="auto" if id_table == "auto" else None,
        cut=Cut("given") if topk else None,
        max_error=contents.max_error or 0.0,
        user_columns=dict(contents.columns),
    )
    for what in contents.lost:
        tally.setdefault(what, 0)
    return version, existed, tally


def _with_teacher(meta: CacheMeta, contents: Contents) -> CacheMeta:
    teacher = meta.teacher or ModelInfo(name="unknown")
    if contents.values is Values.RENORMALISED:
        teacher = dataclasses.replace(teacher, logprob_mode=RENORMALISED_TOPK)
    if contents.temperature is not None:
        stated = teacher.logprob_temperature
        if stated not in (None, contents.temperature):
            raise InvalidArgumentError(
                f"--temperature: {stated}, but the file says {contents.temperature}; leave it out"
            )
        teacher = dataclasses.replace(teacher, logprob_temperature=contents.temperature)
    return dataclasses.replace(meta, teacher=teacher)


def _asked(settings: ReadSettings) -> tuple[object, ...]:
    """What of the settings the result depends on: contents, not paths. The tokenizer is part of the meta."""
    config = None if settings.config is None else hashlib.sha256(settings.config.read_bytes()).hexdigest()
    return settings.vocab_size, settings.topk, sorted(settings.columns.items()), config
