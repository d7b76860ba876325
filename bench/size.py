"""Bytes a position and what they lose: every peer layout and encoding of ours, on real teacher log-probs.

    python bench/size.py runs/bench-data [--positions 8192] [--topk 8,16,32,64,128] [--out docs/figures]

DATA_DIR is what bench/data.py wrote; only its evaluation windows are measured. For each K the teacher is the
top K of the 128 stored ranks and a tail made, in float64, of the rest. Then, at the Ks of --variants-at: the
same with logits rounded to bfloat16, under the ids of Qwen's vocabulary, and under random ids below 262,144.

Every decoded id is compared with the original. Errors are of log-probs, in nats; KL is KL(teacher || decoded)
over K ranks and the tail, in float64, once with the tail that the layout stores and once with the tail
rebuilt as 1 - sum. Needs safetensors, and matplotlib for --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import ours
import quality
import vocabularies
import windows
from numpy.typing import NDArray
from peers import peers
from windows import Windows

from opd_store import IdTable

COLUMNS = ("layout", "B/position", "bits/entry", "max error", "KL, stored tail", "KL, 1 - sum", "largest KL")
EXACT_KL = 1e-10
"""Where plots draw a KL of (almost) zero. float32 log-probs have 1e-10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One layout on one data set at one K. KLs are means over positions."""

    name: str
    is_ours: bool
    bytes_per_position: float
    max_error: float
    kl_stored: float | None
    kl_rebuilt: float
    kl_largest: float
    """Over all positions, with the better tail that the layout offers."""

    @property
    def kl(self) -> float:
        """As a reader gets it: with the stored tail where there is one."""
        return self.kl_rebuilt if self.kl_stored is None else self.kl_stored

    def row(self, topk: int) -> tuple[str, ...]:
        stored = "-" if self.kl_stored is None else f"{self.kl_stored:.1e}"
        bits = f"{8 * self.bytes_per_position / topk:.2f}"
        kls = (stored, f"{self.kl_rebuilt:.1e}", f"{self.kl_largest:.1e}")
        return (self.name, f"{self.bytes_per_position:.1f}", bits, f"{self.max_error:.5f}", *kls)


def measured(
    name: str,
    data: Windows,
    n_bytes: int,
    ids: NDArray[np.int32],
    logprob: NDArray[np.float32],
    log_tail: NDArray[np.float32] | None,
    *,
    is_ours: bool,
) -> Measured:
    """Compare decoded rows with the teacher's."""
    teacher_ids, teacher, _ = data.rows()
    if not np.array_equal(ids, teacher_ids.view(np.int32)):
        # Log-probs that became equal are ordered by id, so put each back beside its own.
        there, here = np.argsort(teacher_ids, axis=1), np.argsort(ids, axis=1)
        same = np.array_equal(
            np.take_along_axis(ids, here, axis=1),
            np.take_along_axis(teacher_ids, there, axis=1).view(np.int32),
        )
        if not same:
            raise ValueError(f"{name}: decoded ids differ from the encoded ones")
        moved = np.empty_like(logprob)
        np.put_along_axis(moved, there, np.take_along_axis(logprob, here, axis=1), axis=1)
        logprob = moved
    teacher_tail = data.log_tail.reshape(-1)
    rebuilt = quality.kl(teacher, teacher_tail, logprob)
    stored = None if log_tail is None else quality.kl(teacher, teacher_tail, logprob, log_tail)
    return Measured(
        name=name,
        is_ours=is_ours,
        bytes_per_position=n_bytes / data.n_positions,
        max_error=quality.max_error(teacher, logprob),
        kl_stored=None if stored is None else float(stored.mean()),
        kl_rebuilt=float(rebuilt.mean()),
        kl_largest=float((rebuilt if stored is None else stored).max()),
    )


def measure_ours(data: Windows, table: IdTable) -> Iterator[Measured]:
    """Every variant of ours; the table is learnt from other windows, and its own bytes are not counted."""
    for variant in ours.variants(data.ids.shape[-1], table):
        yield measure_variant(data, variant)


def measure_variant(data: Windows, variant: ours.Variant) -> Measured:
    """One variant of ours, rollout by rollout."""
    n_bytes = 0
    parts = []
    for number in range(len(data.ids)):
        log_tail = data.log_tail[number].astype(np.float32)
        pages = ours.encode(data.ids[number], data.logprob[number], log_tail, variant)
        n_bytes += sum(len(page) for page in pages)
        parts.append(ours.decode(pages, variant, n_positions=len(log_tail)))
    ids, logprob, tails = (np.concatenate(some) for some in zip(*parts, strict=True))
    return measured(variant.name, data, n_bytes, ids, logprob, tails, is_ours=True)


def measure_peers(data: Windows) -> Iterator[Measured]:
    """Every peer that can hold this vocabulary."""
    rows = data.rows()
    for peer in peers(data.vocab_size, sequence=data.ids.shape[1]):
        if data.vocab_size <= peer.max_vocab:
            encoded = peer.encode(*rows)
            yield measured(peer.name, data, len(encoded), *peer.decode(encoded), is_ours=False)


def variants(
    data_dir: Path, positions: int | None, table: IdTable, *, seed: int
) -> Iterator[tuple[Windows, IdTable]]:
    """Other logits, and other ids for the same log-probs, with the id table that fits."""
    yield windows.load(data_dir, prefix="bf16_", positions=positions), table
    base = windows.load(data_dir, positions=positions)
    qwen, share = vocabularies.qwen_ids(data_dir, seed=seed)
    label = f"SmolLM2 log-probs, ids of Qwen's vocabulary ({share:.1%} of tokens by equal bytes)"
    size = vocabularies.QWEN_VOCAB_SIZE
    moved = windows.remap_ids(base, qwen, vocab_size=size, label=label)
    yield moved, ours.remap_table(table, qwen, size)
    random_ids = vocabularies.synthetic_ids(base.vocab_size, seed=seed)
    size = vocabularies.SYNTHETIC_VOCAB_SIZE
    label = f"synthetic: SmolLM2 log-probs, random ids below {size:,}"
    moved = windows.remap_ids(base, random_ids, vocab_size=size, label=label)
    yield moved, ours.remap_table(table, random_ids, size)


def report(data: Windows, topk: int, table: IdTable) -> list[Measured]:
    """Measure, print one table, return its rows."""
    cut = windows.keep_ranks(data, topk)
    found = [*measure_peers(cut), *measure_ours(cut, table)]
    print(f"\n{data.label}; vocabulary {data.vocab_size:,}; K = {topk}; {data.n_positions:,} positions\n")
    print(machine.table(COLUMNS, [one.row(topk) for one in found]), flush=True)
    return found


def plot(results: dict[int, list[Measured]], out: Path) -> None:
    """Size against KL, one panel a K; lower left is better. Ours as one page a rollout."""
    results = {topk: [one for one in rows if "in bands" not in one.name] for topk, rows in results.items()}
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    # Panels sit in rows of at most three and share one legend below them.
    width = min(3, len(results))
    height = -(-len(results) // width)
    figure, axes = plt.subplots(height, width, figsize=(5 * width, 4 * height), squeeze=False)
    every = {one.name: one.is_ours for rows in results.values() for one in rows}
    styles = {}
    for number, name in enumerate(name for name, is_ours in every.items() if not is_ours):
        styles[name] = {"marker": "o", "markersize": 6, "color": plt.get_cmap("tab20")(number % 20)}
    for number, name in enumerate(name for name, is_ours in every.items() if is_ours):
        shade = plt.get_cmap("tab10")(number % 10)
        styles[name] = {"marker": "*", "markersize": 13, "color": shade, "markeredgecolor": "black"}
    handles = {}
    for panel, (topk, rows) in zip(axes.flat, results.items(), strict=False):
        for one in rows:
            (handles[one.name],) = panel.plot(
                [one.bytes_per_position],
                [max(one.kl, EXACT_KL)],
                linestyle="",
                **styles[one.name],
            )
        panel.set(xscale="log", yscale="log", title=f"K = {topk}", xlabel="bytes per position")
        panel.set_ylabel("mean KL as read, nats")
        for place in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            place(ScalarFormatter())
        panel.grid(visible=True, which="both", alpha=0.2)
    for panel in axes.flat[len(results) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.set_layout_engine("constrained")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "size.png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    """Print all tables; draw them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--positions", type=int, help="measure so many, in whole windows (default: all)")
    parser.add_argument("--topk", default="8,16,32,64,128", help="ranks kept, comma-separated")
    parser.add_argument(
        "--variants-at", default="64", help="ranks for bf16 logits and other ids; empty: none"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the id maps")
    parser.add_argument("--out", type=Path, help="folder for size.png")
    args = parser.parse_args(argv)
    print(machine.header(seed=args.seed, packages=(*machine.PACKAGES, "safetensors")))
    data = windows.load(args.data_dir, positions=args.positions)
    table = ours.id_table(args.data_dir)
    print(f"Id table: {len(table.lists):,} lists, {len(table.to_bytes()):,} bytes, learnt from other windows")
    results = {topk: report(data, topk, table) for topk in map(int, args.topk.split(","))}
    variants_at = [int(topk) for topk in args.variants_at.split(",") if topk]
    if variants_at:
        for other, fitting in variants(args.data_dir, args.positions, table, seed=args.seed):
            for topk in variants_at:
                report(other, topk, fitting)
    notes = [f"- {peer.name}: {peer.note}" for peer in peers(data.vocab_size)]
    print("\nPeers:\n" + "\n".join(notes))
    if args.out:
        plot(results, args.out)


if __name__ == "__main__":
    main()
