"""`opd verify`: read every byte and check every promise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import opd_store
from opd_tools.console import AT_LEAST_1, MAX_LINE, Meter, access_options, command, print_json, printable
from opd_tools.destination import is_local
from opd_tools.share.signature import check_signature

_REMOTE_WORKERS = 4
"""Some wait for the network while others check."""


@click.command("verify")
@click.argument("uri")
@click.option(
    "--workers",
    type=AT_LEAST_1,
    help="Shards that are checked at once, each held in memory if it comes from a URL. Default: 1 for a "
    "path, 4 for a URL.",
)
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM file with a public key: also check that its owner signed this version, see `opd sign`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@access_options
@command
def verify_cache(
    uri: str, workers: int | None, key: Path | None, as_json: bool, access: dict[str, Any]
) -> None:
    """Read every byte of the cache URI: checksums, digests, lengths, values, hashes, history. Writes nothing.

    Exits with 1 if anything is wrong, after checking the rest. URI may be pinned, as path@sha256:...

    \b
    Example: opd verify runs/cache
    """
    with Meter("verifying", "rollouts") as meter:
        chosen = workers or (1 if is_local(uri) else _REMOTE_WORKERS)
        # Before the long work, since it is quickly refused.
        signed = None if key is None else check_signature(uri, key, access)
        report = opd_store.verify(uri, on_progress=meter.update, workers=chosen, **access)
    if as_json:
        fields = ("uri", "digest", "versions", "shards", "rollouts", "response_tokens", "n_bytes", "ok")
        print_json(
            {name: getattr(report, name) for name in fields}
            | ({} if signed is None else {"signature": signed.signature})
            | {"problems": [{"error": type(p).__name__, "message": str(p)} for p in report.problems]}
        )
    else:
        for problem in report.problems:
            click.echo(f"{type(problem).__name__}: {printable(problem, MAX_LINE)}", err=True)
        click.echo(
            f"{'ok' if report.ok else 'DAMAGED'}: {report.rollouts:,} rollouts, "
            f"{report.response_tokens:,} response "
            f"tokens, {report.n_bytes:,} bytes in {report.shards} shards, {report.versions} versions"
        )
        if signed is not None:
            click.echo(f"signed by the owner of this key: {printable(signed.signature, None)}")
        click.echo(printable(report.digest))
    if not report.ok:
        sys.exit(1)
