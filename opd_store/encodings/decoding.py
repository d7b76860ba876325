"""Pages to rows of ids and log-probs: into new arrays, into those of a caller, or only taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import kernels, layout
from opd_store.encodings import f32, ladder, plain
from opd_store.encodings.f32 import FloatStreams
from opd_store.encodings.ids import IdStreams, assemble_ids, parse_ids
from opd_store.encodings.idtable import IdTable
from opd_store.encodings.ladder import LadderStreams
from opd_store.encodings.page import Band, Bytes, PageShape, open_page
from opd_store.encodings.planes import MAX_WINDOW, StreamReader, frame_content
from opd_store.errors import FormatError, InvalidArgumentError

CODECS: dict[str, ModuleType] = {name: codec for codec in (plain, f32, ladder) for name in codec.NAMES}


@dataclass(frozen=True, slots=True)
class PageStreams:
    """A packed page, decompressed and proven but not put together: about 2 bytes an entry instead of 8.

    What is left is arithmetic and gathers, which a GPU does faster: `opd_train.pages`.
    """

    scale: int
    """Units a nat of `ladder/s`; 0 for the other encodings."""
    shape: PageShape
    counts: NDArray[np.intp] | None
    """[P] ranks of each row, None where all have all."""
    logprobs: FloatStreams | LadderStreams
    ids: IdStreams
    draws: NDArray[np.uint32] | None
    """[n] draws of all entries."""
    id_table: IdTable | None


def decode_page(
    page: Bytes, shape: PageShape, *, encoding: str, id_table: IdTable | None = None, where: str
) -> Band:
    """Decode one page whose bytes are already trusted; `plain` without a copy.

    Raises:
        FormatError: the page breaks the specification.
    """
    if encoding == "plain":
        return _views(page, shape, where)
    flags, body = _open(page, shape, encoding, where)
    if kernels.COMPILED:
        size = (shape.n_positions, shape.n_ranks)
        draws = np.empty(size, np.uint32) if shape.kind == layout.KIND_SAMPLED else None
        band = Band(
            np.empty(size, np.uint32), np.empty(size, np.float32), np.empty(size[0], np.float32), draws
        )
        if _decode_compiled(
            body, flags, shape, encoding, id_table, band.ids, band.logprob, band.log_tail, draws
        ):
            return band
        del band, draws
    return _assemble(_parse(body, flags, shape, encoding, id_table, where), encoding)


def decode_into(
    page: Bytes,
    shape: PageShape,
    *,
    encoding: str,
    id_table: IdTable | None = None,
    where: str,
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32] | None = None,
    draws: NDArray[np.uint32] | None = None,
) -> None:
    """Decode one page like `decode_page`, into arrays that are there. After an error they hold anything.

    Args:
        ids, logprob: [P, k]; rows may be further apart than k, as in some columns of a larger array.
        log_tail: [P]; None if it is not wanted.
        draws: [P, k]; None if they are not wanted or there are none.

    Raises:
        FormatError: the page breaks the specification.
        InvalidArgumentError: an array of another shape, type or layout.
    """
    has_draws = shape.kind == layout.KIND_SAMPLED
    size = (shape.n_positions, shape.n_ranks)
    if not (
        _is_room(ids, np.uint32, size)
        and _is_room(logprob, np.float32, size)
        and (log_tail is None or _is_room(log_tail, np.float32, size[:1]))
        and (draws is None or (has_draws and _is_room(draws, np.uint32, size)))
    ):
        rows = (ids, logprob, log_tail, draws)
        found = ", ".join("none" if array is None else f"{array.dtype} {array.shape}" for array in rows)
        raise InvalidArgumentError(
            f"{where}: to decode into: expected ids uint32 {size}, log-probs float32 {size}, tails float32 "
            f"{size[:1]} or none, draws {f'uint32 {size} or ' if has_draws else ''}none, all writable, "
            f"the items of a row side by side; found {found}"
        )
    if encoding == "plain":
        band = _views(page, shape, where)
    else:
        flags, body = _open(page, shape, encoding, where)
        if _decode_compiled(body, flags, shape, encoding, id_table, ids, logprob, log_tail, draws):
            return
        band = _assemble(_parse(body, flags, shape, encoding, id_table, where), encoding)
    ids[...], logprob[...] = band.ids, band.logprob
    if log_tail is not None:
        log_tail[...] = band.log_tail
    if draws is not None and band.draws is not None:
        draws[...] = band.draws


def _is_room(array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> bool:
    """Whether values can be put there, in C too."""
    is_joined = len(shape) < 2 or shape[1] == 1 or array.strides[-1] == array.itemsize
    flags = array.flags
    return array.shape == shape and array.dtype == dtype and is_joined and flags.writeable and flags.aligned


def parse_page(
    page: Bytes, shape: PageShape, *, encoding: str, id_table: IdTable | None = None, where: str
) -> PageStreams:
    """Decompress a page of any encoding but `plain`, and prove every limit. Errors as for `decode_page`."""
    flags, body = _open(page, shape, encoding, where)
    return _parse(body, flags, shape, encoding, id_table, where)


def _views(page: Bytes, shape: PageShape, where: str) -> Band:
    flags, body = open_page(page, shape, encoding=plain.CODE, parameter=0, where=where)
    if flags:
        raise FormatError(f"{where}: a plain page with flags {flags}")
    has_draws = shape.kind == layout.KIND_SAMPLED
    return plain.decode(body, shape.n_positions, shape.n_ranks, has_draws=has_draws, where=where)


def _open(page: Bytes, shape: PageShape, encoding: str, where: str) -> tuple[int, Bytes]:
    codec = CODECS[encoding]
    parameter = codec.NAMES[encoding]
    flags, body = open_page(page, shape, encoding=codec.CODE, parameter=parameter, where=where)
    if shape.decoded_bytes > layout.MAX_DECODED_BYTES:
        raise FormatError(
            f"{where}: {shape.decoded_bytes} bytes once decoded, the limit is {layout.MAX_DECODED_BYTES}"
        )
    return flags, body


def _decode_compiled(
    body: Bytes,
    flags: int,
    shape: PageShape,
    encoding: str,
    id_table: IdTable | None,
    ids: NDArray[np.uint32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32] | None,
    draws: NDArray[np.uint32] | None,
) -> bool:
    """Whether the page was decoded. If not, the numpy code finds out why, or does it."""
    uses_table = flags & layout.PAGE_USES_TABLE
    if not kernels.COMPILED or (uses_table and id_table is None):
        return False
    codec = CODECS[encoding]
    parameter = codec.NAMES[encoding]
    return kernels.decode_streams(
        body,
        frame_content,
        max_window=MAX_WINDOW,
        ranks=(shape.rank_start, shape.rank_end),
        ragged=bool(flags & layout.PAGE_RAGGED),
        scale=parameter,
        words=codec is f32,
        limit=codec.largest_value(parameter),
        id_table=(id_table.by_rank, id_table.padded_lists) if uses_table and id_table is not None else None,
        ids=ids,
        logprob=logprob,
        log_tail=log_tail,
        draws=draws,
        has_draws=shape.kind == layout.KIND_SAMPLED,
    )


def _parse(
    body: Bytes, flags: int, shape: PageShape, encoding: str, id_table: IdTable | None, where: str
) -> PageStreams:
    codec = CODECS[encoding]
    parameter = codec.NAMES[encoding]
    streams = StreamReader(body, where=where)
    counts = None
    if flags & layout.PAGE_RAGGED:
        counts = streams.ints(shape.n_positions, limit=shape.n_ranks, what="row lengths").astype(np.intp)
    table = id_table if flags & layout.PAGE_USES_TABLE else None
    if flags & layout.PAGE_USES_TABLE and table is None:
        raise FormatError(f"{where}: the page refers to an id table, and the cache has none")
    logprobs = codec.parse(streams, counts, shape, parameter=parameter)
    ids = parse_ids(streams, counts, shape, table)
    draws = None
    if shape.kind == layout.KIND_SAMPLED:
        n_entries = len(ids.values)
        draws = streams.ints(n_entries, limit=0xFFFFFFFF, what="draws").astype(np.uint32, copy=False)
    streams.finish()
    return PageStreams(parameter, shape, counts, logprobs, ids, draws, table)


def _assemble(parsed: PageStreams, encoding: str) -> Band:
    codec, shape = CODECS[encoding], parsed.shape
    present = None if parsed.counts is None else np.arange(shape.n_ranks) < parsed.counts[:, None]
    logprob, log_tail = codec.assemble(parsed.logprobs, present, shape, parameter=codec.NAMES[encoding])
    flat_ids = assemble_ids(parsed.ids, parsed.counts, shape, parsed.id_table)
    ids = _padded(flat_ids, present, shape, layout.NO_ID)
    draws = None if parsed.draws is None else _padded(parsed.draws, present, shape, 0)
    return Band(ids, logprob, log_tail, draws)


def _padded(
    values: NDArray[np.uint32], present: NDArray[np.bool_] | None, shape: PageShape, padding: int
) -> NDArray[np.uint32]:
    size = (shape.n_positions, shape.n_ranks)
    if present is None:
        return values.reshape(size)
    padded = np.full(size, padding, np.uint32)
    padded[present] = values
    return padded
