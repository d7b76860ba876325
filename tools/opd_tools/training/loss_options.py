"""Options of `opd train` that say what is minimised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from opd_store import InvalidArgumentError

if TYPE_CHECKING:
    from opd_train import LossConfig

# As in opd_train, which --help is not to import: torch takes seconds.
OBJECTIVES = [
    "lightning",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "truncated_forward_kl",
    "renormalised_forward_kl",
    "renormalised_reverse_kl",
    "random_sampling_kd",
    "cross_entropy",
]
CORRECTIONS = [
    "none",
    "token_is",
    "token_tis",
    "token_mask",
    "cispo",
    "ppo",
    "sequence_tis",
    "sequence_mask",
    "gspo",
    "geometric_mask",
    "k2_mask",
    "k3_mask",
    "prefix_is",
]
_OPTIONS = (
    click.option(
        "--objective",
        type=click.Choice(OBJECTIVES),
        help="What to minimise. Default: jsd if the cache has top-k, else lightning with token_tis and a "
        "clip of 1.",
    ),
    click.option(
        "--correction",
        type=click.Choice(CORRECTIONS),
        help="Importance weights. Default: none; token_tis if the objective is left open and there is no "
        "top-k.",
    ),
    click.option(
        "--cap", type=float, help="Largest importance weight. Default: the correction's, 2 for token_tis."
    ),
    click.option(
        "--low", type=float, help="Lower bound of the ratio, for masks and clips. Default: the correction's."
    ),
    click.option("--high", type=float, help="Upper bound of the ratio. Default: the correction's."),
    click.option(
        "--normalise",
        type=click.Choice(["none", "tokens", "sequences"]),
        default="none",
        show_default=True,
        help="Divide importance weights by their mean over a batch's tokens or rollouts.",
    ),
    click.option(
        "--clip",
        type=float,
        help="Largest advantage of lightning, in nats. Default: 10, as published; 1 if the objective is "
        "left open.",
    ),
    click.option("--chosen-ids", is_flag=True, help="Compare on the cache's chosen ids, not on its top-k."),
    click.option(
        "--loss",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Instead of the options above: a JSON file with the fields of LossConfig, such as "
        '{"objective": "lightning", "correction": {"kind": "prefix_is", "step_cap": 1.5}}.',
    ),
)
_NAMES = ("objective", "correction", "cap", "low", "high", "normalise", "clip", "chosen_ids")

F = TypeVar("F", bound=Callable[..., Any])


def loss_options(function: F) -> F:
    """Add these options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def read_loss(options: dict[str, Any], *, topk: int, chosen: int = 0) -> LossConfig:
    """The loss that was asked for, defaults filled in.

    Args:
        topk, chosen: ranks, and chosen ids, that there are to compare on.

    Raises:
        InvalidArgumentError: settings that do not go together, or an objective without what it needs.
    """
    from opd_train import CorrectionConfig, CorrectionKind, LossConfig, Objective, default_loss
    from opd_train.objective.loss_config import require_topk

    if options["loss"] is not None:
        context = click.get_current_context()
        for name in _NAMES:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise InvalidArgumentError(f"--{name.replace('_', '-')}: not together with --loss")
        try:
            fields = json.loads(options["loss"].read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{options['loss']}: not JSON: {error!s:.200}") from error
        loss = LossConfig.from_json(fields, where=str(options["loss"]))
        require_topk(loss.objective, topk=_ids(loss.chosen_ids, topk, chosen))
        return loss
    topk = _ids(options["chosen_ids"], topk, chosen)
    loss = default_loss(topk=topk)
    if options["objective"]:
        loss = LossConfig(objective=Objective(options["objective"]))
    correction = loss.correction
    if options["correction"]:
        correction = CorrectionConfig(kind=CorrectionKind(options["correction"]))
    given = {name: options[name] for name in ("cap", "low", "high") if options[name] is not None}
    correction = dataclasses.replace(correction, normalise=options["normalise"], **given)
    clip = loss.clip if options["clip"] is None else options["clip"]
    require_topk(loss.objective, topk=topk)
    return dataclasses.replace(loss, correction=correction, clip=clip, chosen_ids=options["chosen_ids"])


def _ids(chosen_ids: bool, topk: int, chosen: int) -> int:
    if chosen_ids and not chosen:
        raise InvalidArgumentError(
            "chosen_ids: the cache stores none; score it with --chosen, or leave it out"
        )
    return chosen if chosen_ids else topk
