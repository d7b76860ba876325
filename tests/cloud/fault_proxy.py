"""A proxy on the loopback device that breaks chosen requests. Standard library only; also used by benches.

    with FaultProxy(("127.0.0.1", 5000), plan={3: Fault.RESET}, latency_s=0.02) as proxy:
        ...  # talk to proxy.url
    proxy.log  # what was asked for, and how many bytes went back

Every request gets a connection of its own to the server behind, and is forwarded as it came, so signatures
that cover the Host header stay valid.
"""

from __future__ import annotations

import enum
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Self


class Fault(enum.Enum):
    """What happens to one request."""

    INTERNAL = "500"
    BUSY = "503"
    TOO_MANY = "429"
    RESET = "reset before an answer"
    STALL = "half of the body, then nothing"
    CUT = "half of the body, then the end"
    FLIP = "one bit of the body flipped"
    EXPIRED = "403 ExpiredToken"
    REDIRECT = "307 to another host"
    MOVED = "301 to another host"

    @property
    def is_passing(self) -> bool:
        """Whether a reader has to get over it."""
        return self not in (Fault.EXPIRED, Fault.REDIRECT, Fault.MOVED)


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    range: str
    """As in the header, "" for none."""
    fault: Fault | None
    n_bytes: int = 0
    """Of the answer, headers included."""


@dataclass
class FaultProxy:
    """Forwards to `upstream` (host, port), but for requests in `plan` (1 is the first) or all if `always`."""

    upstream: tuple[str, int] | None = None
    plan: dict[int, Fault] = field(default_factory=dict)
    always: Fault | None = None
    latency_s: float = 0.0
    """Added to every answer."""
    log: list[Request] = field(default_factory=list)
    decoy_hits: int = 0
    """Connections to the host that redirects lead to."""

    def start(self) -> Self:
        """Listen on a free port."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        for listener, serve in zip(self._listeners, (self._serve, self._count_decoy), strict=True):
            threading.Thread(target=self._accept, args=(listener, serve), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port and let go of stalled requests."""
        self._stopped.set()
        for listener in self._listeners:
            # Wakes the thread that waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def arm(self, plan: dict[int, Fault], always: Fault | None = None) -> None:
        """Start to count from 1 again, with other faults."""
        with self._lock:
            self.plan, self.always, self.log = plan, always, []

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listeners[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def _accept(self, listener: socket.socket, serve) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    def _count_decoy(self, client: socket.socket) -> None:
        client.close()
        with self._lock:
            self.decoy_hits += 1

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                head, rest = _read_head(client)
                if head:
                    self._answer(client, head, rest)
            except OSError:
                pass

    def _answer(self, client: socket.socket, head: bytes, rest: bytes) -> None:
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        wanted = _header(head, b"range")
        with self._lock:
            fault = self.plan.get(len(self.log) + 1, self.always)
            request = Request(method, path, wanted, fault)
            self.log.append(request)
        if self._stopped.wait(self.latency_s):
            return
        if fault is Fault.RESET:
            # Closing with a linger time of zero sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        answer = self._made_up(fault)
        if method == "HEAD":
            answer = answer[: answer.find(b"\r\n\r\n") + 4]
        if not answer:
            answer = self._forward(client, head, rest)
            start = answer.find(b"\r\n\r\n") + 4
            middle = start + (len(answer) - start) // 2
            if fault in (Fault.CUT, Fault.STALL):
                answer = answer[:middle]
            elif fault is Fault.FLIP and middle < len(answer):
                answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        client.sendall(answer)
        request.n_bytes = len(answer)
        if fault is Fault.STALL:
            self._stopped.wait(30)

    def _forward(self, client: socket.socket, head: bytes, rest: bytes) -> bytes:
        if _header(head, b"expect"):
            # Who uploads may wait for it.
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = rest
        while len(body) < int(_header(head, b"content-length") or 0):
            body += client.recv(1 << 16)
        head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head)
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        with socket.create_connection(self.upstream) as server:
            server.sendall(head + body)
            pieces = iter(lambda: server.recv(1 << 18), b"")
            return b"".join(pieces)

    def _made_up(self, fault: Fault | None) -> bytes:
        elsewhere = f"http://127.0.0.1:{self._listeners[1].getsockname()[1]}/secret"
        match fault:
            case Fault.INTERNAL:
                return _reply("500 Internal Server Error", "InternalError")
            case Fault.BUSY:
                return _reply("503 Service Unavailable", "SlowDown")
            case Fault.TOO_MANY:
                return _reply("429 Too Many Requests", "TooManyRequests", "Retry-After: 0")
            case Fault.EXPIRED:
                return _reply("403 Forbidden", "ExpiredToken")
            case Fault.REDIRECT:
                return _reply("307 Temporary Redirect", "TemporaryRedirect", f"Location: {elsewhere}")
            case Fault.MOVED:
                return _reply("301 Moved Permanently", "PermanentRedirect", f"Location: {elsewhere}")
        return b""


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(1 << 16)
        if not piece:
            return b"", b""
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _header(head: bytes, name: bytes) -> str:
    found = re.search(rb"(?i)\r\n" + name + rb":\s*([^\r]*)", head)
    return found[1].decode("latin-1") if found else ""


def _reply(status: str, code: str, *headers: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up</Message></Error>"
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", *headers, "", body]).encode()


def wait_until(is_true, seconds: float = 30.0) -> None:
    """Poll until something holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
