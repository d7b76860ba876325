"""Token ids of a page: as they are, by frequency rank, or as codes in lists of an id table.

One byte says which. Entries stand position by position, in rank order; those of shorter rows are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import layout
from opd_store.encodings.idtable import ESCAPE, IdTable
from opd_store.encodings.page import PageShape
from opd_store.encodings.planes import StreamReader, StreamWriter
from opd_store.errors import FormatError

PLAIN, BY_FREQUENCY, BY_LIST = range(3)


def write_ids(
    streams: StreamWriter, ids: NDArray[np.uint32], present: NDArray[np.bool_] | None, table: IdTable | None
) -> None:
    """Append ids [P, k]; `present` [P, k] is None where every entry counts."""
    flat = ids.reshape(-1) if present is None else ids[present]
    mode = PLAIN if table is None else BY_LIST if len(table.lists) else BY_FREQUENCY
    streams.ints(np.array([mode], np.uint8))
    if table is None:
        streams.ints(flat)
    elif mode == BY_FREQUENCY:
        streams.ints(table.rank_of[flat])
    else:
        chosen = table.choose(ids, present)
        streams.ints(chosen)
        counts = ids.shape[1] if present is None else present.sum(axis=1)
        codes = table.codes(flat, np.repeat(chosen, counts))
        streams.ints(codes)
        streams.ints(table.rank_of[flat[codes == ESCAPE]])


@dataclass(frozen=True, slots=True)
class IdStreams:
    """What a page holds, before it is put together. All limits are proven."""

    mode: int
    """PLAIN, BY_FREQUENCY or BY_LIST."""
    values: NDArray[Any]
    """[n] ids, frequency ranks or codes."""
    lists: NDArray[Any] | None = None
    """[P] list of every row."""
    escaped: NDArray[Any] | None = None
    """Frequency rank of the ids whose code is 255, in order."""


def parse_ids(
    streams: StreamReader, counts: NDArray[np.intp] | None, shape: PageShape, table: IdTable | None
) -> IdStreams:
    """Take what `write_ids` appended.

    Raises:
        FormatError: an id that the table or the vocabulary does not have.
    """
    n_entries = shape.entries(shape.rank_start, shape.rank_end, counts)
    mode = int(streams.ints(1, limit=BY_LIST, what="id mode")[0])
    if mode == PLAIN:
        return IdStreams(mode, streams.ints(n_entries, limit=layout.NO_ID - 1, what="ids"))
    if table is None:
        raise FormatError(f"{streams.where}: ids refer to an id table, and the page says it uses none")
    last_rank = table.vocab_size - 1
    if mode == BY_FREQUENCY:
        return IdStreams(mode, streams.ints(n_entries, limit=last_rank, what="frequency ranks"))
    if not len(table.lists):
        raise FormatError(f"{streams.where}: ids refer to lists, and the id table has none")
    lists = streams.ints(shape.n_positions, limit=len(table.lists) - 1, what="lists")
    codes = streams.ints(n_entries, limit=ESCAPE, what="id codes")
    n_escaped = int(np.count_nonzero(codes == ESCAPE))
    return IdStreams(mode, codes, lists, streams.ints(n_escaped, limit=last_rank, what="escaped ids"))


def assemble_ids(
    parsed: IdStreams, counts: NDArray[np.intp] | None, shape: PageShape, table: IdTable | None
) -> NDArray[np.uint32]:
    """[n] ids, without padding."""
    if parsed.mode == PLAIN or table is None:
        return parsed.values.astype(np.uint32, copy=False)
    # No index can be out of range, and "clip" spares numpy the search for one.
    if parsed.mode == BY_FREQUENCY:
        return table.by_rank.take(parsed.values, mode="clip")
    assert parsed.lists is not None
    assert parsed.escaped is not None
    base = parsed.lists.astype(np.intp) << 8
    if counts is None:
        place = (base[:, None] | parsed.values.reshape(shape.n_positions, shape.n_ranks)).reshape(-1)
    else:
        place = np.repeat(base, counts) | parsed.values
    ids: NDArray[np.uint32] = table.padded_lists.take(place, mode="clip")
    ids[np.flatnonzero(parsed.values == ESCAPE)] = table.by_rank.take(parsed.escaped, mode="clip")
    return ids
