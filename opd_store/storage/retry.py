"""The one layer of retries: capped exponential back-off with full jitter, under a total deadline."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from opd_store.errors import InvalidArgumentError
from opd_store.storage.failures import Failure

T = TypeVar("T")

_FACTOR = 4
"""Delays are drawn from 0 to 0.1, 0.4, 1.6 and 5 s: short after a lost connection, long for a busy bucket."""


class GaveUp(Exception):
    """The last failure, and how it came to be the last. Becomes an error of `opd_store.errors`."""

    def __init__(self, failure: Failure, tries: int, seconds: float) -> None:
        super().__init__(failure.text)
        self.failure, self.tries, self.seconds = failure, tries, seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and how long one request is tried."""

    tries: int = 5
    """Requests at most, the first included."""
    deadline_s: float = 60.0
    """After this the last failure is final."""
    attempt_s: float = 10.0
    """How long one attempt may bring nothing."""
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    bytes_per_s: float = 1 << 18
    """The slowest transfer that is still waited for: an attempt and the deadline get this much longer."""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InvalidArgumentError(f"tries: expected at least 1, found {self.tries}")
        for name in ("deadline_s", "attempt_s", "first_delay_s", "max_delay_s", "bytes_per_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgumentError(f"{name}: expected more than 0, found {getattr(self, name)}")

    async def run(
        self,
        attempt: Callable[[], Awaitable[T]],
        judge: Callable[[BaseException], Failure],
        *,
        n_bytes: int = 0,
    ) -> T:
        """Call `attempt` until it succeeds.

        Args:
            judge: what an exception means, and whether to try again.
            n_bytes: expected size of the answer.

        Raises:
            GaveUp: nothing helped.
        """
        start = time.monotonic()
        transfer_s = n_bytes / self.bytes_per_s
        end = start + self.deadline_s + transfer_s
        for number in range(1, self.tries + 1):
            seconds = min(self.attempt_s + transfer_s, max(end - time.monotonic(), 0.001))
            try:
                return await asyncio.wait_for(attempt(), seconds)
            except Exception as error:
                failure = judge(error)
            now = time.monotonic()
            delay = random.uniform(0, min(self.max_delay_s, self.first_delay_s * _FACTOR ** (number - 1)))
            delay = max(delay, failure.retry_after_s)
            if not failure.is_passing or number == self.tries or now + delay >= end:
                break
            await asyncio.sleep(delay)
        # Not inside the handler: what a library raised may hold credentials, and would be kept as context.
        raise GaveUp(failure, number, now - start)
