"""Chosen and sampled ids, id tables, bands and cuts through the verbs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from store.caches import VOCAB, assert_same
from tools.rewrite.making import make, rich_rollouts

import opd_store
from opd_store import ENCODINGS, NO_ID, Cut
from opd_store.encodings import sum_error

SUPPORTS = {"chosen": 3, "sampled": 4}
TABLES = [
    opd_store.build_id_table([rich_rollouts(1, seed=seed)[0].topk_ids], vocab_size=VOCAB) for seed in (7, 8)
]


@pytest.fixture(scope="module")
def supports(tmp_path_factory):
    path = tmp_path_factory.mktemp("supports") / "source"
    make(path, rich_rollouts(4, **SUPPORTS), sampled_temperature=0.7, **SUPPORTS)
    return path


def by_id(rollout, kind):
    """For each position, what is known of an id."""
    names = ["logprob", "draws"] if kind == "sampled" else ["logprob"]
    columns = [getattr(rollout, f"{kind}_{name}") for name in ("ids", *names)]
    return [
        {int(found[0]): found[1:] for found in zip(*row, strict=True) if found[0] != NO_ID}
        for row in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("topk", [0, 12])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_recode_keeps_every_id_and_every_draw(encoding, topk, opd, supports, tmp_path):
    done = opd("recode", supports, tmp_path / "out", "--encoding", encoding, "--topk", topk, "--json").ok()
    source, found = opd_store.open(supports), opd_store.open(tmp_path / "out")
    assert opd_store.verify(tmp_path / "out").problems == []
    assert (found.schema.chosen, found.schema.sampled, found.schema.sampled_temperature) == (3, 4, 0.7)
    assert found.topk == topk
    added = json.loads(done.out)["error_added"]
    for left, right in zip(found, source, strict=True):
        for kind in SUPPORTS:
            for mine, theirs in zip(by_id(left, kind), by_id(right, kind), strict=True):
                assert mine.keys() == theirs.keys()
                for name, (logprob, *draws) in mine.items():
                    assert abs(logprob - theirs[name][0]) <= added
                    assert draws == list(theirs[name][1:])
            tails = [getattr(rollout, f"{kind}_log_tail") for rollout in (left, right)]
            with np.errstate(invalid="ignore"):
                assert np.nanmax(np.abs(tails[0] - tails[1])) <= added
        assert left.extra == right.extra
    if encoding in ("plain", "f32", "ladder/128"):
        # `error_added` is what the encoding of the source may have added, where its pages were read.
        assert found.max_error <= max(source.max_error, sum_error(source.encoding))


OTHERS = {
    "another table": ({"id_table": TABLES[0]}, {"id_table": TABLES[1]}),
    "no table": ({"id_table": TABLES[0]}, {"id_table": None}),
    "a table after none": ({"id_table": None}, {"id_table": TABLES[1]}),
    "other bands": ({"bands": (4, 12)}, {"bands": (2, 5, 12)}),
    "another cut": ({"cut": Cut("mass", 0.6)}, {"cut": Cut("probability", 0.05)}),
    "a cut after none": ({}, {"cut": Cut("mass", 0.6)}),
    "more ranks": ({}, {"topk": 14, "bands": (4, 14)}),
    "everything": (
        {"id_table": TABLES[0], "bands": (3, 12), "encoding": "f32", "cut": Cut("given")},
        {"id_table": TABLES[1], "bands": (2, 5, 14), "topk": 14, "encoding": "ladder/64"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_merge(name, opd, tmp_path):
    first, second = OTHERS[name]
    a = make(tmp_path / "a", rich_rollouts(3), **first)
    b = make(tmp_path / "b", rich_rollouts(3, seed=1, topk=second.get("topk", 12)), **second)
    opd("merge", tmp_path / "a", tmp_path / "b", tmp_path / "out").ok()
    found = opd_store.open(tmp_path / "out")
    assert opd_store.verify(tmp_path / "out").problems == []
    assert (found.encoding, found.schema.bands) == (a.encoding, a.schema.bands)
    assert (found.id_table is None) == (a.id_table is None)
    expected = [cache.rollout(row, ranks=12) for cache in (a, b) for row in range(3)]
    for row, rollout in enumerate(expected):
        if name != "more ranks" or row < 3:
            assert_same(found[row], rollout)
        else:
            # The tail outside rank 12 is a sum, which the ladder rounds.
            np.testing.assert_array_equal(found[row].topk_ids, rollout.topk_ids)
            np.testing.assert_allclose(found[row].log_tail, rollout.log_tail, rtol=0, atol=1 / 256)
