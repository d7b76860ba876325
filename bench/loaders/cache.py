"""This project's caches: `opd_store.gather`, `Cache.rollout` and `opd_train.CacheStream`.

Checksums and values are checked as by default, at first use in each process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from windows import VOCAB_SIZE

import opd_store
from loaders import layout
from loaders.layout import BATCH, Batch, Layout
from loaders.rollouts import FIELDS, Rollouts, Sample
from opd_train import CacheStream

ARRAYS = tuple(name for name in FIELDS if name != "token_ids")
BATCH_TOKENS = 16384
"""Of the stream's batches, as many as 16 rollouts have."""
RECORD_BATCH_BYTES = 4 << 20
"""Of the small caches here; the default would put a shard into one."""
GUESS = {"plain": lambda topk: 8 * topk + 17, "ladder/128": lambda topk: 2 * topk + 17}
"""Bytes a position, for cutting a cache into about so many shards."""


def write(data: Rollouts, folder: Path, n_shards: int, *, encoding: str) -> None:
    """A cache with the id table that it learns by itself."""
    shard_bytes = max(1, data.n_positions * GUESS[encoding](data.topk) // n_shards)
    meta = opd_store.CacheMeta(vocab_size=VOCAB_SIZE, tokenizer_fingerprint="sha256:" + "0" * 64)
    folder.rmdir()
    with opd_store.create(
        folder,
        meta=meta,
        topk=data.topk,
        encoding=encoding,
        batch_bytes=min(RECORD_BATCH_BYTES, shard_bytes),
        shard_bytes=shard_bytes * 19 // 20,
    ) as writer:
        for row, sample in enumerate(data.samples()):
            prompt_len = len(sample["token_ids"]) - len(sample["log_tail"])
            # The same text may come twice, and a cache keeps equal rollouts apart by their name.
            rollout = opd_store.Rollout(prompt_len=prompt_len, sample_id=str(row), **sample)
            if not writer.append(rollout):
                raise AssertionError(f"row {row} was taken for one that is there already")
        writer.commit()


def open_cache(uri: str, *, check_values: bool = True) -> opd_store.Cache:
    """A folder, or a bucket of the server that the environment names, without a local copy."""
    if not uri.startswith("s3://"):
        return opd_store.open(uri, check_values=check_values)
    options = {
        "key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret": os.environ["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
    }
    return opd_store.open(uri, check_values=check_values, storage_options=options, cache_dir=None)


class Reader:
    """`gather`, 16 rows at a time."""

    def __init__(self, uri: str, *, ring: bool, check_values: bool = True) -> None:
        self.cache = open_cache(uri, check_values=check_values)
        self.remote = uri.startswith("s3://")
        self.room: dict[str, NDArray[Any]] | None = {} if ring else None

    def __len__(self) -> int:
        return len(self.cache)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The memory of the batch before it."""
        assert self.room is not None
        held = self.room.get(name)
        if held is None or len(held) < shape[0]:
            held = self.room[name] = np.empty((int(1.5 * shape[0]), *shape[1:]), dtype)
        return held[: shape[0]]

    def epoch(self, *, ranks: int | None = None) -> Iterator[Batch]:
        """With read-ahead of the next batch where the cache is remote."""
        bounds = range(0, len(self.cache), BATCH)
        groups = [range(start, min(start + BATCH, len(self.cache))) for start in bounds]
        for number, rows in enumerate(groups):
            for ahead in groups[number + 1 : number + 3] if self.remote else ():
                self.cache.prefetch(ahead, ranks=ranks, columns=ARRAYS)
            found = opd_store.gather(
                self.cache,
                rows,
                ranks=ranks,
                columns=ARRAYS,
                allocate=None if self.room is None else self.allocate,
            )
            batch = {"lengths": torch.from_numpy(found.lengths)}
            yield batch | {name: layout.tensor(getattr(found, name)) for name in FIELDS}

    def rollout(self, row: int) -> Sample:
        """Views where the encoding has them."""
        found = self.cache.rollout(row, columns=ARRAYS)
        return {name: getattr(found, name) for name in FIELDS}


class OneRow(Reader):
    """`gather` of single rows."""

    def rollout(self, row: int) -> Sample:
        found = opd_store.gather(self.cache, [row], columns=ARRAYS)
        return {name: getattr(found, name) for name in FIELDS}


class StreamReader:
    """`CacheStream`: batches of `TeacherBatch`, whose token ids are 64 bits wide already."""

    def __init__(self, uri: str, **options: str | int | None) -> None:
        self.cache = open_cache(uri)
        self.options = options

    def __len__(self) -> int:
        return len(self.cache)

    def batches(self, **options: str | int | None) -> Iterator[Batch]:
        """An epoch."""
        with_defaults = {"batch_tokens": BATCH_TOKENS} | self.options | options
        for batch in CacheStream(self.cache, **with_defaults):
            found = {"token_ids": batch.input_ids, "lengths": batch.cu_seqlens.diff()}
            yield found | {name: getattr(batch, name) for name in ARRAYS}

    def epoch(self) -> Iterator[Batch]:
        return self.batches()


def shuffled(reader: StreamReader, workers: int, seed: int) -> Iterator[Batch]:
    """In the order that the reader was opened for."""
    return reader.batches(workers=workers, seed=seed)


def endless(reader: StreamReader, workers: int, seed: int) -> Iterator[Batch]:
    """As a trainer of several epochs reads."""
    return reader.batches(workers=workers, seed=seed, epochs=None)


def _layouts(encoding: str) -> Iterator[Layout]:
    name = f"ours: {encoding}"
    made = functools.partial(
        Layout, half=False, checked=True, write=functools.partial(write, encoding=encoding)
    )
    yield made(
        name=f"{name}, gather, ring",
        note="`gather` into arrays that the next batch reuses",
        open=functools.partial(Reader, ring=True),
        few_ranks=lambda reader, ranks: reader.epoch(ranks=ranks),
        ring=True,
        tasks=frozenset({"epoch", "random", "first", "memory", "bucket", "cold"}),
    )
    made = functools.partial(made, stores=f"{name}, gather, ring")
    yield made(
        name=f"{name}, gather",
        note="`gather` into new arrays; a random rollout is `gather` of one row",
        open=functools.partial(OneRow, ring=False),
        tasks=frozenset({"epoch", "random"}),
    )
    for workers in (0, 1, 2):
        yield made(
            name=f"{name}, stream, {workers} workers",
            note="`CacheStream(shuffle='none')`, token ids of 64 bits",
            open=functools.partial(StreamReader, shuffle="none", workers=workers),
            tasks=frozenset({"epoch", "memory", "bucket"} if workers == 0 else {"epoch"}),
        )
    for order in ("global", "block"):
        yield made(
            name=f"{name}, stream, {order}",
            note=f"`CacheStream(shuffle={order!r})`",
            open=functools.partial(StreamReader, shuffle=order),
            shuffled=shuffled,
            endless=endless,
            tasks=frozenset({"shuffled", "first", "stall"} if order == "global" else {"shuffled", "stall"}),
        )


LAYOUTS = (*_layouts("plain"), *_layouts("ladder/128"))
