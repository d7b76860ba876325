"""Writing a cache: append rollouts, commit versions. `create.py` starts it."""

from __future__ import annotations

import errno
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.cache import Cache
from opd_store.columns import BatchBuilder, Stored
from opd_store.copying import read_rollout, read_stored
from opd_store.encodings import IdTable, build_id_table, value_tolerance
from opd_store.errors import (
    CommitConflictError,
    InvalidArgumentError,
    MismatchError,
    OpdError,
    StorageError,
    UnsupportedVersionError,
)
from opd_store.hashing import rollout_hash
from opd_store.index import (
    FileRef,
    RolloutTable,
    SegmentRef,
    encode_rollout_table,
    encode_shard_table,
    merge_rollout_tables,
)
from opd_store.manifest import Manifest, encode_manifest, manifest_digest
from opd_store.meta import CacheMeta, diff_meta
from opd_store.rollout import Rollout, checked
from opd_store.schema import CacheSchema, arrow_schema
from opd_store.shard import ShardInfo, file_digest
from opd_store.shard_writer import ShardWriter
from opd_store.storage import LocalStorage, TempFile
from opd_store.versions import load_manifest

DEFAULT_BATCH_BYTES = 8 << 20
"""A record batch is one range request from a bucket, and what the writer holds in memory."""
DEFAULT_SHARD_BYTES = 256 << 20
TABLE_POSITIONS = 1 << 16
"""Positions that an automatic id table is learnt from. More give a better table, later."""
_COMMIT_TRIES = 16


@dataclass(frozen=True, slots=True)
class Version:
    """What `commit` acknowledged."""

    sequence: int
    digest: str
    uri: str
    """The cache pinned to this version; pass it to `open`."""


def table_ref(table: IdTable) -> FileRef:
    """How a manifest names an id table."""
    return FileRef(table.digest, len(table.to_bytes()), layout.TABLE_DIR)


def require_known(cache: Cache) -> None:
    """Raise UnsupportedVersionError where a version by this release would lose something."""
    if cache.manifest.newer or cache.manifest.optional_features:
        raise UnsupportedVersionError(
            f"{cache.uri}: version {cache.version} was written by a newer release, and a version by this one "
            "would lose what that added; upgrade opd-store to append"
        )


def require_equal_meta(cache: Cache, meta: CacheMeta) -> None:
    """Raise MismatchError unless the cache was created with this meta."""
    for name, found, expected in diff_meta(cache.meta, meta):
        raise MismatchError(
            f"{cache.uri}: {name} is {found} in the cache, but {expected} is to be written. "
            "Use the same models and settings, or another path.",
            field=name,
            expected=expected,
            found=found,
        )


class Writer:
    """Appends rollouts and commits versions. As a context manager it commits at the end unless an error is
    raised.

    Memory is bounded by one record batch, plus about 100 bytes for each rollout since the last commit. After
    an error the writer refuses further use; what was committed is intact, and a new writer goes on from
    there.
    """

    def __init__(
        self,
        storage: LocalStorage,
        meta: CacheMeta,
        schema: CacheSchema,
        base: Cache | None,
        id_table: IdTable | None,
        *,
        batch_bytes: int,
        shard_bytes: int,
    ) -> None:
        if not 1 <= batch_bytes <= layout.MAX_BATCH_BYTES // 2 or shard_bytes < 1:
            raise InvalidArgumentError(
                f"batch_bytes: expected 1..{layout.MAX_BATCH_BYTES // 2} and shard_bytes >= 1, "
                f"found {batch_bytes} and {shard_bytes}"
            )
        self._storage, self.meta, self.schema, self._base = storage, meta, schema, base
        self._batch_bytes, self._shard_bytes = batch_bytes, shard_bytes
        self._arrow = arrow_schema(schema)
        self._builder = BatchBuilder(schema)
        self._temp: TempFile | None = None
        self._shard: ShardWriter | None = None
        self._sealed: list[tuple[ShardInfo, list[bytes]]] = []
        self._pending: set[tuple[bytes, str | None]] = set()
        self._failed = False
        self._builder.id_table = id_table
        self._sample: _IdSample | None = None
        if schema.id_table == "auto" and id_table is None:
            self._sample = _IdSample()
            if base is not None:
                self._sample.take_from(base)
        storage.remove_leftovers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    def append(self, rollout: Rollout, *, max_error: float = 0.0) -> bool:
        """Add one rollout to the next version.

        A rollout is known by its hash and its sample_id: appending it again changes nothing, also after a
        crash and in a later version. The same tokens under another sample_id are another draw, and kept.

        Args:
            max_error: nats by which its top-k and tails were rounded before they came here, such as in a
                cache that was exported; their probabilities may exceed 1 by as much. Counts for this cache's
                `max_error` too.

        Returns:
            False if the cache or the pending version has it already.

        Raises:
            InvalidRolloutError: impossible values; the rollout is refused, the writer goes on.
            InvalidArgumentError: a `max_error` below 0, or without end.
            StorageError: the disk refused.
        """
        self._check_usable()
        if not 0 <= max_error < math.inf:
            raise InvalidArgumentError(f"max_error: expected nats of at least 0, found {max_error}")
        rollout = checked(
            rollout,
            vocab_size=self.meta.vocab_size,
            sizes=self.schema.sizes,
            tolerance=value_tolerance("plain", max_error) if max_error else layout.PROBABILITY_TOLERANCE,
        )
        return self._append(rollout, Stored({}, {}, is_cut=False, error=max_error) if max_error else None)

    def copy(
        self,
        source: Cache,
        row: int,
        *,
        teacher: int | None = None,
        columns: Collection[str] | None = None,
    ) -> bool:
        """Add a rollout of another cache, with the values that it has there.

        Pages that this cache would hold in the same form are copied as they are. Others are encoded anew, of
        the top-k as many ranks as this cache has; the tail outside them, and outside each rank band, is what
        reading so many ranks of `source` gives. What this cache has no column for is left out, but for user
        columns. The `max_error` of the source counts for this cache too.

        Args:
            source: another version or cache, of the same tokenizer.
            row: of `source`.
            teacher: route of the rollout here; None keeps it.
            columns: native and user columns to take beside tokens and ids; None takes all.

        Returns:
            False if the cache or the pending version has it already.

        Raises:
            IndexError: no such row.
            MismatchError: another tokenizer.
            InvalidRolloutError: it does not fit this cache: fewer ranks, an undeclared user column, a value
                that the encoding cannot hold.
            IntegrityError, FormatError: the source is damaged.
            StorageError: the disk refused.
        """
        self._check_usable()
        ours, theirs = self.meta.tokenizer_fingerprint, source.meta.tokenizer_fingerprint
        if ours != theirs:
            raise MismatchError(
                f"tokenizer_fingerprint: {source.uri} has {theirs}, expected {ours}; only rollouts of one "
                "tokenizer can be copied",
                field="tokenizer_fingerprint",
                expected=ours,
                found=theirs,
            )
        if self._holds((source.row_hash(row), source.rollout(row, columns=("sample_id",)).sample_id)):
            return False
        rollout = read_rollout(source, row, self.schema, columns)
        if teacher is not None:
            rollout = replace(rollout, teacher=teacher)
        rollout = checked(
            rollout, vocab_size=self.meta.vocab_size, sizes=self.schema.sizes, tolerance=source.tolerance
        )
        self._require_table()
        return self._append(rollout, read_stored(source, row, self.schema, self._builder.id_table))

    def _append(self, rollout: Rollout, stored: Stored | None) -> bool:
        name = rollout_hash(rollout.token_ids, self.meta.tokenizer_fingerprint)
        key = (name, rollout.sample_id)
        if self._holds(key):
            return False
        self._require_table()
        stored_ids = self._builder.add(rollout, name, stored)
        if self._sample is not None and stored_ids is not None:
            self._sample.add(stored_ids)
        self._pending.add(key)
        if self._builder.n_bytes >= self._batch_bytes:
            self._write_batch()
        return True

    def __contains__(self, rollout: Rollout) -> bool:
        """Whether `append` would change nothing, because the cache or the pending version has the rollout."""
        name = rollout_hash(rollout.token_ids, self.meta.tokenizer_fingerprint)
        return self._holds((name, rollout.sample_id))

    @property
    def at_shard_end(self) -> bool:
        """Whether all that waits to be committed is in finished shards, so that a commit cuts none short."""
        return bool(self._sealed) and self._shard is None and not len(self._builder)

    @property
    def base(self) -> Cache | None:
        """The version this writer last committed or started from; None before the first."""
        return self._base

    def append_batch(self, rollouts: Iterable[Rollout]) -> int:
        """Append several rollouts; returns how many were new."""
        return sum([self.append(rollout) for rollout in rollouts])

    def commit(self) -> Version:
        """Make everything appended so far one new version, durably and whole.

        Without new rollouts the newest version is returned, and a new cache gets an empty first one.

        Raises:
            CommitConflictError: another writer committed some of the same rollouts first; append again.
            StorageError: the disk refused; the version does not exist, older ones do.
        """
        self._check_usable()
        self._failed = True
        if len(self._builder):
            self._write_batch()
        self._seal_shard()
        if self._base is None or self._sealed:
            self._base = self._commit_manifest()
            self._sealed.clear()
            self._pending.clear()
            self._builder.max_error = 0.0
        self._failed = False
        base = self._base
        return Version(base.version, base.digest, f"{base.uri}@{base.digest}")

    def close(self) -> None:
        """Forget what was not committed."""
        self._failed = True
        if self._temp is not None:
            self._temp.discard()
            self._temp = None

    def _holds(self, key: tuple[bytes, str | None]) -> bool:
        return key in self._pending or _holds(self._base, key)

    def _require_table(self) -> None:
        """Make the id table as soon as there is enough to learn it from."""
        if self._sample is not None and self._sample.is_full:
            self._builder.id_table = self._sample.build(self.meta.vocab_size)
            self._sample = None

    def _check_usable(self) -> None:
        if self._failed:
            raise OpdError(
                f"{self._storage.uri}: this writer is closed or failed earlier. "
                "Open a new one with `append`; committed rollouts are kept."
            )

    def _write_batch(self) -> None:
        self._failed = True
        if self._shard is None:
            self._temp = self._storage.create_temp()
            self._shard = ShardWriter(self._temp, self._arrow)
        self._shard.write(self._builder.take())
        if self._shard.n_bytes >= self._shard_bytes:
            self._seal_shard()
        self._failed = False

    def _seal_shard(self) -> None:
        if self._shard is None or self._temp is None:
            return
        info = self._shard.finish()
        self._temp.publish(info.path)
        self._sealed.append((info, self._shard.hashes))
        self._temp.discard()
        self._shard = self._temp = None

    def _commit_manifest(self) -> Cache:
        made = self._builder.id_table
        if made is not None and (self._base is None or self._base.manifest.id_table is None):
            self._storage.put_if_absent(table_ref(made).path, made.to_bytes())
        for _ in range(_COMMIT_TRIES):
            base, table = self._base, self._builder.id_table
            manifest = Manifest(
                sequence=1 if base is None else base.version + 1,
                parent=None if base is None else base.digest,
                meta=self.meta,
                schema=self.schema,
                segments=self._segments(base),
                id_table=None if table is None else table_ref(table),
            )
            data = encode_manifest(manifest)
            name = layout.manifest_path(manifest.sequence)
            self._require_files(manifest)
            # A taken name may hold our own commit, whose acknowledgement was lost: compare before deciding.
            if self._storage.put_if_absent(name, data) or self._taken_by(name, data):
                return Cache(self._storage, manifest, manifest_digest(data))
            self._rebase()
        raise CommitConflictError(
            f"{self._storage.uri}: other writers were faster {_COMMIT_TRIES} times; try again"
        )

    def _require_files(self, manifest: Manifest) -> None:
        """Refuse to commit what somebody has removed since it was written."""
        paths = [info.path for info, _ in self._sealed]
        paths += [
            ref.path for segment in manifest.segments[-1:] for ref in (segment.shards, segment.rollouts)
        ]
        if manifest.id_table is not None:
            paths.append(manifest.id_table.path)
        for path in paths:
            if not self._storage.has(path):
                where = self._storage.describe(path)
                raise StorageError(
                    f"{where}: was removed before its version was committed, such as by `opd gc --min-age`. "
                    "Open a new writer and append again.",
                    errno=errno.ENOENT,
                    filename=where,
                )

    def _taken_by(self, name: str, data: bytes) -> bool:
        return self._storage.read(name, layout.MAX_MANIFEST_BYTES) == data

    def _rebase(self) -> None:
        manifest, digest = load_manifest(self._storage)
        other = Cache(self._storage, manifest, digest)
        require_known(other)
        require_equal_meta(other, self.meta)
        if other.schema != self.schema:
            raise MismatchError(
                f"{other.uri}: another writer created it as {other.schema}, this one has {self.schema}",
                field="schema",
                expected=str(self.schema),
                found=str(other.schema),
            )
        if any(_holds(other, key) for key in self._pending):
            raise CommitConflictError(
                f"{other.uri}: version {other.version}, by another writer, has some of these rollouts. "
                "Open a new writer and append again; duplicates will be skipped."
            )
        mine, theirs = self._builder.id_table, other.id_table
        if mine is None:
            # Pages written so far refer to none, and later ones may as well refer to this one.
            self._builder.id_table = theirs
            if theirs is not None:
                self._sample = None
        elif theirs is not None and mine.digest != theirs.digest:
            raise CommitConflictError(
                f"{other.uri}: version {other.version}, by another writer, has another id table. "
                "Open a new writer and append again."
            )
        self._base = other

    def _segments(self, base: Cache | None) -> tuple[SegmentRef, ...]:
        """The base's segments and a new one, merged so that their number stays logarithmic."""
        kept = () if base is None else base.manifest.segments
        if not self._sealed:
            return kept
        shards = [info for info, _ in self._sealed]
        rollouts = encode_rollout_table([hashes for _, hashes in self._sealed])
        merged_rows = sum(shard.rows for shard in shards)
        max_error = self._builder.max_error
        first = len(kept)
        while first and kept[first - 1].rows < 2 * merged_rows:
            first -= 1
            merged_rows += kept[first].rows
            max_error = max(max_error, kept[first].max_error)
        if base is not None and first < len(kept):
            old_shards = base.shards[sum(segment.n_shards for segment in kept[:first]) :]
            new_table = RolloutTable(
                pa.py_buffer(rollouts), [shard.rows for shard in shards], where="new segment"
            )
            tables = [base.rollout_table(number) for number in range(first, len(kept))]
            counts = [segment.n_shards for segment in kept[first:]]
            rollouts = merge_rollout_tables([*tables, new_table], [*counts, len(shards)])
            shards = [*old_shards, *shards]
        segment = SegmentRef(
            shards=self._put_index(encode_shard_table(shards)),
            rollouts=self._put_index(rollouts),
            n_shards=len(shards),
            rows=sum(shard.rows for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            response_tokens=sum(shard.response_tokens for shard in shards),
            n_bytes=sum(shard.n_bytes for shard in shards),
            max_error=max_error,
        )
        return (*kept[:first], segment)

    def _put_index(self, data: bytes) -> FileRef:
        ref = FileRef(file_digest(data), len(data))
        self._storage.put_if_absent(ref.path, data)
        return ref


class _IdSample:
    """The first positions of a cache, which its id table is learnt from."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint32]] = []
        self._positions = 0

    @property
    def is_full(self) -> bool:
        return self._positions >= TABLE_POSITIONS

    def add(self, stored_ids: NDArray[np.uint32]) -> None:
        if not self.is_full:
            self._blocks.append(stored_ids)
            self._positions += len(stored_ids)

    def take_from(self, base: Cache) -> None:
        """Begin with what was committed, so that a writer that was killed goes on to the same table."""
        for rollout in base.scan(columns=("topk_ids",)):
            if self.is_full:
                return
            assert rollout.topk_ids is not None
            self.add(rollout.topk_ids)

    def build(self, vocab_size: int) -> IdTable:
        return build_id_table(self._blocks, vocab_size=vocab_size)


def _holds(cache: Cache | None, key: tuple[bytes, str | None]) -> bool:
    if cache is None:
        return False
    rows = cache.find_all(key[0])
    return any(cache.rollout(row, columns=("sample_id",)).sample_id == key[1] for row in rows)
