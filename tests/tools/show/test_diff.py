"""`opd diff`: what differs, where, and by how much."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from opd_tools.main import main
from opd_tools.show.compare import Comparison, least_kl
from opd_tools.show.pairing import pair
from tools.show.caches import VOCAB, some_rollouts, write

import opd_store
from opd_store import CacheMeta, ModelInfo


def opd(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def difference(*args, code):
    shown = opd("diff", *args, "--json")
    assert shown.exit_code == code, shown.output
    found = json.loads(shown.stdout)
    assert found["equal"] is (code == 0)
    text = opd("diff", *args)
    assert text.exit_code == code
    assert text.stdout.splitlines()[-1] == ("different" if code else "equal")
    return found


@pytest.fixture(scope="module")
def rollouts():
    return some_rollouts()


@pytest.fixture(scope="module")
def cache(rollouts, tmp_path_factory):
    return write(tmp_path_factory.mktemp("diff") / "cache", rollouts)


def changed(values, at, value):
    found = np.array(values)
    found[at] = value
    return found


def test_a_cache_equals_itself_and_its_copy(cache, rollouts, tmp_path):
    found = difference(cache, cache, code=0)
    assert found["in both"] == {"rollouts": 12, "in the same order": True, "compared": 12, "different": 0}
    # Another digest, in two commits and another order.
    with opd_store.create(
        tmp_path / "copy",
        meta=opd_store.open(cache).meta,
        topk=4,
        user_columns={"x_domain": "utf8", "x_level": "int64"},
    ) as writer:
        writer.append_batch(rollouts[5:])
        writer.commit()
        writer.append_batch(rollouts[:5])
    found = difference(cache, tmp_path / "copy", code=0)
    assert found["in both"]["in the same order"] is False
    assert found["KL"]["largest"] == 0


CHANGES = {
    "teacher_logprob": (lambda r: {"teacher_logprob": changed(r.teacher_logprob, 2, -7.5)}, 2, "-7.5"),
    "log_tail": (lambda r: {"log_tail": changed(r.log_tail, 1, -np.inf)}, 1, "-inf"),
    "loss_mask": (lambda r: {"loss_mask": changed(r.loss_mask, 3, not r.loss_mask[3])}, 3, None),
    "finish_reason": (lambda r: {"finish_reason": "abort"}, None, "abort"),
    "reward": (lambda r: {"reward": 0.25}, None, "0.25"),
    "behaviour_logprob": (lambda r: {"behaviour_logprob": None}, None, "absent"),
    "x_domain": (lambda r: {"extra": {"x_level": r.extra["x_level"]}}, None, "absent"),
    "x_level": (lambda r: {"extra": {**r.extra, "x_level": 77}}, None, "77"),
    "topk_ids": (
        lambda r: {
            "topk_ids": changed(r.topk_ids, (0, 0), next(n for n in range(VOCAB) if n not in r.topk_ids[0]))
        },
        0,
        None,
    ),
    "topk_logprob": (
        lambda r: {"topk_logprob": changed(r.topk_logprob, (2, 3), r.topk_logprob[2, 3] - 1)},
        2,
        None,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change(cache, rollouts, tmp_path, name):
    change, position, value = CHANGES[name]
    other = [*rollouts]
    other[7] = dataclasses.replace(other[7], **change(other[7]))
    # In another place, too.
    found = difference(cache, write(tmp_path / "other", other[1:] + other[:1]), code=1)
    assert list(found["fields"]) == [name]
    field = found["fields"][name]
    assert (field["row in A"], field["row in B"], field["position"]) == (7, 6, position)
    assert (field["rollouts"], field["values"]) == (1, 1)
    assert value is None or field["B"] == value
    assert found["in both"]["different"] == 1
    assert (found["KL"]["largest"] > 0) is (name in ("log_tail", "topk_ids", "topk_logprob"))


def test_rollouts_that_one_has(cache, rollouts, tmp_path):
    (stranger,) = some_rollouts(1, seed=9)
    other = write(tmp_path / "other", [*rollouts[:3], *rollouts[4:], stranger])
    found = difference(cache, other, code=1)
    assert found["only in A"] == {"rollouts": 1, "first rows": [3]}
    assert found["only in B"] == {"rollouts": 1, "first rows": [11]}
    assert found["fields"] == {}
    assert difference(other, cache, code=1)["only in A"]["first rows"] == [11]
    assert difference(other, cache, "--values-only", code=1)["in both"]["compared"] == 11


def test_provenance_and_schema(cache, rollouts, tmp_path):
    meta = CacheMeta(
        vocab_size=VOCAB,
        tokenizer_fingerprint="sha256:" + "5e" * 32,
        teacher=ModelInfo(name="another"),
        extra={"note": "x"},
    )
    other = write(tmp_path / "other", rollouts, meta=meta, encoding="f32", bands=(2, 4))
    found = difference(cache, other, code=1)
    assert {row["field"]: (row["A"], row["B"]) for row in found["provenance"]} == {
        "teacher.name": ("a teacher", "another"),
        "extra": ("unknown", "{'note': 'x'}"),
    }
    assert {row["field"] for row in found["schema"]} >= {"encoding", "bands"}
    assert found["fields"] == {}
    difference(cache, other, "--values-only", code=0)


@pytest.mark.parametrize("encoding", ["ladder16", "ladder/128", "ladder/32"])
def test_tolerance_forgives_rounding(cache, rollouts, tmp_path, encoding):
    other = write(tmp_path / "other", rollouts, encoding=encoding)
    found = difference(cache, other, "--values-only", code=1)
    assert set(found["fields"]) <= {"topk_ids", "topk_logprob", "log_tail"}
    error = max(field["largest difference"] for field in found["fields"].values())
    # Ids swap places at ties, so a rank may differ by both errors.
    assert error <= 2 * opd_store.open(other).max_error
    difference(cache, other, "--values-only", "--tolerance", 2.1 * error, code=0)
    difference(cache, other, "--values-only", "--tolerance", 0.1 * error, code=1)
    assert 0 < found["KL"]["mean"] <= opd_store.open(other).max_error ** 2


def test_fewer_ranks_are_compared(cache, rollouts, tmp_path):
    cached = opd_store.open(cache)
    fewer = [cached.rollout(row, ranks=2) for row in range(len(cached))]
    other = write(tmp_path / "other", fewer, topk=2)
    assert difference(cache, other, "--values-only", code=0)["KL"]["largest"] == pytest.approx(0, abs=1e-6)


def test_another_tokenizer(cache, rollouts, tmp_path):
    other = write(tmp_path / "other", rollouts, fingerprint="sha256:" + "ab" * 32)
    found = difference(cache, other, "--values-only", code=1)
    assert found["comparable"] is False
    assert (found["only in A"]["rollouts"], found["in both"]["rollouts"]) == (12, 0)


def test_equal_rollouts_are_paired_in_order(rollouts, tmp_path):
    def twins(names):
        return [dataclasses.replace(rollouts[int(n[0])], sample_id=n) for n in names]

    first = write(tmp_path / "a", twins(["0a", "1a", "0b", "0c", "2a"]))
    second = write(tmp_path / "b", twins(["1a", "0a", "3a", "0b"]))
    found = pair(opd_store.open(first), opd_store.open(second))
    assert found.first.tolist() == [0, 1, 2]
    assert found.second.tolist() == [1, 0, 3]
    assert found.only_first.tolist() == [3, 4]
    assert found.only_second.tolist() == [2]


def test_nothing_against_nothing_and_something(cache, tmp_path):
    empty = write(tmp_path / "a", [])
    difference(empty, write(tmp_path / "b", []), code=0)
    assert difference(empty, cache, code=1)["only in B"]["rollouts"] == 12


def test_limit(cache, rollouts, tmp_path):
    other = write(tmp_path / "other", rollouts[::-1])
    assert difference(cache, other, "--limit", 5, code=0)["in both"]["compared"] == 5


def test_kl_is_that_of_a_slow_sum(rollouts):
    """Against plain Python on dictionaries, one position at a time, with a search for the least."""
    first, second = rollouts[0], rollouts[4]
    n = min(first.response_len, second.response_len)

    def part(rollout, t):
        pairs = zip(rollout.topk_ids[t].tolist(), np.exp(rollout.topk_logprob[t].astype(float)), strict=True)
        return dict(pairs), float(np.exp(np.float64(rollout.log_tail[t])))

    def cut(rollout):
        names = ("topk_ids", "topk_logprob", "log_tail")
        fields = {name: getattr(rollout, name)[:n] for name in names}
        return dataclasses.replace(rollout, token_ids=rollout.token_ids[: rollout.prompt_len + n], **fields)

    expected = []
    for t in range(n):
        (p, p_tail), (q, q_tail) = part(first, t), part(second, t)
        p_sum, q_sum = sum(p.values()) + p_tail, sum(q.values()) + q_tail
        shared = p.keys() & q.keys()
        mine = sum(v for k, v in p.items() if k not in shared) / p_sum
        outside = (q_tail + sum(v for k, v in q.items() if k not in shared)) / q_sum
        most = min(q_tail, (len(p) - len(shared)) * min(q.values())) / q_sum
        best = np.inf
        for share in np.linspace(0, most, 20001)[1:]:
            rest = p_tail / p_sum * np.log(p_tail / p_sum / (outside - share))
            best = min(best, (mine * np.log(mine / share) if mine else 0) + rest)
        expected.append(best + sum(p[k] / p_sum * np.log(p[k] / p_sum / (q[k] / q_sum)) for k in shared))
    np.testing.assert_allclose(least_kl(cut(first), cut(second)), expected, rtol=1e-4, atol=1e-7)
    assert max(expected) > 0.1


def test_a_prompt_that_ends_elsewhere_is_one_difference(rollouts):
    other = dataclasses.replace(rollouts[0], prompt_len=4)
    comparison = Comparison()
    comparison.add((0, 0), rollouts[0], other)
    assert set(comparison.fields) == {"prompt_len"}
