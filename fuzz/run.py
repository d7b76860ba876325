"""Run every fuzz target for a share of the time, and fail on any finding.

    python fuzz/run.py --seconds 60

Uses libFuzzer through `atheris` where that is installed (`pip install atheris`), and seeded mutations without
coverage otherwise. Findings are written to the output folder; `--replay TARGET FILE` repeats one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HANG_S = 5
RSS_MIB = 1024
"""Python, numpy and pyarrow take about 200 of them."""
MAX_INPUT_BYTES = 16384


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="in all, over all targets and processes")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", help="only these")
    parser.add_argument("--engine", choices=("atheris", "plain"), help="default: atheris if it is installed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    options = parser.parse_args()
    engine = options.engine or ("atheris" if importlib.util.find_spec("atheris") else "plain")
    if options.replay:
        return replay(options.replay[0], Path(options.replay[1]))
    if options.child:
        run = run_atheris if engine == "atheris" else run_plain
        return run(options.child, options.seconds, options.seed, options.out)
    return run_all(engine, options)


def run_all(engine: str, options: argparse.Namespace) -> int:
    from fuzz.targets import TARGETS

    names = options.target or list(TARGETS)
    weights = sum(TARGETS[name].weight for name in names)
    options.out.mkdir(parents=True, exist_ok=True)
    waiting, running, failed, total = list(names), {}, [], 0
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            share = options.seconds * options.jobs * TARGETS[name].weight / weights
            command = [sys.executable, __file__, "--child", name, "--seconds", str(share)]
            command += ["--seed", str(options.seed), "--engine", engine, "--out", str(options.out)]
            log = (options.out / f"{name}.log").open("w+")
            running[name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log)
        time.sleep(0.1)
        for name, (child, log) in list(running.items()):
            if child.poll() is None:
                continue
            log.seek(0)
            text = log.read()
            log.close()
            del running[name]
            counts = re.findall(r"^(?:Done|#)\s*(\d+)", text, re.MULTILINE)
            n_runs = max(map(int, counts), default=0)
            total += n_runs
            print(f"{name:15} {n_runs:10,} runs  {'ok' if child.returncode == 0 else 'FAILED'}", flush=True)
            if child.returncode or not n_runs:
                failed.append(name)
                print(text[-3000:])
    print(f"{total:,} runs with {engine}, {len(failed)} of {len(names)} targets failed")
    return bool(failed)


def run_atheris(name: str, seconds: float, seed: int, out: Path) -> NoReturn:
    """Coverage-guided, by libFuzzer; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["opd_store"]):
        from fuzz.targets import TARGETS, run_one

    target = TARGETS[name]

    def mutator(data: bytes, max_size: int, mutation_seed: int) -> bytes:
        rng = random.Random(mutation_seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, max_size)
        return target.mutate(bytes(data), rng)[:max_size]

    folder = out / f"corpus-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (folder / f"seed-{number:03}").write_bytes(data)
    limits = [f"-max_total_time={max(1, round(seconds))}", f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_MIB}"]
    paths = [f"-artifact_prefix={out}/{name}-", f"-max_len={MAX_INPUT_BYTES}", f"-seed={seed}", str(folder)]
    atheris.Setup([sys.argv[0], *limits, *paths], lambda data: run_one(name, data), custom_mutator=mutator)
    atheris.Fuzz()
    raise SystemExit(0)


class HangError(Exception):
    """An input that takes too long."""


def run_plain(name: str, seconds: float, seed: int, out: Path) -> int:
    """Seeded mutations of seeds, and of inputs that were accepted."""
    from fuzz.targets import TARGETS, run_one

    def hang(number: int, frame: FrameType | None) -> NoReturn:
        raise HangError(f"more than {HANG_S} s")

    signal.signal(signal.SIGALRM, hang)
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    pool = target.seeds()
    end, n_runs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = target.mutate(rng.choice(pool), rng)[:MAX_INPUT_BYTES]
        signal.alarm(HANG_S)
        try:
            accepted = run_one(name, data)
        except Exception:
            traceback.print_exc()
            finding = out / f"{name}-crash-{n_runs}"
            finding.write_bytes(data)
            print(f"# {n_runs} {finding}")
            return 1
        signal.alarm(0)
        n_runs += 1
        if accepted and len(pool) < 5000:
            pool.append(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"Done {n_runs} runs, {peak} MiB")
    return peak > RSS_MIB


def replay(name: str, file: Path) -> int:
    from fuzz.targets import run_one

    print("accepted" if run_one(name, file.read_bytes()) else "refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
