"""What every verb shares: safe printing, errors as one line, progress with rate and time left."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from opd_store import CacheExistsError, CacheNotFoundError, InvalidArgumentError, OpdError

P = ParamSpec("P")
MAX_TEXT = 200
MAX_LINE = 2000
_PLAIN_EVERY_S = 10.0
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "jinja2"), "hf"),
    **dict.fromkeys(("array_record", "datasets", "yaml", "safetensors"), "convert"),
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "model_signing": "sign",
    "peft": "lora",
}
"""What may be missing, and the extra that brings it."""
AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)


def printable(text: object, limit: int | None = MAX_TEXT) -> str:
    """Text from a file, safe for a terminal: control, format and bidi characters escaped, length limited."""
    shown = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in str(text))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 3] + "..."


def print_json(value: object) -> None:
    """One JSON document on standard output, in ASCII."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False))


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one line on standard error: exit code 1 for data at fault, 2 for usage."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (InvalidArgumentError, CacheNotFoundError, CacheExistsError) as error:
            _fail(error, 2)
        except OpdError as error:
            _fail(error, 1)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name not in _EXTRAS:
                raise
            message = f"this needs {name}: pip install 'opd-store[{_EXTRAS[name]}]'"
            _fail(InvalidArgumentError(message), 2)

    return run


def _fail(error: Exception, code: int) -> None:
    click.echo(f"opd: {printable(error, MAX_LINE)}", err=True)
    sys.exit(code)


class Meter:
    """Progress on standard error: a live bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._console = Console(stderr=True, no_color="NO_COLOR" in os.environ or None)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(what, total=None, detail="")
        self._started = self._printed = time.monotonic()
        self._base: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def count(self, done: int, total: int | None) -> None:
        """Show how far the work is where the whole may not be known."""
        if total is not None:
            self.update(done, total)
            return
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        text = f"{done:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        self._progress.update(self._task, completed=done, detail=text)
        if not self._live and now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            click.echo(f"{self._what}: {text}", err=True)

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Show how far the work is, with `detail` or else counts and rate."""
        now = time.monotonic()
        # A resumed run reports old work first, so the rate counts from the first report on, once there is a
        # second.
        since, before = self._base or (self._started, 0)
        self._base = self._base or (now, done)
        rate = (done - before) / max(now - since, 1e-9)
        text = detail or f"{done:,}/{total:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        self._progress.update(self._task, completed=done, total=total, detail=text)
        if not self._live and (now - self._printed > _PLAIN_EVERY_S or done >= total):
            self._printed = now
            left = f", {(total - done) / rate:,.0f} s left" if rate > 0 and done < total else ""
            click.echo(f"{self._what}: {text}{left}", err=True)


def access_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --storage-option and --cache-dir; the command gets `access`, keywords of `opd_store.open`."""

    @click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="For a URL: an option of its fsspec file system, such as endpoint_url=http://host:9000 or "
        "anon=true. Repeatable. Credentials are better left to the provider's own environment and files.",
    )
    @click.option(
        "--cache-dir",
        envvar="OPD_CACHE_DIR",
        help="For a URL: keep what was fetched in this directory, also for later runs. Default: in memory "
        "only; OPD_CACHE_DIR sets it too.",
    )
    @click.option(
        "--cache-gib", default=20.0, show_default=True, help="Size limit of --cache-dir, in GiB; oldest goes."
    )
    @functools.wraps(function)
    def run(
        *args: Any,  # noqa: ANN401
        storage_options: tuple[str, ...],
        cache_dir: str | None,
        cache_gib: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        options = dict(_storage_option(text) for text in storage_options)
        access = {"storage_options": options, "cache_dir": cache_dir, "cache_bytes": int(cache_gib * 2**30)}
        function(*args, access=access, **kwargs)

    return run


def _storage_option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"expected KEY=VALUE, found {printable(text, 40)!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and advice out of our output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_model(path: str, *, dtype: str, device: str, attention: str | None = None) -> Any:  # noqa: ANN401
    """`opd_train.load_causal_lm` with the command line's names for dtype and device."""
    import torch

    from opd_train import load_causal_lm

    quiet_libraries()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidArgumentError(f"--device {device!r:.80}: cannot be used: {reason}") from error
    return load_causal_lm(path, dtype=getattr(torch, dtype), device=device, attention=attention)


MODEL_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Dtype of weights and forward pass; log-probs are always float32.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where the model runs: auto, cpu, cuda, cuda:1, ...",
    ),
)


def model_options(function: Callable[P, None]) -> Callable[P, None]:
    """Add --dtype and --device."""
    for option in reversed(MODEL_OPTIONS):
        function = option(function)
    return function
