"""From hidden states to a top-k loss and its gradients: ours against what people use, in one run.

    python bench/head.py [--device cuda] [--positions N --hidden H --vocab V --topk K --chunk C] [--rounds R]

Time is of one forward and backward pass: wall time on a GPU, CPU time of all threads elsewhere. Forms are run
in turn, so that a ratio is taken within each round; tables hold medians. Memory is the peak above the inputs,
gradients included; on a CPU it is that of the second pass in a fresh process. Errors are those of the first
positions, relative to the norm of a float64 gradient from the same numbers. Peers that do not run here are
left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import head_forms
import machine
import torch
from head_forms import BARE, FORMS, FUSED, NAIVE, RECOMPUTE, SAME_LOSS, Task, Unavailable

PACKAGES = ("torch", "triton", "liger-kernel", "trl")
SEED = 0
SHAPES = {"cuda": (8192, 4096, 151_936, 64, 2048), "cpu": (2048, 128, 64_000, 64, 64)}
"""N, H, V, K and positions per chunk."""
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
ERROR_POSITIONS = 256
MAX_MS, MAX_GIB, MAX_SHARE = 55.0, 3.2, 0.1
MAX_ERROR = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-18}
"""A few roundings of the dtype."""


def make(args: argparse.Namespace) -> Task:
    """The problem of these arguments."""
    return head_forms.make_task(
        args.positions,
        args.hidden,
        args.vocab,
        args.topk,
        chunk=args.chunk,
        dtype=DTYPES[args.device],
        device=args.device,
        seed=SEED,
    )


def usable(task: Task) -> list[str]:
    """Forms that run here, each run once; a line for each of the others."""
    found = []
    for name, form in FORMS.items():
        try:
            form(task)
        except Unavailable as reason:
            print(f"left out: {reason}")
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0]:.120})")
        else:
            found.append(name)
    return found


def milliseconds(task: Task, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Times of every form in every round."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            found[name].append(1e3 * _seconds(task, name))
    return found


def _seconds(task: Task, name: str) -> float:
    if task.hidden.device.type != "cuda":
        return machine.cpu_seconds(lambda: FORMS[name](task))
    torch.cuda.synchronize()
    start = time.perf_counter()
    FORMS[name](task)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(task: Task, name: str, args: argparse.Namespace) -> float:
    """Memory above the inputs."""
    if args.device != "cuda":
        # What is freed goes back to the system, and is not counted twice.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *args.given, "--measure", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1])) / 2**20
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    FORMS[name](task)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def kilobytes_here(task: Task, name: str) -> int:
    """Peak of one call in this process above what it holds already."""
    FORMS[name](task)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    FORMS[name](task)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def errors(task: Task, names: list[str]) -> dict[str, tuple[float, float]]:
    """Of the gradients of hidden states and weight."""
    some = task.first(min(ERROR_POSITIONS, len(task.hidden)))
    exact = head_forms.naive(some.first(len(some.hidden), torch.float64))
    found = {}
    for name in names:
        if name in SAME_LOSS:
            pairs = zip(FORMS[name](some), exact, strict=True)
            first, second = (((one.double() - other).norm() / other.norm()).item() for one, other in pairs)
            found[name] = first, second
    return found


def targets(
    args: argparse.Namespace,
    times: dict[str, float],
    memory: dict[str, float],
    error: dict[str, tuple[float, float]],
) -> list[tuple[str, str, str, str]]:
    """Rows of what was promised."""
    limit = MAX_ERROR[DTYPES[args.device]]
    rows = []
    if args.device == "cuda" and args.default_shape:
        rows += [
            _verdict("fused_loss, ms", f"{times[FUSED]:.1f}", f"<= {MAX_MS:g}", times[FUSED] <= MAX_MS),
            _verdict("fused_loss, GiB", f"{memory[FUSED]:.2f}", f"<= {MAX_GIB}", memory[FUSED] <= MAX_GIB),
        ]
    if args.device == "cpu" and args.default_shape:
        share = memory[FUSED] / memory[NAIVE]
        rows.append(_verdict("memory / naive", f"{share:.3f}", f"<= {MAX_SHARE}", share <= MAX_SHARE))
    for name in (RECOMPUTE, FUSED):
        worst = max(error[name])
        rows.append(_verdict(f"error, {name}", f"{worst:.1e}", f"<= {limit:.1e}", worst <= limit))
    return rows


def _verdict(what: str, measured: str, target: str, met: bool) -> tuple[str, str, str, str]:
    return what, measured, target, "yes" if met else "NO"


def arguments(argv: list[str]) -> argparse.Namespace:
    """Shapes follow from the device unless given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=DTYPES, default="cuda" if torch.cuda.is_available() else "cpu")
    names = ("positions", "hidden", "vocab", "topk", "chunk")
    for name in names:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, help="default 20 on a GPU, 3 elsewhere")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = [word for word in argv if word != "--no-compile"]
    args.default_shape = not any(getattr(args, name) for name in names)
    for name, value in zip(names, SHAPES[args.device], strict=True):
        setattr(args, name, getattr(args, name) or value)
    args.rounds = args.rounds or {"cuda": 20, "cpu": 3}[args.device]
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the table of forms and that of targets."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    if args.measure:
        print(kilobytes_here(make(args), args.measure))
        return
    if args.no_compile:
        del FORMS[head_forms.COMPILED]
    print(machine.header(seed=SEED, packages=(*machine.PACKAGES, *PACKAGES)))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{where}; N = {args.positions:,}, H = {args.hidden:,}, V = {args.vocab:,}, K = {args.topk}, "
        f"chunks of {args.chunk:,}, {str(DTYPES[args.device]).removeprefix('torch.')}, {args.rounds} rounds"
    )
    task = make(args)
    names = usable(task)
    times = milliseconds(task, names, args.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: peak_gib(task, name, args) for name in names}
    error = errors(task, names)
    rows = []
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[BARE], strict=True))
        found = [f"{value:.1e}" for value in error.get(name, ())] or ["", ""]
        rows.append((name, f"{medians[name]:,.1f}", f"{ratio:.2f}", f"{memory[name]:.3f}", *found))
    columns = ("form", "ms", f"/ {BARE}", "GiB above inputs", "error of dh", "error of dW")
    print("\n" + machine.table(columns, rows))
    print("\n" + machine.table(("what", "measured", "target", "met"), targets(args, medians, memory, error)))


if __name__ == "__main__":
    main()
