"""How well windows of record batches mix a cache whose rollouts are sorted by length.

    python bench/shuffle.py [--rollouts 100000] [--block 64] [--batch 16] [--seeds 5]

Sorted is the worst case: neighbours are alike, and a record batch says all about its rollouts. Two numbers
tell how much of that is left in stream order. `lag-1` is the correlation of the lengths of rollouts that
follow each other; 0 is perfect. `batch means` is how far the mean length of `--batch` rollouts that follow
each other varies (standard deviation), over the same after a global shuffle; 1 is perfect. `plan` is the wall
time of one epoch's plan. No shard is made: orders follow from lengths alone.
"""

from __future__ import annotations

import argparse
import time
from fractions import Fraction

import machine
import numpy as np
from numpy.typing import NDArray

from opd_train import Shuffle
from opd_train.data.plan import Planner, Rollouts

WINDOWS = (1, 8, 32, 128)
BATCH_TOKENS = 16_384


def lag_correlation(values: NDArray[np.int64]) -> float:
    """Correlation of each value with the next."""
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])


def spread_of_means(values: NDArray[np.int64], batch: int) -> float:
    """Standard deviation of the means of `batch` values that follow each other."""
    whole = len(values) // batch * batch
    return float(values[:whole].reshape(-1, batch).mean(axis=1).std())


def planner_of(lengths: NDArray[np.int64], block: int, shuffle: Shuffle, window: int, seed: int) -> Planner:
    """The planner of a cache of these rollouts, `block` of them in each record batch."""
    rows = np.arange(len(lengths))
    rollouts = Rollouts("sorted", np.zeros_like(rows), rows, rows // block, lengths, (Fraction(1),))
    return Planner(
        rollouts=rollouts,
        seed=seed,
        shuffle=shuffle,
        window=window,
        batch_tokens=BATCH_TOKENS,
        batch_rollouts=None,
    )


def measure(
    lengths: NDArray[np.int64], *, block: int, batch: int, shuffle: Shuffle, window: int, seeds: int
) -> tuple[float, float, float]:
    """Mean over seeds of lag-1 correlation, spread of batch means, and seconds a plan."""
    found = []
    for seed in range(seeds):
        planner = planner_of(lengths, block, shuffle, window, seed)
        start = time.perf_counter()
        plan = planner.plan(0, 1)
        seconds = time.perf_counter() - start
        values = lengths[plan.rollout[plan.entries]]
        found.append((lag_correlation(values), spread_of_means(values, batch), seconds))
    lag, spread, seconds = np.mean(found, axis=0)
    return float(lag), float(spread), float(seconds)


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=64, help="rollouts in a record batch")
    parser.add_argument("--batch", type=int, default=16, help="rollouts whose mean length is taken")
    parser.add_argument("--seeds", type=int, default=5, help="orders that each number is a mean of")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    lengths = np.sort(np.clip(rng.lognormal(6.2, 0.8, args.rollouts), 32, BATCH_TOKENS).astype(np.int64))
    cases = [("none", Shuffle.NONE, 1)]
    cases += [(f"window {window}", Shuffle.BLOCK, window) for window in WINDOWS]
    cases.append(("global", Shuffle.GLOBAL, 1))
    options = {"block": args.block, "batch": args.batch}
    _, ideal, _ = measure(lengths, **options, shuffle=Shuffle.GLOBAL, window=1, seeds=args.seeds)
    rows = []
    for name, shuffle, window in cases:
        lag, spread, seconds = measure(lengths, **options, shuffle=shuffle, window=window, seeds=args.seeds)
        rows.append((name, f"{lag:.3f}", f"{spread / ideal:.2f}x", f"{1e3 * seconds:.0f} ms"))
    print(machine.header(seed=0, packages=("numpy",)))
    print(
        f"\n{args.rollouts:,} rollouts sorted by length (log-normal, mean {lengths.mean():.0f} tokens), "
        f"{args.block} a record batch; means of {args.batch}; orders of seeds 0..{args.seeds - 1}\n"
    )
    print(machine.table(("order", "lag-1", "batch means", "plan"), rows))


if __name__ == "__main__":
    main()
