"""Tar files of Megatron-LM's offline logits distillation (`megatron/training/distillation`).

Files `cp{C}_dp{D}__{I}.tar` hold `_meta.json` and, for each iteration, `{iteration}.pt.zst`: lists of
microbatches with log-probs [S, B, k] and ids of 17 bits. They hold no tokens, see `megatron_tokens`.

Axes: S = positions of a sequence, B = sequences of a microbatch, k = entries, G = context-parallel ranks.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading import torch_load
from opd_tools.converters.trainers import megatron_tokens

_TAR = re.compile(r"(?:^|/)cp(?P<cp>\d+)_dp(?P<dp>\d+)__(?P<iteration>\d+)\.tar$")
_MEMBER = re.compile(r"^(?P<iteration>\d+)\.pt\.zst$")
_META = "_meta.json"
MOST_VOCABULARY = 1 << 17
"""Megatron stores 17 bits of an id, and refuses larger vocabularies."""
_MOST_MEMBER = 4 << 30
"""Bytes of one iteration, unpacked, and"""
_MOST_RATIO = 256
"""how often as many as packed; what top-p left out packs well."""
_ALWAYS = 64 << 20
"""Bytes that any may have."""
_LOOKED_AT = 4000
_FEWEST = 64
"""With fewer positions than this nothing is decided."""
_FEWEST_HITS = 0.1
"""Share of tokens that have to be the likeliest of their row: with tokens of another order it is near 0."""
_EMPTY = 131071
"""What the index sentinel -1 becomes in 17 bits; its log-prob, -1000, is a filler anyway."""

Parts = dict[tuple[int, int], list[str]]


def detect(source: Source) -> bool:
    """Whether files are called so."""
    return any(_TAR.search(name) for name in source.names)


def read(source: Source, settings: ReadSettings) -> Contents:
    """Tokens come from a file beside the tar files, as `megatron_tokens.find` says.

    Raises:
        FormatError: no such files, or ranks are missing.
        InvalidArgumentError: no tokens, or a vocabulary that does not fit into 17 bits.
    """
    parts = _parts(source)
    if settings.vocab_size > MOST_VOCABULARY:
        raise InvalidArgumentError(
            f"megatron: a vocabulary of {settings.vocab_size} does not fit into the 17 bits that Megatron "
            "stores of an id; files of such a teacher have wrong ids"
        )
    tokens = megatron_tokens.find(source, settings)
    topk = _topk(source, parts)
    return Contents(
        records=_records(source, parts, tokens),
        topk=topk,
        lost=(
            f"tokens are not in the files: {source.shown(tokens)} has them, and only its order ties them",
            "where the prompt ends, and padding: all tokens after the first count as response",
        ),
    )


def _parts(source: Source) -> Parts:
    """Tar files of each rank, by iteration."""
    found: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for name in source.names:
        if match := _TAR.search(name):
            rank = int(match["cp"]), int(match["dp"])
            found.setdefault(rank, []).append((int(match["iteration"]), name))
    if not found:
        raise FormatError(f"{source.uri}: no files called cp0_dp0__100.tar or so")
    n_cp, n_dp = (1 + max(ranks) for ranks in zip(*found, strict=True))
    missing = {(cp, dp) for cp in range(n_cp) for dp in range(n_dp)} - found.keys()
    if missing:
        cp, dp = min(missing)
        raise FormatError(f"{source.uri}: no files cp{cp}_dp{dp}__*.tar, but of other ranks")
    return {rank: [name for _, name in sorted(files)] for rank, files in found.items()}


def _topk(source: Source, parts: Parts) -> int:
    """As the metadata of the first file says."""
    name = parts[0, 0][0]
    with source.open(name) as file:
        for member, data in _members(file, source.shown(name)):
            if member != _META:
                break
            try:
                return int(json.loads(data)["saver"]["k"])
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{source.shown(name)}, {_META}: no saver.k: {error!s:.100}") from error
    raise FormatError(f"{source.shown(name)}: does not begin with {_META}")


def _members(file: IO[bytes], shown: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar's members, in order. Raises FormatError."""
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if member.name != _META and not _MEMBER.match(member.name):
                    continue
                # A sparse one is as large as its header says, whatever the file holds.
                if not member.isreg() or member.issparse():
                    raise FormatError(
                        f"{shown}, {member.name}: a link or a sparse file; expected a plain one"
                    )
                found = tar.extractfile(member)
                assert found is not None
                data = found.read(_MOST_MEMBER + 1)
                if len(data) != member.size:
                    raise FormatError(f"{shown}, {member.name}: cut off, or larger than {_MOST_MEMBER} bytes")
                yield member.name, data
    except tarfile.TarError as error:
        raise FormatError(f"{shown}: not a tar file, damaged, or cut off: {error!s:.200}") from error


def _records(source: Source, parts: Parts, tokens_name: str) -> Iterator[Record]:
    shown = source.shown(tokens_name)
    tokens = megatron_tokens.sequences(source, tokens_name)
    likeliest = _Likeliest(shown)
    for where, ids, logprob in _sequences(source, parts):
        row = next(tokens, None)
        if row is None:
            raise FormatError(f"{shown}: ends before {where}; it is not of the same run")
        if len(row) not in (len(ids), len(ids) + 1):
            raise FormatError(
                f"{where}: {len(ids)} rows, but {shown} has {len(row)} tokens there; expected {len(ids)} or "
                f"{len(ids) + 1}"
            )
        size = len(row) - 1
        likeliest.look(row, ids[:size], logprob[:size])
        yield Record(where=where, token_ids=row, topk_ids=ids[:size], topk_logprob=logprob[:size])
    likeliest.require()
    if next(tokens, None) is not None:
        raise FormatError(f"{shown}: more sequences than the tar files; not of the same run")


class _Likeliest:
    """Whether tokens belong to the rows at all; whether rows are off by one is asked for all formats."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._positions = 0
        self._hits = np.zeros(3, np.int64)

    def look(self, tokens: NDArray[np.int64], ids: NDArray[np.int64], logprob: NDArray[np.float32]) -> None:
        if self._positions >= _LOOKED_AT or len(ids) < 3:
            return
        best = ids[np.arange(len(ids)), logprob.argmax(axis=1)][1:-1]
        for place in range(3):
            self._hits[place] += (best == tokens[1 + place : 1 + place + len(best)]).sum()
        self._positions += len(best)
        if self._positions >= _LOOKED_AT:
            self.require()

    def require(self) -> None:
        hits = int(self._hits.max())
        if self._positions >= _FEWEST and hits < _FEWEST_HITS * self._positions:
            raise FormatError(
                f"{self._shown}: {hits / self._positions:.1%} of its tokens are the likeliest of their rows "
                "in the tar files; it is in another order, or of another run"
            )


def _sequences(source: Source, parts: Parts) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.float32]]]:
    """Ids and log-probs [S, k] in the order of training: iteration, microbatch, data rank, place in it."""
    n_cp, n_dp = (1 + max(ranks) for ranks in zip(*parts, strict=True))
    streams = {rank: _iterations(source, names) for rank, names in sorted(parts.items())}
    while True:
        loaded = {rank: next(stream, None) for rank, stream in streams.items()}
        if all(one is None for one in loaded.values()):
            return
        iterations = {None if one is None else one[0] for one in loaded.values()}
        counts = {0 if one is None else len(one[1]) for one in loaded.values()}
        if len(iterations) > 1 or len(counts) > 1:
            raise FormatError(f"{source.uri}: ranks have different iterations or microbatches: {iterations}")
        (iteration,), (count,) = iterations, counts
        for microbatch in range(count):
            for dp in range(n_dp):
                where = f"iteration {iteration}, microbatch {microbatch}, data rank {dp}"
                chunks = [loaded[cp, dp][1][microbatch] for cp in range(n_cp)]  # type: ignore[index]
                values, ids = _joined(chunks, where)
                for number in range(values.shape[1]):
                    yield f"{where}, sequence {number}", ids[:, number], values[:, number]


def _iterations(
    source: Source, names: list[str]
) -> Iterator[tuple[int, list[tuple[NDArray[Any], NDArray[Any]]]]]:
    """Each iteration of a rank: its microbatches' log-probs and ids."""
    for name in names:
        shown = source.shown(name)
        with source.open(name) as file:
            for member, data in _members(file, shown):
                if match := _MEMBER.match(member):
                    where = f"{shown}, {member}"
                    yield (
                        int(match["iteration"]),
                        _microbatches(torch_load.load(_unpacked(data, where), where), where),
                    )


def _unpacked(data: bytes, where: str) -> bytes:
    most = min(_MOST_MEMBER, max(_ALWAYS, _MOST_RATIO * len(data)))
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            found = reader.read(most + 1)
        complete = zstandard.frame_content_size(data) in (-1, len(found))
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: damaged zstd: {error!s:.100}") from error
    if len(found) > most or not complete:
        raise FormatError(f"{where}: cut off, or more than {most} bytes unpacked")
    return found


def _has_lists(loaded: object, names: tuple[str, ...]) -> bool:
    return isinstance(loaded, dict) and all(isinstance(loaded.get(name), list) for name in names)


def _microbatches(loaded: Any, where: str) -> list[tuple[NDArray[Any], NDArray[Any]]]:  # noqa: ANN401
    names = ("values", "indices_low", "bit_17")
    parts: list[list[Any]] = [loaded[name] for name in names] if _has_lists(loaded, names) else []
    if len({len(part) for part in parts}) != 1:
        raise FormatError(
            f"{where}: expected lists of tensors values, indices_low and bit_17, as long as another"
        )
    found = []
    for values, low, high in zip(*parts, strict=True):
        shapes = {np.shape(values), np.shape(low), np.shape(high)}
        if len(shapes) > 1 or np.ndim(values) != 3 or np.asarray(values).dtype.kind != "f":
            raise FormatError(
                f"{where}: expected log-probs and ids of one shape [S, B, k], found {sorted(shapes)}"
            )
        ids = (np.asarray(high).astype(np.int64) << 16) | np.asarray(low).astype(np.int64)
        values = np.asarray(values, np.float32)
        found.append((values, np.where((ids == _EMPTY) & (values <= -1e3), -1, ids)))
    return found


def _joined(
    chunks: list[tuple[NDArray[Any], NDArray[Any]]], where: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Whole sequences. Of G ranks of context parallelism, rank g has the parts g and 2G - 1 - g of 2G."""
    if len(chunks) == 1:
        return chunks[0]
    k = max(values.shape[2] for values, _ in chunks)
    halves: list[tuple[NDArray[Any], NDArray[Any]] | None] = [None] * (2 * len(chunks))
    for rank, (values, ids) in enumerate(chunks):
        if values.shape[:2] != chunks[0][0].shape[:2] or values.shape[0] % 2:
            raise FormatError(f"{where}: context ranks have different or odd numbers of positions")
        room = ((0, 0), (0, 0), (0, k - values.shape[2]))
        values = np.pad(values, room, constant_values=-np.inf)
        ids = np.pad(ids, room, constant_values=-1)
        half = values.shape[0] // 2
        halves[rank] = values[:half], ids[:half]
        halves[-1 - rank] = values[half:], ids[half:]
    joined = [half for half in halves if half is not None]
    return np.concatenate([values for values, _ in joined]), np.concatenate([ids for _, ids in joined])


FORMAT = Format(
    name="megatron",
    title="Megatron-LM logits tar",
    alignment="source: row t is about token t + 1; order of training",
    keeps="the top-k as it was rounded, without what top-p left out",
    loses="tokens (from a file beside), the tail (1 - sum), masks; the identity of teacher and data",
    tested="files that Megatron-LM's packing and writing functions made",
    detect=detect,
    read=read,
)
