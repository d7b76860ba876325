"""`opd sign`: say with a key that a version is yours."""

from __future__ import annotations

from pathlib import Path

import click

from opd_tools.console import command, print_json, printable
from opd_tools.share.signature import sign as sign_cache


@click.command("sign")
@click.argument("uri", metavar="CACHE")
@click.option(
    "--key",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="PEM file with a private key on the curve P-256, P-384 or P-521. `openssl ecparam -name prime256v1 "
    "-genkey -noout` makes one.",
)
@click.option(
    "--password",
    envvar="OPD_KEY_PASSWORD",
    help="Of the key, if it has one. Better left to the variable OPD_KEY_PASSWORD.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@command
def sign(uri: str, key: Path, password: str | None, as_json: bool) -> None:
    """Sign the local CACHE: the digest of its manifest, and of every file that it names.

    A signature that holds proves that whoever has the private key signed exactly these files. It does not
    prove who that is, nor when it was, nor that the numbers are true. It lies beside the manifest as .sig, in
    the format of OpenSSF model signing, and travels with publish and pull; `opd verify --key` checks it.

    \b
    Example: opd sign runs/cache --key signing.pem
    """
    found = sign_cache(uri, key, password=password)
    if as_json:
        print_json(
            {
                "uri": f"{found.uri}@{found.digest}",
                "digest": found.digest,
                "signature": found.signature,
                "files": found.files,
                "existed": found.existed,
            }
        )
        return
    if found.existed:
        click.echo("opd: note: signed before with this key, nothing to do", err=True)
    click.echo(printable(found.signature, None))
