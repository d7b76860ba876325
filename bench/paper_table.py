"""Does offline distillation from a cache match live distillation? Which correction, which objective, when?

    python bench/paper_table.py runs/paper [--seeds 5] [--workers 2] [--groups main,truncated,rate,...]

A few CPU hours. Everything is kept below RUNS, so a second run goes on, and only prints where all is done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import machine
import torch
from opd_tools.console import quiet_libraries
from paper import figures, tables
from paper.compute import compute_table
from paper.methods import DEFAULT, GROUPS, LIVE_METHODS, Method
from paper.training import measure_start, result_path, run
from paper.world import TEACHERS, World

WIDE_TEACHER = 256
"""Twice the width of the table's teacher, so about four times as expensive."""


def prepare(root: Path, seed: int, students: list[str]) -> None:
    """Models of one seed."""
    quiet_libraries()
    torch.set_num_threads(1)
    world = World(root, seed)
    if not (world.path / "opd.jsonl").exists():
        world.write_prompts()
    if not all((world.path / name).exists() for name in TEACHERS):
        world.train_teachers()
    for name in students:
        if not (world.path / name).exists():
            distance, _, teacher = name.partition("-of-")
            world.train_student(distance, teacher)
        measure_start(root, name, seed)


def work(root: Path, seed: int, methods: list[Method]) -> None:
    """All of one seed, in one process: two would make the same caches twice."""
    quiet_libraries()
    for method in methods:
        if not result_path(root, method, seed).exists():
            started = time.perf_counter()
            run(root, method, seed)
            print(f"seed {seed}: {method.name}: {time.perf_counter() - started:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated")
    parser.add_argument("--out", type=Path, help="directory for the figures")
    args = parser.parse_args(argv)
    methods = [method for name in args.groups.split(",") for method in GROUPS[name]]
    seeds = range(args.seeds)
    students = {
        seed: sorted({m.student for m in methods if m.pair in (None, seed)})
        for seed in {*seeds, *(m.pair for m in methods if m.pair is not None)}
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for future in [pool.submit(prepare, args.runs, seed, names) for seed, names in students.items()]:
            future.result()
        for future in [pool.submit(work, args.runs, seed, methods) for seed in seeds]:
            future.result()
    print(machine.header(packages=("torch", "transformers", "numpy")), f"\nseeds 0 to {args.seeds - 1}\n")
    for title, (columns, rows) in tables.all_tables(args.runs, seeds).items():
        print(f"{title}\n\n{machine.table(columns, rows)}\n")
    found = tables.targets(args.runs, seeds, DEFAULT)
    for teacher, hidden in (("the teacher", None), (f"a teacher of width {WIDE_TEACHER}", WIDE_TEACHER)):
        columns, rows, ratio = compute_table(args.runs, LIVE_METHODS[1], DEFAULT, teacher_hidden=hidden)
        print(f"Compute with {teacher}, one thread, medians of rounds in one process\n")
        print(machine.table(columns, rows), "\n")
        met = "yes" if ratio >= 4 else "no"
        found.append(
            (f"seconds with {teacher}: {LIVE_METHODS[1].name} / default", f"{ratio:.1f}x", ">= 4x", met)
        )
    print(f"{DEFAULT.name}: what was aimed at\n")
    print(machine.table(("what", "measured", "target", "met"), found))
    if args.out is not None:
        figures.draw(args.runs, seeds, args.out)


if __name__ == "__main__":
    main()
