"""What counts as passing, and for how long it is tried."""

from __future__ import annotations

import asyncio
import pickle

import pytest

import opd_store
from opd_store.storage import Retry
from opd_store.storage.failures import Failure, Kind, judge, of_status, retry_after
from opd_store.storage.retry import GaveUp


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(status, Kind.PASSING) for status in (408, 429, 500, 502, 503, 504)],
        *[(status, Kind.DENIED) for status in (401, 403)],
        *[(status, Kind.MISSING) for status in (404, 410)],
        *[(status, Kind.MOVED) for status in (301, 302, 307, 308)],
        *[(status, Kind.REFUSED) for status in (400, 405, 501)],
        (416, Kind.DAMAGED),
    ],
)
def test_statuses(status, kind):
    assert of_status(status, {}).kind is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("reset"), Kind.PASSING),
        (TimeoutError(), Kind.PASSING),
        (EOFError("short"), Kind.PASSING),
        (FileNotFoundError("bucket/key"), Kind.MISSING),
        (PermissionError("no"), Kind.DENIED),
        (OSError("Forbidden: bucket/key"), Kind.DENIED),
        (ValueError("a mistake"), Kind.REFUSED),
        (TypeError("a mistake"), Kind.REFUSED),
    ],
)
def test_exceptions(error, kind):
    assert judge(error, ()).kind is kind
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert judge(wrapped, ()).kind is kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "3"}, 3),
        ({"Retry-After": "99999"}, 30),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "Mon, 01 Jan 2024 00:00:05 GMT", "Date": "Mon, 01 Jan 2024 00:00:00 GMT"}, 5),
        ({"Retry-After": "Mon, 01 Jan 2024 00:00:05 GMT"}, 0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


def test_tries():
    calls = []

    async def fail() -> None:
        calls.append(None)
        raise ConnectionResetError

    def judged(kind: Kind):
        return lambda _: Failure(kind, "text")

    quick = Retry(tries=3, first_delay_s=1e-6)
    for kind, n_calls in ((Kind.PASSING, 3), (Kind.DENIED, 1)):
        calls.clear()
        with pytest.raises(GaveUp) as caught:
            asyncio.run(quick.run(fail, judged(kind)))
        assert len(calls) == caught.value.tries == n_calls
        assert caught.value.__context__ is None
    # Who asks for more time than is left is not tried again.
    calls.clear()
    with pytest.raises(GaveUp):
        asyncio.run(Retry(deadline_s=1).run(fail, lambda _: Failure(Kind.PASSING, "text", 2.0)))
    assert len(calls) == 1
    assert pickle.loads(pickle.dumps(quick)) == quick


@pytest.mark.parametrize("change", [{"tries": 0}, {"deadline_s": 0}, {"attempt_s": -1}, {"bytes_per_s": 0}])
def test_impossible_values(change):
    with pytest.raises(opd_store.InvalidArgumentError, match=next(iter(change))):
        Retry(**change)
