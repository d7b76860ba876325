"""ArrayRecord files of MaxText's `save_top_k_teacher_logits.py`, a sequence a record."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Tally, Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.trainers.tf_example import parse

_ENDINGS = (".array_record", ".arrayrecord")
_BATCH_RECORDS = 8
_NEEDED = ("inputs", "top_k_logits", "top_k_indices")


def detect(source: Source) -> bool:
    """Whether there are ArrayRecord files; nothing else that is known here comes in them."""
    return bool(source.named(*_ENDINGS))


def read(source: Source, settings: ReadSettings) -> Contents:
    """The first record tells how many entries a row has.

    Raises:
        FormatError: no such files, or the first is damaged or holds something else.
        InvalidArgumentError: the array_record package is missing.
    """
    del settings
    names = source.named(*_ENDINGS)
    if not names:
        raise FormatError(f"{source.uri}: no ArrayRecord files")
    first, where = next(_examples(source, names[:1]), ({}, source.uri))
    ids = _rows(first, where)[1]
    tally = Tally()
    lost = ["logits without their logsumexp: log-probs sum to 1 over the entries, no tail is known"]
    lost.append("sequence_hash, which Python salts anew in every process")
    if "targets_segmentation" not in first:
        lost.append("which tokens were trained on: all after the first count as response")
    return Contents(
        records=_records(source, names, ids.shape[1], tally),
        topk=ids.shape[1],
        values=Values.RENORMALISED,
        lost=tuple(lost),
        tally=tally,
    )


def _records(source: Source, names: list[str], topk: int, tally: Tally) -> Iterator[Record]:
    for example, where in _examples(source, names):
        logits, ids = _rows(example, where)
        if ids.shape[1] != topk:
            raise FormatError(f"{where}: {ids.shape[1]} entries a token, the first record has {topk}")
        tokens = _integers(example, "inputs", len(ids), where)
        segments = _integers(example, "inputs_segmentation", len(ids), where, absent=1)
        trained = _integers(example, "targets_segmentation", len(ids), where, absent=1)
        targets = _integers(example, "targets", len(ids), where) if "targets" in example else None
        bounds = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(ids)]
        for number, (first, end) in enumerate(pairwise(bounds)):
            if segments[first] == 0:
                continue
            kept = tokens[first:end]
            if targets is not None:
                same = targets[first : end - 1] == tokens[first + 1 : end]
                # Where a token is not trained on its target may be a filler.
                if not (same | (trained[first : end - 1] == 0)).all():
                    at = int(np.argmin(same))
                    raise FormatError(
                        f"{where}, position {first + at}: row t is about target {targets[first + at]}, but "
                        f"token t + 1 is {tokens[first + at + 1]}; only models of the next token can be "
                        "converted"
                    )
                if trained[end - 1] == segments[first]:
                    # Cut at the sequence's end, the last target is a token that the inputs do not have.
                    kept = np.append(kept, targets[end - 1])
            size = len(kept) - 1
            if size < end - first:
                tally["rows about the token after the last one, which the file does not hold"] += 1
            if size < 1:
                tally["sequences of one token, left out"] += 1
                continue
            mask = trained[first : first + size] != 0
            yield Record(
                where=where if len(bounds) == 2 else f"{where}, sequence {number}",
                token_ids=kept,
                topk_ids=ids[first : first + size],
                topk_logprob=logits[first : first + size],
                loss_mask=None if mask.all() else mask,
            )


def _rows(example: dict[str, Any], where: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits and ids [L, k]; flat in the file."""
    for name in _NEEDED:
        if not isinstance(example.get(name), np.ndarray) or not example[name].size:
            raise FormatError(f"{where}: no numbers called {name}; found {', '.join(sorted(example))[:200]}")
    size = example["inputs"].size
    logits, ids = example["top_k_logits"], example["top_k_indices"]
    if logits.size != ids.size or logits.size % size or ids.dtype != np.int64:
        raise FormatError(
            f"{where}: expected as many logits as ids, whole rows for {size} tokens, found {logits.size} and "
            f"{ids.size}"
        )
    return logits.reshape(size, -1), ids.reshape(size, -1)


def _integers(
    example: dict[str, Any], name: str, size: int, where: str, absent: int | None = None
) -> NDArray[np.int64]:
    values = example.get(name)
    if values is None and absent is not None:
        return np.full(size, absent, np.int64)
    if not isinstance(values, np.ndarray) or values.dtype != np.int64 or len(values) != size:
        raise FormatError(f"{where}, {name}: expected {size} integers")
    return values


def _examples(source: Source, names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise InvalidArgumentError(
            "maxtext: reading ArrayRecord needs a package; pip install 'opd-store[convert]'"
        ) from error
    for name in names:
        shown = source.shown(name)
        with _local(source, name) as path:
            try:
                reader = ArrayRecordReader(path)
                count = reader.num_records()
                if not count:
                    # What the package makes of any file that it does not know.
                    raise FormatError(f"{shown}: no records; not an ArrayRecord file, empty, or cut off")
                for start in range(0, count, _BATCH_RECORDS):
                    records = reader.read(start, min(count, start + _BATCH_RECORDS))
                    for number, record in enumerate(records, start):
                        yield parse(record), f"{shown}, record {number}"
                reader.close()
            except (RuntimeError, IndexError, ValueError) as error:
                if isinstance(error, FormatError):
                    raise
                raise FormatError(f"{shown}: damaged, or no tf.train.Example: {error!s:.200}") from error


@contextmanager
def _local(source: Source, name: str) -> Iterator[str]:
    """A path that the package can open; a file from elsewhere is copied."""
    if isinstance(source.fs, LocalFileSystem):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records"
        with source.open(name) as file, path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        yield str(path)


FORMAT = Format(
    name="maxtext",
    title="MaxText ArrayRecord",
    alignment="source: row t is about token t + 1",
    keeps="token ids of each packed sequence, the ratios within the top-k, the target mask",
    loses="the logsumexp, so log-probs and tail; the prompt's length",
    tested="files that MaxText's create_tf_example and array_record made",
    detect=detect,
    read=read,
)
