"""`opd cat` and `opd head`: rollouts as text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.padding import Padding

import opd_store
from opd_store import Cache, InvalidArgumentError
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, access_options, command, printable
from opd_tools.show.rollout_view import (
    View,
    as_json,
    facts,
    flowing,
    flowing_plain,
    legend,
    table,
    view_of,
)
from opd_tools.show.token_text import TokenTexts

_AHEAD = 64
"""Rows that are asked for at once from a URL."""
_RANGE = re.compile(r"(-?\d{1,18})|(-?\d{1,18})?:(-?\d{1,18})?")
_OPTIONS = (
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="tokenizer.json, or a directory with one, to show text instead of ids; has to be the cache's.",
    ),
    click.option(
        "--alternatives",
        type=AT_LEAST_0,
        metavar="N",
        help="One line a token: position, id, text, log-prob, and the teacher's N most likely ids with "
        "theirs. Default: flowing text.",
    ),
    click.option(
        "--max-tokens", type=AT_LEAST_1, metavar="N", help="Show N response tokens of each. Default: all."
    ),
    click.option("--json", "as_json_", is_flag=True, help="Print one JSON document a line instead of text."),
)


def _show_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command("cat")
@click.argument("uri")
@click.option(
    "--rows",
    metavar="LIST",
    help="Row numbers from 0 and ranges START:END without END, such as 3,10:20,-1. Default: all.",
)
@_show_options
@access_options
@command
def cat(uri: str, rows: str | None, access: dict[str, Any], **options: Any) -> None:  # noqa: ANN401
    """Show rollouts of the cache URI as text: prompt, response, how surprised the teacher was.

    On a terminal the colour of a token is its surprise, minus the teacher's log-prob in nats. Elsewhere, and
    with NO_COLOR, it follows the token as a number in brackets where it is at least 0.05. Tokens that the
    loss mask leaves out are struck through, or stand in tildes.

    \b
    Example: opd cat runs/cache --tokenizer models/teacher --rows 0:3 --alternatives 4
    """
    cache = opd_store.open(uri, **access)
    wanted = range(len(cache)) if rows is None else parse_rows(rows, len(cache))
    show(cache, wanted, **options)


@click.command("head")
@click.argument("uri")
@click.option("-n", "--number", type=AT_LEAST_0, default=5, show_default=True, help="How many rollouts.")
@_show_options
@access_options
@command
def head(uri: str, number: int, access: dict[str, Any], **options: Any) -> None:  # noqa: ANN401
    """Show the first rollouts of the cache URI as text; see `opd cat`.

    \b
    Example: opd head runs/cache -n 2 --tokenizer models/teacher
    """
    cache = opd_store.open(uri, **access)
    show(cache, range(min(number, len(cache))), **options)


def parse_rows(text: str, n_rows: int) -> list[int]:
    """Row numbers of a list such as "3,10:20,-1". Raises InvalidArgumentError."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InvalidArgumentError(
                f"--rows: expected numbers and ranges such as 3,10:20,-1, found {printable(part, 40)!r}"
            )
        single, *ends = match.groups()
        if single is None:
            found += range(n_rows)[slice(*(None if end is None else int(end) for end in ends))]
            continue
        row = int(single)
        if not -n_rows <= row < n_rows:
            raise InvalidArgumentError(f"--rows: row {row} of a cache with {n_rows:,} rollouts")
        found.append(row % n_rows)
    return found


def show(
    cache: Cache,
    rows: Sequence[int],
    *,
    tokenizer: Path | None,
    alternatives: int | None,
    max_tokens: int | None,
    as_json_: bool,
) -> None:
    """Print these rows, one after the other."""
    texts = None if tokenizer is None else TokenTexts(tokenizer, cache.meta)
    n = alternatives or 0
    if n and not cache.topk:
        raise InvalidArgumentError(f"--alternatives: {cache.uri} has no top-k; give 0, or leave it out")
    views = (
        view_of(row, rollout, texts, alternatives=n, max_tokens=max_tokens)
        for row, rollout in _read(cache, rows, min(n, cache.topk))
    )
    if as_json_:
        for view in views:
            click.echo(json.dumps(as_json(view), ensure_ascii=True, allow_nan=False))
        return
    _print(views, is_table=alternatives is not None)


def _print(views: Iterable[View], *, is_table: bool) -> None:
    # What rich understands is taken as text: no markup, no emoji codes.
    console = Console(highlight=False, markup=False, emoji=False)
    colour = console.is_terminal and console.color_system is not None and "NO_COLOR" not in os.environ
    for number, view in enumerate(views):
        heading = "  ".join(facts(view))
        if not colour:
            click.echo(heading)
            click.echo(table(view, colour=False).plain if is_table else flowing_plain(view))
            continue
        if number == 0:
            console.print(legend())
        console.print(heading, style="bold", soft_wrap=True)
        if is_table:
            console.print(table(view, colour=True), soft_wrap=True)
        else:
            console.print(Padding(flowing(view), (0, 0, 0, 2)))


def _read(cache: Cache, rows: Sequence[int], ranks: int) -> Iterator[tuple[int, opd_store.Rollout]]:
    columns = {
        *("loss_mask", "teacher_logprob", "sample_id", "finish_reason", "policy_version", "teacher"),
        *("reward", "label", *cache.schema.user_columns),
    }
    if ranks:
        columns |= {"topk_ids", "topk_logprob", "log_tail"}
    for start in range(0, len(rows), _AHEAD):
        some = rows[start : start + _AHEAD]
        cache.prefetch(some, ranks=ranks, columns=columns)
        for row in some:
            rollout = cache.rollout(row, ranks=ranks, columns=columns)
            if rollout.teacher_logprob is None and ranks < cache.topk:
                # The sampled token may be anywhere among the ranks.
                rollout = cache.rollout(row)
            yield row, rollout
