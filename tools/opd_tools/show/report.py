"""`opd report`: a training run or a cache as one page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import opd_store
from opd_store import InvalidArgumentError, StorageError
from opd_tools.console import AT_LEAST_1, Meter, access_options, command, print_json, printable


@click.command("report")
@click.argument("uri", metavar="RUN|CACHE")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write. Default for a run: RUN/report.html."
)
@click.option(
    "--limit",
    type=AT_LEAST_1,
    default=10_000,
    show_default=True,
    help="Of a cache: rollouts to read, evenly spread over it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@access_options
@command
def report(uri: str, out: Path | None, limit: int, as_json: bool, access: dict[str, Any]) -> None:
    """Show a training run or a cache as one HTML file that loads nothing.

    Of a run: curves, alarms, settings and provenance, from metrics.jsonl and the newest opd.json; works while
    the run goes on. Of a cache: what `opd inspect` and `opd stats` tell, with plots, by teacher, finish
    reason and x_* columns.

    \b
    Example: opd report runs/cache --out cache.html
    """
    try:
        from opd_tools.show.cache_page import page as cache_page
        from opd_tools.training.run_page import METRICS_FILE, page, read_run
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InvalidArgumentError("this command needs matplotlib: pip install 'opd-store[plot]'") from error

    run = Path(uri)
    is_run = (run / METRICS_FILE).is_file() or (run.is_dir() and not (run / "manifests").is_dir())
    if is_run and "://" not in uri:
        target = out or run / "report.html"
        text = page(read_run(run))
    elif out is None:
        raise InvalidArgumentError(
            "--out: say where the page of a cache goes; nothing is written into a cache"
        )
    else:
        target = out
        text = _of_cache(uri, limit, access, cache_page)
    try:
        target.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write: {error.strerror or error}", errno=error.errno, filename=str(target)
        ) from error
    if as_json:
        print_json({"path": str(target), "bytes": len(text.encode())})
    else:
        click.echo(printable(target, None))


def _of_cache(uri: str, limit: int, access: dict[str, Any], page: Any) -> str:  # noqa: ANN401
    from opd_tools.show.inspect import describe
    from opd_tools.show.sampling import collect, groupable

    cache = opd_store.open(uri, **access)
    with Meter("measuring", "rollouts") as meter:
        sample = collect(cache, by=groupable(cache), limit=limit, on_progress=meter.update)
    name = cache.uri.rstrip("/").rpartition("/")[2] or cache.uri
    text: str = page(name, describe(cache), sample)
    return text
