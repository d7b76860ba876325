"""`opd publish`: a cache where others find it, with a card, metadata and a preview."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import opd_store
from opd_store import CacheMeta, InvalidArgumentError, ModelInfo
from opd_store.storage import LocalStorage, resolve
from opd_tools.console import Meter, access_options, command, print_json, printable
from opd_tools.converters.reading.text import TextTokenizer, tokenizer_file
from opd_tools.destination import is_local, partial_path
from opd_tools.share import figures
from opd_tools.share.card import CARD, card
from opd_tools.share.contents import Contents, contents
from opd_tools.share.croissant import CROISSANT, croissant
from opd_tools.share.facts import facts_of, require
from opd_tools.share.fetch import download
from opd_tools.share.hub import Hub
from opd_tools.share.places import Item, Place
from opd_tools.share.preview import PREVIEW, preview
from opd_tools.share.transfer import Stage, place_of, stages, transmit

_TEACHER = {"teacher": "name", "teacher_revision": "revision", "teacher_digest": "weights_digest"}


@click.command("publish")
@click.argument("uri", metavar="CACHE")
@click.argument("dest")
@click.option("--licence", help="Terms the teacher's outputs come under. Default: as in CACHE.")
@click.option("--teacher", help="Name of the model that scored it. Default: as in CACHE.")
@click.option("--teacher-revision", help="Its revision. Default: as in CACHE.")
@click.option("--teacher-digest", metavar="sha256:...", help="Digest of its weights. Default: as in CACHE.")
@click.option("--title", help="Name for people. Default: the last part of DEST.")
@click.option(
    "--tag",
    help="Name for this version, such as v1.0.0. On the Hub it becomes a tag of the repository; elsewhere "
    "the card names it, and the digest is what others cite.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="tokenizer.json, or a directory with one: the preview gets the rollouts as text too.",
)
@click.option(
    "--preview",
    "n_preview",
    type=click.IntRange(min=1, max=10_000),
    default=100,
    show_default=True,
    help="Rollouts in the preview.",
)
@click.option("--private", is_flag=True, help="Make a new repository on the Hub private.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@access_options
@command
def publish(
    uri: str,
    dest: str,
    access: dict[str, Any],
    title: str | None,
    tag: str | None,
    tokenizer: Path | None,
    n_preview: int,
    private: bool,
    dry_run: bool,
    as_json: bool,
    **terms: str | None,
) -> None:
    """Copy CACHE to DEST for others to find: the Hub, a bucket, or a directory.

    DEST is hf://datasets/USER/NAME, s3://, gs://, az:// or a path.

    Writes a card (README.md), croissant.json, and a preview in Parquet beside it. Shards go first, the
    manifest last, and then the tag, so that nobody sees half of it. What is there is not sent again, and what
    arrived is proven, by the store's own checksum or by reading it back, as on the Hub and Azure. A cache
    without licence and teacher is refused; filling them in gives a new digest.

    \b
    Example: opd publish runs/cache hf://datasets/me/cache --licence apache-2.0 --tag v1.0.0
    """
    place = place_of(dest, access, private=private)
    with Meter("publishing", "bytes") as meter, contextlib.ExitStack() as stack:
        directory, pin = stack.enter_context(_local(uri, access, meter))
        whole, pin = stack.enter_context(_with_terms(directory, pin, terms, uri))
        found = contents(LocalStorage(whole), pin)
        digest = found.cache.digest
        extras = _describe(found, dest, title or _last(dest), tag or "", tokenizer, n_preview)
        steps = stages(found, whole, extras=extras)
        if dry_run:
            _show_plan(place, steps, digest, as_json)
            return
        sent = transmit(place, steps, on_bytes=meter.update)
    if tag is not None and isinstance(place, Hub):
        place.tag(tag, digest)
    pinned = f"{place.shown}@{digest}"
    if as_json:
        print_json(
            {
                "uri": pinned,
                "digest": digest,
                "tag": tag,
                "existed": not sent.files,
                "files": sent.files,
                "n_bytes": sent.n_bytes,
                "files_there": sent.there,
            }
        )
        return
    if not sent.files:
        click.echo("opd: note: published before, nothing to do", err=True)
    elif whole != directory:
        click.echo("opd: note: what was filled in is part of it, so it has a digest of its own", err=True)
    if tag is not None and not isinstance(place, Hub):
        click.echo("opd: note: there are no tags there; cite the digest", err=True)
    click.echo(printable(pinned, None))


@contextlib.contextmanager
def _local(uri: str, access: dict[str, Any], meter: Meter) -> Iterator[tuple[Path, str | None]]:
    """The cache on this machine, and its pin. What had to be fetched goes when all is done."""
    options = None if is_local(uri) else access.get("storage_options")
    place, pin = resolve(uri, storage_options=options)
    if isinstance(place, LocalStorage):
        yield place.root, pin
        return
    base = partial_path("publish " + uri)
    base.parent.mkdir(parents=True, exist_ok=True)
    yield base, download(uri, base, access, on_bytes=meter.update).digest
    shutil.rmtree(base)


@contextlib.contextmanager
def _with_terms(
    directory: Path, pin: str | None, terms: dict[str, str | None], uri: str
) -> Iterator[tuple[Path, str | None]]:
    """A cache with what was given filled in: the same one where that changes nothing.

    Raises:
        InvalidArgumentError: something is still missing, or something else is known already.
    """
    cache = opd_store.open(directory if pin is None else f"{directory}@{pin}")
    meta = _filled(cache.meta, terms)
    require(meta, printable(uri, None))
    if meta == cache.meta:
        yield directory, pin
        return
    # Beside it, since files are linked there, and copied elsewhere.
    beside = directory.absolute().parent
    with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as temporary:
        whole = Path(temporary, "cache")
        opd_store.snapshot(cache, whole, meta=meta)
        yield whole, None


def _filled(meta: CacheMeta, terms: dict[str, str | None]) -> CacheMeta:
    given = {name: value for name, value in terms.items() if value is not None}
    if (licence := given.pop("licence", None)) is not None:
        _refuse_other("licence", meta.licence, licence)
        meta = dataclasses.replace(meta, licence=licence)
    if given:
        teacher = meta.teacher or ModelInfo(name=given.get("teacher", "unknown"))
        fields: dict[str, Any] = {}
        for option, value in given.items():
            field = _TEACHER[option]
            known = getattr(teacher, field)
            _refuse_other(f"teacher {field}", None if known == "unknown" else known, value)
            fields[field] = value
        meta = dataclasses.replace(meta, teacher=dataclasses.replace(teacher, **fields))
    return meta


def _refuse_other(what: str, known: str | None, given: str) -> None:
    if known not in (None, "", given):
        raise InvalidArgumentError(
            f"{what}: the cache says {printable(known, 80)!r}, not {printable(given, 80)!r}; publishing "
            "fills in what is missing, and changes nothing"
        )


def _describe(
    found: Contents, dest: str, title: str, tag: str, tokenizer: Path | None, n_preview: int
) -> tuple[Item, ...]:
    """Card, metadata, figures and preview."""
    facts = facts_of(found.cache, title=title, url=dest, tag=tag)
    text = None if tokenizer is None else TextTokenizer(tokenizer_file(tokenizer))
    data, schema = preview(found.cache, n_preview, text)
    drawings = {
        "figures/lengths.svg": (
            "Response lengths",
            figures.histogram("Response lengths", "tokens", found.cache.row_response_tokens),
        ),
        "figures/bytes.svg": (
            "Bytes a response token, by column",
            figures.bars("Bytes a response token", "bytes", list(facts.columns.items())),
        ),
    }
    shown = [(about, path) for path, (about, _) in drawings.items()]
    return (
        Item.of_bytes(PREVIEW, data),
        *(Item.of_bytes(path, drawn.encode()) for path, (_, drawn) in drawings.items()),
        Item.of_bytes(CROISSANT, croissant(facts, found, data, schema)),
        Item.of_bytes(CARD, card(facts, shown, has_text=text is not None).encode()),
    )


def _show_plan(place: Place, steps: list[Stage], digest: str, as_json: bool) -> None:
    there = place.declared([item for step in steps for item in step.items])
    plan = [
        {
            "stage": step.what,
            "files": [
                {"name": item.name, "n_bytes": item.n_bytes, "there": item.name in there}
                for item in step.items
            ],
        }
        for step in steps
    ]
    if as_json:
        print_json({"uri": f"{place.shown}@{digest}", "digest": digest, "dry_run": True, "stages": plan})
        return
    for step in steps:
        missing = [item for item in step.items if item.name not in there]
        n_bytes = sum(item.n_bytes for item in missing)
        click.echo(f"{step.what}: {len(missing)} of {len(step.items)} files to send, {n_bytes:,} bytes")
        for item in missing:
            click.echo(f"  {item.n_bytes:>14,}  {printable(item.name, None)}")
    click.echo(printable(f"{place.shown}@{digest}", None))


def _last(dest: str) -> str:
    """The last part of an address."""
    return dest.partition("?")[0].rstrip("/").rpartition("/")[2].partition("@")[0] or "cache"
