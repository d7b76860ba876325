"""Taking pages and caches apart and sealing them again, so that damage gets past every checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import opd_store
from opd_store import arrow_message, layout
from opd_store.encodings.page import page_size
from opd_store.hashing import crc32c
from opd_store.index import FileRef, encode_shard_table
from opd_store.manifest import Manifest, encode_manifest
from opd_store.schema import arrow_schema, part_columns
from opd_store.shard import Region, ShardInfo, _buffer_widths, file_digest
from opd_store.storage import LocalStorage

Plane = tuple[bool, bytes]
"""Whether it is said to be a zstd frame, and the payload."""
Stream = list[Plane]
_ZSTD = 1 << 31


def parse_body(body: bytes) -> list[Stream]:
    """The streams of a valid page body, whatever they mean."""
    streams: list[Stream] = []
    at = 0
    while at < len(body):
        n_planes, at = body[at], at + 1
        stream: Stream = []
        for _ in range(n_planes):
            size = int.from_bytes(body[at : at + 4], "little")
            end = at + 4 + (size & ~_ZSTD)
            stream.append((bool(size & _ZSTD), body[at + 4 : end]))
            at = end
        streams.append(stream)
    return streams


def build_body(streams: list[Stream]) -> bytes:
    """The opposite."""
    parts = []
    for stream in streams:
        parts.append(bytes([len(stream) & 0xFF]))
        for zstd, payload in stream:
            parts += [(len(payload) | _ZSTD * zstd).to_bytes(4, "little"), payload]
    return b"".join(parts)


def split_page(page: bytes) -> tuple[bytes, bytes]:
    """Header, and body without its padding."""
    fields = layout.PAGE_HEADER.unpack_from(page)
    return page[: layout.PAGE_HEADER.size], page[layout.PAGE_HEADER.size :][: fields[6]]


def join_page(header: bytes, body: bytes, owner: bytes = b"") -> bytes:
    """A page with this body: body length, padding and checksum put right, every other field kept."""
    fields = list(layout.PAGE_HEADER.unpack(header))
    fields[6], fields[8] = len(body), 0
    start = layout.PAGE_HEADER.pack(*fields)[: layout.PAGE_CRC_OFFSET]
    padded = body + bytes(page_size(len(body)) - layout.PAGE_HEADER.size - len(body))
    return start + crc32c(padded, crc32c(owner + start)).to_bytes(4, "little") + padded


def with_pages(batch: pa.RecordBatch, column: str, pages: list[bytes]) -> pa.RecordBatch:
    """The record batch with other pages in one column."""
    at = batch.schema.get_field_index(column)
    return batch.set_column(at, batch.schema.field(at), pa.array(pages, pa.binary()))


def seal_manifest(text: bytes) -> bytes:
    """A manifest of this text, which is everything before the checksum line."""
    return text + f',\n "checksum": "sha256:{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


def manifest_text(manifest: bytes) -> bytes:
    """The opposite."""
    return manifest[: manifest.rindex(b',\n "checksum"')]


def pieces_of(path: Path) -> list[bytes]:
    """Head, record batch and footer of the only shard of a cache."""
    return Parts.of(path).pieces


def cut_message(message: bytes, schema: pa.Schema) -> list[bytes]:
    """A record batch in parts: where its metadata says, if that makes sense, and evenly otherwise."""
    columns = part_columns(schema)
    try:
        body = 8 + int.from_bytes(message[4:8], "little")
        batch = arrow_message._Table.root(message[8:body]).table(arrow_message._MESSAGE_HEADER)
        buffers = batch.structs(arrow_message._BATCH_BUFFERS, arrow_message._BUFFER)
        first = [0, *itertools.accumulate(len(_buffer_widths(kind)) for kind in schema.types)]
        cuts = [0, *(body + buffers[first[part.start]][0] for part in columns[1:]), len(message)]
    except (struct.error, IndexError):
        cuts = [0]
    if len(cuts) == 1 or any(a >= b for a, b in itertools.pairwise(cuts)):
        cuts = [len(message) * n // len(columns) for n in range(len(columns) + 1)]
    return [message[a:b] for a, b in itertools.pairwise(cuts)]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a cache with one version and one shard consists of, without any digest."""

    manifest: Manifest
    info: ShardInfo
    pieces: list[bytes]
    """Bytes of head, record batch and footer."""
    rollout_table: bytes
    table: bytes | None

    @classmethod
    def of(cls, path: Path) -> Parts:
        cache = opd_store.open(path)
        (info,), (segment,) = cache.shards, cache.manifest.segments
        data = (path / info.path).read_bytes()
        head, footer = info.regions[0], info.regions[-1]
        pieces = [data[: head.length], data[head.length : footer.offset], data[footer.offset :]]
        ref = cache.manifest.id_table
        table = None if ref is None else (path / ref.path).read_bytes()
        return cls(cache.manifest, info, pieces, (path / segment.rollouts.path).read_bytes(), table)

    def described(self, pieces: list[bytes], rows: int | None = None) -> ShardInfo:
        """The index entry of a shard of these pieces, with right digests.

        Args:
            rows: rollouts that the index claims; None for as many as there are.
        """
        head, message, footer = pieces
        regions = [head, *cut_message(message, arrow_schema(self.manifest.schema)), footer]
        offsets = np.cumsum([0, *map(len, regions)]).tolist()
        rows = self.info.rows if rows is None else rows
        # More than the index could list of a small shard is refused for that.
        tokens, response_tokens = (
            np.resize(lengths, min(rows, 1 << 16))
            for lengths in (self.info.row_tokens, self.info.row_response_tokens)
        )
        return dataclasses.replace(
            self.info,
            sha256=file_digest(b"".join(pieces)),
            n_bytes=offsets[-1],
            rows=rows,
            tokens=int(tokens.sum()),
            response_tokens=int(response_tokens.sum()),
            regions=tuple(
                Region(offset, len(part), crc32c(part), rows if number == 1 else 0)
                for number, (offset, part) in enumerate(zip(offsets, regions, strict=False))
            ),
            row_tokens=tokens,
            row_response_tokens=response_tokens,
        )

    def sealed(
        self,
        *,
        pieces: list[bytes] | None = None,
        rows: int | None = None,
        table: bytes | None = None,
        shard_table: bytes | None = None,
        rollout_table: bytes | None = None,
        edit: Callable[[bytes], bytes] | None = None,
    ) -> dict[str, bytes]:
        """Name to content of every file, where parts were replaced and every digest was put right.

        Args:
            pieces: bytes of head, record batch and footer.
            rows: rollouts that the index claims.
            table, shard_table, rollout_table: whole files.
            edit: changes the text of the manifest, after the digests are in it.
        """
        pieces = self.pieces if pieces is None else pieces
        info = self.described(pieces, rows)
        files = {info.path: b"".join(pieces)}
        refs = []
        for data in (shard_table or encode_shard_table([info]), rollout_table or self.rollout_table):
            refs.append(FileRef(file_digest(data), len(data)))
            files[refs[-1].path] = data
        table_ref = self.manifest.id_table
        if table_ref is not None:
            table = table or self.table
            assert table is not None
            table_ref = FileRef(file_digest(table), len(table), layout.TABLE_DIR)
            files[table_ref.path] = table
        counts = {name: getattr(info, name) for name in ("rows", "tokens", "response_tokens", "n_bytes")}
        segment = dataclasses.replace(self.manifest.segments[0], shards=refs[0], rollouts=refs[1], **counts)
        manifest = dataclasses.replace(self.manifest, segments=(segment,), id_table=table_ref)
        data = encode_manifest(manifest)
        files[layout.manifest_path(1)] = seal_manifest(edit(manifest_text(data))) if edit else data
        return files


def seal_cache(path: Path, like: Path, **replaced: Any) -> None:  # noqa: ANN401
    """A copy of a cache in which parts were replaced; arguments as for `Parts.sealed`."""
    for name, data in Parts.of(like).sealed(**replaced).items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


class PartialShard:
    """A source of the parts that are asked for, and of noise elsewhere: what a bucket is to its reader."""

    def __init__(self, data: bytes, info: ShardInfo) -> None:
        self._data, self._info = data, info

    def batch(self, number: int, parts: tuple[int, ...]) -> pa.Buffer:
        regions = self._info.parts(number)
        wanted = (number in parts for number in range(len(regions)))
        return pa.py_buffer(
            b"".join(
                self._data[region.offset : region.offset + region.length]
                if there
                else b"\xa5" * region.length
                for region, there in zip(regions, wanted, strict=True)
            )
        )

    def prefetch(self, number: int, parts: tuple[int, ...]) -> None:
        pass


class MemoryStorage(LocalStorage):
    """A cache without a disk."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Path("memory"))
        self.files = files

    def versions(self) -> list[int]:
        return [1]

    def read(self, name: str, limit: int) -> bytes:
        return self.files[name]

    def map_pages(self, name: str) -> tuple[pa.Buffer, None, Callable[[], None]]:
        if name not in self.files:
            raise opd_store.IntegrityError(f"memory/{name}: missing, although the manifest names it")
        return pa.py_buffer(self.files[name]), None, lambda: None
