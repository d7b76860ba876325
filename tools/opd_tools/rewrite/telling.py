"""What the verbs of this package print, and the options that they share."""

from __future__ import annotations

from collections.abc import Callable

import click

from opd_tools.console import AT_LEAST_1, print_json, printable
from opd_tools.rewrite.plan import SHARD_MIB, Made

shard_option = click.option(
    "--shard-mib", type=AT_LEAST_1, default=SHARD_MIB, show_default=True, help="Size of a shard, in MiB."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def tell(made: Made, counts: dict[str, int], *, as_json: bool) -> None:
    """Print one new cache: its address on standard output, everything else beside it.

    Args:
        counts: what else there is to say, such as how many rollouts were left out.
    """
    if as_json:
        print_json(made.to_json() | {name.replace(" ", "_"): count for name, count in counts.items()})
        return
    note(made, counts)
    click.echo(printable(made.version.uri, None))


def note(made: Made, counts: dict[str, int]) -> None:
    """Say on standard error what was made."""
    if made.existed:
        click.echo("opd: note: made before, nothing to do", err=True)
    cache = made.cache
    numbers = [
        f"{len(cache):,} rollouts",
        f"{cache.n_bytes:,} bytes",
        *(f"{n:,} {what}" for what, n in counts.items()),
    ]
    click.echo(f"opd: note: {', '.join(numbers)}", err=True)
    if made.error_added:
        click.echo(
            f"opd: note: log-probs moved by at most {made.error_added:.3g} nat; with what the source was off "
            f"by, {cache.max_error:.3g}",
            err=True,
        )


def several(made: dict[str, Made], *, as_json: bool) -> None:
    """Print several new caches by name."""
    if as_json:
        print_json({name: one.to_json() for name, one in made.items()})
        return
    for one in made.values():
        tell(one, {}, as_json=False)


def total_of(update: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Progress of one of several caches that are made one after the other."""

    def report(done: int, _: int) -> None:
        update(before + done, total)

    return report
