"""Addresses of caches: which protocols are read, and what of an address may be shown."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from urllib.parse import urlsplit

from opd_store import layout
from opd_store.errors import InvalidArgumentError

EXTRAS = {
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "hf": "hub",
    "http": "http",
    "https": "http",
    "memory": "",
}
"""Protocols that are read through fsspec, and the extra of this package that each needs."""
WRITE_LOCALLY = (
    "caches are written to a local directory. Write there, then copy it to the bucket with `opd publish`, or "
    "by hand: index/, shards/ and tables/ first, manifests/ last."
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a cache is."""

    protocol: str
    """A key of `EXTRAS`, or "file"."""
    url: str = dataclasses.field(repr=False)
    """A path for "file", else a URL without query and trailing slash."""
    query: str = dataclasses.field(repr=False)
    """What comes after the `?` of an http(s) address, for every file."""
    shown: str
    """For messages: without passwords and query."""
    secrets: frozenset[str] = dataclasses.field(repr=False)
    """Parts of the address that no message may show."""

    def describe(self, name: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.shown}/{name}"


def parse(text: str) -> tuple[Address, str | None]:
    """Split an address into place and pin.

    Raises:
        InvalidArgumentError: another protocol, a chain of them, or credentials where none belong.
    """
    pin = None
    if "@sha256:" in text:
        text, _, pin = text.rpartition("@")
    protocol, found, rest = text.partition("://")
    protocol = protocol if found else "file"
    shown = _shown(protocol, rest) if protocol in EXTRAS else text.partition("?")[0]
    if pin is not None and not layout.DIGEST.fullmatch(pin):
        raise InvalidArgumentError(f"{shown}: the pin after '@' is not 'sha256:' and 64 hexadecimal digits")
    if "\0" in text:
        raise InvalidArgumentError(f"{shown!r:.200}: an address with a null character")
    if protocol == "file":
        path = rest if found else text
        if "::" not in path and "://" not in path:
            return Address("file", path, "", path, frozenset()), pin
    elif protocol in EXTRAS and "::" not in text and "://" not in rest.partition("?")[0]:
        return _remote(protocol, rest, shown), pin
    if "@" in shown:
        shown = shown.rpartition("@")[2]
    known = ", ".join(f"{name}://" for name in EXTRAS)
    raise InvalidArgumentError(
        f"{shown:.200}: cannot be opened. Expected a local path, file:// or one of {known}, "
        "not chained by '::'"
    )


def _remote(protocol: str, rest: str, shown: str) -> Address:
    place, _, query = rest.partition("?")
    place = place.rstrip("/")
    host = place.partition("/")[0]
    # In abfs://container@account the name before the @ is no secret; in hf://datasets/user/name@revision it
    # comes after the host.
    user = host.rpartition("@")[0] if protocol in ("http", "https") else ""
    if not host and protocol != "memory":
        raise InvalidArgumentError(f"{shown}: names no {'host' if protocol.startswith('http') else 'bucket'}")
    if "#" in place:
        raise InvalidArgumentError(f"{shown}: a '#' cannot be part of an address")
    if not protocol.startswith("http"):
        if query:
            raise InvalidArgumentError(f"{shown}: only http addresses may have a query")
        if "@" in host and not protocol.startswith("abfs"):
            raise InvalidArgumentError(f"{shown}: pass credentials as storage options, not in the address")
    secrets = {user, user.partition(":")[2], query, *(pair.partition("=")[2] for pair in query.split("&"))}
    return Address(protocol, f"{protocol}://{place}", query, shown, frozenset(secrets - {""}))


def _shown(protocol: str, rest: str) -> str:
    place = rest.partition("?")[0].partition("#")[0].rstrip("/")
    host, slash, path = place.partition("/")
    if not (protocol.startswith("abfs") and ":" not in host.partition("@")[0]):
        host = host.rpartition("@")[2]
    return f"{protocol}://{host}{slash}{path}"


def same_host(first: str, second: str) -> bool:
    """Whether two URLs have the same scheme, host and port."""
    a, b = urlsplit(first), urlsplit(second)
    return (a.scheme, a.hostname, a.port) == (b.scheme, b.hostname, b.port)
