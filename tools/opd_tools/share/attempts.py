"""Requests that write, under the same retries and with the same explanations as those that read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from opd_store import OpdError
from opd_store.storage import Retry
from opd_store.storage.address import Address
from opd_store.storage.explain import describe_credentials, explain
from opd_store.storage.failures import Failure, Kind, judge, secrets_of
from opd_store.storage.retry import GaveUp

T = TypeVar("T")


class Attempts:
    """What is tried at one address, and how its failures are told."""

    def __init__(self, address: Address, options: Mapping[str, object]) -> None:
        self.address, self.options, self.retry = address, options, Retry()
        self._secrets = address.secrets | secrets_of(options)

    def judge(self, error: BaseException) -> Failure:
        """What an exception of a library means, without credentials."""
        return judge(error, self._secrets)

    def run(self, attempt: Callable[[], Awaitable[T]], *, n_bytes: int = 0) -> T:
        """Try in fsspec's thread, and wait. Raises GaveUp."""
        import fsspec.asyn

        work = self.retry.run(attempt, self.judge, n_bytes=n_bytes)
        future = asyncio.run_coroutine_threadsafe(work, fsspec.asyn.get_loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def error(self, gave_up: GaveUp, name: str, *, action: str = "write") -> OpdError:
        """The error to raise for a file."""
        failure = gave_up.failure
        if failure.kind is Kind.MISSING:
            # Writing asks for nothing else to be there.
            failure = Failure(Kind.NO_BUCKET, failure.text)
        again = GaveUp(failure, gave_up.tries, gave_up.seconds)
        credentials = describe_credentials(self.address, self.options)
        return explain(again, self.address.describe(name), credentials, is_named=False, action=action)
