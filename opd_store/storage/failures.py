"""What an exception of a storage library means, in words that hold no credentials."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_MAX_TEXT = 200
_MAX_RETRY_AFTER_S = 30.0
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_PASSING_CODES = {
    "InternalError",
    "RequestTimeout",
    "ServerBusy",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound", "RepositoryNotFoundError", "RevisionNotFoundError"}
_DENIED_NAMES = {
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "GatedRepoError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "PermissionError",
    "RefreshError",
    "TokenRetrievalError",
}
_DENIED_CODES = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# What these raise without a status is about the connection. `http` is the standard library's.
_NETWORK_PACKAGES = {
    "aiohttp",
    "azure",
    "botocore",
    "http",
    "httpcore",
    "httpx",
    "httpx2",
    "requests",
    "urllib3",
}
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_HTTP_FORBIDDEN = re.compile(r"\AForbidden: ")
# Options whose values help to understand a message.
_HARMLESS_OPTIONS = {
    "account_host",
    "account_name",
    "addressing_style",
    "endpoint",
    "endpoint_url",
    "location_mode",
    "project",
    "region_name",
    "signature_version",
}


class Kind(enum.Enum):
    """What a caller can do about a failure."""

    PASSING = "try again"
    MISSING = "no such file"
    NO_BUCKET = "no such bucket"
    DENIED = "access denied"
    MOVED = "redirected"
    DAMAGED = "not the bytes that were written"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt."""

    kind: Kind
    text: str
    """Class, status and message, without credentials."""
    retry_after_s: float = 0.0
    """How long the server asks to wait."""

    @property
    def is_passing(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind is Kind.PASSING


class TransportError(Exception):
    """A failure that our own code found. Its text holds no credentials."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def judge(error: BaseException, secrets: Collection[str]) -> Failure:
    """What an exception means. Everything unknown that is about the connection may pass."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, TransportError):
            return link.failure
    status = next(filter(None, map(_status, chain)), 0)
    code = next(filter(None, map(_code, chain)), "")
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = _describe(error, status, code, secrets)
    return Failure(_kind(chain, status, code, names), text, _retry_after(chain))


def of_status(status: int, headers: Mapping[str, str]) -> Failure:
    """What an HTTP status means."""
    return Failure(_kind([], status, "", set()), f"HTTP {status}", retry_after(headers))


def _kind(chain: list[BaseException], status: int, code: str, names: set[str]) -> Kind:
    if code in _BUCKET_CODES or names & _BUCKET_CODES:
        return Kind.NO_BUCKET
    if code in _PASSING_CODES or status in _PASSING_STATUS:
        return Kind.PASSING
    if status in (401, 403) or code in _DENIED_CODES or names & _DENIED_NAMES:
        return Kind.DENIED
    # gcsfs says so in words only.
    if any(isinstance(link, OSError) and _HTTP_FORBIDDEN.match(str(link)) for link in chain):
        return Kind.DENIED
    if 300 <= status < 400:
        return Kind.MOVED
    if status == 416 or code == "InvalidRange":
        return Kind.DAMAGED
    if status in (404, 410) or "FileNotFoundError" in names or "EntryNotFoundError" in names:
        return Kind.MISSING
    if status:
        return Kind.REFUSED
    packages = {type(link).__module__.partition(".")[0] for link in chain}
    is_about_connection = any(isinstance(link, OSError | EOFError | TimeoutError) for link in chain)
    return Kind.PASSING if is_about_connection or packages & _NETWORK_PACKAGES else Kind.REFUSED


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(16):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int:
    """The HTTP status, wherever the library put it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        metadata = response.get("ResponseMetadata")
        candidates = [metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None]
    else:
        candidates = [getattr(error, name, None) for name in ("status", "status_code")]
        candidates.append(getattr(response, "status_code", None))
        # aiohttp's protocol errors have a code as well, one that no server sent.
        if not type(error).__module__.startswith("aiohttp"):
            candidates.append(getattr(error, "code", None))
    for value in candidates:
        if isinstance(value, str) and value.isdecimal():
            value = int(value[:4])
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return 0


def _code(error: BaseException) -> str:
    """The error code of the service, such as SlowDown."""
    response = getattr(error, "response", None)
    details = response.get("Error") if isinstance(response, Mapping) else None
    found = details.get("Code") if isinstance(details, Mapping) else getattr(error, "error_code", None)
    # Azure has an enumeration of strings.
    text = str(getattr(found, "value", found))
    return text if found is not None and _CODE.fullmatch(text) else ""


def _retry_after(chain: list[BaseException]) -> float:
    for link in chain:
        response = getattr(link, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        for headers in (metadata.get("HTTPHeaders"), getattr(link, "headers", None)):
            if isinstance(headers, Mapping):
                return retry_after(headers)
    return 0.0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, at most 30; 0 where there is none that can be used."""
    value = next((text for name, text in headers.items() if name.lower() == "retry-after"), "")
    if value.isascii() and value.isdecimal():
        return min(float(value[:4]), _MAX_RETRY_AFTER_S)
    try:
        when, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("Date", ""))
        return min(max((when - now).total_seconds(), 0.0), _MAX_RETRY_AFTER_S)
    except (TypeError, ValueError):
        return 0.0


def _describe(error: BaseException, status: int, code: str, secrets: Collection[str]) -> str:
    name = "timed out" if isinstance(error, TimeoutError) and not str(error) else type(error).__name__
    facts = [name, f"HTTP {status}" if status else "", redact(code, secrets)]
    message = redact(str(error), secrets)
    text = " ".join(filter(None, facts))
    return f"{text}: {message}" if message else text


def redact(text: str, secrets: Collection[str]) -> str:
    """At most 200 printable characters without userinfo and queries of URLs, and without the secrets."""
    for secret in sorted(secrets, key=len, reverse=True):
        if secret in text:
            if len(secret) < 4:
                # Taking single letters out would leave nothing to read, and tell which they were.
                return ""
            text = text.replace(secret, "***")
    text = re.sub(r"(://)[^/\s@]*@", r"\1", text)
    text = re.sub(r"\?[^\s'\"<>]*", "?***", text)
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def secrets_of(options: Mapping[str, object]) -> frozenset[str]:
    """All texts in storage options but those that are known to be harmless."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.update({value} - {""})
        elif isinstance(value, bytes):
            found.update({value.decode("latin-1")} - {""})
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key not in _HARMLESS_OPTIONS:
                    collect(item)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                collect(item)

    collect(options)
    return frozenset(found)
