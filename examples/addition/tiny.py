"""Two tiny untrained models and some prompts, to try the commands on."""

from __future__ import annotations

from pathlib import Path

import click
import models
import task
from opd_tools.console import quiet_libraries


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def main(directory: Path) -> None:
    """Write DIRECTORY/teacher, DIRECTORY/student and DIRECTORY/prompts.jsonl."""
    quiet_libraries()
    models.create(directory / "teacher", hidden=64, intermediate=192, heads=4, seed=0)
    models.create(directory / "student", hidden=32, intermediate=96, heads=2, seed=1)
    task.write_prompts_jsonl(directory / "prompts.jsonl", task.problems(256, seed=0))


if __name__ == "__main__":
    main()
