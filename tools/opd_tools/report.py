"""`opd report`: a training run as one page of HTML."""

from __future__ import annotations

from pathlib import Path

import click

from opd_store import InvalidArgumentError, StorageError
from opd_tools.console import command, printable


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write. Default: RUN/report.html.")
@command
def report(run: Path, out: Path | None) -> None:
    """Show the training run in directory RUN as one HTML file: curves, alarms, settings, provenance.

    Reads metrics.jsonl and the newest opd.json; works while the run goes on. The page loads nothing from
    elsewhere.

    \b
    Example: opd report runs/distilled
    """
    try:
        from opd_tools.training_report import page, read_run
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "numpy"):
            raise
        raise InvalidArgumentError("this command needs matplotlib: pip install 'opd-store[plot]'") from error

    target = out or run / "report.html"
    text = page(read_run(run))
    try:
        target.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write: {error.strerror or error}", errno=error.errno, filename=str(target)
        ) from error
    click.echo(printable(target, None))
