"""Entry point of the `opd` command."""

from __future__ import annotations

import click

import opd_store
from opd_tools.convert import convert, formats
from opd_tools.evaluate import evaluate
from opd_tools.inspect import inspect_cache
from opd_tools.report import report
from opd_tools.rollouts import rollouts
from opd_tools.score import score
from opd_tools.train import train
from opd_tools.verify import verify_cache


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(opd_store.__version__, prog_name="opd")
def main() -> None:
    """Teacher log-probs as files: sample, score, inspect, verify, train.

    \b
    The life of a rollout:
      opd rollouts   sample responses from the student to be trained
      opd score      let the teacher score them, once, into a cache
      opd train      distil from the cache, without a teacher
    Exit codes: 0 ok, 1 data at fault, 2 usage.
    """


for verb in (rollouts, score, train, evaluate, report, convert, formats, inspect_cache, verify_cache):
    main.add_command(verb)


if __name__ == "__main__":
    # For `torchrun -m opd_tools.main`.
    main(prog_name="opd")
