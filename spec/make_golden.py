"""Write `tests/golden/1.0/`: small caches as this version writes them, and the SHA-256 of every file.

    python spec/make_golden.py [FOLDER]

Run it together with a change of the specification, and never for a released version: its caches stay as they
are. The input is made of integers alone, so that it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import zstandard

import opd_store
from opd_store import Rollout, build_id_table, layout
from opd_store.testing import example_meta

FORMAT_VERSION = "1.0"
VOCAB = 300
RANKS = 20
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def rollouts() -> list[Rollout]:
    """Three rollouts of 1, 7 and 90 positions with ties, long steps, and tails of nothing."""
    values = []
    for number, positions in enumerate((1, 7, 90)):
        place = np.arange(positions * RANKS).reshape(positions, RANKS)
        # 7919 is a prime: no two ranks of a position have the same id.
        ids = ((place // RANKS * 13 + place % RANKS * 7919 + number) % VOCAB).astype(np.uint32)
        gaps = 8 + (place * 2654435761 >> 7) % 64
        gaps[:, 0] += 150
        gaps[::5, 3] = 0
        gaps[::7, 5] = 5000
        logprob = (np.cumsum(gaps, axis=1) / -100).astype(np.float32)
        order = np.lexsort((ids, -logprob), axis=1)
        tail = ((np.arange(positions) % 50 + 120) / -100).astype(np.float32)
        tail[::4] = -np.inf
        tokens = np.arange(positions + 3, dtype=np.uint32) * 31 % VOCAB + number
        values.append(
            Rollout(
                token_ids=(tokens % VOCAB).astype(np.uint32),
                prompt_len=3,
                sample_id=f"golden-{number}",
                finish_reason="stop",
                teacher_logprob=logprob[:, 1],
                loss_mask=np.arange(positions) % 3 != 1,
                topk_ids=np.take_along_axis(ids, order, axis=1),
                topk_logprob=np.take_along_axis(logprob, order, axis=1),
                log_tail=tail,
                reward=0.5 * number,
                extra={"x_domain": ("maths", "code", "prose")[number]},
            )
        )
    return values


def caches() -> dict[str, dict[str, object]]:
    """Name of each cache to what it is created with."""
    # One band: the tail of an inner band is a sum of exponentials, whose last bit depends on the machine.
    shared = {
        "topk": RANKS,
        "bands": (RANKS,),
        "meta": example_meta(VOCAB),
        "user_columns": {"x_domain": "utf8"},
    }
    names = ("plain", "f32", "ladder16", "ladder/128", "ladder/64", "ladder/32")
    made: dict[str, dict[str, object]] = {
        name.replace("/", "-"): {**shared, "encoding": name, "id_table": None} for name in names
    }
    table = build_id_table([value.topk_ids for value in rollouts()[:2]], vocab_size=VOCAB, n_lists=2)
    made["id-table"] = {**shared, "encoding": "ladder/128", "id_table": table}
    return made


def write(folder: Path) -> None:
    """All caches, two versions each."""
    values = rollouts()
    for name, options in caches().items():
        with opd_store.create(folder / name, **options) as writer:
            writer.append_batch(values[:2])
        with opd_store.append(folder / name) as writer:
            writer.append(values[2])
        shutil.rmtree(folder / name / "tmp", ignore_errors=True)


def listing(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "golden.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(folder: Path) -> None:
    found = f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}"
    if found != FORMAT_VERSION:
        raise SystemExit(
            f"opd_store writes format {found}, these caches are of {FORMAT_VERSION}. Released ones never "
            "change: copy this script for the new version."
        )
    place = folder / FORMAT_VERSION
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write(place)
    libraries = {"pyarrow": pa.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))}
    record = {
        "format_version": FORMAT_VERSION,
        "opd_store": opd_store.__version__,
        "made_by": "spec/make_golden.py",
        **libraries,
        "sha256": listing(place),
    }
    (place / "golden.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(record['sha256'])} files in {place}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
