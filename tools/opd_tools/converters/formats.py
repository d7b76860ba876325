"""Every foreign format, by its name and by what a source looks like."""

from __future__ import annotations

from opd_store import InvalidArgumentError
from opd_tools.converters.core.format import Format
from opd_tools.converters.core.source import Source
from opd_tools.converters.plain import jsonl, safetensors_export, table, table_export, torch_pile
from opd_tools.converters.servers import llamacpp, openai, sglang, vllm
from opd_tools.converters.trainers import axolotl, distillkit, lightning, maxtext, megatron, nemo


def all_formats() -> tuple[Format, ...]:
    """Those that more than one could read are asked in this order."""
    return (
        lightning.FORMAT,
        distillkit.FORMAT,
        axolotl.FORMAT,
        nemo.FORMAT,
        vllm.FORMAT,
        sglang.FORMAT,
        llamacpp.FORMAT,
        openai.FORMAT,
        maxtext.FORMAT,
        megatron.FORMAT,
        torch_pile.FORMAT,
        table.FORMAT,
        table_export.DATASETS,
        jsonl.FORMAT,
        safetensors_export.FORMAT,
    )


def by_name(name: str) -> Format:
    """The format with this name. Raises InvalidArgumentError."""
    for candidate in all_formats():
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in all_formats())
    raise InvalidArgumentError(f"{name!r:.60} is no format; known are {known}")


def detect(source: Source) -> Format:
    """The format that a source is in. Raises InvalidArgumentError where none or several fit."""
    found = [candidate for candidate in all_formats() if candidate.detect and candidate.detect(source)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(candidate.name for candidate in found or all_formats() if candidate.read)
    how = "could be several" if found else "not recognised"
    raise InvalidArgumentError(f"{source.uri}: format {how}; say which with --from: {names}")
