"""What may be opened, what a message shows of it, and what is asked of nobody."""

from __future__ import annotations

import socket

import fsspec
import pytest

import opd_store
from opd_store.storage import LocalStorage, RemoteStorage, resolve
from opd_store.storage.failures import redact, secrets_of
from opd_store.testing import example_meta

PIN = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/some/cache/", "s3://bucket/some/cache"),
        ("gs://bucket/c", "gs://bucket/c"),
        ("gcs://bucket/c", "gcs://bucket/c"),
        ("az://container/c", "az://container/c"),
        (
            "abfs://container@account.dfs.core.windows.net/c",
            "abfs://container@account.dfs.core.windows.net/c",
        ),
        ("abfss://container/c", "abfss://container/c"),
        ("hf://datasets/user/name@main/c", "hf://datasets/user/name@main/c"),
        ("memory://c", "memory://c"),
        ("https://host/c", "https://host/c"),
        ("https://user:secret@host:8/c?sig=secret", "https://host:8/c"),
        ("https://secret@host/c?secret@x/y", "https://host/c"),
    ],
)
def test_addresses(uri, shown, monkeypatch):
    def no_connection(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_connection)
    for text, expected in ((uri, None), (f"{uri}@{PIN}", PIN)):
        storage, pin = resolve(text, storage_options={"token": "secret"})
        assert isinstance(storage, RemoteStorage)
        assert (storage.uri, pin) == (shown, expected)
        assert storage.describe("a/b") == f"{shown}/a/b"
        assert repr(storage) == f"<RemoteStorage {shown}>"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        *[
            (uri, "cannot be opened. Expected a local path")
            for uri in (
                "simplecache::s3://b/c",
                "simplecache::file:///etc/hostname",
                "s3://b/c::file:///etc/hostname",
                "filecache://b/c",
                "blockcache::memory://c",
                "zip://c.arrow::s3://b/z.zip",
                "dir::file:///etc",
                "github://org:repo@main/c",
                "ftp://user:secret@host/c",
                "sftp://user:secret@host/c",
                "ssh://secret@host/c",
                "data://text/plain;base64,c2VjcmV0",
                "local:///etc",
                "FILE:///c",
                "S3://b/c",
                "reference://c",
                "http://host/http://other/c",
                "file://a::b",
                "a::b",
                "://c",
                "hdfs://host/c",
                "smb://host/c",
                "jupyter://host/c",
                "git://c",
            )
        ],
        ("s3://", "names no bucket"),
        ("https:///c", "names no host"),
        ("s3://key:secret@bucket/c", "pass credentials as storage options"),
        ("gs://secret@bucket/c", "pass credentials as storage options"),
        ("s3://bucket/c?secret", "only http addresses may have a query"),
        ("https://host/c#secret", "'#'"),
        ("s3://bucket/c\0d", "null character"),
        ("c\0d", "null character"),
        ("s3://bucket/c@sha256:12", "64 hexadecimal digits"),
        ("https://user:secret@host/c?secret@sha256:12", "64 hexadecimal digits"),
    ],
)
def test_what_is_refused(uri, text):
    with pytest.raises(opd_store.InvalidArgumentError, match=text.replace("?", r"\?")) as caught:
        resolve(uri)
    assert "secret" not in str(caught.value)
    assert "c2VjcmV0" not in str(caught.value) or uri.startswith("data")


def test_local_addresses(tmp_path):
    for uri in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"{tmp_path}@{PIN}", "a@b", "a?b#c", "a:b"):
        storage, _ = resolve(uri)
        assert isinstance(storage, LocalStorage)
        assert storage.is_local
    with pytest.raises(opd_store.InvalidArgumentError, match="a local path takes no storage options"):
        resolve(tmp_path, storage_options={"key": "secret"})


@pytest.mark.parametrize(
    "uri", ["s3://bucket/c", "https://user:secret@host/c?secret", "memory://c", "hf://d/u/n"]
)
def test_writers_stay_local(uri):
    for call in (opd_store.append, lambda uri: opd_store.create(uri, meta=example_meta())):
        with pytest.raises(
            opd_store.InvalidArgumentError, match=r"written to a local directory.*copy"
        ) as caught:
            call(uri)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "extra"),
    [("s3://b/c", "s3"), ("az://b/c", "azure"), ("hf://datasets/u/n", "hub"), ("http://h/c", "http")],
)
def test_a_missing_package(uri, extra, monkeypatch):
    def missing(protocol: str) -> None:
        raise ImportError(f"Install something to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(opd_store.InvalidArgumentError, match=rf"pip install opd-store\[{extra}\]"):
        resolve(uri)


def test_options_that_no_library_takes():
    storage, _ = resolve("az://b/c", storage_options={"connection_string": "the-secret"})
    with pytest.raises(opd_store.StorageError, match="cannot use these storage options: ") as caught:
        storage.versions()
    assert "the-secret" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach https://user:pw@host/c?sig=1 now", "cannot reach https://host/c?*** now"),
        ("token the-secret is bad", "token *** is bad"),
        ("nested also-secret, a list-secret, bytes-secret", "nested ***, a ***, ***"),
        ("endpoint http://e:1 is gone", "endpoint http://e:1 is gone"),
        ("a\x1b[31mred\r\n", "a [31mred  "),
        ("x" * 300, "x" * 197 + "..."),
        ("abc", ""),
    ],
)
def test_redaction(text, shown):
    options = {
        "key": "the-secret",
        "client_kwargs": {"a": "also-secret", "b": ["list-secret", b"bytes-secret", 3, None]},
        "endpoint_url": "http://e:1",
        "pin": "bc",
    }
    assert redact(text, secrets_of(options)) == shown
