"""The error that a caller sees for a request that failed for good."""

from __future__ import annotations

from collections.abc import Mapping

from opd_store.errors import CacheNotFoundError, IntegrityError, OpdError, StorageError
from opd_store.storage.address import Address
from opd_store.storage.failures import Kind
from opd_store.storage.retry import GaveUp

_CREDENTIAL_OPTIONS = {
    "account_key", "client_kwargs", "client_secret", "connection_string", "credential", "headers", "key",
    "password", "profile", "sas_token", "secret", "session", "token", "username",
}  # fmt: skip


def explain(error: GaveUp, where: str, credentials: str, *, is_named: bool, action: str = "read") -> OpdError:
    """The error to raise.

    Args:
        where: the full name of the file.
        credentials: which ones were used, from `describe_credentials`.
        is_named: a manifest names the file, so that it has to be there.
        action: what was tried, "read" or "write".
    """
    failure = error.failure
    match failure.kind:
        case Kind.DENIED:
            return StorageError(
                f"{where}: access denied with {credentials}: {failure.text}. "
                f"Renew the credentials, or ask for permission to {action}.",
                filename=where,
            )
        case Kind.NO_BUCKET:
            return CacheNotFoundError(f"{where}: no such bucket or repository. Check the address.")
        case Kind.MISSING if is_named:
            return IntegrityError(
                f"{where}: missing, although the manifest names it. Copy it again.", uri=where
            )
        case Kind.MISSING:
            return CacheNotFoundError(f"{where}: no such file")
        case Kind.DAMAGED:
            return damaged(where, failure.text, came_twice=True)
        case Kind.MOVED:
            return StorageError(
                f"{where}: {failure.text}. Open the cache at its own address.", filename=where
            )
    tries = f" after {error.tries} tries in {error.seconds:.1f} s" if error.tries > 1 else ""
    return StorageError(f"{where}: cannot {action}{tries}: {failure.text}", filename=where)


def damaged(where: str, text: str, *, came_twice: bool) -> IntegrityError:
    """Wrong bytes, the same ones twice or others every time."""
    blame = "Every request brought other bytes, so something between the bucket and here damages them."
    if came_twice:
        blame = "The stored object itself is damaged: the same bytes came twice. Copy it again."
    return IntegrityError(f"{where}: {text}. {blame}", uri=where)


def describe_credentials(address: Address, options: Mapping[str, object]) -> str:
    """Which credentials are used: their names, never their values."""
    given = sorted(str(name) for name in options if str(name) in _CREDENTIAL_OPTIONS)
    if given:
        return f"the credentials in the storage options ({', '.join(given)})"
    if address.secrets:
        return "the credentials in the address"
    if options.get("anon"):
        return "anonymous access (anon)"
    return "the credentials found in the environment"
