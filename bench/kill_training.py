"""Kills `opd train` with SIGKILL at random steps and starts it again, until it was killed often enough.

    python bench/kill_training.py [CACHE STUDENT] [--steps 40] [--kills 20] [--seed 0]

Without a cache, the README's tiny models make one. A kill comes up to 20 ms after a step that is drawn at
random, so anywhere in the steps and checkpoints that follow. At the end weights, metrics and last checkpoint
have to be those of a run that nothing interrupted, bit for bit; otherwise this fails.
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
from typing import Any

import machine

TIMINGS = ("seconds", "tokens_per_s", "data_share")
POLL_S, LONGEST_DELAY_S = 0.002, 0.02
TINY = Path(__file__).parents[1] / "examples" / "addition" / "tiny.py"


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    """The run that is killed."""
    options = {"steps": arguments.steps, "save-every": 3, "lr": 1e-3, "batch-tokens": arguments.batch_tokens}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "opd_tools.main", "train", arguments.cache, "--student", arguments.student]
    return [*start, "--out", str(out), "--device", "cpu", *words]


def tiny(root: Path) -> tuple[str, str]:
    """A cache and a student, made as in the README."""
    opd = [sys.executable, "-m", "opd_tools.main"]
    models, rollouts, cache = root / "tiny", str(root / "rollouts"), str(root / "cache")
    subprocess.run([sys.executable, str(TINY), str(models)], check=True, capture_output=True)
    sample = ["rollouts", str(models / "student"), str(models / "prompts.jsonl"), rollouts]
    subprocess.run([*opd, *sample, "--max-new-tokens", "24"], check=True, capture_output=True)
    score = ["score", str(models / "teacher"), rollouts, cache, "--topk", "8"]
    subprocess.run([*opd, *score], check=True, capture_output=True)
    return cache, str(models / "student")


def steps_done(out: Path) -> int:
    """Lines of the metrics, half ones included."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(words: Sequence[str], out: Path, kill: tuple[int, float] | None) -> bool:
    """Start it, and kill it so many seconds after a step; whether it was killed."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if kill is not None:
        step, delay_s = kill
        while process.poll() is None and steps_done(out) < step:
            time.sleep(POLL_S)
        time.sleep(delay_s)
        process.kill()
    _, message = process.communicate()
    if process.returncode not in (0, -9):
        raise SystemExit(message.decode())
    return process.returncode == -9


def finished(out: Path) -> dict[str, Any]:
    """What has to be equal: every file but the metrics' timings."""
    files: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".safetensors":
            files[str(path.relative_to(out))] = path.read_bytes()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return files | {"metrics": [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Names of the files that differ, and the first step whose metrics do."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    pairs = zip(found["metrics"], expected["metrics"], strict=False)
    rows = [f"{a} for {b}" for a, b in pairs if a != b]
    return f"{', '.join(names)}; {rows[0] if rows else 'metrics agree'}"


def main() -> None:
    """Run the kills and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cache", nargs="?")
    parser.add_argument("student", nargs="?")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(machine.header(seed=arguments.seed))
    rng, kills, runs, rows = random.Random(arguments.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as directory:
        if arguments.student is None:
            arguments.cache, arguments.student = tiny(Path(directory))
        whole = Path(directory) / "whole"
        run(command(arguments, whole), whole, None)
        expected = finished(whole)
        while kills < arguments.kills:
            runs += 1
            out = Path(directory) / f"run-{runs}"
            n_killed = 0
            # The last start of a run is never killed, so that every run ends and is compared.
            while kills < arguments.kills and n_killed < 4 and steps_done(out) < arguments.steps - 1:
                step = rng.randint(steps_done(out), arguments.steps - 1)
                if not run(command(arguments, out), out, (step, rng.uniform(0, LONGEST_DELAY_S))):
                    break
                kills, n_killed = kills + 1, n_killed + 1
                rows.append([str(kills), str(runs), str(step), str(steps_done(out))])
            run(command(arguments, out), out, None)
            if (found := finished(out)) != expected:
                raise SystemExit(
                    f"run {runs} is not what an uninterrupted one is: {differences(found, expected)}"
                )
    print(machine.table(["kill", "run", "after step", "steps done"], rows))
    print(f"{kills} kills in {runs} runs of {arguments.steps} steps: all end in the same bits")


if __name__ == "__main__":
    main()
