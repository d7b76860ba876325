"""`opd convert`: foreign files into a cache, and a cache into foreign files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import click

import opd_store
from opd_store import (
    ENCODINGS,
    CacheExistsError,
    CacheMeta,
    InvalidArgumentError,
    ModelInfo,
)
from opd_tools.console import AT_LEAST_1, Meter, access_options, command, print_json, printable
from opd_tools.converters.core.format import ReadSettings, WriteSettings
from opd_tools.converters.core.source import Source
from opd_tools.converters.formats import all_formats, by_name, detect
from opd_tools.converters.importing import import_cache
from opd_tools.converters.reading.text import identity, tokenizer_file

_PATH = click.Path(path_type=Path)


@click.command("convert")
@click.argument("src")
@click.argument("dst")
@click.option("--from", "from_", metavar="FORMAT", help="What SRC is. Default: what it looks like.")
@click.option("--to", metavar="FORMAT", help="SRC is a cache; write DST in this format.")
@click.option(
    "--tokenizer", type=_PATH, help="tokenizer.json, or a directory with one, that the token ids belong to."
)
@click.option(
    "--tokenizer-fingerprint",
    metavar="sha256:...",
    help="Instead of --tokenizer, as `opd inspect` shows it; needs --vocab-size.",
)
@click.option("--vocab-size", type=AT_LEAST_1, help="Logits of the teacher. Default: ids of the tokenizer.")
@click.option("--topk", type=AT_LEAST_1, help="Ranks to keep; less likely ones join the tail. Default: all.")
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    default="ladder/128",
    show_default=True,
    help="How top-k pages are stored: plain and f32 keep every bit, ladder/s keeps log-probs to 1/(2s) nat.",
)
@click.option(
    "--id-table",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="Whether ids are coded by a table that is learnt on the way: smaller, and slower to write.",
)
@click.option("--teacher", help="Name of the model whose log-probs these are.")
@click.option("--teacher-revision", help="Its revision.")
@click.option("--teacher-digest", metavar="sha256:...", help="Digest of its weights, if known.")
@click.option("--temperature", type=float, help="At which its log-probs were computed. Default: unknown.")
@click.option("--licence", help="Terms the teacher's outputs come under.")
@click.option("--meta", type=_PATH, help="JSON with any fields of CacheMeta; the options above go before it.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD=NAME",
    help="For --from table: where a field is, such as token_ids=input_ids. Repeatable.",
)
@click.option("--config", type=_PATH, help="For --from distillkit: its compression config.")
@click.option(
    "--shift",
    default=0,
    show_default=True,
    help="Move rows to tokens so many places later: 1 if row t is about token t + 1 against the format.",
)
@click.option(
    "--commit-every",
    type=AT_LEAST_1,
    help="Rollouts after which work is safe from a kill, at the cost of a shorter shard. Default: whenever a "
    "shard is full.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@access_options
@command
def convert(src: str, dst: str, from_: str | None, to: str | None, **options: Any) -> None:  # noqa: ANN401
    """Convert SRC, in a foreign format, into the cache DST; or with --to the cache SRC into DST.

    Prints what was lost and keeps it in the provenance. A killed run goes on when the same command is given
    again; a finished one changes nothing. Formats: see `opd formats`.

    \b
    Example: opd convert logits.jsonl runs/cache --tokenizer models/teacher --teacher Qwen3-32B
    """
    if to is not None:
        if from_ is not None:
            raise InvalidArgumentError("--from and --to: give one of them; a cache is read without --from")
        _export(src, dst, to, options)
    else:
        _import(src, dst, from_, options)


def _import(src: str, dst: str, from_: str | None, options: dict[str, Any]) -> None:
    access = options["access"]
    source = Source(src, access["storage_options"])
    how = detect(source) if from_ is None else by_name(from_)
    if how.read is None:
        raise InvalidArgumentError(f"--from {how.name}: this format is written, not read")
    meta, tokenizer = _meta(options)
    columns = dict(_column(text) for text in options["columns"])
    settings = ReadSettings(
        vocab_size=meta.vocab_size,
        tokenizer=tokenizer,
        topk=options["topk"],
        columns=columns,
        config=options["config"],
    )
    with Meter("converting", "rollouts") as meter:
        version, existed, tally = import_cache(
            source,
            dst,
            how,
            settings=settings,
            meta=meta,
            encoding=options["encoding"],
            id_table=options["id_table"],
            shift=options["shift"],
            commit_every=options["commit_every"],
            access=access,
            on_progress=meter.count,
        )
    lost = {what: count for what, count in sorted(tally.items())}
    if options["as_json"]:
        print_json({"uri": version.uri, "format": how.name, "existed": existed, "lost": lost})
        return
    if existed:
        click.echo("opd: note: converted before, nothing to do", err=True)
    for what, count in lost.items():
        click.echo(f"opd: note: {f'{count:,} ' if count else ''}{printable(what)}", err=True)
    click.echo(printable(version.uri, None))


def _export(src: str, dst: str, to: str, options: dict[str, Any]) -> None:
    how = by_name(to)
    if how.write is None:
        raise InvalidArgumentError(f"--to {how.name}: this format is read, not written")
    if "://" in dst:
        raise InvalidArgumentError(f"{dst}: foreign files are written locally; copy them from there")
    out = Path(dst)
    if out.exists():
        raise CacheExistsError(f"{dst}: already exists; choose another path")
    tokenizer = None if options["tokenizer"] is None else tokenizer_file(options["tokenizer"])
    cache = opd_store.open(src, **options["access"])
    partial = out.with_name(out.name + ".partial")
    _remove(partial)
    with Meter("converting", "rollouts") as meter:
        try:
            how.write(cache, partial, WriteSettings(tokenizer=tokenizer, topk=options["topk"]), meter.update)
        except BaseException:
            _remove(partial)
            raise
    partial.rename(out)
    if options["as_json"]:
        print_json({"path": dst, "format": how.name, "rollouts": len(cache), "lost": how.loses})
        return
    click.echo(f"opd: note: {how.title} does not hold: {how.loses}", err=True)
    click.echo(printable(dst, None))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _meta(options: dict[str, Any]) -> tuple[CacheMeta, Path | None]:
    fields: dict[str, Any] = {}
    if options["meta"] is not None:
        try:
            fields = json.loads(options["meta"].read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(f"--meta {options['meta']}: not JSON: {error!s:.200}") from error
        if not isinstance(fields, dict):
            raise InvalidArgumentError(f"--meta {options['meta']}: expected an object")
    tokenizer = None
    if options["tokenizer"] is not None:
        tokenizer = tokenizer_file(options["tokenizer"])
        fields["tokenizer_fingerprint"], size = identity(tokenizer)
        fields.setdefault("vocab_size", size)
    if options["tokenizer_fingerprint"] is not None:
        if tokenizer is not None and options["tokenizer_fingerprint"] != fields["tokenizer_fingerprint"]:
            raise InvalidArgumentError(
                f"--tokenizer-fingerprint: {options['tokenizer_fingerprint']!s:.80}, but {tokenizer} has "
                f"{fields['tokenizer_fingerprint']}"
            )
        fields["tokenizer_fingerprint"] = options["tokenizer_fingerprint"]
    if options["vocab_size"] is not None:
        fields["vocab_size"] = options["vocab_size"]
    if "tokenizer_fingerprint" not in fields or "vocab_size" not in fields:
        raise InvalidArgumentError(
            "which tokenizer the ids belong to is not known; give --tokenizer with its tokenizer.json, or "
            "--tokenizer-fingerprint and --vocab-size"
        )
    if options["licence"] is not None:
        fields["licence"] = options["licence"]
    fields.setdefault("code_version", f"opd-store {opd_store.__version__}")
    meta = CacheMeta.from_json(fields, where=str(options["meta"] or "options"))
    given = {
        "name": options["teacher"],
        "revision": options["teacher_revision"],
        "weights_digest": options["teacher_digest"],
        "logprob_temperature": options["temperature"],
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        teacher = dataclasses.replace(meta.teacher or ModelInfo(name="unknown"), **given)
        meta = dataclasses.replace(meta, teacher=teacher)
    return meta, tokenizer


def _column(text: str) -> tuple[str, str]:
    field, equals, name = text.partition("=")
    if not equals or not field or not name:
        raise InvalidArgumentError(f"--column: expected FIELD=NAME, found {printable(text, 60)!r}")
    return field, name


@click.command("formats")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table.")
@command
def formats(as_json: bool, as_markdown: bool) -> None:
    """List the formats that `opd convert` reads and writes, and what each keeps and loses.

    \b
    Example: opd formats --json
    """
    rows = [
        {"name": how.name, "title": how.title, "read": how.read is not None, "written": how.write is not None}
        | {name: getattr(how, name) for name in ("alignment", "keeps", "loses", "tested")}
        for how in all_formats()
    ]
    if as_json:
        print_json(rows)
        return
    if as_markdown:
        click.echo("| format | | read | written | rows | kept | lost or unknown | tested on |")
        click.echo("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ways = {name: "yes" if row[name] else "no" for name in ("read", "written")}
        if as_markdown:
            cells = [f"`{row['name']}`", row["title"], *ways.values()]
            cells += [row[name] for name in ("alignment", "keeps", "loses", "tested")]
            click.echo(f"| {' | '.join(map(str, cells))} |")
            continue
        click.echo(f"{row['name']}: {row['title']}; read: {ways['read']}, written: {ways['written']}")
        for name, shown in (("alignment", "rows"), ("keeps", "keeps"), ("loses", "loses")):
            click.echo(f"    {shown}: {row[name]}")
