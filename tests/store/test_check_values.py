"""Values are proven possible when a row is first read, once, unless the caller says otherwise."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store.caches import VOCAB, some_rollouts, write

import opd_store
from opd_store import Rollout, batch, layout, record_batches

SIZES = {"topk": 9, "chosen": 3, "sampled": 3}
GOOD = some_rollouts(4, response_len=5, **SIZES)


@pytest.fixture
def spied(monkeypatch):
    """Names of the checks that were made, in order."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(batch, name)

        def wrapped(first, *args, **options):
            calls.append(first if name != "support_problem" else f"{first} {args[0].shape[1]}")
            return real(first, *args, **options)

        monkeypatch.setattr(batch, name, wrapped)

    spy("support_problem")
    spy("ids_problem")
    spy("logprobs_problem")
    return calls


NATIVE = ["token_ids", "teacher_logprob", "behaviour_logprob", "reference_logprob"]


def test_a_row_is_checked_once_for_each_number_of_ranks(tmp_path, spied):
    write(tmp_path / "cache", GOOD, bands=(2, 9), **SIZES)
    found = opd_store.open(tmp_path / "cache")
    assert spied == []
    only = {"columns": ["topk_ids"]}
    found.rollout(1, ranks=2, **only)
    assert spied == [*NATIVE, "topk 2"]
    for ranks in (2, 1, 0):
        found.rollout(1, ranks=ranks, **only)
    assert spied == [*NATIVE, "topk 2"]
    for ranks in (5, 4, 9, None, 3, 9):
        found.rollout(1, ranks=ranks, **only)
    # A band is proven whole, with its own tail; ranks that join the tail add nothing to prove.
    assert spied == [*NATIVE, "topk 2", "topk 9"]
    spied.clear()
    list(found.scan(**only))
    assert spied == ["topk 9"] * 3
    list(found.scan(**only))
    assert spied == ["topk 9"] * 3


def test_nothing_is_checked_again_after_a_batch_was_forgotten(tmp_path, spied, monkeypatch):
    monkeypatch.setattr(record_batches, "_OPEN_BATCHES", 1)
    write(tmp_path / "cache", GOOD, batch_bytes=1, bands=(8, 9), **SIZES)
    found = opd_store.open(tmp_path / "cache")
    list(found.scan(columns=["topk_ids"]))
    assert spied == [*NATIVE, "topk 9"] * 4
    spied.clear()
    list(found.scan(columns=["topk_ids"]))
    assert spied == []
    for _ in range(2):
        list(found.scan(columns=["topk_ids"], ranks=3))
    assert spied == ["topk 8"] * 4


def test_nothing_else_is_checked_again_either(tmp_path, spied, monkeypatch):
    monkeypatch.setattr(record_batches, "_OPEN_BATCHES", 1)
    write(tmp_path / "cache", GOOD, batch_bytes=1, bands=(8, 9), **SIZES)
    found = opd_store.open(tmp_path / "cache")
    list(found.scan(columns=["chosen_ids", "sampled_ids"]))
    spied.clear()
    list(found.scan(columns=["chosen_ids", "sampled_ids"]))
    assert spied == []


def test_every_support_is_checked(tmp_path, spied):
    write(tmp_path / "cache", GOOD[:1], **SIZES)
    opd_store.open(tmp_path / "cache")[0]
    assert spied == [*NATIVE, "topk 9", "chosen 3", "sampled 3"]


def test_no_check_where_the_caller_wants_none(tmp_path, spied):
    write(tmp_path / "cache", GOOD, **SIZES)
    found = opd_store.open(tmp_path / "cache", check_values=False)
    list(found)
    list(pickle.loads(pickle.dumps(found)))
    assert spied == []
    list(pickle.loads(pickle.dumps(opd_store.open(tmp_path / "cache"))))
    assert spied == [*NATIVE, *["topk 9", "chosen 3", "sampled 3"] * 4]


def poke(name: str, *index_and_value: object) -> Rollout:
    *index, value = index_and_value
    array = np.array(getattr(GOOD[2], name))
    array[tuple(index)] = value
    return replace(GOOD[2], **{name: array})


def write_unchecked(path: Path, values: list[Rollout], monkeypatch, **options: object) -> None:
    """As a writer with an error would: checksums are right, values are not."""
    with monkeypatch.context() as patch:
        patch.setattr("opd_store.writer.checked", lambda rollout, **_: rollout)
        patch.setattr("opd_store.encodings._in_decoded_order", lambda band, _: band)
        patch.setattr("opd_store.encodings._largest_error", lambda *_: 0.0)
        write(path, values, **(SIZES | options))


NAN = np.nan
CASES = {
    "token_ids": (poke("token_ids", 3, VOCAB), "token_ids", "position 3"),
    "finish_reason": (replace(GOOD[2], finish_reason="eos"), "finish_reason", "'eos'"),
    **{
        f"{name} {value}": (poke(name, 4, value), name, "position 4")
        for name in ("teacher_logprob", "behaviour_logprob", "reference_logprob")
        for value in (NAN, -np.inf, 0.5)
    },
    "log_tail nan": (poke("log_tail", 4, NAN), "log_tail", "position 4"),
    "log_tail": (poke("log_tail", 4, 0.5), "log_tail", "position 4"),
    "topk_ids": (poke("topk_ids", 4, 8, VOCAB), "topk_ids", "position 4"),
    "topk_ids padding": (poke("topk_ids", 4, 8, layout.NO_ID), "topk_ids", "position 4"),
    "topk_ids twice": (poke("topk_ids", 4, 8, GOOD[2].topk_ids[4, 0]), "topk_ids", "position 4"),
    "topk_logprob nan": (poke("topk_logprob", 4, 1, NAN), "topk_logprob", "position 4"),
    "topk_logprob -inf": (poke("topk_logprob", 4, 8, -np.inf), "topk_logprob", "position 4"),
    "topk_logprob order": (poke("topk_logprob", 4, 8, 0.0), "topk_logprob", "position 4"),
    "topk sum": (poke("log_tail", 4, 0.0), "topk_logprob", "position 4"),
    "chosen_log_tail": (poke("chosen_log_tail", 4, NAN), "chosen_log_tail", "position 4"),
    "chosen sum": (poke("chosen_logprob", 4, 0, 0.1), "chosen_logprob", "position 4"),
    "sampled_draws": (
        poke("sampled_draws", slice(None), slice(None), 0),
        "sampled_draws",
        "position",
    ),
    "sampled_ids": (poke("sampled_ids", 0, 0, VOCAB), "sampled_ids", "position 0"),
}


@pytest.fixture(scope="module", params=["plain", "f32"])
def written(request, tmp_path_factory):
    """A cache with every case, in a record batch of its own, and one possible row at the end."""
    path = tmp_path_factory.mktemp("check_values") / "cache"
    values = [replace(rollout, sample_id=case) for case, (rollout, _, _) in CASES.items()]
    with pytest.MonkeyPatch.context() as patch:
        options = {"batch_bytes": 1, "encoding": request.param, "bands": (9,)}
        write_unchecked(path, [*values, GOOD[0]], patch, **options)
    return path


@pytest.mark.parametrize("case", CASES)
def test_impossible_values_are_found_when_they_are_read(written, case):
    bad, column, place = CASES[case]
    row = list(CASES).index(case)
    found = opd_store.open(written)
    for again in (found, found, pickle.loads(pickle.dumps(found))):
        with pytest.raises(opd_store.FormatError) as caught:
            again[row]
        assert (caught.value.row, caught.value.column) == (0, column)
        for part in (f"record batch {row}, row 0", f"column {column}", place, "expected", str(written)):
            assert part in str(caught.value)
        assert again[-1].sample_id == "r0"
    unchecked = opd_store.open(written, check_values=False)
    for again in (unchecked, pickle.loads(pickle.dumps(unchecked))):
        name = column if column != "topk_logprob" or case != "topk sum" else "log_tail"
        left, right = getattr(again[row], name), getattr(bad, name)
        assert np.array_equal(left, right) or left.tobytes() == right.tobytes()


def test_verify_finds_all_of_them(written):
    problems = [str(problem) for problem in opd_store.verify(written).problems]
    assert len(problems) == len(CASES)
    for row, problem in enumerate(problems):
        assert f"record batch {row}" in problem


def test_a_bad_row_spoils_no_other_row_of_its_batch(tmp_path, monkeypatch):
    write_unchecked(tmp_path / "cache", [*GOOD[:2], CASES["topk_ids"][0], GOOD[3]], monkeypatch, bands=(8, 9))
    found = opd_store.open(tmp_path / "cache")
    with pytest.raises(opd_store.FormatError, match="record batch 0, row 2, position 4, column topk_ids"):
        found[2]
    assert [found[row].sample_id for row in (0, 1, 3)] == ["r0", "r1", "r3"]
    # The ranks before it are possible.
    assert found.rollout(2, ranks=8).topk_ids.shape == (5, 8)


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize("encoding", ["plain", "f32"])
def test_the_tail_of_every_band_is_checked(tmp_path, monkeypatch, encoding, first):
    """Also when all ranks were read before, which need the last band's tail only."""
    real = opd_store.encodings.fold_tail

    def broken(band, ranks):
        return np.full(5, NAN, np.float32) if ranks == 2 else real(band, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(opd_store.encodings, "fold_tail", broken)
        patch.setattr(opd_store.encodings, "_largest_error", lambda *_: 0.0)
        write(tmp_path / "cache", GOOD, encoding=encoding, bands=(2, 9), **SIZES)
    found = opd_store.open(tmp_path / "cache")
    if first is None:
        found[0]
    with pytest.raises(opd_store.FormatError, match="column log_tail"):
        found.rollout(0, ranks=2)


def test_verify_looks_at_the_tail_of_every_band(tmp_path, monkeypatch):
    real = opd_store.encodings.fold_tail

    def broken(band, ranks):
        return np.full(5, NAN, np.float32) if ranks == 2 else real(band, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(opd_store.encodings, "fold_tail", broken)
        write(tmp_path / "cache", GOOD, bands=(2, 9), **SIZES)
    assert not opd_store.verify(tmp_path / "cache").ok


def test_checked_values_are_those_that_are_returned(tmp_path):
    write(tmp_path / "cache", GOOD, encoding="ladder/32", **SIZES)
    left = list(opd_store.open(tmp_path / "cache"))
    right = list(opd_store.open(tmp_path / "cache", check_values=False))
    for a, b in zip(left, right, strict=True):
        assert a.topk_logprob.tobytes() == b.topk_logprob.tobytes()
        assert a.sampled_draws.tobytes() == b.sampled_draws.tobytes()
