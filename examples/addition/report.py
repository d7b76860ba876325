"""The demo's table and its HTML report."""

from __future__ import annotations

import base64
import html as html_escape
import io
import math
import statistics
from collections.abc import Callable, Sequence

import matplotlib as mpl
from methods import BATCH, CURVE_PROBLEMS, KL_PROBLEMS, LR, METHODS, N_OPD, STEPS, Result

mpl.use("Agg")
import matplotlib.pyplot as plt

from opd_train.evaluation import proportion

_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % points of Student's t, by number of seeds."""
ACTIVITIES = ("sampling", "teacher", "student")
SECONDS = "seconds (sampling + teacher + student)"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds."""
    mean = statistics.fmean(values)
    half = _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table(results: Sequence[Result]) -> str:
    """Plain text, one row a method."""
    start = results[0]
    first = proportion(start.n_correct, start.n_problems)
    lines = [
        f"{'':42} {'accuracy':>8}  {'95 % interval':<14} {'each seed':<18} {'KL':>6}   "
        f"{'seconds: sampling  teacher  student    all'}",
        f"{'SFT student':42} {first.mean:8.3f}  [{first.low:.3f}, {first.high:.3f}] {'':18} {start.kl:6.2f}",
    ]
    for method in METHODS:
        rows = [result for result in results if result.method == method.name]
        accuracies = [row.n_correct / row.n_problems for row in rows]
        mean, low, high = interval(accuracies)
        seconds = [statistics.fmean(row.seconds.get(name, 0.0) for row in rows) for name in ACTIVITIES]
        seconds[2] += statistics.fmean(row.seconds.get("data", 0.0) for row in rows)
        shown = "{:17.1f} {:8.1f} {:8.1f}".format(*seconds)
        label = method.name if method.live else f"offline: {method.name}"
        lines.append(
            f"{label:42} {mean:8.3f}  [{max(low, 0):.3f}, {min(high, 1):.3f}] "
            f"{' '.join(f'{value:.3f}' for value in accuracies):<18} "
            f"{statistics.fmean(row.kl for row in rows):6.2f}   {shown} {sum(seconds):6.1f}"
        )
    return "\n".join([*lines, "", *notes(results)])


def notes(results: Sequence[Result]) -> list[str]:
    """How to read the table."""
    seeds = len({result.seed for result in results})
    return [
        f"Three-digit addition with a scratch pad; {results[0].n_problems:,} held-out problems, greedy.",
        f"{STEPS} steps of {BATCH} rollouts, AdamW {LR:g}. Live, every rollout is fresh; offline, "
        f"{N_OPD:,} are",
        "sampled and scored once and used three times. One pair of teacher and student.",
        f"{seeds} seeds, each with its own rollouts, order and draws. Intervals: Student's t over the "
        "seeds, which",
        "leaves out the choice of problems; for the SFT student Wilson's, which is of nothing else.",
        f"KL: student to teacher, nats per response, on samples for {KL_PROBLEMS} problems. Seconds: "
        "means, one CPU",
        "thread each; offline they include sampling and scoring the whole cache, loading and disk.",
    ]


def html(results: Sequence[Result], text: str) -> str:
    """One self-contained page: the table, and plots of accuracy, KL, ESS and ratio."""
    plots = [
        _plot(results, SECONDS, "accuracy", _curve("accuracy")),
        _plot(results, SECONDS, "KL(student || teacher), nats", _curve("kl"), log=True),
        _plot(results, "step", "effective sample size of the ratios", _metric("ess")),
        _plot(results, "step", "mean ratio, student to sampler", _metric("ratio_mean"), log=True),
    ]
    images = "\n".join(f'<img alt="{alt}" src="data:image/png;base64,{data}">' for alt, data in plots)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Offline distillation from a cache, against a live teacher</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px }}
img {{ width: 49%; min-width: 28rem }}
</style>
<h1>Offline distillation from a cache, against a live teacher</h1>
<pre>{html_escape.escape(text)}</pre>
{images}
<p>Each line is one seed; its points are on the same {CURVE_PROBLEMS} problems. Ratio and effective
sample size are of the sampled tokens under the student, against the policy that drew them: live, that
is the student itself, so both are 1.</p>
</html>
"""


Points = Callable[[Result], tuple[list[float], list[float]]]


def _curve(name: str) -> Points:
    return lambda result: ([p["seconds"] for p in result.curve], [p[name] for p in result.curve])


def _metric(name: str) -> Points:
    return lambda result: ([m["step"] for m in result.metrics], [m[name] for m in result.metrics])


def _plot(
    results: Sequence[Result], x_label: str, y_label: str, points: Points, *, log: bool = False
) -> tuple[str, str]:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    start = results[0]
    for number, method in enumerate(METHODS):
        for result in (result for result in results if result.method == method.name):
            x, y = points(result)
            if x_label == SECONDS:
                x, y = [result.seconds_before, *x], [*points(start)[1], *y]
            style = ("--" if method.live else "-") + ("." if len(x) < 9 else "")
            label = method.name if result.seed == 0 else None
            axes.plot(x, y, style, color=f"C{number}", label=label, linewidth=1)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return y_label, base64.b64encode(buffer.getvalue()).decode()
