"""One attempt at one request. Retries, checks and messages are above.

fsspec caches file system objects, listings and blocks; none of that is used, since it may be stale or belong
to another process. What libraries retry by themselves is switched off, so that attempts do not multiply. Left
are aiohttp, which asks once more where a connection ends before an answer, and listings of huggingface_hub.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol
from urllib.parse import urljoin

from opd_store.errors import InvalidArgumentError
from opd_store.storage.address import EXTRAS, Address, same_host
from opd_store.storage.failures import Failure, Kind, TransportError, of_status
from opd_store.storage.retry import Retry

_MAX_HOPS = 5


class Transport(Protocol):
    """Requests to one place. All methods raise whatever the library raises, or TransportError."""

    can_list: bool
    fs: Any
    """The fsspec file system."""

    async def prepare(self) -> None:
        """Make the client, where that was not done. Takes a second, so it is no part of an attempt."""

    async def get(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; fewer where it ends earlier."""

    async def list(self, directory: str) -> list[str]:
        """Names in a directory, without their path."""

    async def size(self, name: str) -> int:
        """Bytes of a file."""


def file_system_class(address: Address) -> Any:
    """The class that fsspec uses for the protocol; importing it makes no connection.

    Raises:
        InvalidArgumentError: its package is missing.
    """
    extra = EXTRAS[address.protocol]
    try:
        if extra == "gcs":
            # What fsspec would choose asks the bucket for its layout first, by a protocol of its own.
            from gcsfs.core import GCSFileSystem

            return GCSFileSystem
        import fsspec

        return fsspec.get_filesystem_class(address.protocol)
    except ImportError:
        pass
    raise InvalidArgumentError(
        f"{address.shown}: reading {address.protocol}:// needs another package. "
        f"Install it with `pip install opd-store[{extra}]`."
    )


def connect(address: Address, options: Mapping[str, object], retry: Retry) -> Transport:
    """A transport for this process. Makes no connection yet."""
    kind = file_system_class(address)
    settings = {**kind._get_kwargs_from_urls(address.url), **options}
    settings |= {"skip_instance_cache": True, "use_listings_cache": False}
    if EXTRAS[address.protocol] == "http":
        return _Http(kind(**settings), address, retry)
    if EXTRAS[address.protocol] == "hub":
        return _Hub(kind(**settings), address, retry)
    if EXTRAS[address.protocol] == "s3":
        return _FileSystem(_s3(kind, settings, retry), address)
    if EXTRAS[address.protocol] == "gcs":
        return _FileSystem(_gcs(kind, settings, retry), address)
    if EXTRAS[address.protocol] == "azure":
        return _FileSystem(_azure(kind, settings, retry), address)
    return _FileSystem(kind(**settings), address)


def _s3(kind: Any, settings: dict[str, Any], retry: Retry) -> Any:
    from aiobotocore.httpsession import AIOHTTPSession

    trace = _no_redirects()

    class SameHostSession(AIOHTTPSession):  # type: ignore[misc]
        """By itself it would follow any redirect, and take the session token along."""

        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            if trace not in session.trace_configs:
                session.trace_configs.append(trace)
            return session

    defaults = {
        "connect_timeout": retry.attempt_s,
        "read_timeout": retry.attempt_s,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "http_session_cls": SameHostSession,
    }
    settings["config_kwargs"] = defaults | dict(settings.get("config_kwargs") or {})
    fs = kind(**settings)
    fs.retries = 1
    return fs


def _gcs(kind: Any, settings: dict[str, Any], retry: Retry) -> Any:
    import aiohttp

    session = dict(settings.get("session_kwargs") or {})
    session["trace_configs"] = [*session.get("trace_configs", ()), _no_redirects()]
    settings["session_kwargs"] = session
    settings.setdefault(
        "requests_timeout",
        aiohttp.ClientTimeout(total=None, sock_connect=retry.attempt_s, sock_read=retry.attempt_s),
    )
    fs = kind(**settings)
    # The decorator around it retries, and logs what fails.
    fs._request = kind._request.__wrapped__.__get__(fs)
    return fs


def _no_redirects() -> Any:
    """What makes an aiohttp session refuse to go to another host."""
    import aiohttp

    async def refuse(session: Any, context: Any, params: Any) -> None:
        location = str(params.response.headers.get("Location", ""))
        if not same_host(str(params.url), urljoin(str(params.url), location)):
            raise moved(params.response.status)

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    trace.freeze()
    return trace


def _azure(kind: Any, settings: dict[str, Any], retry: Retry) -> Any:
    settings.setdefault("connection_timeout", retry.attempt_s)
    settings.setdefault("read_timeout", retry.attempt_s)
    settings.setdefault("max_concurrency", 1)
    fs = kind(**settings)
    for policy in fs.service_client._pipeline._impl_policies:
        if hasattr(policy, "total_retries"):
            policy.total_retries = 0
        if hasattr(policy, "max_redirects"):
            policy.allow = False
    return fs


def moved(status: int) -> TransportError:
    """The refusal to go to another host."""
    text = f"HTTP {status}, a redirect to another host, which is not followed"
    return TransportError(Failure(Kind.MOVED, text))


class _FileSystem:
    """Any fsspec file system; those that are not asynchronous run in a thread."""

    can_list = True

    def __init__(self, fs: Any, address: Address) -> None:
        self.fs, self._root = fs, fs._strip_protocol(address.url)

    async def prepare(self) -> None:
        if hasattr(self.fs, "set_session"):
            await self.fs.set_session()

    async def get(self, name: str, start: int, end: int) -> bytes:
        return bytes(await self._call("cat_file", f"{self._root}/{name}", start=start, end=end))

    async def list(self, directory: str) -> list[str]:
        self.fs.invalidate_cache()
        found = await self._call("ls", f"{self._root}/{directory}", detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    async def size(self, name: str) -> int:
        self.fs.invalidate_cache()
        return int((await self._call("info", f"{self._root}/{name}"))["size"])

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.fs.async_impl:
            return await getattr(self.fs, f"_{method}")(*args, **kwargs)
        return await asyncio.to_thread(getattr(self.fs, method), *args, **kwargs)


class _Hub(_FileSystem):
    """Hugging Face: plain ranges. Its files would ask for their size first, and read ahead."""

    def __init__(self, fs: Any, address: Address, retry: Retry) -> None:
        super().__init__(fs, address)
        self._retry = retry

    async def get(self, name: str, start: int, end: int) -> bytes:
        return await asyncio.to_thread(self._get, f"{self._root}/{name}", start, end)

    def _get(self, path: str, start: int, end: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        headers = {**build_hf_headers(token=self.fs.token), "Range": f"bytes={start}-{end - 1}"}
        url, timeout = self.fs.url(path), self._retry.attempt_s
        response = http_backoff("GET", url, headers=headers, timeout=timeout, max_retries=0)
        hf_raise_for_status(response)
        return bytes(response.content)


class _Http:
    """A web server that knows ranges. It has no listings."""

    can_list = False

    def __init__(self, fs: Any, address: Address, retry: Retry) -> None:
        self.fs, self._address, self._retry = fs, address, retry

    async def prepare(self) -> None:
        await self.fs.set_session()

    async def get(self, name: str, start: int, end: int) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        async with self._open("GET", name, headers) as response:
            if response.status != 206 and not (response.status == 200 and start == 0):
                text = f"HTTP {response.status} to a request for a range: this server has no range requests"
                raise TransportError(Failure(Kind.REFUSED, text))
            # Not more than was asked for, whatever the server sends.
            body = bytearray()
            while len(body) < end - start and (piece := await response.content.read(end - start - len(body))):
                body += piece
            return bytes(body)

    async def list(self, directory: str) -> list[str]:
        raise NotImplementedError(directory)

    async def size(self, name: str) -> int:
        async with self._open("HEAD", name, {"Accept-Encoding": "identity"}) as response:
            return int(response.headers["Content-Length"])

    @contextlib.asynccontextmanager
    async def _open(self, method: str, name: str, headers: dict[str, str]) -> AsyncIterator[Any]:
        import aiohttp

        session = await self.fs.set_session()
        settings = dict(self.fs.kwargs)
        settings["headers"] = {**dict(settings.get("headers") or {}), **headers}
        settings["allow_redirects"] = False
        settings.setdefault(
            "timeout",
            aiohttp.ClientTimeout(
                total=None, sock_connect=self._retry.attempt_s, sock_read=self._retry.attempt_s
            ),
        )
        query = f"?{self._address.query}" if self._address.query else ""
        url = f"{self._address.url}/{name}{query}"
        for _ in range(_MAX_HOPS):
            async with session.request(method, self.fs.encode_url(url), **settings) as response:
                if not 300 <= response.status < 400:
                    if response.status >= 400:
                        raise TransportError(of_status(response.status, response.headers))
                    yield response
                    return
                target = urljoin(url, response.headers.get("Location", ""))
                if not same_host(url, target):
                    raise moved(response.status)
                url = target
        raise TransportError(Failure(Kind.MOVED, f"more than {_MAX_HOPS} redirects"))
