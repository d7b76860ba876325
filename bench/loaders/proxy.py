"""Counts and delays the requests of an object store's clients.

    python -m loaders.proxy PORT UPSTREAM_PORT

`GET /--count` answers what was asked since the last such call; `GET /--delay?MS` holds every request for so
many milliseconds before it is passed on, as a distant bucket would. Both are on loopback.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio import StreamReader, StreamWriter
from collections import Counter

CONTROL = "/--"
BLOCK = 1 << 18
NO_BODY = {204, 304}


class Proxy:
    """State of one proxy."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.delay_s = 0.0
        self.counts: Counter[str] = Counter()

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection of a client; it has one of its own behind the proxy."""
        behind: tuple[StreamReader, StreamWriter] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.split(b" ", 2)[:2]
                if path.decode().startswith(CONTROL):
                    writer.write(self.control(path.decode()))
                    continue
                if behind is None:
                    behind = await asyncio.open_connection("127.0.0.1", self.upstream, limit=BLOCK)
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                listing = method == b"GET" and b"list-type=" in path
                self.counts["LIST" if listing else method.decode()] += 1
                behind[1].write(head)
                await copy_body(reader, behind[1], headers_of(head))
                answer = await behind[0].readuntil(b"\r\n\r\n")
                status = int(answer.split(b" ", 2)[1])
                while status == 100:
                    writer.write(answer)
                    answer = await behind[0].readuntil(b"\r\n\r\n")
                    status = int(answer.split(b" ", 2)[1])
                writer.write(answer)
                if method != b"HEAD" and status not in NO_BODY:
                    n_bytes = await copy_body(behind[0], writer, headers_of(answer))
                    self.counts["bytes"] += n_bytes
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            if behind is not None:
                behind[1].close()

    def control(self, path: str) -> bytes:
        """The answer to a control request."""
        command, _, value = path.removeprefix(CONTROL).partition("?")
        body = b"{}"
        if command == "delay":
            self.delay_s = float(value) / 1000
        else:
            body = json.dumps(self.counts).encode()
            self.counts = Counter()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def headers_of(head: bytes) -> dict[str, str]:
    """By name in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def copy_body(source: StreamReader, sink: StreamWriter, headers: dict[str, str]) -> int:
    """Pass a body on; its bytes."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        total = 0
        while True:
            line = await source.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            sink.write(line + await source.readexactly(size + 2))
            await sink.drain()
            total += size
            if size == 0:
                return total
    left = total = int(headers.get("content-length", 0))
    while left:
        block = await source.read(min(left, BLOCK))
        if not block:
            raise ConnectionResetError
        sink.write(block)
        await sink.drain()
        left -= len(block)
    return total


async def main(port: int, upstream: int) -> None:
    """Until it is killed."""
    server = await asyncio.start_server(Proxy(upstream).serve, "127.0.0.1", port, limit=BLOCK)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
