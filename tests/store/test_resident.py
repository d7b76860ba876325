"""Reading a cache of any size keeps no more of it in memory than was said."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from store.caches import some_rollouts, write

import opd_store
from opd_store import kernels, record_batches


def resident(directory: Path) -> int:
    """Bytes of files in a directory that this process has mapped and touched."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(not kernels.COMPILED, reason="no C extension")
@pytest.mark.parametrize("read", ["gather", "rollout", "scan"])
def test_mapped_pages_are_given_back(tmp_path, monkeypatch, read):
    path = tmp_path / "cache"
    write(
        path, some_rollouts(60, topk=90, response_len=400), topk=90, batch_bytes=1 << 19, shard_bytes=4 << 20
    )
    expected = [rollout.topk_ids.copy() for rollout in opd_store.open(path)]

    def found(cache):
        if read == "gather":
            return [opd_store.gather(cache, np.array([row])).topk_ids for row in range(60)]
        if read == "rollout":
            return [cache.rollout(row).topk_ids.copy() for row in range(60)]
        return [rollout.topk_ids.copy() for rollout in cache.scan()]

    kept = {}
    for limit in (1 << 30, 2 << 20):
        monkeypatch.setattr(record_batches, "_RESIDENT_BYTES", limit)
        cache = opd_store.open(path)
        assert cache.n_bytes > 16 << 20
        for _ in range(2):
            ids = found(cache)
        assert all(np.array_equal(one, other) for one, other in zip(ids, expected, strict=True))
        kept[limit] = resident(path)
        del cache
    assert kept[1 << 30] > 14 << 20
    assert kept[2 << 20] < 6 << 20


def test_open_shards_hold_no_file_descriptors(tmp_path):
    write(tmp_path / "cache", some_rollouts(30), batch_bytes=1, shard_bytes=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache = opd_store.open(tmp_path / "cache")
    assert cache.n_shards == len(list(cache)) == 30
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
