"""`opd gc`: room that nothing needs any more."""

from __future__ import annotations

import errno

import click

from opd_store import InvalidArgumentError, StorageError
from opd_store.storage import LocalStorage, resolve_writable
from opd_tools.console import AT_LEAST_1, Meter, command, print_json, printable
from opd_tools.destination import is_local
from opd_tools.rewrite.garbage import Found, find, read_manifests, referenced, remove, remove_versions
from opd_tools.rewrite.telling import json_option


@click.command("gc")
@click.argument("cache")
@click.option("--delete", is_flag=True, help="Remove them. Without it nothing is changed.")
@click.option(
    "--keep-versions",
    type=AT_LEAST_1,
    help="Also give up all but so many of the newest versions. The others cannot be opened any more, and a "
    "program that reads one of them now will fail.",
)
@click.option(
    "--min-age",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours that a file has to be old, since a writer may be about to commit it.",
)
@json_option
@command
def gc(cache: str, delete: bool, keep_versions: int | None, min_age: float, as_json: bool) -> None:
    """List files of CACHE that no version of it refers to; with --delete, remove them.

    CACHE is a local path. Such files are what killed writers left behind. Nothing that a version consists of
    is touched, nor any file that is not the cache's own. With --delete it refuses while a writer is at work.
    Bytes may be shared with other caches by hard links; removing frees them when the last one goes.

    \b
    Example: opd gc runs/cache --delete
    """
    if not is_local(cache):
        raise InvalidArgumentError(
            f"{cache}: only local caches can be tidied up; remove old files of a bucket there"
        )
    storage = resolve_writable(cache)
    manifests = read_manifests(storage)
    dropped = sorted(manifests)[:-keep_versions] if keep_versions is not None else []
    kept = referenced(storage, [found for number, found in manifests.items() if number not in dropped])
    min_age_s = min_age * 3600
    found = find(storage, kept, min_age_s=min_age_s)
    garbage = found.garbage
    if delete:
        _require_no_writer(storage, found)
        if dropped:
            remove_versions(storage, manifests, dropped)
        garbage = []
        with Meter("removing", "files") as meter:
            for item in remove(storage, found.garbage, min_age_s=min_age_s):
                garbage.append(item)
                meter.update(len(garbage), len(found.garbage))
    n_bytes = sum(item.n_bytes for item in garbage)
    if as_json:
        names = ("name", "n_bytes", "why")
        print_json(
            {
                "deleted": delete,
                "files": [{name: getattr(item, name) for name in names} for item in garbage],
                "bytes": n_bytes,
                "versions": dropped,
                "too_young": [item.name for item in found.young],
                "writers": found.writers,
            }
        )
        return
    for number in dropped:
        click.echo(f"version {number}")
    for item in garbage:
        click.echo(f"{printable(item.name)}  {item.n_bytes:,} bytes, {item.why}")
    if found.young:
        click.echo(f"opd: note: {len(found.young):,} files younger than {min_age:g} h stay", err=True)
    if found.writers:
        click.echo("opd: note: a writer is at work", err=True)
    done = "removed" if delete else "to be removed with --delete"
    click.echo(f"{len(garbage):,} files, {n_bytes:,} bytes {done}")


def _require_no_writer(storage: LocalStorage, found: Found) -> None:
    if found.writers:
        raise StorageError(
            f"{storage.uri}: a writer is at work ({found.writers[0]} is locked); try again when it is done",
            errno=errno.EBUSY,
            filename=storage.uri,
        )
