"""Options of `opd train` that would have no effect: refused, since somebody meant something by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from opd_store import InvalidArgumentError
from opd_tools.training.drift import NEEDED, REFRESH_OPTIONS, is_refreshing

if TYPE_CHECKING:
    from opd_train import LossConfig

_OFFLINE_ONLY = (
    *("ranks", "workers", "shuffle", "window", "too_long"),
    *("storage_options", "cache_dir", "cache_gib"),
)
_LIVE_ONLY = (*NEEDED, "topk")


def refuse_idle_of_mode(options: dict[str, Any], *, live: bool) -> None:
    """Refuse what is not read offline, live or between the two, and adapters' settings without adapters."""
    if live:
        refuse_options((*_OFFLINE_ONLY, *REFRESH_OPTIONS), "--live")
    elif is_refreshing(options):
        refuse_options(("topk",), "--refresh-*, which scores as many ranks as CACHE has")
    else:
        refuse_options(_LIVE_ONLY, "a CACHE")
        refuse_options(REFRESH_OPTIONS[2:], "neither --refresh-every nor --refresh-on-drift")
    if options["lora_rank"] is None:
        refuse_options(("lora_alpha", "lora_targets"), "all weights trained (no --lora-rank)")


def refuse_options(names: tuple[str, ...], mode: str) -> None:
    """Raise InvalidArgumentError if one of these was given on the command line."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if option.name in names and given:
            raise InvalidArgumentError(f"{option.opts[0]} has no effect with {mode}; leave it out")


def refuse_idle(options: dict[str, Any], loss: LossConfig) -> None:
    """Refuse what this loss and this order do not read."""
    if not loss.objective.needs_topk or loss.chosen_ids:
        # 0 has an effect: it chooses the objective.
        for name in ("ranks", "topk"):
            if options[name]:
                refuse_options((name,), f"objective {loss.objective.value}, which compares on no top-k")
    kind = loss.correction.kind.value
    if kind != "ppo":
        refuse_options(("proximal_every",), f"correction {kind}")
    if kind == "none":
        refuse_options(("normalise",), "correction none")
    if options["shuffle"] != "block":
        refuse_options(("window",), f"--shuffle {options['shuffle']}")
