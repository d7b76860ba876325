"""Who takes part, where their files are, and what was found: the state of one run of bench/loader.py."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaders.zygote import Family, Json, TaskError

RING = "memmap, ring"
BARE = "memmap"
OURS = "ours: "
PLAIN, LADDER = "ours: plain", "ours: ladder/128"

Item = dict[str, Any]
"""What `zygote.describe` tells of a layout."""
Pair = tuple[Family, Item]


@dataclass(kw_only=True)
class Bench:
    """The state."""

    families: list[Family]
    work: Path
    seed: int
    repeats: int
    found: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    """(table, data, layout) to its numbers: what targets and plots are made of."""
    broken: set[tuple[str, str]] = field(default_factory=set)
    """(data, layout) that could not be written or read back other values."""

    def layouts(self, task: str, wanted: Callable[[Item], bool] = lambda _: True) -> list[Pair]:
        """Everybody who takes part in a table."""
        return [
            (family, item)
            for family in self.families
            for item in family.layouts.values()
            if (item["tasks"] is None or task in item["tasks"]) and wanted(item)
        ]

    def folder(self, data: str, item: Item) -> Path:
        """Where a layout's files of one data set are."""
        return self.work / data / "".join(letter if letter.isalnum() else "-" for letter in item["stores"])

    def n_bytes(self, data: str, item: Item) -> int:
        """Of those files."""
        return sum(path.stat().st_size for path in self.folder(data, item).rglob("*") if path.is_file())

    def ask(self, task: str, pair: Pair, data: str, *, uri: str | None = None, **arguments: Json) -> Json:
        """None, and a line on stderr, where it fails."""
        family, item = pair
        if (data, item["name"]) in self.broken or (data, item["stores"]) in self.broken:
            return None
        try:
            return family.ask(task, item["name"], uri=uri or str(self.folder(data, item)), **arguments)
        except TaskError as error:
            print(f"{item['name']}, {data}, {task}: {error}", file=sys.stderr)
            return None

    def rounds(self, task: str, data: str, pairs: Sequence[Pair], **arguments: Json) -> dict[str, list[Any]]:
        """Answers of interleaved repeats, by layout; those who fail once are not asked again."""
        answers: dict[str, list[Any]] = {item["name"]: [] for _, item in pairs}
        for number in range(self.repeats):
            for pair in pairs:
                held = answers[pair[1]["name"]]
                if len(held) == number and (answer := self.ask(task, pair, data, **arguments)) is not None:
                    held.append(answer)
        return {name: answer for name, answer in answers.items() if answer}

    def store(self, data: str, n_shards: int, pairs: Iterable[Pair], *, check: bool = True) -> None:
        """Write what is missing, and compare every value with the source. Ours is always written anew."""
        source = str(self.work / data / "source")
        for family, item in pairs:
            folder = self.folder(data, item)
            done = folder.with_name(f"{folder.name}.{n_shards}")
            name = item["name"]
            try:
                if item["stores"] == name and (name.startswith(OURS) or not done.exists()):
                    shutil.rmtree(folder, ignore_errors=True)
                    family.ask("write", name, folder=str(folder), source=source, n_shards=n_shards)
                    done.touch()
                if check and (data, item["stores"]) not in self.broken:
                    family.ask("check", name, uri=str(folder), source=source)
            except TaskError as error:
                print(f"{name}, {data}: left out: {error}", file=sys.stderr)
                self.broken.add((data, name))

    def named(self, pairs: Iterable[Pair]) -> Iterator[tuple[str, Pair]]:
        """By name."""
        return ((pair[1]["name"], pair) for pair in pairs)


def median(values: Iterable[float]) -> float:
    """nan of nothing."""
    held = list(values)
    return statistics.median(held) if held else float("nan")
