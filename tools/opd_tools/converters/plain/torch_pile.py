"""Directories of `.pt` files: dicts of stacked tensors, lists of dicts, the two directories of whittle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opd_store import FormatError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading import torch_load
from opd_tools.converters.reading.field_rows import to_record
from opd_tools.converters.reading.fields import NESTED, Fields, resolve

_ENDINGS = (".pt", ".pth")
_ASIDE = ("metadata.pt",)
"""Files that tell about the pile and hold no rows."""
_TOKENS = ("input_ids", "token_ids", "tokens", "inputs")


def detect(source: Source) -> bool:
    """Whether there are `.pt` files."""
    return bool(_names(source))


def _names(source: Source) -> list[str]:
    """Files with rows; those of an `indices/` directory come with the ones in `logits/`."""
    names = [name for name in source.named(*_ENDINGS) if name.rpartition("/")[2] not in _ASIDE]
    return [name for name in names if _folder(name) != "indices" or not _twin(source, name, "logits")]


def _folder(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def _twin(source: Source, name: str, folder: str) -> str | None:
    """The file of the same batch beside: logits/logits_batch_0.pt and indices/indices_batch_0.pt."""
    path, _, last = name.rpartition("/")
    twin = f"{path.rpartition('/')[0]}/{folder}/{last.replace(_folder(name), folder)}"
    return twin if twin in source.names else None


def read(source: Source, settings: ReadSettings) -> Contents:
    """The first file tells the fields of all.

    Raises:
        FormatError: no `.pt` files, or the first is damaged or holds more than tensors.
        InvalidArgumentError: keys that cannot be told, or all logits without a word on how many to keep.
    """
    names = _names(source)
    if not names:
        raise FormatError(f"{source.uri}: no .pt files")
    first, where = next(_sequences(source, names[:1]), ({}, source.uri))
    fields = _fields(first, settings, where)
    lost = fields.lost
    if "rows" not in settings.columns:
        lost = (
            *lost,
            "rows of as many as tokens were taken to be about token t + 1, as outputs of models are",
        )
    name = fields.names.get("topk_ids")
    return Contents(
        records=_records(source, names, fields),
        topk=fields.kept if name is None else fields.flat or int(np.shape(first[name])[-1]),
        values=fields.values,
        lost=lost,
    )


def _fields(first: Mapping[str, Any], settings: ReadSettings, where: str) -> Fields:
    depths = {key: np.ndim(value) for key, value in first.items() if np.ndim(value) <= NESTED}
    return resolve(depths, settings, where, source_aligned=True)


def _records(source: Source, names: list[str], fields: Fields) -> Iterator[Record]:
    for sequence, where in _sequences(source, names):
        missing = [name for name in fields.names.values() if name not in sequence]
        if missing:
            raise FormatError(f"{where}: no {', '.join(missing)}, which the first sequence has")
        yield to_record({field: sequence[name] for field, name in fields.names.items()}, fields, where)


def _sequences(source: Source, names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for name in names:
        shown = source.shown(name)
        content = _load(source, name)
        twin = _twin(source, name, "indices") if _folder(name) == "logits" else None
        if twin is not None and isinstance(content, dict):
            other = _load(source, twin)
            if not isinstance(other, dict) or content.get("batch_idx") != other.get("batch_idx"):
                raise FormatError(f"{shown}: {source.shown(twin)} is not of the same batch")
            content = {**other, **content}
        yield from _split(content, shown)


def _load(source: Source, name: str) -> Any:  # noqa: ANN401
    shown = source.shown(name)
    if (size := source.size(name)) > torch_load.MOST_BYTES:
        raise FormatError(f"{shown}: {size} bytes; .pt files are read up to {torch_load.MOST_BYTES} bytes")
    with source.open(name) as file:
        return torch_load.load(file.read(), shown)


def _split(content: Any, shown: str) -> Iterator[tuple[dict[str, Any], str]]:  # noqa: ANN401
    """The sequences of a file: of a list, of stacked tensors, or the one that it is."""
    if isinstance(content, list):
        for number, item in enumerate(content):
            if not isinstance(item, dict):
                raise FormatError(f"{shown}, item {number}: expected a dict of tensors")
            yield from _split(item, f"{shown}, item {number}")
        return
    if not isinstance(content, dict):
        raise FormatError(f"{shown}: expected a dict of tensors, or a list of such dicts")
    tokens = next((content[key] for key in _TOKENS if key in content), None)
    if tokens is not None and _depth(tokens) == 2:
        stacked = {
            key: value for key, value in content.items() if _depth(value) and len(value) == len(tokens)
        }
        for number in range(len(tokens)):
            yield {key: value[number] for key, value in stacked.items()}, f"{shown}, sequence {number}"
    else:
        yield content, shown


def _depth(value: Any) -> int:  # noqa: ANN401
    """Dimensions of an array, or of a list of arrays of different lengths."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else np.ndim(value)


FORMAT = Format(
    name="torch-pile",
    title=".pt files",
    alignment=(
        "as many rows as tokens: source (row t is about token t + 1), as model outputs are, or label with "
        "--column rows=label; one row less: about tokens 1, 2, ..."
    ),
    keeps="token ids, top-k, log-probs of sampled tokens, masks; of all logits a top-k and its exact tail",
    loses="logits without their logsumexp have no tail; nobody states teacher, temperature or prompt",
    tested="files of torch.save, and whittle's store_teacher_logits layout built from its source",
    detect=detect,
    read=read,
)
