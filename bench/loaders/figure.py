"""The figure of docs/benchmarks.md: how fast everybody reads an epoch."""

from __future__ import annotations

from pathlib import Path

from loaders.bench import RING, Bench

OURS_COLOR, PEER_COLOR = "#c44e52", "#8c9bb0"


def epoch_bars(bench: Bench, dest: Path, *, data: tuple[str, ...] = ("k16", "k64")) -> None:
    """Positions per CPU-second relative to memmaps with reused buffers, one panel a K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = {
        one: {
            name: found[RING]
            for (kind, where, name), found in bench.found.items()
            if kind == "epoch" and where == one and RING in found and "workers" not in name
        }
        for one in data
    }
    order = sorted(tables[data[0]], key=tables[data[0]].__getitem__)
    figure, axes = pyplot.subplots(1, len(data), figsize=(10, 0.28 * len(order) + 1.2), sharey=True)
    for axis, one in zip(axes, data, strict=True):
        values = [tables[one].get(name, float("nan")) for name in order]
        colors = [OURS_COLOR if name.startswith("ours") else PEER_COLOR for name in order]
        bars = axis.barh(order, values, color=colors)
        axis.bar_label(bars, [f"{value:.2g}" for value in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(right=3)
        axis.margins(y=0.01)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"K = {one.removeprefix('k')}", fontsize=10)
        axis.set_xlabel("epoch into tensors, per CPU-second / memmap ring")
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    dest.mkdir(parents=True, exist_ok=True)
    figure.savefig(dest / "loader.png", dpi=130)
