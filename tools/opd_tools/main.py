"""Entry point of the `opd` command."""

from __future__ import annotations

import click

import opd_store
from opd_tools.completion import completion
from opd_tools.convert import convert, formats
from opd_tools.rewrite.dedup import dedup
from opd_tools.rewrite.filter import filter_cache
from opd_tools.rewrite.gc import gc
from opd_tools.rewrite.join import join
from opd_tools.rewrite.log import log
from opd_tools.rewrite.merge import merge
from opd_tools.rewrite.recode import recode
from opd_tools.rewrite.split import split
from opd_tools.share.publish import publish
from opd_tools.share.pull import pull
from opd_tools.share.sign import sign
from opd_tools.show.cat import cat, head
from opd_tools.show.diff import diff
from opd_tools.show.inspect import inspect_cache
from opd_tools.show.report import report
from opd_tools.show.stats import stats
from opd_tools.show.verify import verify_cache
from opd_tools.training.evaluate import evaluate
from opd_tools.training.rollouts import rollouts
from opd_tools.training.score import score
from opd_tools.training.train import train

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Make a cache": (rollouts, score, convert, formats),
    "Look inside": (inspect_cache, head, cat, stats, diff, report, verify_cache),
    "Make another cache of it": (recode, filter_cache, split, merge, dedup, join),
    "Look after it": (log, gc),
    "Share": (publish, pull, sign, completion),
    "Train": (train, evaluate),
}


class Sections(click.Group):
    """A group whose help lists commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        width = max(len(command.name or "") for commands in SECTIONS.values() for command in commands)
        for title, commands in filter(lambda section: section[1], SECTIONS.items()):
            with formatter.section(title):
                rows = [
                    ((command.name or "").ljust(width), command.get_short_help_str(90))
                    for command in commands
                ]
                formatter.write_dl(rows)


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(opd_store.__version__, prog_name="opd")
def main() -> None:
    """Teacher log-probs as files: sample, score, convert, look inside, share, train.

    \b
    The life of a rollout:
      opd rollouts   sample responses from the student to be trained
      opd score      let the teacher score them, once, into a cache
      opd train      distil from the cache, without a teacher
    Exit codes: 0 ok, 1 data at fault, 2 usage.
    """


for verbs in SECTIONS.values():
    for verb in verbs:
        main.add_command(verb)


if __name__ == "__main__":
    # For `torchrun -m opd_tools.main`.
    main(prog_name="opd")
