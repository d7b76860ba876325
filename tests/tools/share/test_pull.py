"""`opd pull`: the whole cache or a part of it, whatever goes wrong on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from cloud.fault_proxy import Fault, FaultProxy
from opd_tools.share.fetch import ORIGIN, download
from opd_tools.share.transfer import upload
from store.caches import VOCAB, add, assert_same, files, some_rollouts, write
from tools.share.conftest import TEACHER, ok, opd, refused

import opd_store
from opd_store import CacheExistsError, IntegrityError, StorageError
from opd_store.testing import example_meta


def without_origin(path):
    return {name: data for name, data in files(path).items() if name != ORIGIN}


def test_the_whole_is_the_same_files_under_the_same_digest(local, place, tmp_path):
    url, access = place
    upload(local, url, access)
    digest = opd_store.open(local).digest
    out = tmp_path / "out"
    done = json.loads(ok(opd("pull", f"{url}@{digest}", out, "--json", access=access)).stdout)
    assert done["digest"] == digest
    assert done["from"] == f"{url}@{digest}"
    assert not done["existed"]
    assert without_origin(out) == files(local)
    assert json.loads((out / ORIGIN).read_text()) == {"uri": url, "digest": digest}
    again = ok(opd("pull", url, out, access=access))
    assert "pulled before, nothing to do" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_an_older_version_is_pulled_by_its_pin(local, tmp_path):
    first = opd_store.open(f"{local}@{opd_store.open(local).parent}")
    got = download(f"{local}@{first.digest}", tmp_path / "out", {})
    found = opd_store.open(tmp_path / "out")
    assert (got.digest, found.digest, found.version) == (first.digest, first.digest, 2)
    report = opd_store.verify(tmp_path / "out")
    assert (report.ok, report.versions) == (True, 2)


def test_every_pulled_version_can_be_opened(local, tmp_path):
    download(str(local), tmp_path / "out", {})
    cache = opd_store.open(tmp_path / "out")
    for _ in range(3):
        assert opd_store.verify(f"{tmp_path / 'out'}@{cache.digest}").ok
        if cache.parent is not None:
            cache = opd_store.open(f"{tmp_path / 'out'}@{cache.parent}")
    assert cache.version == 1


def test_it_does_without_the_index_of_older_versions(local, tmp_path):
    shutil.copytree(local, tmp_path / "tidied")
    newest = opd_store.open(local)
    oldest = opd_store.open(f"{local}@{opd_store.open(f'{local}@{newest.parent}').parent}")
    names = {ref.path for ref in (oldest.manifest.segments[0].shards, oldest.manifest.segments[0].rollouts)}
    names -= {ref.path for part in newest.manifest.segments for ref in (part.shards, part.rollouts)}
    for name in names:
        (tmp_path / "tidied" / name).unlink()
    download(str(tmp_path / "tidied"), tmp_path / "out", {})
    assert opd_store.verify(tmp_path / "out").ok


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.RESET, Fault.CUT, Fault.FLIP])
def test_passing_faults_are_overcome(local, moto, tmp_path, fault):
    with FaultProxy(("127.0.0.1", moto.port)) as proxy:
        url = f"s3://bucket/pull-{fault.name}"
        upload(local, url, {"storage_options": moto.options})
        proxy.arm(dict.fromkeys(range(5, 60, 4), fault))
        download(url, tmp_path / "out", {"storage_options": moto.options | {"endpoint_url": proxy.url}})
        assert any(found.fault for found in proxy.log)
    assert without_origin(tmp_path / "out") == files(local)


def test_what_was_cut_off_goes_on_inside_a_file(local, moto, tmp_path, monkeypatch):
    monkeypatch.setattr("opd_tools.share.places._WINDOW", 1 << 15)
    monkeypatch.setattr("opd_tools.share.fetch._AT_ONCE", 1)
    access = {"storage_options": moto.options}
    upload(local, "s3://bucket/cut-off", access)
    total = sum(len(data) for data in files(local).values())
    with FaultProxy(("127.0.0.1", moto.port)) as proxy:
        through = {"storage_options": moto.options | {"endpoint_url": proxy.url}}
        download("s3://bucket/cut-off", tmp_path / "rehearsal", through)
        n_requests = len(proxy.log)
        # From the middle on, nothing comes.
        proxy.arm({}, None)
        proxy.plan = dict.fromkeys(range(n_requests * 2 // 3, 10_000), Fault.EXPIRED)
        with pytest.raises(StorageError, match="access denied"):
            download("s3://bucket/cut-off", tmp_path / "out", through)
        assert not (tmp_path / "out").exists()
        kept = sum(path.stat().st_size for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
        assert 0 < kept < total
        proxy.arm({})
        download("s3://bucket/cut-off", tmp_path / "out", through)
        fetched = sum(found.n_bytes for found in proxy.log if "shards" in found.path)
        assert fetched < total - kept + 20_000
    assert without_origin(tmp_path / "out") == files(local)


def test_bytes_that_were_damaged_here_are_fetched_again(local, tmp_path):
    download(str(local), tmp_path / "out", {})
    (tmp_path / "out").rename(tmp_path / "out.partial")
    shard, *_ = sorted((tmp_path / "out.partial/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    part = tmp_path / "out.partial/tmp" / shard.stem
    part.parent.mkdir()
    part.write_bytes(b"not the beginning of it")
    download(str(local), tmp_path / "out", {})
    assert without_origin(tmp_path / "out") == files(local)


def test_a_damaged_source_is_refused_and_nothing_is_put_in_place(local, tmp_path):
    shutil.copytree(local, tmp_path / "source")
    shard, *_ = sorted((tmp_path / "source/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shards/.*not the .* bytes with the digest"):
        download(str(tmp_path / "source"), tmp_path / "out", {})
    shard.unlink()
    with pytest.raises(IntegrityError, match="missing, although"):
        download(str(tmp_path / "source"), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(local, tmp_path):
    write(tmp_path / "other", some_rollouts(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    for name in ("other", "full", "file"):
        with pytest.raises(CacheExistsError):
            download(str(local), tmp_path / name, {})
    (tmp_path / "empty").mkdir()
    download(str(local), tmp_path / "empty", {})


PARTS = {
    "ranks": ("--ranks 8", 8, range(40), None),
    "no ranks": ("--ranks 0", 0, range(40), None),
    "rows": ("--rows 3:6,38", 20, [3, 4, 5, 38], None),
    "limit": ("--limit 7", 20, range(7), None),
    "columns": ("--columns teacher_logprob,reward", 20, range(40), {"teacher_logprob", "reward"}),
    "all": ("--ranks 8 --rows 5: --limit 3 --columns reward", 8, [5, 6, 7], {"reward"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_holds_what_the_whole_holds_there(local, seaweedfs, tmp_path, name):
    text, ranks, rows, columns = PARTS[name]
    options = text.split()
    access = {"storage_options": seaweedfs.options}
    upload(local, "s3://bucket/parts", access)
    whole = opd_store.open(local)
    out = tmp_path / "part"
    done = json.loads(ok(opd("pull", "s3://bucket/parts", out, *options, "--json", access=access)).stdout)
    part = opd_store.open(out)
    assert opd_store.verify(out).ok
    assert done["uri"] == f"{out}@{part.digest}"
    assert done["from"] == f"s3://bucket/parts@{whole.digest}"
    assert done["n_bytes"] < whole.n_bytes + 50_000
    assert part.meta.extra["pulled_from"] == f"s3://bucket/parts@{whole.digest}"
    assert part.meta.extra["pulled_ranks"] == str(ranks)
    assert dataclasses.replace(part.meta, extra={}) == whole.meta
    assert (part.topk, len(part), part.encoding) == (ranks, len(rows), whole.encoding)
    always = {"topk_ids", "topk_logprob", "log_tail", "sample_id", "finish_reason", "teacher"}
    for found, row in zip(part, rows, strict=True):
        wanted = None if columns is None else columns | always
        expected = whole.rollout(row, ranks=ranks, columns=wanted)
        if ranks == 0:
            expected = dataclasses.replace(expected, topk_ids=None, topk_logprob=None, log_tail=None)
        assert np.array_equal(found.token_ids, expected.token_ids)
        assert_same(found, expected)
    again = json.loads(ok(opd("pull", "s3://bucket/parts", out, *options, "--json", access=access)).stdout)
    assert again["existed"]
    assert again["uri"] == done["uri"]


def test_ranks_between_bands_are_encoded_anew_and_the_error_says_so(local, tmp_path):
    ok(opd("pull", local, tmp_path / "part", "--ranks", "5"))
    whole, part = opd_store.open(local), opd_store.open(tmp_path / "part")
    assert whole.max_error < part.max_error <= 2 * whole.max_error
    for row, found in enumerate(part):
        expected = whole.rollout(row, ranks=5)
        assert np.array_equal(found.topk_ids, expected.topk_ids)
        for name in ("topk_logprob", "log_tail"):
            apart = np.abs(getattr(found, name) - getattr(expected, name)).max()
            assert apart <= part.max_error - whole.max_error + 1e-6


def test_a_part_fetches_only_what_it_needs(tmp_path, seaweedfs):
    write(tmp_path / "wide", some_rollouts(200, topk=64, response_len=100), topk=64, batch_bytes=1 << 20)
    access = {"storage_options": seaweedfs.options}
    upload(tmp_path / "wide", "s3://bucket/wide", access)
    options = ["--ranks", "0", "--limit", "20", "--json"]
    done = json.loads(ok(opd("pull", "s3://bucket/wide", tmp_path / "part", *options, access=access)).stdout)
    assert done["n_bytes"] < opd_store.open(tmp_path / "wide").n_bytes / 5


def test_a_part_of_a_part_says_so(local, tmp_path):
    ok(opd("pull", local, tmp_path / "one", "--limit", "9"))
    ok(opd("pull", tmp_path / "one", tmp_path / "two", "--ranks", "8"))
    found = opd_store.open(tmp_path / "two")
    assert found.meta.extra["pulled_from"] == f"{tmp_path / 'one'}@{opd_store.open(tmp_path / 'one').digest}"
    assert (found.max_error, found.meta.teacher) == (opd_store.open(local).max_error, TEACHER)


def test_user_columns_and_an_id_table_come_along(tmp_path):
    rollouts = some_rollouts(30, topk=16, response_len=40)
    extras = [{"x_domain": f"d{at % 3}", "x_n": at} for at in range(30)]
    rollouts = [dataclasses.replace(r, extra=extra) for r, extra in zip(rollouts, extras, strict=True)]
    table = opd_store.build_id_table([r.topk_ids for r in rollouts], vocab_size=VOCAB)
    columns = {"x_domain": "utf8", "x_n": "int64"}
    options = {"topk": 16, "encoding": "ladder/64", "id_table": table, "user_columns": columns}
    write(tmp_path / "from", rollouts, meta=example_meta(VOCAB), **options)
    ok(opd("pull", tmp_path / "from", tmp_path / "all", "--limit", "10"))
    ok(opd("pull", tmp_path / "from", tmp_path / "one", "--limit", "10", "--columns", "x_n"))
    found, one = opd_store.open(tmp_path / "all"), opd_store.open(tmp_path / "one")
    assert found.id_table is not None
    assert found.id_table.digest == opd_store.open(tmp_path / "from").id_table.digest
    assert [r.extra for r in found] == [r.extra for r in rollouts[:10]]
    assert [dict(r.extra) for r in one] == [{"x_n": i} for i in range(10)]


def test_wrong_usage(local, tmp_path):
    refused(opd("pull", local, tmp_path / "x", "--ranks", "21"), 2, "--ranks 21", "has 20")
    refused(opd("pull", local, tmp_path / "x", "--columns", "x_none"), 2, "'x_none' is not one of")
    refused(opd("pull", local, tmp_path / "x", "--rows", "99"), 2, "row 99")
    refused(opd("pull", tmp_path / "none", tmp_path / "x"), 2, "no cache here")
    refused(opd("pull", local, "s3://bucket/x"), 2, "a whole cache is pulled to a path")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_moved_on_is_not_mixed_in(local, tmp_path):
    shutil.copytree(local, tmp_path / "source")
    download(str(tmp_path / "source"), tmp_path / "out", {})
    add(tmp_path / "source", some_rollouts(2, seed=9, topk=20))
    with pytest.raises(CacheExistsError, match="holds sha256"):
        download(str(tmp_path / "source"), tmp_path / "out", {})
