"""Check everything a cache promises: every byte, every page, every value, every hash."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from opd_store import layout
from opd_store.arrow_message import record_batches
from opd_store.batch import BatchView
from opd_store.cache import Cache
from opd_store.encodings import IdTable
from opd_store.errors import (
    FormatError,
    IntegrityError,
    InvalidArgumentError,
    InvalidRolloutError,
    OpdError,
)
from opd_store.hashing import rollout_hash
from opd_store.rollout import checked
from opd_store.schema import arrow_schema
from opd_store.shard import MappedShard, ShardInfo, ShardReader, file_digest, part_slices
from opd_store.storage import DEFAULT_CACHE_BYTES, Storage, resolve
from opd_store.versions import load_manifest, read_parent, was_removed
from opd_store.watch import FileWatch


@dataclass(slots=True)
class VerifyReport:
    """What `verify` read, and what it found wrong."""

    uri: str
    digest: str
    versions: int = 0
    shards: int = 0
    rollouts: int = 0
    response_tokens: int = 0
    n_bytes: int = 0
    problems: list[OpdError] = field(default_factory=list)
    """One error a damaged file or row; empty for an intact cache."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def verify(
    uri: str | os.PathLike[str],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    storage_options: Mapping[str, object] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> VerifyReport:
    """Read every byte of a version and of the history it names. Writes nothing.

    Args:
        uri: a cache, optionally pinned.
        storage_options, cache_dir, cache_bytes: as for `open`. Shards are fetched whole and not kept.
        on_progress: called with (rollouts done, rollouts in all) after each record batch, from any thread but
            never by two at once.
        workers: threads, each with a shard of its own. More than one help where shards come over a network:
            one is fetched while another is checked. Each holds a whole shard in memory then.

    Returns:
        A report; damaged shards and rows are listed there, and the rest is still checked.

    Raises:
        InvalidArgumentError: `workers` below 1.
        OpdError: the manifest, a shard table or the id table cannot be read, so there is nothing to check
            against.
    """
    if workers < 1:
        raise InvalidArgumentError(f"workers: expected at least 1, found {workers}")
    storage, pin = resolve(uri, storage_options=storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)
    cache = Cache(storage, *load_manifest(storage, pin))
    # Found damaged here once, and not in every page.
    id_table = cache.id_table
    report = VerifyReport(cache.uri, cache.digest, n_bytes=cache.n_bytes)
    report.problems += _check_history(storage, cache, report)
    for number in range(len(cache.manifest.segments)):
        try:
            if not cache.rollout_table(number).in_order():
                where = storage.describe(cache.manifest.segments[number].rollouts.path)
                raise FormatError(f"{where}: not sorted by hash")
        except OpdError as error:
            report.problems.append(error)
    progress = _Progress(len(cache), on_progress)
    first_rows = np.cumsum([0, *(info.rows for info in cache.shards)]).tolist()

    def check(number: int) -> _ShardReport:
        found = _ShardReport()
        shard = cache.shards[number]
        try:
            for problem in _check_shard(storage, cache, shard, first_rows[number], id_table, found, progress):
                found.problems.append(problem)
        except OpdError as error:
            found.problems.append(error)
        if found.rollouts < shard.rows:
            progress.add(shard.rows - found.rollouts)
        return found

    with ThreadPoolExecutor(workers) as pool:
        # In the order of the shards, however they end.
        for found in pool.map(check, range(cache.n_shards)):
            report.shards += 1
            report.rollouts += found.rollouts
            report.response_tokens += found.response_tokens
            report.problems += found.problems
    return report


@dataclass(slots=True)
class _ShardReport:
    rollouts: int = 0
    response_tokens: int = 0
    problems: list[OpdError] = field(default_factory=list)


class _Progress:
    """Counts rollouts that are done, those of damaged shards included."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._report = 0, total, report
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self._done += n
            if self._report is not None:
                self._report(self._done, self._total)


def _check_history(storage: Storage, cache: Cache, report: VerifyReport) -> Iterator[OpdError]:
    report.versions = 1
    there = set(storage.versions())
    child = cache.manifest
    for sequence in range(cache.version - 1, 0, -1):
        name = layout.manifest_path(sequence)
        where = storage.describe(name)
        try:
            if sequence not in there and was_removed(storage, sequence, child):
                return
            manifest = read_parent(storage, name, child)
            for field_name in ("meta", "schema"):
                if getattr(manifest, field_name) != getattr(child, field_name):
                    raise FormatError(f"{where}: the next version has another {field_name}", uri=where)
            if manifest.id_table not in (None, child.id_table):
                raise FormatError(f"{where}: the next version has another id table", uri=where)
            if manifest.minor > child.minor:
                raise FormatError(f"{where}: the next version is of an older format version", uri=where)
        except OpdError as error:
            yield error
            return
        child = manifest
        report.versions += 1


def _check_shard(
    storage: Storage,
    cache: Cache,
    info: ShardInfo,
    first_row: int,
    id_table: IdTable | None,
    report: _ShardReport,
    progress: _Progress,
) -> Iterator[OpdError]:
    uri = storage.describe(info.path)
    buffer = storage.map(info.path)
    schema = arrow_schema(cache.schema)
    current_size = FileWatch(uri, buffer.size).size if storage.is_local else None
    source = MappedShard(buffer, info, schema, uri=uri, current_size=current_size)
    reader = ShardReader(source, info, schema, uri=uri)
    for number in range(info.n_batches):
        rows = slice(first_row, first_row + info.parts(number)[0].rows)
        first_row = rows.stop
        try:
            view = BatchView(
                reader.batch(number),
                cache.schema,
                row_tokens=cache.row_tokens[rows],
                row_response_tokens=cache.row_response_tokens[rows],
                vocab_size=cache.meta.vocab_size,
                id_table=id_table,
                tolerance=cache.tolerance,
                where=f"{uri}, record batch {number}",
            )
        except OpdError as error:
            yield error
            continue
        for row in range(view.n_rows):
            try:
                _check_row(cache, view, row, rows.start + row)
                report.response_tokens += view.response_len(row)
            except OpdError as error:
                yield error
        report.rollouts += view.n_rows
        progress.add(view.n_rows)
    try:
        _check_footer(buffer, info, schema, uri)
    except OpdError as error:
        yield error
    if file_digest(buffer) != info.sha256:
        yield IntegrityError(f"{uri}: its SHA-256 is not its name. Fetch this shard again.", uri=uri)


def _check_footer(buffer: pa.Buffer, info: ShardInfo, schema: pa.Schema, uri: str) -> None:
    """Other Arrow tools find record batches by the footer, which this package does not use."""
    try:
        found = record_batches(buffer)
        same_schema = pa.ipc.open_file(buffer).schema.equals(schema, check_metadata=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{uri}: does not parse as an Arrow file: {error}", uri=uri) from error
    batches = [part_slices(info, number) for number in range(info.n_batches)]
    expected = [(parts[0][0], sum(length for _, length, _ in parts)) for parts in batches]
    if found != expected or not same_schema:
        raise FormatError(f"{uri}: the footer has other record batches or columns than the index", uri=uri)


def _check_row(cache: Cache, view: BatchView, row: int, cache_row: int) -> None:
    where = f"{view.where}, row {row}"
    view.check_pages(row)
    rollout = view.rollout(row)
    try:
        checked(
            rollout,
            vocab_size=cache.meta.vocab_size,
            sizes=cache.schema.sizes,
            tolerance=cache.tolerance,
        )
    except InvalidRolloutError as error:
        raise FormatError(f"{where}: {error}", row=row, column=error.field) from error
    view.check_inner_bands(row)
    stored = view.hashes[row].tobytes()
    if rollout_hash(rollout.token_ids, cache.meta.tokenizer_fingerprint) != stored:
        raise FormatError(
            f"{where}: rollout_hash is not the hash of its tokens", row=row, column="rollout_hash"
        )
    named = list(cache.find_all(stored))
    if cache_row not in named:
        raise FormatError(f"{where}: missing from the rollout table", row=row, column="rollout_hash")
    for other in (row for row in named if row < cache_row):
        if cache.rollout(other, columns=("sample_id",)).sample_id == rollout.sample_id:
            raise FormatError(
                f"{where}: the same rollout and sample_id as row {other} of the cache",
                row=row,
                column="sample_id",
            )
