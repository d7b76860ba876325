"""The page of `opd report` for a training run. It says nothing that is not in the run's own files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_store import FormatError, InvalidArgumentError, StorageError
from opd_tools.show.html_page import MAX_ROWS, cut_note, document, figure_tag, plt, shown, table, text

METRICS_FILE, PROVENANCE_FILE = "metrics.jsonl", "opd.json"
MAX_FILE_BYTES = 1 << 30
MAX_NUMBER = 1e100


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: curves over the same unit, and the thresholds that alarms have."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    limits: tuple[float, ...] = ()
    log: bool = False


PLOTS = (
    Plot("Loss", "per token", ("loss",)),
    Plot("Distance to the teacher", "nats a token", ("forward_kl", "reverse_kl", "tail_kl", "log_gap")),
    Plot("Effective sample size", "share", ("ess", "weight_ess"), (0.5,)),
    Plot("Chi-square of the ratios", "mean(ratio^2) - 1", ("chi2", "k3"), (1.0,)),
    Plot("Mean ratio, student to sampler", "ratio", ("ratio_mean", "weight_mean"), (0.8, 1.25)),
    Plot("Tokens flattened or left out", "share", ("capped", "dropped", "clipped"), (0.25,)),
    Plot("Probability on the cached ranks", "probability", ("teacher_mass", "student_mass"), (0.9, 0.5)),
    Plot("Agreement on the most likely id", "share", ("top1",)),
    Plot("Gradient norm", "norm", ("grad_norm",), log=True),
    Plot("Learning rate", "rate", ("lr",)),
    Plot("Speed", "tokens a second", ("tokens_per_s",)),
    Plot("Waiting for data", "share of the step", ("data_share",)),
)
"""A plot is left out if a run has none of its metrics."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the files of a run say."""

    name: str
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]
    is_done: bool


def read_run(directory: Path) -> Run:
    """Read the metrics and the newest provenance below a run's directory.

    Raises:
        InvalidArgumentError: no such run.
        FormatError: a file that is not what it should be.
        StorageError: a file that cannot be read.
    """
    path = directory / METRICS_FILE
    if not path.is_file():
        raise InvalidArgumentError(f"{directory}: no {METRICS_FILE} here; give the --out of an `opd train`")
    rows = []
    # What follows the last line feed is still being written.
    for number, line in enumerate(_read(path).split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not JSON; it was cut short or changed") from error
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise FormatError(f"{path}, line {number}: expected an object with a step")
        rows.append(row)
    if not rows:
        raise InvalidArgumentError(f"{path}: no step was made yet")
    final = directory / "final" / PROVENANCE_FILE
    provenance: dict[str, Any] = {}
    for path in (final, *sorted(directory.glob(f"step-*/{PROVENANCE_FILE}"), reverse=True)):
        # A run that goes on may have removed it meanwhile.
        if path.is_file() and (provenance := _provenance(path)):
            break
    return Run(directory.resolve().name, rows, provenance, final.is_file())


def _provenance(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except StorageError:
        if path.exists():
            raise
        return {}
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected an object")
    return found


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise StorageError(
            f"{path}: cannot read: {error.strerror or error}", errno=error.errno, filename=str(path)
        ) from error


def page(run: Run) -> str:
    """The whole page."""
    alarms = [
        alarm
        for row in run.rows
        if isinstance(row.get("alarms"), list)
        for alarm in row["alarms"]
        if isinstance(alarm, dict)
    ]
    figures = "\n".join(
        _draw(plot, run.rows, alarms)
        for plot in PLOTS
        if any(_points(run.rows, name)[0] for name in plot.metrics)
    )
    state = "done" if run.is_done else "not finished"
    last = run.rows[-1]
    config = run.provenance.get("config", {})
    rest = {name: value for name, value in run.provenance.items() if name != "config"}
    seconds: Any = last.get("seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    body = f"""<p>{len(run.rows)} steps, {state}.</p>
<h2>Alarms</h2>
{_alarm_table(alarms)}
<h2>Curves</h2>
<p>Dotted lines are the default thresholds of the alarms; red lines are steps at which one was raised.</p>
{figures}
<h2>Last step</h2>
{table((name, value) for name, value in last.items() if _is_number(value))}
<h2>Seconds</h2>
{table(seconds.items())}
<h2>Settings</h2>
{table(_flat("", config))}
<h2>Provenance</h2>
{table(_flat("", rest))}"""
    return document(f"Training run {run.name}", body)


def _alarm_table(alarms: Sequence[dict[str, Any]]) -> str:
    if not alarms:
        return "<p>None.</p>"
    columns = ("step", "kind", "metric", "value", "threshold")
    head = "".join(f"<th>{name}</th>" for name in ("", *columns))
    lines = []
    for alarm in alarms[:MAX_ROWS]:
        raised = alarm.get("raised") is True
        cells = "".join(f"<td>{text(shown(alarm.get(name)))}</td>" for name in columns)
        lines.append(
            f"<tr{' class=raised' if raised else ''}><td>{'raised' if raised else 'cleared'}</td>{cells}</tr>"
        )
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + f"\n</table>{cut_note(len(alarms))}"


def _flat(prefix: str, value: object) -> Iterable[tuple[str, object]]:
    """Dotted names and values of nested objects, without recursion: a file may nest as deep as it likes."""
    waiting: list[tuple[str, object]] = [(prefix, value)]
    found = []
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, dict) and item:
            waiting += [
                (f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(item.items())
            ]
        elif name:
            found.append((name, item))
    return found


def _is_number(value: object) -> bool:
    """A number that can be drawn: what lies beyond is no measurement, and the plots cannot scale it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _points(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it is a finite number."""
    found = [(float(row["step"]), float(row[name])) for row in rows if _is_number(row.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def _draw(plot: Plot, rows: Sequence[dict[str, Any]], alarms: Sequence[dict[str, Any]]) -> str:
    """The plot as HTML."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    low, high = math.inf, -math.inf
    for name in plot.metrics:
        steps, values = _points(rows, name)
        if steps:
            axes.plot(steps, values, "." if len(steps) == 1 else "-", linewidth=1, label=name)
            low, high = min(low, *values), max(high, *values)
    for limit in plot.limits:
        # A threshold that is far away would flatten the curve.
        if low - (high - low) - 0.1 <= limit <= high + (high - low) + 0.1:
            axes.axhline(limit, color="black", linestyle=":", linewidth=0.8)
    for alarm in alarms:
        if (
            alarm.get("raised") is True
            and alarm.get("metric") in plot.metrics
            and _is_number(alarm.get("step"))
        ):
            axes.axvline(float(alarm["step"]), color="red", linewidth=0.8)
    if plot.log and low > 0:
        axes.set_yscale("log")
    axes.set_title(plot.title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.unit)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)
    # A long run has too many points for an SVG.
    return figure_tag(plot.title, figure)
