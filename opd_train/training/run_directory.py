"""The directory of a run: one trainer at a time, checkpoints that appear whole or not at all, metrics."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from opd_store import OpdError, StorageError
from opd_train.training.distributed import World

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
_STEP_NAME = re.compile(r"step-(\d{8})")
_PARTIAL_NAME = re.compile(r"\.(step-\d{8}|final)\.partial")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(out: Path, world: World) -> Iterator[None]:
    """Hold a run's directory, which is made if need be. The system lets go of it when a process dies.

    Raises:
        OpdError: another process trains there.
        StorageError: it cannot be made or written.
    """
    descriptor = -1
    failure: list[Any] | None = None
    if world.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if descriptor >= 0 and error.errno in _NO_LOCKS:
                warnings.warn(f"{out}: this file system has no locks; start one run there", stacklevel=3)
            else:
                failure = [error.errno, str(error.strerror or error)]
    try:
        if (failed := world.gather(failure)[0]) is not None:
            number, text = failed
            if number == errno.EWOULDBLOCK:
                raise OpdError(
                    f"{out}: another process trains there; wait for it, end it, or choose another directory"
                )
            raise StorageError(
                f"{out}: cannot write: {text}. Earlier checkpoints are intact.",
                errno=number,
                filename=str(out),
            )
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Steps and directories of the complete checkpoints below `out`, oldest first."""
    if not out.is_dir():
        return []
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in out.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint below `out`, or None."""
    found = checkpoints(out)
    return found[-1][1] if found else None


def remove_partial(out: Path) -> None:
    """Remove what a killed run was still writing below `out`."""
    for path in out.iterdir():
        if _PARTIAL_NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    """Add a line to the run's metrics; what is not finite becomes null. Raises StorageError."""
    path = out / METRICS_FILE
    text = json.dumps(_without_nan(row), allow_nan=False)
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    """The JSON value with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trim_metrics(out: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which will be run again, and a line cut short by a kill."""
    path = out / METRICS_FILE
    if not path.exists():
        return
    kept = []
    with storage_errors(path):
        lines = path.read_text("utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    with storage_errors(path):
        temp = path.with_name(f".{METRICS_FILE}.partial")
        temp.write_text("".join(line + "\n" for line in kept), "utf-8")
        temp.replace(path)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, as far as they are whole, with NaN for null; none where there is no such
    file.

    Raises:
        StorageError: the file cannot be read.
    """
    path = out / METRICS_FILE
    if not path.exists():
        return []
    with storage_errors(path):
        lines = path.read_text("utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row["step"], int):
                found.append({name: math.nan if value is None else value for name, value in row.items()})
        except (ValueError, KeyError):
            break
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it. Raises StorageError."""
    with storage_errors(path):
        temp = path.with_name(f".{path.name}.partial")
        temp.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
        sync(temp)
        temp.replace(path)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror or error}. Earlier checkpoints are intact.",
            errno=error.errno,
            filename=str(path),
        ) from error


def write_directory(
    target: Path,
    write: Callable[[Path], Any],
    finish: Callable[[Path, list[Any]], None] | None = None,
    *,
    world: World,
) -> None:
    """Write a directory that all ranks see under a temporary name; rename it when all of it is on the disk.

    Args:
        write: puts this rank's files into the directory it is given; what it returns is JSON.
        finish: on the first rank, gets the directory and what every rank returned.

    Raises:
        StorageError: on every rank, if the disk refused one. What was there before is intact.
    """
    temp = target.parent / f".{target.name}.partial"

    def begin() -> None:
        if world.first:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)

    def end(written: list[Any]) -> None:
        if not world.first:
            return
        if finish is not None:
            finish(temp, written)
        for path in (*temp.rglob("*"), temp):
            sync(path)
        _put_in_place(temp, target)
        sync(target.parent)

    try:
        _together(target, begin, world)
        written = _together(target, lambda: write(temp), world)
        _together(target, lambda: end(written), world)
    except StorageError:
        if world.first:
            shutil.rmtree(temp, ignore_errors=True)
        raise


def _put_in_place(temp: Path, target: Path) -> None:
    if not target.exists():
        temp.rename(target)
        return
    # What was there goes last: were it removed first and the new one refused, neither would be left.
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        temp.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _together(target: Path, act: Callable[[], Any], world: World) -> list[Any]:
    """Do it on every rank; either all go on, with what each returned, or all raise."""
    found, failure, cause = None, None, None
    try:
        found = act()
    except (OSError, safetensors.SafetensorError) as error:
        failure, cause = [getattr(error, "errno", None), str(error)], error
    answers = world.gather([found, failure])
    for rank, (_, failed) in enumerate(answers):
        if failed is not None:
            where = f"rank {rank}: " if world.size > 1 else ""
            raise StorageError(
                f"{target}: cannot write: {where}{failed[1]}. Earlier checkpoints are intact; "
                "free space and run again.",
                errno=failed[0],
                filename=str(target),
            ) from cause
    return [answer for answer, _ in answers]


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
