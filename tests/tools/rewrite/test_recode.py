"""`opd recode`: another form, the same values, and the error told."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from store.caches import assert_same, files
from tools.rewrite.making import make, rich_rollouts

import opd_store
from opd_store import ENCODINGS, Cut, layout

CASES = {
    "nothing": ([], {}),
    "plain": (["--encoding", "plain"], {"encoding": "plain", "bands": (12,), "id_table": "none"}),
    "f32": (["--encoding", "f32"], {"encoding": "f32", "bands": (4, 12)}),
    "fewer ranks": (["--topk", 4], {"topk": 4, "bands": (4,)}),
    "bands": (["--bands", "2,4,12", "--encoding", "f32"], {"bands": (2, 4, 12)}),
    "no table": (["--id-table", "none"], {"id_table": "none"}),
    "no ranks": (["--topk", 0], {"topk": 0, "bands": ()}),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_that_hold_every_value(name, opd, source, tmp_path):
    options, expected = CASES[name]
    before = files(source)
    done = opd("recode", source, tmp_path / "out", *options, "--json").ok()
    assert files(source) == before
    told = json.loads(done.out)
    found, old = opd_store.open(told["uri"]), opd_store.open(source)
    for field, value in expected.items():
        assert getattr(found.schema, field) == value
    # A tail that one band has and the other sums up is not the same to the last bit.
    ends = sorted({4, 12} & {*found.schema.bands}) or [0]
    for row, ranks in itertools.product(range(len(old)), ends):
        assert_same(found.rollout(row, ranks=ranks), old.rollout(row, ranks=ranks))
    assert opd_store.verify(told["uri"]).problems == []
    assert (told["error_added"], told["existed"]) == (0.0, False)
    assert told["max_error"] == (pytest.approx(1 / 256, rel=1e-3) if found.topk else 0)
    extra = found.meta.extra
    assert (extra["note"], extra["made_by"], extra["made_from"]) == ("kept", "opd recode", old.digest)
    assert json.loads(opd("recode", source, tmp_path / "out", *options, "--json").ok().out)["existed"]


@pytest.mark.parametrize("encoding", ["ladder/64", "ladder/32", "ladder16"])
def test_the_error_is_the_old_and_the_new_one(encoding, opd, source, tmp_path):
    done = opd("recode", source, tmp_path / "out", "--encoding", encoding).ok()
    found, old = opd_store.open(tmp_path / "out"), opd_store.open(source)
    added = 0.0
    for left, right in zip(found, old, strict=True):
        difference = np.sort(left.topk_logprob, axis=1) - np.sort(right.topk_logprob, axis=1)
        added = max(added, float(np.abs(difference).max()))
    assert 0 < added <= found.max_error - old.max_error
    assert f"with what the source was off by, {found.max_error:.3g}" in done.err
    assert opd_store.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("before", ENCODINGS)
def test_every_encoding_of_fewer_ranks_is_what_reading_fewer_gives(before, opd, tmp_path):
    old = make(tmp_path / "source", rich_rollouts(4), encoding=before)
    opd("recode", tmp_path / "source", tmp_path / "out", "--topk", 6, "--encoding", "f32").ok()
    for row, found in enumerate(opd_store.open(tmp_path / "out")):
        assert_same(found, old.rollout(row, ranks=6))


@pytest.mark.parametrize(("option", "rule"), [("--min-probability", "probability"), ("--mass", "mass")])
def test_thresholds(option, rule, opd, source, tmp_path):
    opd("recode", source, tmp_path / "a", option, 0.3).ok()
    found, old = opd_store.open(tmp_path / "a"), opd_store.open(source)
    assert found.schema.cut == Cut(rule, 0.3)
    for left, right in zip(found, old, strict=True):
        kept = left.topk_ids != layout.NO_ID
        assert kept[:, 0].all()
        assert 0 < kept.sum() < kept.size
        assert left.topk_logprob[kept].tolist() == right.topk_logprob[kept].tolist()
        totals = [np.exp(np.c_[r.topk_logprob, r.log_tail].astype(float)).sum(axis=1) for r in (left, right)]
        assert totals[0] == pytest.approx(totals[1], abs=0.01)
        if rule == "probability":
            assert (kept[:, 1:] == (right.topk_logprob[:, 1:] >= np.float32(np.log(0.3)))).all()
    stricter, looser = (0.5, 0.1) if rule == "probability" else (0.1, 0.5)
    opd("recode", tmp_path / "a", tmp_path / "b", option, stricter).ok()
    opd("recode", tmp_path / "a", tmp_path / "c", option, looser).refused(2, "was cut before")
    other = "--mass" if rule == "probability" else "--min-probability"
    opd("recode", tmp_path / "a", tmp_path / "c", other, stricter).refused(2, "was cut before")
    assert not (tmp_path / "c").exists()


def test_the_table_of_another_cache(opd, source, tmp_path):
    values = rich_rollouts(3, seed=5)
    table = opd_store.build_id_table([value.topk_ids for value in values], vocab_size=100)
    make(tmp_path / "other", values, id_table=table)
    opd("recode", source, tmp_path / "out", "--id-table", tmp_path / "other").ok()
    found = opd_store.open(tmp_path / "out")
    assert found.id_table.digest == table.digest
    for row, rollout in enumerate(opd_store.open(source)):
        assert_same(found[row], rollout)
    opd("recode", tmp_path / "out", tmp_path / "again").ok()
    assert opd_store.open(tmp_path / "again").id_table.digest == table.digest


def test_small_shards(opd, tmp_path):
    make(tmp_path / "source", rich_rollouts(12, response_len=9000), encoding="plain", bands=(12,))
    opd("recode", tmp_path / "source", tmp_path / "out", "--shard-mib", 1).ok()
    found = opd_store.open(tmp_path / "out")
    assert opd_store.open(tmp_path / "source").n_shards == 1
    # A rollout takes about as much as a shard may.
    sizes = [shard.n_bytes for shard in found.shards]
    assert len(sizes) > 5
    assert max(sizes) < 2.5 * 2**20
    assert_same(found[11], opd_store.open(tmp_path / "source")[11])


REFUSED = {
    "more ranks": (["--topk", 13], "holds 12 ranks"),
    "both": (["--mass", 0.5, "--min-probability", 0.5], "give one of them"),
    "bands": (["--bands", "a,b"], "--bands"),
    "falling bands": (["--bands", "8,4,12"], "rising"),
    "wrong last band": (["--bands", "4,8"], "the last one 12"),
    "no such table": (["--id-table", "nowhere"], "--id-table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name, opd, source, tmp_path):
    options, message = REFUSED[name]
    opd("recode", source, tmp_path / "out", *options).refused(2, message)
    assert list(tmp_path.iterdir()) == []


def test_another_cache_is_not_overwritten(opd, source, tmp_path):
    opd("recode", source, tmp_path / "out").ok()
    before = files(tmp_path / "out")
    opd("recode", source, tmp_path / "out", "--topk", 4).refused(2, "another cache")
    opd("recode", source, source).refused(2, "another cache")
    assert files(tmp_path / "out") == before


def test_a_damaged_source_leaves_what_can_go_on(opd, source, tmp_path):
    make(tmp_path / "source", rich_rollouts(4))
    shard = next((tmp_path / "source/shards").iterdir())
    whole = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    opd("recode", tmp_path / "source", tmp_path / "out", "--topk", 4).refused(1, shard.name)
    assert not (tmp_path / "out").exists()
    shard.write_bytes(whole)
    opd("recode", tmp_path / "source", tmp_path / "out", "--topk", 4).ok()
