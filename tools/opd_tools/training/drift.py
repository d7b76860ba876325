"""What `opd train` does against drift: checks before the first step, alarms, and new rollouts when they are
due."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opd_store import Cache, InvalidArgumentError, SamplerInfo
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, load_model, printable

if TYPE_CHECKING:
    from opd_train import CausalLM, LossConfig, Stopwatch
    from opd_train.training.monitors import Alarm
    from opd_train.training.refresh import RefreshingSource

ROLLOUTS_DIR = "rollouts"
"""Below OUT: the cache of what --refresh-* sampled."""
REFRESH_OPTIONS = ("refresh_every", "refresh_on_drift", "refresh_rollouts", "refresh_keep")
NEEDED = ("teacher", "prompts", "max_new_tokens")
"""Options that --live and --refresh-* share."""
_OPTIONS = (
    click.option(
        "--refresh-every",
        type=AT_LEAST_0,
        default=0,
        show_default=True,
        help="Steps after which new rollouts are sampled from the student and scored by --teacher; 0 for "
        "never, 1 is live distillation.",
    ),
    click.option(
        "--refresh-on-drift",
        is_flag=True,
        help="Sample new rollouts when the student has drifted from those it trains on.",
    ),
    click.option(
        "--refresh-rollouts",
        type=AT_LEAST_1,
        default=1024,
        show_default=True,
        help="With --refresh-*: new rollouts each time; they are kept in OUT/rollouts.",
    ),
    click.option(
        "--refresh-keep",
        type=AT_LEAST_1,
        default=1,
        show_default=True,
        help="With --refresh-*: train on the rollouts of so many versions of the student, the newest.",
    ),
)


def drift_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --refresh-every, --refresh-on-drift, --refresh-rollouts and --refresh-keep."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def is_refreshing(options: dict[str, Any]) -> bool:
    """Whether the command asks for new rollouts at all."""
    return bool(options["refresh_every"] or options["refresh_on_drift"])


def split_allowed(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Fields of --allow-mismatch that are compared by `check_cache`, and by `check_start`."""
    from opd_train.training.start import START_FIELDS

    return [name for name in names if name not in START_FIELDS], [
        name for name in names if name in START_FIELDS
    ]


def look_before_start(
    cache: Cache,
    lm: CausalLM,
    loss: LossConfig,
    out: Path,
    allow: list[str],
    *,
    teacher_used: bool,
    speak: bool,
) -> None:
    """Compare the cache's log-probs with the student's, unless the run has begun already."""
    from opd_train.training.run_directory import latest_checkpoint
    from opd_train.training.start import check_start

    if latest_checkpoint(out) is not None or (out / "final").exists():
        return
    report = check_start(
        cache, lm, allow=allow, teacher_used=teacher_used, behaviour_used=loss.correction.needs_behaviour
    )
    for note in report.notes if speak else ():
        click.echo(f"opd: note: {printable(note, None)}", err=True)


def show_alarm(alarm: Alarm) -> None:
    """One line on standard error."""
    click.echo(f"opd: note: {alarm}", err=True)


def refreshing_source(
    cache: Cache,
    lm: CausalLM,
    stopwatch: Stopwatch,
    options: dict[str, Any],
    *,
    loss: LossConfig,
    ranks: int | None,
) -> RefreshingSource:
    """Batches of the cache, and then of what the student samples."""
    from opd_train import read_prompts
    from opd_train.training.refresh import RefreshConfig, RefreshingSource, StreamConfig

    if not options["teacher"] or not options["prompts"]:
        raise InvalidArgumentError("--refresh-every and --refresh-on-drift need --teacher and --prompts")
    if options["world"].size > 1:
        raise InvalidArgumentError("--refresh-* samples in one process; start it without torchrun")
    if loss.objective.needs_draws:
        raise InvalidArgumentError(
            f"--refresh-* scores no draws, which objective {loss.objective.value!r} needs; leave it out"
        )
    if loss.chosen_ids:
        raise InvalidArgumentError("--refresh-* scores no chosen ids; leave out one of the two")
    known = cache.meta.sampler or SamplerInfo()
    is_given = click.get_current_context().get_parameter_source("max_new_tokens")
    given = is_given is not None and is_given.name == "COMMANDLINE"
    sampler = dataclasses.replace(
        known,
        max_new_tokens=options["max_new_tokens"]
        if given
        else known.max_new_tokens or options["max_new_tokens"],
        seed=options["seed"],
        stop_token_ids=known.stop_token_ids or lm.stop_token_ids,
        engine=lm.info.engine,
        engine_version=lm.info.engine_version,
    )
    return RefreshingSource(
        lm,
        load_model(options["teacher"], dtype="float32", device=str(lm.device)),
        read_prompts(options["prompts"], lm),
        sampler,
        options["out"] / ROLLOUTS_DIR,
        RefreshConfig(
            rollouts=options["refresh_rollouts"],
            every=options["refresh_every"],
            on_drift=options["refresh_on_drift"],
            keep=options["refresh_keep"],
        ),
        start=cache,
        stream=StreamConfig(
            batch_tokens=options["batch_tokens"],
            batch_rollouts=options["batch_rollouts"],
            seed=options["seed"],
            ranks=ranks,
            shuffle=options["shuffle"],
            window=options["window"],
            too_long=options["too_long"],
            workers=options["workers"],
        ),
        topk=cache.topk,
        teacher_tokens=options["batch_tokens"],
        stopwatch=stopwatch,
    )
