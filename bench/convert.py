"""How fast foreign files become caches, and how much memory that takes however large they are.

    python bench/convert.py [--gib 0.0625] [--repeats 3] [--keep FOLDER]

Makes files of about so many GiB in the forms of DistillKit (exact ranks and a fitted tail, as its published
config has them), JSON lines and Parquet, and converts each with `opd convert` in a process of its own, whose
peak memory is printed. Beside it the peer: the same rows read and written by pyarrow alone (Parquet, snappy),
or parsed and written by the json module, also in a process of its own. Ratios are of CPU time, the median of
repeats in turns.

Targets: 1 GiB converts in less than 500 MiB, and Parquet at K = 16 at 200,000 positions a second or more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import header, table
from numpy.typing import NDArray
from opd_tools.converters.trainers.distillkit_codec import packed
from opd_tools.converters.trainers.distillkit_config import Codec

VOCAB = 151_936
ROWS = 511
"""Positions of a sequence."""
K = 16
DISTILLKIT = Codec(d=VOCAB, k=128, exact_k=32, polynomial_terms=(0, 1, 2))
"""The config of arcee-ai's Qwen3-235B files."""
FINGERPRINT = "sha256:" + "0" * 64


def teacher(
    rng: np.random.Generator, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Tokens [ROWS + 1], ids and log-probs [ROWS, k] of a teacher that holds most tokens likeliest."""
    ids = (rng.integers(0, VOCAB, (ROWS, 1)) + np.cumsum(rng.integers(1, 900, (ROWS, k)), axis=1)) % VOCAB
    gaps = rng.gamma(1.0, 1.0, (ROWS, k)) / np.arange(1, k + 1) * 2
    logprob = -np.cumsum(gaps, axis=1)
    logprob -= np.log(np.exp(logprob).sum(axis=1, keepdims=True)) + 0.05
    tokens = np.append(rng.integers(0, VOCAB), ids[:, 0])
    return tokens, ids, logprob.astype(np.float32)


def nested(values: list[NDArray[Any]]) -> pa.Array:
    """[sequences][rows][entries] of arrays [rows, entries]."""
    flat = np.concatenate(values)
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]), pa.array(flat.ravel())
    )
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(values) + 1, dtype=np.int32) * len(values[0])), inner
    )


def lists(values: list[NDArray[Any]]) -> pa.Array:
    """[sequences][tokens]."""
    return pa.array([value.tolist() for value in values], pa.list_(pa.int64()))


def make_distillkit(out: Path, n_bytes: int, rng: np.random.Generator) -> int:
    """A directory of data_{n}.parquet, 200 sequences each. Gives its positions."""
    out.mkdir()
    codec = DISTILLKIT
    terms = {
        "d": VOCAB,
        "k": codec.k,
        "exact_k": codec.exact_k,
        "polynomial_terms": [0, 1, 2],
        "residual_bins": [],
    }
    (out / "compression_config.yaml").write_text(json.dumps(terms))
    t = np.arange(float(codec.k - codec.exact_k))
    solve = np.linalg.pinv(np.stack([t**0, t, t**2], axis=1)).T
    done = number = 0
    while sum(path.stat().st_size for path in out.iterdir()) < n_bytes:
        found = [teacher(rng, codec.k) for _ in range(200)]
        bytes_ = []
        for _, _, logprob in found:
            deltas = np.diff(logprob.astype(np.float64), axis=1, prepend=0.0)
            exact = deltas[:, : codec.exact_k].astype("<f4").view(np.uint8)
            coefficients = (deltas[:, codec.exact_k :] @ solve).astype("<f4").view(np.uint8)
            bytes_.append(np.concatenate([exact, coefficients], axis=1))
        columns = {
            "input_ids": lists([tokens for tokens, _, _ in found]),
            "compressed_logprobs": nested(bytes_),
            "bytepacked_indices": nested([packed(ids, codec.id_bits) for _, ids, _ in found]),
        }
        pq.write_table(pa.table(columns), out / f"data_{number}.parquet")
        done, number = done + 200 * ROWS, number + 1
    return done


def make_parquet(out: Path, n_bytes: int, rng: np.random.Generator) -> int:
    """One file with int32 ids and float32 log-probs. Gives its positions."""
    done = 0
    writer = None
    while writer is None or out.stat().st_size < n_bytes:
        found = [teacher(rng, K) for _ in range(200)]
        columns = {
            "input_ids": lists([tokens for tokens, _, _ in found]),
            "topk_ids": nested([ids.astype(np.int32) for _, ids, _ in found]),
            "topk_logprob": nested([logprob for _, _, logprob in found]),
        }
        batch = pa.table(columns)
        writer = writer or pq.ParquetWriter(out, batch.schema)
        writer.write_table(batch)
        done += 200 * ROWS
    writer.close()
    return done


def make_jsonl(out: Path, n_bytes: int, rng: np.random.Generator) -> int:
    """Lines as `opd convert --to jsonl` writes them. Gives its positions."""
    done = 0
    with out.open("w") as file:
        while file.tell() < n_bytes:
            tokens, ids, logprob = teacher(rng, K)
            line = {
                "format": "opd-rollout/1",
                "topk": K,
                "token_ids": tokens.tolist(),
                "prompt_len": 1,
                "topk_ids": ids.tolist(),
                "topk_logprob": [[float(str(value)) for value in row] for row in logprob],
            }
            file.write(json.dumps(line) + "\n")
            done += ROWS
    return done


FORMS = {"distillkit": make_distillkit, "jsonl": make_jsonl, "table": make_parquet}
FILES = {"distillkit": "distillkit", "jsonl": "rows.jsonl", "table": "rows.parquet"}


def peer(source: Path, out: Path) -> None:
    """Read and write the same rows without looking at them."""
    if source.suffix == ".jsonl":
        with source.open() as file, out.open("w") as copy:
            for line in file:
                copy.write(json.dumps(json.loads(line)) + "\n")
        return
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    writer = None
    for file in files:
        for batch in pq.ParquetFile(file, buffer_size=1 << 20).iter_batches(64, use_threads=False):
            writer = writer or pq.ParquetWriter(out, batch.schema)
            writer.write_batch(batch)
    assert writer is not None
    writer.close()


def measured(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds and peak MiB of this program in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    seconds, mib = done.stdout.splitlines()[-1].split()
    return float(seconds), float(mib)


def job(what: str, source: Path, out: Path, encoding: str) -> None:
    """One measured conversion, or its peer; prints CPU seconds and peak MiB."""
    started = time.process_time()
    if what == "peer":
        peer(source, out)
    else:
        from opd_tools.main import main as opd

        started = time.process_time()
        options = ["--from", what, "--tokenizer-fingerprint", FINGERPRINT, "--vocab-size", str(VOCAB)]
        options += ["--id-table", "none", "--encoding", encoding]
        opd(["convert", str(source), str(out), *options], standalone_mode=False)
    print(time.process_time() - started, peak_mib())


def peak_mib() -> float:
    """The most memory that this process had resident. Linux only: elsewhere a child inherits its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def rows(folder: Path, gib: float, repeats: int) -> Iterator[list[str]]:
    """A line of the table for each form and encoding."""
    for form, make in FORMS.items():
        source = folder / FILES[form]
        positions = make(source, int(gib * 2**30), np.random.default_rng(0))
        size = sum(path.stat().st_size for path in ([source] if source.is_file() else source.iterdir()))
        for encoding in ("plain", "ladder/128"):
            ratios, ours, peaks = [], [], []
            for number in range(repeats):
                found = {}
                for what in (form, "peer")[:: -1 if number % 2 else 1]:
                    out = folder / "out"
                    found[what] = measured(["--job", what, str(source), str(out), encoding])
                    shutil.rmtree(out) if out.is_dir() else out.unlink()
                ratios.append(found["peer"][0] / found[form][0])
                ours.append(found[form][0])
                peaks.append(found[form][1])
            per_s = positions / statistics.median(ours)
            yield [
                form,
                encoding,
                f"{size / 2**20:,.0f}",
                f"{positions:,}",
                f"{max(peaks):,.0f}",
                f"{per_s:,.0f}",
                f"{statistics.median(ratios):.2f}",
            ]
        shutil.rmtree(source) if source.is_dir() else source.unlink()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=0.0625, help="Size of each input.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where files are made. Default: a temporary one.")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        what, source, out, encoding = arguments.job
        job(what, Path(source), Path(out), encoding)
        return
    print(header(seed=0))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        columns = [
            "from",
            "encoding",
            "MiB",
            "positions",
            "peak MiB",
            "positions/CPU-s",
            "CPU of peer / ours",
        ]
        print(table(columns, list(rows(Path(folder), arguments.gib, arguments.repeats))))


if __name__ == "__main__":
    main()
