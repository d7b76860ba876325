"""Reading a cache: rollouts as views of memory-mapped shards."""

from __future__ import annotations

import bisect
import functools
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_store import layout
from opd_store.batch import ARRAY_FIELDS, SUPPORT_FIELDS, BatchView, Proven
from opd_store.encodings import IdTable, PageStreams
from opd_store.errors import CacheNotFoundError, IntegrityError, InvalidArgumentError
from opd_store.index import FileRef, RolloutTable, SegmentRef, decode_shard_table
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.meta import CacheMeta
from opd_store.rollout import Rollout
from opd_store.schema import SCALARS, CacheSchema, arrow_schema
from opd_store.shard import ShardInfo, ShardReader, file_digest
from opd_store.storage import LocalStorage, resolve
from opd_store.table import rollouts_to_arrow

_OPEN_BATCHES = 256
"""Record batches kept parsed. Each costs a few kilobytes; their data stays in the page cache."""


def open_cache(uri: str | os.PathLike[str], *, check_values: bool = True) -> Cache:
    """Open the newest version of a cache, or the one pinned by `path@sha256:...`. Exported as
    `opd_store.open`.

    Reads the manifest, the shard tables and the id table; shards are mapped and checked when first used.

    Args:
        check_values: prove at the first read of each row that its values are possible: ids inside the
            vocabulary and distinct, log-probs finite, at most 0 and in order, probabilities of at most 1.
            Checksums are compared in any case.

    Raises:
        CacheNotFoundError: no committed version there, or none with the pinned digest.
        FormatError, IntegrityError, UnsupportedVersionError: the manifest or a shard table is at fault.
    """
    storage, pin = resolve(uri)
    return Cache(storage, *load_manifest(storage, pin), check_values=check_values)


def load_manifest(storage: LocalStorage, pin: str | None = None) -> tuple[Manifest, str]:
    """The newest manifest, or the pinned one, and its digest."""
    versions = storage.versions()
    if not versions:
        raise CacheNotFoundError(
            f"{storage.uri}: no cache here ({layout.MANIFEST_DIR}/ holds no manifest). "
            "Check the path, or write one with `opd score`."
        )
    for sequence in reversed(versions) if pin else versions[-1:]:
        name = layout.manifest_path(sequence)
        data = storage.read(name, layout.MAX_MANIFEST_BYTES)
        digest = manifest_digest(data)
        if pin in (None, digest):
            manifest = decode_manifest(data, where=storage.describe(name))
            if manifest.sequence != sequence:
                raise IntegrityError(
                    f"{storage.describe(name)}: holds version {manifest.sequence}; it was renamed"
                )
            return manifest, digest
    raise CacheNotFoundError(
        f"{storage.uri}: none of its {len(versions)} versions has the pinned digest {pin}"
    )


class Cache(Sequence[Rollout]):
    """One version of a cache, for reading. Rollouts keep the order in which they were appended.

    `cache[i]` and iteration give `Rollout` objects with read-only views. A cache may be shared by threads and
    inherited by forked processes; pickling it passes its address, pinned to this version.
    """

    def __init__(
        self, storage: LocalStorage, manifest: Manifest, digest: str, *, check_values: bool = True
    ) -> None:
        self._storage, self._manifest, self._check_values = storage, manifest, check_values
        self.digest = digest
        """`sha256:...` of the manifest: the identity of this version."""
        self._arrow = arrow_schema(manifest.schema)
        self._shards: list[ShardInfo] = []
        self._segment_start: list[int] = []
        for segment in manifest.segments:
            self._segment_start.append(len(self._shards))
            self._shards += self._load_shard_table(segment)
        self._first_row: list[int] = []
        self._batch_at: list[tuple[int, int]] = []
        self._shard_row: list[int] = []
        row = 0
        for number, shard in enumerate(self._shards):
            self._shard_row.append(row)
            for batch, region in enumerate(region for region in shard.regions if region.rows):
                self._first_row.append(row)
                self._batch_at.append((number, batch))
                row += region.rows
        self._readers: dict[int, ShardReader] = {}
        self._batches: OrderedDict[int, BatchView] = OrderedDict()
        self._tables: dict[int, RolloutTable] = {}
        self._proven: dict[int, Proven] = {}
        self.id_table = self._load_id_table()
        """What the ids of packed pages may refer to; None if there is none. Other caches may use it too."""

    def __reduce__(self) -> tuple[object, ...]:
        reopen = functools.partial(open_cache, check_values=self._check_values)
        return reopen, (f"{self.uri}@{self.digest}",)

    def __repr__(self) -> str:
        what = f"{len(self)} rollouts, top-{self.topk} {self.encoding}"
        return f"<Cache {self.uri} version {self.version}: {what}>"

    @property
    def uri(self) -> str:
        """Where the cache is, without a pin."""
        return self._storage.uri

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
    def max_error(self) -> float:
        """Nats: how far stored log-probs and tails are from those appended, at most; 0 if exact."""
        return max((segment.max_error for segment in self._manifest.segments), default=0.0)

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
        starts = np.array(self._first_row, np.int64)
        return np.append(starts[1:], len(self))[: len(starts)] - starts

    @functools.cached_property
    def row_tokens(self) -> NDArray[np.uint32]:
        """[rows] tokens of every rollout, prompt included. From the index: no shard is read."""
        return np.array([len(rollout.token_ids) for rollout in self.scan(columns=())], np.uint32)

    @functools.cached_property
    def row_response_tokens(self) -> NDArray[np.uint32]:
        """[rows] response tokens of every rollout. From the index: no shard is read."""
        return np.array([rollout.response_len for rollout in self.scan(columns=())], np.uint32)

    def prefetch(
        self, rows: Sequence[int], *, ranks: int | None = None, columns: Collection[str] | None = None
    ) -> None:
        """Ask for what `gather` of these rows will need, and return at once. Local caches need nothing."""

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
        self._check_selection(ranks, columns)
        batch, row = self._locate(row)
        return batch.rollout(row, ranks=ranks, columns=columns)

    def page_streams(self, row: int, *, ranks: int | None = None) -> list[PageStreams]:
        """The pages that hold the first `ranks` ranks (None: all) of one rollout, decompressed and proven but
        not put together, for decoding on another device.

        Raises:
            IndexError: no such row.
            InvalidArgumentError: more ranks than stored, or `plain` pages, which have no streams.
            IntegrityError, FormatError: the shard is damaged, or a value is not possible.
        """
        self._check_selection(ranks, None)
        if self.encoding == "plain":
            raise InvalidArgumentError(f"{self.uri}: plain pages have no streams")
        batch, row = self._locate(row)
        return batch.page_streams(row, ranks)

    def column_bytes(self, *, batches: int = 16) -> tuple[dict[str, int], int]:
        """What each column takes, in up to `batches` record batches spread evenly over the cache.

        Returns:
            Bytes of every column, and the response tokens of the same record batches.
        """
        n_batches = len(self._first_row)
        sizes = dict.fromkeys(self._arrow.names, 0)
        tokens = 0
        for number in sorted({index * n_batches // batches for index in range(batches if n_batches else 0)}):
            view = self._batch(number)
            tokens += view.n_response_tokens
            for name, n_bytes in view.column_bytes().items():
                sizes[name] += n_bytes
        return sizes, tokens

    def scan(self, *, ranks: int | None = None, columns: Collection[str] | None = None) -> Iterator[Rollout]:
        """All rollouts in order. Arguments and errors as for `rollout`."""
        self._check_selection(ranks, columns)
        for number in range(len(self._first_row)):
            batch = self._batch(number)
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
                yield self._shard_row[self._segment_start[number] + shard] + row

    def row_hash(self, row: int) -> bytes:
        """The stored rollout hash of a row, 32 bytes."""
        batch, row = self._locate(row)
        return bytes(batch.hashes[row])

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

    def _check_selection(self, ranks: int | None, columns: Collection[str] | None) -> None:
        if ranks is not None and not 0 <= ranks <= self.topk:
            raise InvalidArgumentError(f"ranks: expected 0..{self.topk} (the stored top-k), found {ranks}")
        if columns is not None:
            known = {*SCALARS, *ARRAY_FIELDS, *SUPPORT_FIELDS, *self.schema.user_columns} - {"rollout_hash"}
            unknown = sorted(set(columns) - known)
            if unknown:
                raise InvalidArgumentError(
                    f"columns: {unknown[0]!r:.100} is not one of {', '.join(sorted(known))}"
                )

    def _locate(self, row: int) -> tuple[BatchView, int]:
        n_rows = len(self)
        if not -n_rows <= row < n_rows:
            raise IndexError(f"{self.uri}: row {row} of {n_rows}")
        row %= n_rows
        number = bisect.bisect_right(self._first_row, row) - 1
        return self._batch(number), row - self._first_row[number]

    def _batch(self, number: int) -> BatchView:
        view = self._batches.get(number)
        if view is None:
            shard, batch = self._batch_at[number]
            where = f"{self._storage.describe(self._shards[shard].path)}, record batch {batch}"
            arrow_batch = self.shard_reader(shard).batch(batch)
            proven = self._proven.setdefault(number, Proven()) if self._check_values else None
            view = BatchView(
                arrow_batch,
                self.schema,
                vocab_size=self.meta.vocab_size,
                id_table=self.id_table,
                proven=proven,
                where=where,
            )
            self._batches[number] = view
            if len(self._batches) > _OPEN_BATCHES:
                self._batches.popitem(last=False)
        return view

    def shard_reader(self, number: int) -> ShardReader:
        """A mapped shard. Internal to the package."""
        if number not in self._readers:
            info = self._shards[number]
            buffer = self._storage.map(info.path)
            self._readers[number] = ShardReader(
                buffer, info, self._arrow, uri=self._storage.describe(info.path)
            )
        return self._readers[number]

    def rollout_table(self, number: int) -> RolloutTable:
        """The rollout table of a segment, digest checked at first use. Internal to the package."""
        if number not in self._tables:
            segment = self._manifest.segments[number]
            buffer = self._load_index_file(segment.rollouts)
            where = self._storage.describe(segment.rollouts.path)
            start = self._segment_start[number]
            shard_rows = [shard.rows for shard in self._shards[start : start + segment.n_shards]]
            self._tables[number] = RolloutTable(buffer, shard_rows, where=where)
        return self._tables[number]

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest. Internal to the package."""
        return self._manifest

    @property
    def shards(self) -> Sequence[ShardInfo]:
        """The shard tables, joined. Internal to the package."""
        return self._shards

    def _load_shard_table(self, segment: SegmentRef) -> list[ShardInfo]:
        where = self._storage.describe(segment.shards.path)
        shards = decode_shard_table(self._load_index_file(segment.shards), where=where)
        sums = [len(shards)]
        sums += [
            sum(getattr(s, name) for s in shards) for name in ("rows", "tokens", "response_tokens", "n_bytes")
        ]
        if sums != [segment.n_shards, segment.rows, segment.tokens, segment.response_tokens, segment.n_bytes]:
            raise IntegrityError(f"{where}: its counts {sums} are not those of the manifest")
        return shards

    def _load_id_table(self) -> IdTable | None:
        ref = self._manifest.id_table
        if ref is None:
            return None
        where = self._storage.describe(ref.path)
        data = np.frombuffer(self._load_index_file(ref), np.uint8)
        return IdTable.from_bytes(data, vocab_size=self.meta.vocab_size, where=where)

    def _load_index_file(self, ref: FileRef) -> pa.Buffer:
        buffer = self._storage.map(ref.path)
        where = self._storage.describe(ref.path)
        if buffer.size != ref.n_bytes or file_digest(buffer) != ref.sha256:
            raise IntegrityError(
                f"{where}: not the {ref.n_bytes} bytes with the digest in its name. Fetch it again.",
                uri=where,
            )
        return buffer
