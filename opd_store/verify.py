"""Check everything a cache promises: every byte, every page, every value, every hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from opd_store import layout
from opd_store.arrow_message import record_batches
from opd_store.batch import BatchView
from opd_store.cache import Cache, load_manifest
from opd_store.encodings import IdTable
from opd_store.errors import (
    CacheNotFoundError,
    FormatError,
    IntegrityError,
    InvalidRolloutError,
    OpdError,
)
from opd_store.hashing import rollout_hash
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.rollout import checked
from opd_store.schema import arrow_schema
from opd_store.shard import MappedShard, ShardInfo, ShardReader, file_digest, part_slices
from opd_store.storage import DEFAULT_CACHE_BYTES, Storage, resolve
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
    storage_options: Mapping[str, object] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> VerifyReport:
    """Read every byte of a version and of the history it names. Writes nothing.

    Args:
        uri: a cache, optionally pinned.
        storage_options, cache_dir, cache_bytes: as for `open`. Shards are fetched whole and not kept.
        on_progress: called with (rollouts checked, rollouts in all) after each record batch.

    Returns:
        A report; damaged shards and rows are listed there, and the rest is still checked.

    Raises:
        OpdError: the manifest, a shard table or the id table cannot be read, so there is nothing to check
            against.
    """
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
    first_row = 0
    for info in cache.shards:
        try:
            for problem in _check_shard(storage, cache, info, first_row, id_table, report):
                report.problems.append(problem)
                if on_progress is not None:
                    on_progress(report.rollouts, len(cache))
        except OpdError as error:
            report.problems.append(error)
        report.shards += 1
        first_row += info.rows
        if on_progress is not None:
            on_progress(report.rollouts, len(cache))
    return report


def _check_history(storage: Storage, cache: Cache, report: VerifyReport) -> Iterator[OpdError]:
    report.versions = 1
    child = cache.manifest
    for sequence in range(cache.version - 1, 0, -1):
        name = layout.manifest_path(sequence)
        where = storage.describe(name)
        try:
            manifest = _read_parent(storage, name, child)
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


def _read_parent(storage: Storage, name: str, child: Manifest) -> Manifest:
    where = storage.describe(name)
    try:
        data = storage.read(name, layout.MAX_MANIFEST_BYTES)
    except CacheNotFoundError as error:
        raise IntegrityError(f"{where}: missing, although a later version names it", uri=where) from error
    if manifest_digest(data) != child.parent:
        raise IntegrityError(
            f"{where}: {manifest_digest(data)}, but the next version names {child.parent}", uri=where
        )
    return decode_manifest(data, where=where)


def _check_shard(
    storage: Storage,
    cache: Cache,
    info: ShardInfo,
    first_row: int,
    id_table: IdTable | None,
    report: VerifyReport,
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
            tolerance=cache.schema.tolerance,
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
