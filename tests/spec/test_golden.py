"""Caches of this version, kept as bytes: read as they were written, and written again as they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from spec.spec_files import SPEC, reference

import opd_store

GOLDEN = SPEC.parent / "tests" / "golden" / "1.0"
NAMES = ("f32", "id-table", "ladder-128", "ladder-32", "ladder-64", "ladder16", "plain")

_found = importlib.util.spec_from_file_location("make_golden", SPEC / "make_golden.py")
assert _found is not None
assert _found.loader is not None
make_golden = importlib.util.module_from_spec(_found)
_found.loader.exec_module(make_golden)


def record() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    """The same caches, written by this checkout."""
    folder = tmp_path_factory.mktemp("golden")
    make_golden.write(folder)
    return folder


def streams(body: bytes) -> list[list[bytes]]:
    """The planes of every stream, decompressed; what they are for does not matter here."""
    found, at = [], 0
    while at < len(body):
        n_planes = body[at]
        at += 1
        planes = []
        for _ in range(n_planes):
            size = int.from_bytes(body[at : at + 4], "little")
            payload = body[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
            at += 4 + len(payload)
            planes.append(zstandard.ZstdDecompressor().decompress(payload) if size >> 31 else payload)
        found.append(planes)
    return found


def pages(cache) -> list[tuple]:
    """Every page without what depends on zstd: its lengths, its checksum and how its planes are packed."""
    found = []
    for number in range(cache.n_shards):
        reader = pa.ipc.open_file(cache._storage.map(cache.shards[number].path))
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)):
            for column in cache.schema.packed_columns():
                for page in batch.column(column.name).to_pylist():
                    body = page[24 : 24 + int.from_bytes(page[12:16], "little")]
                    content = body if page[0] == 0 else streams(body)
                    found.append((page[:12], page[16:20], content))
    return found


def test_no_golden_file_is_missing_or_changed():
    assert record()["sha256"] == make_golden.listing(GOLDEN)
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(NAMES)
    version = f"{opd_store.layout.FORMAT_MAJOR}.{opd_store.layout.FORMAT_MINOR}"
    assert record()["format_version"] == version == GOLDEN.name
    assert set(opd_store.ENCODINGS) == {opd_store.open(GOLDEN / name).encoding for name in NAMES}
    assert opd_store.open(GOLDEN / "id-table").id_table is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_those_given(name):
    """Read by both readers, within the declared error."""
    cache = opd_store.open(GOLDEN / name)
    read = reference.read_cache(GOLDEN / name)
    assert cache.version == read["version"] == 2
    assert opd_store.verify(GOLDEN / name).problems == []
    for given, rollout, row in zip(make_golden.rollouts(), cache, read["rows"], strict=True):
        assert rollout.sample_id == row["sample_id"] == given.sample_id
        assert rollout.extra == given.extra
        assert rollout.topk_ids.ravel().tolist() == row["topk_ids"]
        np.testing.assert_array_equal(rollout.topk_logprob.ravel(), np.float32(row["topk_logprob"]))
        np.testing.assert_array_equal(rollout.log_tail, np.float32(row["log_tail"]))
        np.testing.assert_array_equal(np.sort(rollout.topk_ids), np.sort(given.topk_ids))
        np.testing.assert_allclose(rollout.topk_logprob, given.topk_logprob, rtol=0, atol=cache.max_error)
        np.testing.assert_allclose(rollout.log_tail, given.log_tail, rtol=0, atol=cache.max_error)
    bound = {"plain": 0, "f32": 0, "ladder16": 2**-5}.get(name)
    assert cache.max_error <= (0.5 / int(re.sub(r"\D", "", cache.encoding)) if bound is None else bound)


@pytest.mark.parametrize("name", NAMES)
def test_the_writer_still_writes_the_same_pages(name, today):
    """Byte for byte, but for what is inside of zstd frames."""
    old, new = opd_store.open(GOLDEN / name), opd_store.open(today / name)
    assert pages(old) == pages(new)
    assert (old.schema, old.meta, old.max_error) == (new.schema, new.meta, new.max_error)
    if old.id_table is not None:
        (one,), (two,) = ((root / name / "tables").iterdir() for root in (GOLDEN, today))
        assert one.read_bytes()[:16] == two.read_bytes()[:16]
        assert streams(one.read_bytes()[16:]) == streams(two.read_bytes()[16:])


def test_the_writer_still_writes_the_same_files(today):
    """With the libraries that wrote the golden files; others may frame the same pages otherwise."""
    zstd = ".".join(map(str, zstandard.ZSTD_VERSION))
    if (pa.__version__, zstd) != (record()["pyarrow"], record()["zstd"]):
        pytest.skip(f"pyarrow {pa.__version__} and zstd {zstd} are not those of the golden files")
    assert make_golden.listing(today) == record()["sha256"]


def test_the_golden_files_hold_frames_and_raw_planes():
    shards = b"".join(path.read_bytes() for path in GOLDEN.glob("ladder*/shards/*"))
    assert b"\x28\xb5\x2f\xfd" in shards
    plain = b"".join(path.read_bytes() for path in GOLDEN.glob("plain/shards/*"))
    assert b"\x28\xb5\x2f\xfd" not in plain


def test_the_script_refuses_another_version(tmp_path):
    code = (
        "import runpy, sys; from opd_store import layout; layout.FORMAT_MINOR += 1; "
        f"sys.argv = ['make_golden.py', {str(tmp_path)!r}]; "
        f"runpy.run_path({str(SPEC / 'make_golden.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SPEC.parent)
    assert done.returncode == 1
    assert "never change" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_test_writes_golden_files():
    """The list names the program that did."""
    assert record()["made_by"] == "spec/make_golden.py"
    one = next(iter(record()["sha256"]))
    assert hashlib.sha256((GOLDEN / one).read_bytes()).hexdigest() == record()["sha256"][one]
