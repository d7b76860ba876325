"""Sending a cache anywhere: order, resumption, conflicts, and what goes wrong on the way."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from click.testing import CliRunner
from cloud.fault_proxy import Fault, FaultProxy
from opd_tools.main import main
from opd_tools.share.bucket import Bucket
from opd_tools.share.contents import contents
from opd_tools.share.transfer import place_of, stages, transmit, upload
from store.caches import add, files, some_rollouts, write
from tools.share.conftest import REPO

import opd_store
from opd_store import CacheExistsError, CacheNotFoundError, IntegrityError, InvalidArgumentError, StorageError
from opd_store.storage import resolve


def copy(local, tmp_path):
    shutil.copytree(local, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_is_the_same_cache_and_sent_once(local, place):
    url, access = place
    n = len(files(local))
    seen = []
    sent = upload(local, url, access, on_bytes=lambda done, total: seen.append((done, total)))
    assert (sent.files, sent.there) == (n, 0)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(len(data) for data in files(local).values())
    report = opd_store.verify(url, **access)
    assert report.ok, report.problems
    assert (report.digest, report.versions) == (opd_store.open(local).digest, 3)
    again = upload(local, url, access)
    assert (again.files, again.n_bytes, again.there) == (0, 0, n)


def test_a_later_version_sends_what_is_new(local, place, tmp_path):
    url, access = place
    upload(local, url, access)
    ours = copy(local, tmp_path)
    version = add(ours, some_rollouts(3, seed=5, topk=20))
    sent = upload(ours, url, access)
    assert 0 < sent.files < sent.there
    assert opd_store.open(url, **access).digest == version.digest
    # The older one has all that this needs, and would hide it.
    with pytest.raises(CacheExistsError, match="holds version 4, which this cache does not"):
        upload(local, url, access)


def test_a_history_that_was_removed_stays_removed(local, place, tmp_path):
    url, access = place
    ours = copy(local, tmp_path)
    shortened = ["gc", str(ours), "--keep-versions", "1", "--min-age", "0", "--delete"]
    assert CliRunner().invoke(main, shortened).exit_code == 0
    upload(ours, url, access)
    for found in (opd_store.verify(ours), opd_store.verify(url, **access)):
        assert found.ok, found.problems
        assert found.versions == 1
    assert upload(ours, url, access).files == 0


def test_another_cache_is_never_overwritten(local, place, tmp_path):
    url, access = place
    write(tmp_path / "other", some_rollouts(3))
    upload(tmp_path / "other", url, access)
    for shorter in (False, True):
        if shorter:
            for at in range(3):
                add(tmp_path / "other", some_rollouts(1, seed=at + 7))
            upload(tmp_path / "other", url, access)
        with pytest.raises(CacheExistsError):
            upload(local, url, access)
    assert opd_store.verify(url, **access).ok


def test_damage_at_the_place_is_sent_again(local, tmp_path):
    upload(local, str(tmp_path / "place"), {})
    (tmp_path / "place/manifests/00000003.json").unlink()
    shard = next((tmp_path / "place/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    next((tmp_path / "place/index").iterdir()).unlink()
    assert upload(local, str(tmp_path / "place"), {}).files == 3
    assert files(tmp_path / "place") == files(local)


def test_shards_first_manifests_last_in_order(local, hub, moto):
    upload(local, REPO, {"storage_options": hub.options})
    repo = hub.repos["user/name"]
    assert repo.messages == ["initial commit", *(f"Add {what}" for what in (
        "shards (3 files)", "index (6 files)", "manifest (3 files)"
    ))]  # fmt: skip
    with FaultProxy(("127.0.0.1", moto.port)) as proxy:
        options = moto.options | {"endpoint_url": proxy.url}
        upload(local, "s3://bucket/in-order", {"storage_options": options})
        sent = [found.path.split("/")[3] for found in proxy.log if found.method == "PUT"]
        assert sent == ["shards"] * 3 + ["index"] * 6 + ["manifests"] * 3
        names = [found.path for found in proxy.log if found.method == "PUT" and "manifests" in found.path]
        assert names == sorted(names)


@pytest.mark.parametrize("fault", [Fault.INTERNAL, Fault.BUSY, Fault.RESET, Fault.CUT, Fault.TOO_MANY])
def test_passing_faults_are_overcome(local, moto, tmp_path, fault):
    with FaultProxy(("127.0.0.1", moto.port), plan=dict.fromkeys(range(3, 60, 4), fault)) as proxy:
        access = {"storage_options": moto.options | {"endpoint_url": proxy.url}}
        url = f"s3://bucket/faults-{fault.name}"
        upload(local, url, access)
        assert sum(found.fault is not None for found in proxy.log) > 5
    assert opd_store.verify(url, storage_options=moto.options).ok


def test_a_lost_reply_to_the_manifest_is_no_conflict(local, moto, hub):
    with FaultProxy(("127.0.0.1", moto.port)) as proxy:
        access = {"storage_options": moto.options | {"endpoint_url": proxy.url}}
        upload(local, "s3://bucket/rehearsal", access)
        last = max(at for at, found in enumerate(proxy.log, 1) if found.method == "PUT")
        # The server does what was asked, and the answer is cut.
        proxy.arm({last: Fault.CUT})
        assert upload(local, "s3://bucket/lost", access).files == len(files(local))
        assert proxy.log[last - 1].fault is Fault.CUT
    hub.lose_replies = 3
    upload(local, REPO, {"storage_options": hub.options})
    assert hub.lose_replies == 0
    assert len(hub.repos["user/name"].messages) == 4
    assert hub.files("user/name") == files(local)


def test_what_was_cut_off_goes_on(local, hub):
    access = {"storage_options": hub.options}
    hub.stop_after = 2
    with pytest.raises(StorageError, match="cannot write"):
        upload(local, REPO, access)
    with pytest.raises((CacheNotFoundError, StorageError)):
        opd_store.open(REPO, **access)
    hub.stop_after, hub.log[:] = None, []
    upload(local, REPO, access)
    # Two of the nine large files were there.
    assert hub.count("PUT /objects/") == 7
    assert hub.files("user/name") == files(local)


def test_a_wrong_byte_on_arrival_is_found(local, hub, monkeypatch):
    access = {"storage_options": hub.options}
    hub.damage = 1
    with pytest.raises(IntegrityError, match="what arrived was never"):
        upload(local, REPO, access)
    assert not any(name.startswith("manifests/") for name in hub.files("user/name"))

    storage, _ = resolve(local)
    found = contents(storage, None)
    for name, times in (("once", 1), ("always", 99)):
        place = place_of(f"memory://damaged-{name}", {})
        assert isinstance(place, Bucket)
        left = damage_memory(place, times, monkeypatch)
        if name == "once":
            transmit(place, stages(found, local))
            assert left == [0]
            assert opd_store.verify("memory://damaged-once").ok
        else:
            with pytest.raises(IntegrityError, match="sent 3 times"):
                transmit(place, stages(found, local))


def damage_memory(place, times, monkeypatch):
    """Files that are put in memory lose a bit so many times; how often is left."""
    put, left = place._fs.put_file, [times]

    def damage(source, target, **how):
        put(source, target, **how)
        if left[0]:
            left[0] -= 1
            data = place._fs.cat_file(target)
            place._fs.pipe_file(target, data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(place._fs, "put_file", damage)
    return left


def test_large_files_go_in_parts_and_are_proven_without_reading_back(seaweedfs, tmp_path, monkeypatch):
    monkeypatch.setattr("opd_tools.share.bucket._PART", 5 << 20)
    rollouts = some_rollouts(60, topk=64, response_len=3000)
    write(tmp_path / "large", rollouts, topk=64)
    assert max(len(data) for data in files(tmp_path / "large").values()) > 4 * (5 << 20)
    with FaultProxy(("127.0.0.1", seaweedfs.port)) as proxy:
        options = seaweedfs.options | {"endpoint_url": proxy.url}
        upload(tmp_path / "large", "s3://bucket/large", {"storage_options": options})
        assert any("uploadId" in found.path for found in proxy.log)
        received = sum(found.n_bytes for found in proxy.log if found.method == "GET")
        assert received < 1 << 20
    assert opd_store.verify("s3://bucket/large", storage_options=seaweedfs.options).ok


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://host/cache", ("https://host/cache", "read only")),
        ("hf://user/name", ("hf://datasets/USER/NAME",)),
        ("hf://datasets/name", ("hf://datasets/USER/NAME",)),
        ("s3://bucket/x@sha256:" + "0" * 64, ("pinned version cannot be written to",)),
        ("ftp://host/x", ("cannot be opened",)),
    ],
)
def test_addresses_that_nothing_is_sent_to(local, url, parts):
    with pytest.raises(InvalidArgumentError) as caught:
        upload(local, url, {})
    assert all(part in str(caught.value) for part in parts)


def test_refusals_say_what_was_refused_and_no_secret(local, seaweedfs, hub):
    wrong = {"storage_options": seaweedfs.options | {"secret": "hunter2-hunter2"}}
    with pytest.raises(StorageError, match="access denied") as caught:
        upload(local, "s3://bucket/denied", wrong)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(CacheNotFoundError, match="no such bucket"):
        upload(local, "s3://no-such-bucket/x", {"storage_options": seaweedfs.options})
    with pytest.raises(StorageError, match="access denied") as caught:
        upload(local, REPO, {"storage_options": hub.options | {"token": "hf_wrong-token"}})
    assert "hf_wrong" not in str(caught.value)


def test_what_is_missing_here_is_not_sent(local, tmp_path):
    ours = copy(local, tmp_path)
    next((ours / "shards").iterdir()).unlink()
    with pytest.raises(StorageError, match="cannot read"):
        upload(ours, str(tmp_path / "place"), {})
    assert not (tmp_path / "place/manifests").exists()


def test_what_others_left_beside_the_cache_is_not_sent(local, tmp_path):
    ours = copy(local, tmp_path)
    (ours / "shards/stray.arrow").write_bytes(b"stray")
    (ours / "notes.txt").write_text("private")
    upload(ours, str(tmp_path / "place"), {})
    assert files(tmp_path / "place") == files(local)


def test_a_place_that_lists_nothing_wrong_is_asked_little(local, hub):
    upload(local, REPO, {"storage_options": hub.options})
    hub.log.clear()
    upload(local, REPO, {"storage_options": hub.options})
    assert not hub.count("POST")
    assert hub.count("/resolve/") == 3
    assert dataclasses.asdict(upload(local, REPO, {"storage_options": hub.options}))["files"] == 0
