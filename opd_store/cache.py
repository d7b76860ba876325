"""Reading a cache: rollouts as views of shards, mapped or fetched."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.batch import ARRAY_FIELDS, SUPPORT_FIELDS, BatchView
from opd_store.encodings import IdTable, PageStreams
from opd_store.errors import IntegrityError, InvalidArgumentError
from opd_store.index import FileRef, RolloutTable, SegmentRef, ShardTable, decode_shard_table
from opd_store.manifest import Manifest
from opd_store.meta import CacheMeta
from opd_store.record_batches import RecordBatches
from opd_store.rollout import Rollout
from opd_store.schema import SCALARS, CacheSchema, PackedColumn, arrow_schema
from opd_store.shard import ShardInfo, ShardReader, require_size
from opd_store.storage import DEFAULT_CACHE_BYTES, LocalStorage, Stats, Storage, resolve
from opd_store.table import rollouts_to_arrow
from opd_store.versions import load_manifest
from opd_store.watch import FileWatch

_PREFETCHED_BATCHES = 64
"""Record batches that reading a column asks for ahead."""


def open_cache(
    uri: str | os.PathLike[str],
    *,
    check_values: bool = True,
    storage_options: Mapping[str, object] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Cache:
    """Open the newest version of a cache, or the one pinned by `path@sha256:...`. Exported as
    `opd_store.open`.

    Reads the manifest and the shard tables; shards and the id table are read and checked when first used.

    Args:
        uri: a path, or a URL of a protocol that fsspec knows: s3, gs, az, abfs, hf, https, memory.
        check_values: prove at the first read of each row that its values are possible: ids inside the
            vocabulary and distinct, log-probs finite, at most 0 and in order, probabilities of at most 1.
            Checksums are compared in any case.
        storage_options: for a URL, what its fsspec file system takes, such as `endpoint_url` for s3.
        cache_dir: for a URL, a directory that keeps what was fetched; processes may share it. None keeps
            up to 512 MiB in memory.
        cache_bytes: what that directory may hold; what was not used for longest goes.

    Raises:
        CacheNotFoundError: no committed version there, or none with the pinned digest.
        FormatError, IntegrityError, UnsupportedVersionError: the manifest or a shard table is at fault.
        InvalidArgumentError: a protocol that is not known, or whose package is missing.
        StorageError: the place cannot be read.
    """
    storage, pin = resolve(uri, storage_options=storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)
    return _open_version(storage, pin, check_values=check_values)


def _open_version(storage: Storage, pin: str | None, *, check_values: bool) -> Cache:
    return Cache(storage, *load_manifest(storage, pin), check_values=check_values)


def _checked_parts(schema: CacheSchema, ranks: int | None, columns: frozenset[str] | None) -> tuple[int, ...]:
    if ranks is not None and not 0 <= ranks <= schema.topk:
        raise InvalidArgumentError(f"ranks: expected 0..{schema.topk} (the stored top-k), found {ranks}")
    if columns is not None:
        known = {*SCALARS, *ARRAY_FIELDS, *SUPPORT_FIELDS, *schema.user_columns} - {"rollout_hash"}
        unknown = sorted(columns - known)
        if unknown:
            raise InvalidArgumentError(
                f"columns: {unknown[0]!r:.100} is not one of {', '.join(sorted(known))}"
            )
    return schema.parts(ranks, columns)


class Cache(Sequence[Rollout]):
    """One version of a cache, for reading. Rollouts keep the order in which they were appended.

    `cache[i]` and iteration give `Rollout` objects with read-only views. A cache may be shared by threads and
    inherited by forked processes; pickling it passes its address, pinned to this version, and the storage
    options.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        digest: str,
        *,
        check_values: bool = True,
    ) -> None:
        self._storage, self._manifest, self._check_values = storage, manifest, check_values
        self.digest = digest
        """`sha256:...` of the manifest: the identity of this version."""
        self._arrow = arrow_schema(manifest.schema)
        tables = [self._load_shard_table(segment) for segment in manifest.segments]
        self._shards = ShardTable.join(tables, manifest.schema.n_parts)
        self._segment_start = np.cumsum([0, *map(len, tables)])
        self._batches = RecordBatches(storage, self._shards, manifest, self._arrow, check_values=check_values)
        # Remembered: it would take longer than a row of a `plain` cache.
        self._known_parts = functools.lru_cache(maxsize=64)(
            functools.partial(_checked_parts, manifest.schema)
        )
        self._tables: dict[int, tuple[RolloutTable, FileWatch | None]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        reopen = functools.partial(_open_version, check_values=self._check_values)
        return reopen, (self._storage, self.digest)

    def __repr__(self) -> str:
        what = f"{len(self)} rollouts, top-{self.topk} {self.encoding}"
        return f"<Cache {self.uri} version {self.version}: {what}>"

    @property
    def uri(self) -> str:
        """Where the cache is, without a pin."""
        return self._storage.uri

    @property
    def stats(self) -> Stats | None:
        """Requests and bytes that this process fetched; None for a local cache."""
        return None if isinstance(self._storage, LocalStorage) else self._storage.stats

    @property
    def version(self) -> int:
        """Sequence number of this version, from 1."""
        return self._manifest.sequence

    @property
    def parent(self) -> str | None:
        """Digest of the version before this one."""
        return self._manifest.parent

    @property
    def meta(self) -> CacheMeta:
        """Identity and provenance."""
        return self._manifest.meta

    @property
    def schema(self) -> CacheSchema:
        """Top-k, bands, encoding and user columns."""
        return self._manifest.schema

    @property
    def topk(self) -> int:
        """K, ranks stored at every response position; 0 for none."""
        return self.schema.topk

    @property
    def encoding(self) -> str:
        """Encoding of the top-k pages."""
        return self.schema.encoding

    @property
    def checks_values(self) -> bool:
        """Whether values are proven possible when they are first read; see `opd_store.open`."""
        return self._check_values

    @property
    def max_error(self) -> float:
        """Nats: how far stored log-probs and tails are from those first appended, at most; 0 if exact.

        What a cache was copied from counts as well.
        """
        return self._manifest.max_error

    @property
    def tolerance(self) -> float:
        """How far stored probabilities of one position may exceed 1 in sum: rounding may have lifted each."""
        return self._manifest.tolerance

    @property
    def n_tokens(self) -> int:
        """All tokens, prompts included."""
        return sum(segment.tokens for segment in self._manifest.segments)

    @property
    def n_response_tokens(self) -> int:
        """Response tokens, that is, stored rows of log-probs."""
        return sum(segment.response_tokens for segment in self._manifest.segments)

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards, of the index and of the id table."""
        refs = self._manifest.segments
        table = self._manifest.id_table
        n_bytes = sum(ref.n_bytes + ref.shards.n_bytes + ref.rollouts.n_bytes for ref in refs)
        return n_bytes + (table.n_bytes if table is not None else 0)

    @property
    def n_shards(self) -> int:
        """Number of shard files."""
        return len(self._shards)

    @property
    def batch_rows(self) -> NDArray[np.int64]:
        """[B] rollouts of every record batch; those of the first come first, and so on."""
        return self._shards.batch_rows

    @property
    def row_tokens(self) -> NDArray[np.uint32]:
        """[rows] tokens of every rollout, prompt included. From the index: no shard is read."""
        return self._shards.row_tokens

    @property
    def row_response_tokens(self) -> NDArray[np.uint32]:
        """[rows] response tokens of every rollout. From the index: no shard is read."""
        return self._shards.row_response_tokens

    @property
    def id_table(self) -> IdTable | None:
        """What the ids of packed pages may refer to; None if there is none. Other caches may use it too.

        Raises:
            IntegrityError, FormatError: its file is damaged.
        """
        return self._batches.id_table

    def lengths(
        self, rows: Sequence[int] | NDArray[np.int64], *, max_tokens: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[S] tokens, and response tokens, of rollouts that are cut after `max_tokens`. From the index.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: a prompt that `max_tokens` leaves no response to.
        """
        wanted = self.require_rows(np.asarray(rows, np.int64))
        lengths = self.row_tokens[wanted].astype(np.int64)
        responses = self.row_response_tokens[wanted].astype(np.int64)
        if max_tokens is not None:
            beyond = np.maximum(lengths - max_tokens, 0)
            lengths, responses = lengths - beyond, responses - beyond
            if responses.min(initial=1) < 1:
                at = int(responses.argmin())
                raise InvalidArgumentError(
                    f"{self.uri}: row {wanted[at]} has a prompt of {lengths[at] - responses[at]} tokens; "
                    f"max_tokens={max_tokens} leaves no response"
                )
        return lengths, responses

    def require_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """These rows. Raises IndexError where one does not exist. Internal to the package."""
        # Negative numbers are large ones without their sign.
        if len(rows) and rows.view(np.uint64).max() >= len(self):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise IndexError(f"{self.uri}: row {wrong} of {len(self)}")
        return rows

    def prefetch(
        self, rows: Sequence[int], *, ranks: int | None = None, columns: Collection[str] | None = None
    ) -> None:
        """Ask for what `gather` of these rows will need, and return at once. Local caches need nothing.

        Args:
            rows, ranks, columns: as for `gather`.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: more ranks than stored, or an unknown column.
            IntegrityError, FormatError: a shard is damaged.
        """
        parts = self._parts(ranks, columns)
        wanted = self.require_rows(np.asarray(rows, np.int64))
        for number in np.unique(self._batches.first_row.searchsorted(wanted, side="right") - 1).tolist():
            self._batches.prefetch(number, parts)

    def __len__(self) -> int:
        return self._manifest.rows

    def __getitem__(self, row: int) -> Rollout:  # type: ignore[override]
        return self.rollout(row)

    def __iter__(self) -> Iterator[Rollout]:
        return self.scan()

    def rollout(
        self, row: int, *, ranks: int | None = None, columns: Collection[str] | None = None
    ) -> Rollout:
        """One rollout.

        Args:
            row: 0 <= row < len(self), or negative from the end.
            ranks: how many of the top-k ranks to read; the rest joins `log_tail`. None means all, 0 none.
            columns: fields to fill; None means all. `token_ids` and `prompt_len` are always filled.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: more ranks than stored, or an unknown column.
            IntegrityError, FormatError: the shard is damaged.
        """
        batch, row = self._locate(row, self._parts(ranks, columns))
        return batch.rollout(row, ranks=ranks, columns=columns)

    def page_streams(self, row: int, *, ranks: int | None = None) -> list[PageStreams]:
        """The pages that hold the first `ranks` ranks (None: all) of one rollout, decompressed and proven but
        not put together, for decoding on another device.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: more ranks than stored, or `plain` pages, which have no streams.
            IntegrityError, FormatError: the shard is damaged, or a value is not possible.
        """
        if self.encoding == "plain":
            raise InvalidArgumentError(f"{self.uri}: plain pages have no streams")
        batch, row = self._locate(row, self._parts(ranks, ("topk_ids",)))
        return batch.page_streams(row, ranks)

    def page(self, row: int, column: PackedColumn) -> NDArray[np.uint8]:
        """A page of one rollout as it is stored, compared with its own checksum. Internal to the package.

        Raises:
            IntegrityError: it is damaged.
        """
        ranks = column.rank_end if column.kind == layout.KIND_TOPK else None
        name = "topk" if ranks is not None else column.name
        batch, row = self._locate(row, self.schema.parts(ranks, (f"{name}_ids",)))
        return batch.page(column, row)

    def part_bytes(self) -> dict[str, int]:
        """What the columns take in the whole cache, as far as the index tells; no shard is read.

        Returns:
            Bytes of "scalars" (with the headers of record batches), of "lists" (tokens and log-probs), and of
            each packed column.
        """
        names = ("scalars", "lists", *(column.name for column in self.schema.packed_columns()))
        return dict(zip(names, self._shards.part_bytes(), strict=True))

    def column_bytes(self, *, batches: int = 16) -> tuple[dict[str, int], int]:
        """What each column takes, in up to `batches` record batches spread evenly over the cache.

        Returns:
            Bytes of every column, and the response tokens of the same record batches.
        """
        n_batches = len(self.batch_rows)
        sizes = dict.fromkeys(self._arrow.names, 0)
        tokens = 0
        for number in sorted({index * n_batches // batches for index in range(batches if n_batches else 0)}):
            view = self._batches.view(number, self.schema.parts())
            tokens += view.n_response_tokens
            for name, n_bytes in view.column_bytes().items():
                sizes[name] += n_bytes
        return sizes, tokens

    def scan(self, *, ranks: int | None = None, columns: Collection[str] | None = None) -> Iterator[Rollout]:
        """All rollouts in order. Arguments and errors as for `rollout`."""
        parts = self._parts(ranks, columns)
        for number in range(len(self.batch_rows)):
            batch = self._batches.view(number, parts)
            first, end = self._batches.first_row[number : number + 2]
            self._batches.note_read(int(self.row_tokens[first:end].sum()))
            for row in range(batch.n_rows):
                yield batch.rollout(row, ranks=ranks, columns=columns)

    def find(self, rollout_hash: bytes) -> int | None:
        """Row of the first rollout with this hash, or None.

        Args:
            rollout_hash: 32 bytes from `opd_store.rollout_hash`.
        """
        return next(self.find_all(rollout_hash), None)

    def find_all(self, rollout_hash: bytes) -> Iterator[int]:
        """Rows of all rollouts with this hash: the same tokens may have been sampled more than once."""
        for number in range(len(self._manifest.segments)):
            for shard, row in self.rollout_table(number).find(rollout_hash):
                yield int(self._shards.first_row[self._segment_start[number] + shard]) + row

    def row_hash(self, row: int) -> bytes:
        """The stored rollout hash of a row, 32 bytes."""
        batch, row = self._locate(row, (0,))
        return bytes(batch.hashes[row])

    def column(self, name: str) -> pa.ChunkedArray:
        """One scalar or `x_*` column of all rollouts, in order, a chunk a record batch; for filters.

        No list and no page is read: only the first part of each record batch is.

        Raises:
            InvalidArgumentError: not a scalar column.
            IntegrityError, FormatError: a shard is damaged.
        """
        names = (*SCALARS, *sorted(self.schema.user_columns))
        if name not in names:
            raise InvalidArgumentError(f"column: {name!r:.100} is not one of {', '.join(names)}")
        chunks = []
        n_batches = len(self.batch_rows)
        for number in range(min(_PREFETCHED_BATCHES, n_batches)):
            self._batches.prefetch(number, (0,))
        for number in range(n_batches):
            if number + _PREFETCHED_BATCHES < n_batches:
                self._batches.prefetch(number + _PREFETCHED_BATCHES, (0,))
            found = self._batches.fresh_view(number, (0,)).column(name)
            # A copy, so that not every shard stays open.
            chunks.append(found.take(pa.array(np.arange(len(found)))))
        return pa.chunked_array(chunks, self._arrow.field(name).type)

    def shard_name(self, row: int) -> str:
        """The shard that holds a row, as a path below the cache's address."""
        shard = np.searchsorted(self._shards.first_row, row % len(self), side="right") - 1
        return self._shards[int(shard)].path

    def to_arrow(
        self,
        *,
        rows: Sequence[int] | None = None,
        ranks: int | None = None,
        columns: Collection[str] | None = None,
    ) -> pa.Table:
        """Rollouts as an Arrow table; top-k as flat lists of R * ranks values, position-major.

        Args:
            rows: which rows, in which order; None means all.
            ranks, columns: as for `rollout`.
        """
        selected = self.scan(ranks=ranks, columns=columns)
        if rows is not None:
            selected = (self.rollout(row, ranks=ranks, columns=columns) for row in rows)
        return rollouts_to_arrow(selected, self.schema, columns)

    def _parts(self, ranks: int | None, columns: Collection[str] | None) -> tuple[int, ...]:
        """What `CacheSchema.parts` says. Raises InvalidArgumentError for a selection that cannot be."""
        return self._known_parts(ranks, None if columns is None else frozenset(columns))

    def runs(
        self, rows: NDArray[np.int64], *, ranks: int | None, columns: Collection[str]
    ) -> list[tuple[BatchView, int, int]]:
        """Rows as pieces [first, end) of record batches, in the given order. Internal to the package."""
        parts = self._parts(ranks, columns)
        numbers = self._batches.first_row.searchsorted(rows, side="right") - 1
        inside = rows - self._batches.first_row[numbers]
        views = {number: self._batches.view(number, parts) for number in dict.fromkeys(numbers.tolist())}
        self._batches.note_read(int(self.row_tokens[rows].sum()))
        breaks = np.flatnonzero((numbers[1:] != numbers[:-1]) | (inside[1:] != inside[:-1] + 1))
        starts = [0, *(breaks + 1).tolist()]
        ends = [*starts[1:], len(rows)]
        firsts, found = inside[starts].tolist(), numbers[starts].tolist()
        pieces = zip(found, firsts, starts, ends, strict=True)
        return [(views[number], first, first + end - start) for number, first, start, end in pieces]

    def _locate(self, row: int, parts: tuple[int, ...]) -> tuple[BatchView, int]:
        n_rows = len(self)
        if not -n_rows <= row < n_rows:
            raise IndexError(f"{self.uri}: row {row} of {n_rows}")
        row %= n_rows
        number = int(self._batches.first_row.searchsorted(row, side="right")) - 1
        self._batches.note_read(int(self.row_tokens[row]))
        return self._batches.view(number, parts), row - int(self._batches.first_row[number])

    def shard_reader(self, number: int) -> ShardReader:
        """An open shard. Internal to the package."""
        return self._batches.shard(number)

    def rollout_table(self, number: int) -> RolloutTable:
        """The rollout table of a segment, digest checked at first use. Internal to the package."""
        ref = self._manifest.segments[number].rollouts
        where = self._storage.describe(ref.path)
        if number not in self._tables:
            buffer = self._load(ref)
            start, end = self._segment_start[number : number + 2]
            shard_rows = np.diff(self._shards.first_row[start : end + 1])
            watch = FileWatch(where, buffer.size) if self._storage.is_local else None
            self._tables[number] = RolloutTable(buffer, shard_rows, where=where), watch
        table, watch = self._tables[number]
        if watch is not None:
            require_size(watch.size(), ref.n_bytes, uri=where)
        return table

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest. Internal to the package."""
        return self._manifest

    @property
    def shards(self) -> Sequence[ShardInfo]:
        """The shard tables, joined. Internal to the package."""
        return self._shards

    def _load_shard_table(self, segment: SegmentRef) -> ShardTable:
        where = self._storage.describe(segment.shards.path)
        # A copy: these arrays are used as long as the cache is open, whatever becomes of the file.
        buffer = pa.py_buffer(self._load(segment.shards).to_pybytes())
        shards = decode_shard_table(buffer, self.schema.n_parts, where=where)
        counts = ("rows", "tokens", "response_tokens", "n_bytes")
        sums = [len(shards), *(shards.total(name) for name in counts)]
        if sums != [segment.n_shards, segment.rows, segment.tokens, segment.response_tokens, segment.n_bytes]:
            raise IntegrityError(f"{where}: its counts {sums} are not those of the manifest")
        return shards

    def _load(self, ref: FileRef) -> pa.Buffer:
        return self._storage.load(ref.path, ref.n_bytes, ref.sha256)
