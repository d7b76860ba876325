"""Kills `opd train` with SIGKILL at random moments and starts it again, until it was killed often enough.

    python bench/kill_training.py runs/demo/cache runs/demo/student [--steps 40] [--kills 20] [--seed 0]

A moment is any between the first write to the run's directory and the end. The weights, metrics and last
checkpoint at the end have to be, bit for bit, those of a run that nothing interrupted; otherwise this fails.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import machine

TIMINGS = ("seconds", "tokens_per_s", "data_share")
POLL_S = 0.002


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    """The run that is killed."""
    options = {"steps": arguments.steps, "save-every": 3, "lr": 1e-3, "batch-tokens": arguments.batch_tokens}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "opd_tools.main", "train", arguments.cache, "--student", arguments.student]
    return [*start, "--out", str(out), "--device", "cpu", *words]


def steps_done(out: Path) -> int:
    """Lines of the metrics, half ones included."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(words: Sequence[str], out: Path, delay_s: float | None) -> bool:
    """Start it, and kill it so long after its directory exists; whether it was killed."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = time.monotonic()
    # The lock file is there from the first run on, so wait for this one to take hold of its directory.
    lock = out / ".lock"
    while process.poll() is None and not (lock.exists() and held(lock, process.pid)):
        time.sleep(POLL_S)
    if delay_s is not None:
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < delay_s:
            time.sleep(POLL_S)
        process.kill()
    _, message = process.communicate()
    if process.returncode not in (0, -9):
        raise SystemExit(message.decode())
    return process.returncode == -9


def held(lock: Path, pid: int) -> bool:
    """Whether the process has the file open."""
    try:
        return any(entry.resolve() == lock.resolve() for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def finished(out: Path) -> dict[str, object]:
    """What has to be equal: every file but the metrics' timings."""
    files: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".safetensors":
            files[str(path.relative_to(out))] = path.read_bytes()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return files | {"metrics": [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]}


def main() -> None:
    """Run the kills and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(machine.header(seed=arguments.seed))
    rng, kills, runs, rows = random.Random(arguments.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole"
        run(command(arguments, whole), whole, None)
        expected = finished(whole)
        duration_s = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        span_s = sum(duration_s.values())
        while kills < arguments.kills:
            runs += 1
            out = Path(directory) / f"run-{runs}"
            n_killed = 0
            # The last start of a run is never killed, so that every run ends and is compared.
            while kills < arguments.kills and n_killed < 4:
                delay_s = rng.uniform(0, span_s)
                if not run(command(arguments, out), out, delay_s):
                    break
                kills, n_killed = kills + 1, n_killed + 1
                rows.append([str(kills), str(runs), f"{delay_s:.2f}", str(steps_done(out))])
            run(command(arguments, out), out, None)
            if finished(out) != expected:
                raise SystemExit(f"run {runs} differs from one that was not interrupted")
    print(machine.table(["kill", "run", "after (s)", "steps done"], rows))
    print(f"{kills} kills in {runs} runs of {arguments.steps} steps: all end in the same bits")


if __name__ == "__main__":
    main()
