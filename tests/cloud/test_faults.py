"""Every fault at every request of a typical read: the right bytes, or a clear error, and never a secret."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import threading

import pytest
from cloud.contract import local_index
from cloud.fault_proxy import Fault, FaultProxy
from cloud.servers import KEY, SECRET, RangeHandler, s3_options, web_server

import opd_store
from opd_store.index import decode_shard_table
from opd_store.storage import Retry, resolve
from opd_store.versions import load_manifest

# Short delays, and no long wait for what stalls.
QUICK = Retry(tries=4, deadline_s=10, attempt_s=0.4, first_delay_s=0.001, max_delay_s=0.01)
TOKEN = "a-query-that-is-a-secret"


def read_some(storage) -> str:
    """The first reads of a training run, as a digest."""
    manifest, digest = load_manifest(storage)
    hasher = hashlib.sha256(digest.encode())
    ref = manifest.segments[0].shards
    table = storage.load(ref.path, ref.n_bytes, ref.sha256)
    hasher.update(table)
    info = decode_shard_table(table, manifest.schema.n_parts, where="")[0]
    source = storage.open_shard(info)
    for number in range(3):
        hasher.update(source.batch(number, (0, 1, 2, 3)))
    return hasher.hexdigest()


def outcome(storage) -> str | opd_store.StorageError:
    """What `read_some` returns or raises."""
    try:
        return read_some(storage)
    except opd_store.StorageError as error:
        return error


@pytest.fixture(params=["moto", "web"])
def behind(request, local):
    """Port of a server that has the cache, and its address and options through a proxy on another one."""
    server = request.getfixturevalue(request.param)
    server.put(local, "cache")

    def through(proxy):
        if request.param == "moto":
            return "s3://bucket/cache", s3_options(proxy.port)
        return f"{proxy.url}/cache?token={TOKEN}", {"headers": {"X-Token": SECRET}}

    return server.port, through


def opened(behind, proxy):
    address, options = behind[1](proxy)
    return resolve(address, storage_options=options, retry=QUICK)[0]


def assert_no_secret(error: BaseException, log: str) -> None:
    for text in (str(error), repr(error), repr(error.__dict__), log):
        for secret in (KEY, SECRET, TOKEN):
            assert secret not in text
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_every_fault_at_every_request(behind, caplog, fault):
    caplog.set_level(logging.INFO)
    outcomes = set()
    with FaultProxy(("127.0.0.1", behind[0])) as proxy:
        storage = opened(behind, proxy)
        read_some(storage)
        proxy.arm({})
        expected = read_some(storage)
        n_requests = len(proxy.log)
        assert n_requests == (8 if storage.uri.startswith("s3") else 11)
        for position in range(1, n_requests + 2):
            proxy.arm({position: fault})
            found = outcome(storage)
            outcomes.add(found if isinstance(found, str) else "error")
            if not isinstance(found, str):
                assert not fault.is_passing, f"request {position} of {n_requests}: {found}"
                assert "access denied" in str(found) or "redirect" in str(found)
                assert_no_secret(found, caplog.text)
            assert [request.fault for request in proxy.log].count(fault) == (position <= n_requests)
        assert proxy.decoy_hits == 0
    assert outcomes == ({expected} if fault.is_passing else {expected, "error"})


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.RESET, Fault.STALL, Fault.CUT])
def test_a_server_that_stays_broken(behind, local, caplog, fault):
    _, _, (info, *_) = local_index(local)
    with FaultProxy(("127.0.0.1", behind[0]), always=fault) as proxy:
        storage = opened(behind, proxy)
        for call in (
            lambda: storage.load(info.path, info.n_bytes, info.sha256),
            lambda: storage.open_shard(info).batch(0, (0, 1)),
        ):
            proxy.arm({}, fault)
            with pytest.raises(
                opd_store.StorageError, match=r"cannot read after 4 tries in [\d.]+ s: "
            ) as caught:
                call()
            # aiohttp asks once more by itself where a connection ends before an answer.
            assert len(proxy.log) <= QUICK.tries * (2 if fault is Fault.RESET else 1)
            assert info.path in str(caught.value)
            assert_no_secret(caught.value, caplog.text)


def test_the_deadline_ends_it(behind, local):
    """Before the tries are used up."""
    _, _, (info, *_) = local_index(local)
    with FaultProxy(("127.0.0.1", behind[0]), always=Fault.STALL) as proxy:
        address, options = behind[1](proxy)
        retry = Retry(deadline_s=0.5, attempt_s=0.3, first_delay_s=0.001, tries=100, bytes_per_s=1e9)
        storage, _ = resolve(address, storage_options=options, retry=retry)
        with pytest.raises(opd_store.StorageError, match="cannot read"):
            storage.open_shard(info).batch(0, (0,))
        assert len(proxy.log) <= 3


def test_a_connection_that_damages_everything(behind, local):
    _, _, (info, *_) = local_index(local)
    with FaultProxy(("127.0.0.1", behind[0]), always=Fault.FLIP) as proxy:
        storage = opened(behind, proxy)
        with pytest.raises(opd_store.IntegrityError, match="stored object itself is damaged") as caught:
            storage.open_shard(info).batch(0, (0, 1))
        assert len(proxy.log) == 2
        assert f"{info.path}: bytes [" in str(caught.value)
        assert "crc32c" in str(caught.value)


def test_nobody_listens(behind, caplog):
    with FaultProxy() as proxy:
        pass
    proxy._listeners[0] = type("Gone", (), {"getsockname": lambda _: ("127.0.0.1", 1)})()
    with pytest.raises(opd_store.StorageError, match="cannot read after 4 tries") as caught:
        opened(behind, proxy).versions()
    assert_no_secret(caught.value, caplog.text)


def test_wrong_credentials(seaweedfs, local, caplog):
    address = seaweedfs.put(local, "cache")
    name = "manifests/00000001.json"
    for change in ({"secret": "another-secret"}, {"key": "another-key"}):
        storage, _ = resolve(address, storage_options=seaweedfs.options | change, retry=QUICK)
        for call in (storage.versions, lambda storage=storage: storage.read(name, 1 << 20)):
            with pytest.raises(
                opd_store.StorageError, match=r"access denied with .* \(key, secret\)"
            ) as caught:
                call()
            assert_no_secret(caught.value, caplog.text)
            assert "another" not in str(caught.value)


def test_no_bucket(moto, seaweedfs):
    for server in (moto, seaweedfs):
        storage, _ = resolve("s3://no-such-bucket/cache", storage_options=server.options, retry=QUICK)
        for call in (storage.versions, lambda storage=storage: storage.read("manifests/00000001.json", 9)):
            with pytest.raises(opd_store.CacheNotFoundError, match="no such bucket"):
                call()


class UnlistedHandler(RangeHandler):
    """Says 403 for what is not there, as buckets do that may not be listed."""

    def send_error(self, code: int, *args: object) -> None:
        super().send_error(403 if code == 404 else code, *args)


def test_a_web_server_that_denies_what_is_not_there(local):
    with web_server(local, UnlistedHandler) as server, FaultProxy(("127.0.0.1", server.port)) as proxy:
        storage, _ = resolve(proxy.url, retry=QUICK)
        assert storage.versions() == [1, 2, 3]
        n_requests = len(proxy.log)
        for last in range(n_requests):
            proxy.arm(dict.fromkeys(range(last + 1, 100), Fault.EXPIRED))
            with pytest.raises(opd_store.StorageError, match="access denied"):
                storage.versions()


def broken_shards(local, tmp_path):
    """(name of a copy, what its first shard is now)."""
    _, _, (info, *_) = local_index(local)
    data = (local / info.path).read_bytes()
    at = info.parts(1)[1].offset + 5
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    for name, content in (("flipped", flipped), ("cut", data[: at + 3]), ("short", data[:100])):
        path = tmp_path / name / info.path
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        yield name, info


def test_a_stored_object_that_is_damaged(moto, web, local, tmp_path):
    for server, (name, info) in itertools.product((moto, web), list(broken_shards(local, tmp_path))):
        address = server.put(tmp_path / name, name)
        storage, _ = resolve(address, storage_options=server.options, retry=QUICK)
        source = storage.open_shard(info)
        if name != "short":
            source.batch(0, (0, 1, 2, 3))
            source.batch(1, (0,))
        source.prefetch(1, (0, 1))
        with pytest.raises(opd_store.IntegrityError, match="stored object itself is damaged"):
            source.batch(1, (0, 1))
        with pytest.raises(opd_store.IntegrityError, match="stored object itself is damaged"):
            storage.load(info.path, info.n_bytes, info.sha256)
        assert storage.stats.requests <= 8


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("gs://bucket/cache", {"endpoint_url": "{}", "token": "anon", "project": "p"}),
        (
            "az://bucket/cache",
            {
                "account_name": "a",
                "connection_string": "DefaultEndpointsProtocol=http;AccountName=a;"
                "AccountKey=c2VjcmV0;BlobEndpoint={}/a;",
            },
        ),
        ("s3://bucket/cache", {"endpoint_url": "{}", "key": KEY, "secret": SECRET}),
        ("{}/cache", {}),
    ],
    ids=["gcs", "azure", "s3", "http"],
)
def test_libraries_neither_retry_nor_follow(address, options, caplog):
    """There is no server behind the proxy, only faults."""
    for fault, n_requests, text in (
        (Fault.BUSY, QUICK.tries, "cannot read after 4 tries"),
        (Fault.REDIRECT, 1, "redirect"),
        (Fault.EXPIRED, 1, "access denied"),
    ):
        with FaultProxy(always=fault) as proxy:
            filled = {name: value.format(proxy.url) for name, value in options.items()}
            storage, _ = resolve(address.format(proxy.url), storage_options=filled, retry=QUICK)
            with pytest.raises(opd_store.StorageError, match=f"(?i){text}") as caught:
                storage.load("index/x.arrow", 10, b"x" * 32)
            # Under load the first attempt may end before it gets to its request.
            assert 1 <= len(proxy.log) <= n_requests
            assert proxy.decoy_hits == 0
            assert_no_secret(caught.value, caplog.text)
            assert "c2VjcmV0" not in str(caught.value) + caplog.text


def test_many_threads(moto, local):
    _, _, (info, *_) = local_index(local)
    storage, _ = resolve(moto.put(local, "cache"), storage_options=moto.options)
    expected = (local / info.path).read_bytes()[info.parts(0)[0].offset : info.regions[-1].offset]
    found = []

    def read() -> None:
        source = storage.open_shard(info)
        with contextlib.suppress(opd_store.OpdError):
            found.append(b"".join(source.batch(number, (0, 1, 2, 3)).to_pybytes() for number in range(3)))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
    assert storage.stats.requests == 24
