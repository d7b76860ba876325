"""This project's page encodings behind the calls that the benchmark programs use.

A rollout here is one window. Sizes are those of whole pages with their headers and checksums, without the id
table, which is counted apart; `decode` checks the checksum of every page it reads, as the cache does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import windows
from numpy.typing import NDArray

from opd_store import ENCODINGS, IdTable, build_id_table, layout
from opd_store import encodings as pages_of

ROLLOUT_HASH = bytes(32)
TABLE_RANKS = 64
WITH_TABLE = ("f32", "ladder16", "ladder/128", "ladder/64")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to store a rollout's top-k."""

    encoding: str
    bands: tuple[int, ...]
    table: IdTable | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        words = [f"ours: {self.encoding}"]
        if self.table is not None:
            words.append("id table" if len(self.table.lists) else "frequency order")
        return ", ".join(words + (["in bands"] if len(self.bands) > 1 else []))


def variants(topk: int, table: IdTable) -> Iterator[Variant]:
    """Every encoding as one page a rollout and in the default bands, without and with an id table."""
    shapes = list(dict.fromkeys([(topk,), layout.band_ends(topk)]))
    for bands in shapes:
        for encoding in ENCODINGS:
            yield Variant(encoding, bands)
    yield Variant("ladder/128", (topk,), IdTable(table.by_rank, table.lists[:0]))
    for bands in shapes:
        for encoding in WITH_TABLE:
            yield Variant(encoding, bands, table)


def id_table(data_dir: Path, *, positions: int | None = None) -> IdTable:
    """The id table learnt from the training windows, kept beside them for the next call."""
    path = data_dir / f"table-{positions or 'all'}.ids"
    if path.exists():
        return IdTable.from_bytes(np.fromfile(path, np.uint8), where=str(path))
    train = windows.keep_ranks(windows.load(data_dir, part="train", positions=positions), TABLE_RANKS)
    table = build_id_table(list(train.ids), vocab_size=train.vocab_size)
    path.write_bytes(table.to_bytes())
    return table


def remap_table(table: IdTable, new_ids: NDArray[np.uint32], vocab_size: int) -> IdTable:
    """The same table for tokens that have other ids; ids that no token has come last."""
    by_rank = new_ids[table.by_rank]
    unused = np.setdiff1d(np.arange(vocab_size, dtype=np.uint32), by_rank)
    return IdTable(np.concatenate([by_rank, unused]), new_ids[table.lists])


def encode(
    ids: NDArray[np.uint32], logprob: NDArray[np.float32], log_tail: NDArray[np.float32], variant: Variant
) -> list[bytes]:
    """Pages of one rollout, one a band.

    Args:
        ids, logprob: [P, K].
        log_tail: [P].
    """
    return pages_of.encode_pages(
        pages_of.Band(ids, logprob, log_tail),
        encoding=variant.encoding,
        bands=variant.bands,
        rollout_hash=ROLLOUT_HASH,
        id_table=variant.table,
    ).pages


def decode(
    pages: list[bytes], variant: Variant, *, n_positions: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """All ranks of one rollout, in new arrays."""
    size = (n_positions, variant.bands[-1])
    found = (np.empty(size, np.int32), np.empty(size, np.float32), np.empty(n_positions, np.float32))
    decode_into(*found, pages, variant)
    return found


def decode_into(
    ids: NDArray[np.int32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    pages: list[bytes],
    variant: Variant,
) -> None:
    """As many ranks of one rollout as the arrays have, the end of a band, reading no page beyond them.

    Args:
        ids, logprob: [P, ranks].
        log_tail: [P].
    """
    digest = None if variant.table is None else variant.table.digest
    start, words = 0, ids.view(np.uint32)
    for page, end in zip(pages, variant.bands, strict=False):
        if end > ids.shape[1]:
            break
        buffer = np.frombuffer(page, np.uint8)
        pages_of.check_page_crc(buffer, ROLLOUT_HASH, digest, where="bench")
        pages_of.decode_into(
            buffer,
            pages_of.PageShape(layout.KIND_TOPK, start, end, len(ids)),
            encoding=variant.encoding,
            id_table=variant.table,
            where="bench",
            ids=words[:, start:end],
            logprob=logprob[:, start:end],
            log_tail=log_tail if end == ids.shape[1] else None,
        )
        start = end
    assert start == ids.shape[1], f"{ids.shape[1]} ranks are not the end of a band of {variant.bands}"
