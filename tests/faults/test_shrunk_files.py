"""Files that are cut, lost or replaced while a cache is open: an error or the right rows, no dead process.

A read of mapped bytes that are gone is a signal, which no test could catch; hence processes of their own.
"""

from __future__ import annotations

import pytest
from store.caches import run_python, some_rollouts, write

PRELUDE = """
import os, sys
from pathlib import Path
import opd_store
path = Path(sys.argv[1])
cache = opd_store.open(path)
(shard,) = (path / "shards").iterdir()
rollouts = path / cache.manifest.segments[0].rollouts.path
name = cache.row_hash(2)
n_bytes = shard.stat().st_size

def refused(call):
    try:
        call()
    except opd_store.IntegrityError as error:
        assert "shrank from" in str(error), error
        assert error.uri in (str(shard), str(rollouts)), error.uri
        return
    raise SystemExit("not refused")

def readable():
    assert [rollout.sample_id for rollout in cache] == [f"r{i}" for i in range(50)]
    assert [len(rollout.topk_ids) for rollout in opd_store.open(path)] == [30] * 50
"""
CASES = {
    "before a record batch is read": """
os.truncate(shard, 4096)
refused(lambda: cache[49])
refused(lambda: cache.column("sample_id"))
""",
    "after it was read": """
whole = cache[49]
os.truncate(shard, 0)
refused(lambda: cache[49])
refused(lambda: cache.rollout(49, ranks=0))
refused(lambda: list(cache))
""",
    "by a byte": """
os.truncate(shard, n_bytes - 1)
refused(lambda: cache[0])
""",
    "and grown back": """
os.truncate(shard, 0)
refused(lambda: cache[49])
os.truncate(shard, n_bytes)
try:
    cache[49]
except opd_store.IntegrityError as error:
    assert "crc32c" in str(error)
""",
    "the rollout table": """
assert cache.find(name) == 2
os.truncate(rollouts, 100)
refused(lambda: cache.find(name))
assert cache[2].sample_id == "r2"
""",
    "all index files": """
tables = [cache.row_tokens, cache.row_response_tokens, cache.batch_rows]
for file in (path / "index").iterdir():
    os.truncate(file, 0)
assert sum(tables[0]) == cache.n_tokens and sum(tables[1]) == 30 * 50 and sum(tables[2]) == 50
assert cache[49].sample_id == "r49"
""",
    "not at all, but unlinked": """
moved = path / "elsewhere"
cache[0]
os.link(shard, moved)
shard.unlink()
assert cache[49].sample_id == "r49" and cache[0].sample_id == "r0"
os.rename(moved, shard)
readable()
""",
    "not at all, but replaced by a shorter file": """
cache[0]
(path / "other").write_bytes(b"x")
backup = shard.read_bytes()
os.replace(path / "other", shard)
assert [rollout.sample_id for rollout in cache] == [f"r{i}" for i in range(50)]
shard.write_bytes(backup)
readable()
""",
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_cut(tmp_path, case):
    write(tmp_path / "cache", some_rollouts(50, topk=20, response_len=30), topk=20, batch_bytes=10_000)
    run_python(PRELUDE + CASES[case], tmp_path / "cache")
