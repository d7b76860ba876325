"""`opd join`: what two teachers said about the same rollouts."""

from __future__ import annotations

import dataclasses
import posixpath
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import opd_store
from opd_store import Cache, CacheMeta, ModelInfo
from opd_store.select import row_hashes
from opd_tools.console import Meter, access_options, command, print_json
from opd_tools.rewrite.duplicates import occurrences, sortable
from opd_tools.rewrite.merge import merged_schema, require_equal
from opd_tools.rewrite.plan import Made, Part, Rows, all_rows, open_source, require_rows, schema_of, write
from opd_tools.rewrite.telling import json_option, shard_option, tell, total_of


@dataclass(frozen=True, slots=True)
class Common:
    """Rows of two caches, pair by pair."""

    left: Rows
    right: Rows
    counts: dict[str, int]
    """What was left out, and why."""


@click.command("join")
@click.argument("left")
@click.argument("right")
@click.argument("dst")
@click.option(
    "--route",
    is_flag=True,
    help="Write one cache instead: LEFT, and the rollouts of RIGHT that LEFT does not have, each marked with "
    "its teacher.",
)
@shard_option
@json_option
@access_options
@command
def join(
    left: str, right: str, dst: str, route: bool, as_json: bool, shard_mib: int, access: dict[str, Any]
) -> None:
    """Write the rollouts that LEFT and RIGHT have in common to DST/left and DST/right.

    For training on two teachers at once: row i of both new caches is the same rollout with the same prompt,
    in the order of LEFT, so `CacheStream(left, joined=[(right, numpy.arange(len(left)))])` pairs them. What
    has no partner, or another prompt there, is left out and counted. Of equal rollouts the first goes with
    the first of the other cache, the second with the second, and so on. Values do not change.

    With --route, for teachers of different subjects: a rollout is in DST once, and its column `teacher` says
    who scored it, as in `opd filter --teacher`.

    \b
    Example: opd join runs/by-32b runs/by-8b runs/both
    """
    ours, theirs = open_source(left, access), open_source(right, access)
    found = common(ours, theirs)
    if route:
        made = _routed(ours, theirs, dst, access=access, shard_mib=shard_mib)
        tell(made, {"rollouts of both": len(found.left)}, as_json=as_json)
        return
    require_rows(found.left, f"{left} and {right}: no rollout in common")
    both: dict[str, Made] = {}
    with Meter("joining", "rollouts") as meter:
        sides = {"left": (ours, found.left), "right": (theirs, found.right)}
        for number, (name, (cache, rows)) in enumerate(sides.items()):
            both[name] = write(
                posixpath.join(dst, name),
                [Part(cache, rows)],
                verb="join",
                asked=[name, ours.digest, theirs.digest],
                meta=cache.meta,
                schema=schema_of(cache),
                access=access,
                on_progress=total_of(meter.update, number * len(rows), 2 * len(rows)),
                shard_mib=shard_mib,
            )
    if as_json:
        counts = {name.replace(" ", "_"): count for name, count in found.counts.items()}
        print_json({name: made.to_json() for name, made in both.items()} | counts)
        return
    counts_text = ", ".join(f"{count:,} {name}" for name, count in found.counts.items())
    click.echo(f"opd: note: left out: {counts_text}", err=True)
    for made in both.values():
        tell(made, {}, as_json=False)


def common(left: Cache, right: Cache) -> Common:
    """Rows of the same rollout with the same prompt; the second draw of it goes with the second one there.

    Raises:
        MismatchError: different tokenizers.
    """
    # For the refusal, and for what is in neither.
    ours, theirs = opd_store.join(left, right)[0], opd_store.join(right, left)[0]
    names = [_with_prompt(cache) for cache in (left, right)]
    draws = [_with_number(rows) for rows in names]
    _, rows, partners = np.intersect1d(draws[0], draws[1], assume_unique=True, return_indices=True)
    order = np.argsort(rows)
    counts = {"only in LEFT": len(left) - len(ours), "only in RIGHT": len(right) - len(theirs)}
    shared = [int(np.isin(sortable(one), sortable(other)).sum()) for one, other in (names, reversed(names))]
    counts["with another prompt"] = len(ours) - shared[0]
    counts |= {"again in LEFT": shared[0] - len(rows), "again in RIGHT": shared[1] - len(rows)}
    return Common(rows[order].astype(np.int64), partners[order].astype(np.int64), counts)


def _with_prompt(cache: Cache) -> NDArray[np.uint8]:
    """[n, 36] hash and response length, since equal tokens may have another prompt."""
    lengths = cache.row_response_tokens.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.hstack([row_hashes(cache), lengths])


def _with_number(names: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """[n] names with how often each was there before."""
    numbers = occurrences(names).astype("<i8").view(np.uint8).reshape(-1, 8)
    return sortable(np.hstack([names, numbers]))


def _routed(left: Cache, right: Cache, dst: str, *, access: dict[str, Any], shard_mib: int) -> Made:
    meta, routes = routed_meta(left.meta, right.meta)
    require_equal(left, right, allow=("teacher", "other_teachers"))
    rows = np.setdiff1d(all_rows(right), opd_store.join(right, left)[0])
    with Meter("joining", "rollouts") as meter:
        return write(
            dst,
            [Part(left, all_rows(left)), Part(right, rows, routes)],
            verb="join",
            asked=["route", left.digest, right.digest],
            meta=meta,
            schema=merged_schema([left, right], encoding=None, topk=None),
            access=access,
            on_progress=meter.update,
            shard_mib=shard_mib,
        )


def routed_meta(left: CacheMeta, right: CacheMeta) -> tuple[CacheMeta, dict[int, int]]:
    """The left cache's identity with the teachers of both, and the new routes of those of the right one."""
    teachers: list[ModelInfo | None] = [left.teacher, *left.other_teachers]
    routes = {}
    for route, teacher in enumerate((right.teacher, *right.other_teachers)):
        if teacher not in teachers:
            teachers.append(teacher)
        routes[route] = teachers.index(teacher)
    known = tuple(teacher or ModelInfo(name="unknown") for teacher in teachers[1:])
    return dataclasses.replace(left, other_teachers=known), routes
