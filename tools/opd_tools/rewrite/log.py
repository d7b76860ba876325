"""`opd log`: the versions of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from opd_store import CacheNotFoundError, layout
from opd_store.manifest import Manifest, decode_manifest, manifest_digest
from opd_store.storage import Storage, resolve
from opd_tools.console import AT_LEAST_1, access_options, command, print_json, printable
from opd_tools.destination import is_local
from opd_tools.rewrite.telling import json_option

_COUNTS = ("rollouts", "tokens", "response_tokens", "bytes")


@click.command("log")
@click.argument("cache")
@click.option("--limit", type=AT_LEAST_1, help="Show only so many versions. Default: all.")
@json_option
@access_options
@command
def log(cache: str, limit: int | None, as_json: bool, access: dict[str, Any]) -> None:
    """List the versions of CACHE, newest first: number, digest, and what each added.

    Reads manifests only. A line shows what the version has more than the one before it; --json has its parent
    and its totals as well. CACHE may be pinned, as path@sha256:..., to begin at an older version.

    \b
    Example: opd log runs/cache
    """
    storage, pin = resolve(cache, **({} if is_local(cache) else access))
    found = []
    for version in history(storage, pin):
        found.append(version)
        if len(found) == limit:
            break
    if as_json:
        print_json(found)
        return
    for version in found:
        added = version["added"]
        what = "what it added is not known, since older versions were removed"
        if added is not None:
            what = ", ".join(f"{added[name]:+,} {name.replace('_', ' ')}" for name in _COUNTS)
        click.echo(f"{version['version']:>4}  {printable(version['digest'])}  {what}")


def history(storage: Storage, pin: str | None) -> Iterator[dict[str, Any]]:
    """Versions from the newest, or the pinned one, to the oldest that is there.

    Raises:
        CacheNotFoundError: no version, or none with this digest.
        IntegrityError, FormatError: a manifest is damaged.
    """
    before: tuple[Manifest, str] | None = None
    begun = pin is None
    for number in reversed(storage.versions()):
        manifest, digest = _version(storage, number)
        if before is not None:
            yield _described(*before, manifest)
        begun = begun or digest == pin
        before = (manifest, digest) if begun else None
    if before is None:
        what = "no cache here" if pin is None else f"no version has the pinned digest {pin}"
        raise CacheNotFoundError(f"{storage.uri}: {what}")
    yield _described(*before, None)


def _version(storage: Storage, number: int) -> tuple[Manifest, str]:
    name = layout.manifest_path(number)
    data = storage.read(name, layout.MAX_MANIFEST_BYTES)
    return decode_manifest(data, where=storage.describe(name)), manifest_digest(data)


def _described(manifest: Manifest, digest: str, parent: Manifest | None) -> dict[str, Any]:
    counts = _counts(manifest)
    added: dict[str, int] | None = None
    if parent is not None and parent.sequence == manifest.sequence - 1:
        before = _counts(parent)
        added = {name: counts[name] - before[name] for name in counts}
    elif manifest.parent is None:
        added = counts
    return {
        "version": manifest.sequence,
        "digest": digest,
        "parent": manifest.parent,
        "added": added,
        **counts,
    }


def _counts(manifest: Manifest) -> dict[str, int]:
    segments = manifest.segments
    sums = [
        sum(getattr(s, name) for s in segments) for name in ("rows", "tokens", "response_tokens", "n_bytes")
    ]
    return dict(zip(_COUNTS, sums, strict=True))
