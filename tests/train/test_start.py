"""What is looked at before the first step: a good cache passes, and each way of being wrong is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from train.tiny_models import EOS, VOCAB, loaded, meta_of, save_tiny, scored_cache, tiny_tokenizer

import opd_store
from opd_store import InvalidRolloutError, MismatchError, SamplerInfo
from opd_train import Prompt, load_causal_lm, sample_rollouts
from opd_train.capture.scoring import score_rollouts, with_teacher
from opd_train.training.start import check_start

RNG = np.random.default_rng(0)
PROMPTS = [Prompt(ids=RNG.integers(4, VOCAB, 3).astype(np.uint32), sample_id=f"p{i}") for i in range(80)]


def sampler(**fields):
    return SamplerInfo(**{"max_new_tokens": 24, "seed": 1, "stop_token_ids": (EOS,)} | fields)


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


@pytest.fixture(scope="module")
def rollouts(student, teacher):
    drawn = sample_rollouts(student, PROMPTS, sampler())
    scores = score_rollouts(teacher, drawn, topk=12)
    return [with_teacher(rollout, score) for rollout, score in zip(drawn, scores, strict=True)]


def written(path, lm, rollouts, **meta):
    with opd_store.create(path, meta=meta_of(lm, **meta), topk=12, encoding="plain") as writer:
        writer.append_batch(rollouts)
    return opd_store.open(path)


def moved(array, by):
    return np.roll(array, by, axis=0)


def changed(rollouts, **change):
    """Every rollout with functions applied to some of its fields."""
    return [
        dataclasses.replace(r, **{name: function(getattr(r, name)) for name, function in change.items()})
        for r in rollouts
    ]


@pytest.mark.parametrize("encoding", ["plain", "ladder/32"])
def test_a_good_cache_passes(student, teacher, rollouts, tmp_path, encoding):
    with opd_store.create(tmp_path / "cache", meta=meta_of(student), topk=12, encoding=encoding) as writer:
        writer.append_batch(rollouts)
    report = check_start(opd_store.open(tmp_path / "cache"), student)
    assert report.n_rollouts == 64
    assert report.notes == ()
    assert report.ratio.mean == pytest.approx(1, abs=1e-4)
    assert report.ratio.n_rollouts == 64
    assert report.topk_agreement == 1


def test_any_student_has_mean_ratio_1_on_rollouts_of_another(teacher, models, tmp_path):
    # Hot, so that the student's probability is not concentrated on tokens that are never drawn.
    near = load_causal_lm(models["llama"])
    drawn = sample_rollouts(near, PROMPTS, sampler())
    for parameter in near.model.parameters():
        parameter.data.mul_(0.97)
    cache = scored_cache(tmp_path / "cache", teacher, drawn)
    ratio = check_start(cache, near, n=80).ratio
    assert ratio.mean != pytest.approx(1, abs=1e-4)
    assert abs(ratio.z) < 4


WRONG = {
    "behaviour at another temperature": (
        {"behaviour_logprob": lambda x: x / 2},
        "behaviour_logprob",
        "has mean",
    ),
    "teacher one on": (
        {"teacher_logprob": lambda x: moved(x, 1)},
        "topk_ids",
        "row t of teacher_logprob is of the token before",
    ),
    "teacher one back": (
        {"teacher_logprob": lambda x: moved(x, -1)},
        "topk_ids",
        "row t of teacher_logprob is of the next token",
    ),
    "top-k one on": (
        dict.fromkeys(("topk_ids", "topk_logprob", "log_tail"), lambda x: moved(x, 1)),
        "topk_ids",
        "its row t is of the token before",
    ),
    "top-k one back": (
        dict.fromkeys(("topk_ids", "topk_logprob", "log_tail"), lambda x: moved(x, -1)),
        "topk_ids",
        "its row t is of the next token",
    ),
    "two teachers": ({"teacher_logprob": lambda x: x - 0.5}, "topk_ids", "in one pass of one teacher"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named_and_may_be_allowed(student, rollouts, tmp_path, name):
    change, field, part = WRONG[name]
    cache = written(tmp_path / "cache", student, changed(rollouts, **change))
    with pytest.raises(MismatchError, match=part) as caught:
        check_start(cache, student)
    assert caught.value.field == field
    assert f"--allow-mismatch {field}" in str(caught.value)
    report = check_start(cache, student, allow=[field])
    assert any(part in note for note in report.notes)
    # What the run does not read is no reason to stop it.
    unused = {"behaviour_used": False} if field == "behaviour_logprob" else {"teacher_used": False}
    assert check_start(cache, student, **unused).notes == report.notes


@pytest.mark.parametrize(("by", "part"), [(1, "token before"), (-1, "next token")])
@pytest.mark.parametrize("field", ["behaviour_logprob", "teacher_logprob"])
def test_off_by_one_shows_against_the_student_too(student, rollouts, tmp_path, field, by, part):
    # Without top-k, and for a teacher that is like the student.
    own = [
        dataclasses.replace(r, teacher_logprob=r.behaviour_logprob, topk_ids=None, topk_logprob=None)
        for r in rollouts
    ]
    own = [dataclasses.replace(r, log_tail=None) for r in own]
    with opd_store.create(tmp_path / "cache", meta=meta_of(student)) as writer:
        writer.append_batch(changed(own, **{field: lambda x: moved(x, by)}))
    allow = ["behaviour_logprob"] if field == "teacher_logprob" else []
    cache = opd_store.open(tmp_path / "cache")
    if field == "behaviour_logprob":
        report = check_start(cache, student, allow=[field])
        (note,) = [note for note in report.notes if "off by one" in note]
        assert f"row t fits the {part} better" in note
        return
    with pytest.raises(MismatchError, match=f"row t fits the {part} better"):
        check_start(cache, student, allow=allow)


@pytest.mark.parametrize(
    ("meta", "part"),
    [
        ({"sampler": SamplerInfo(top_p=0.5)}, "sample at top-p 1"),
        ({"behaviour": None}, "another checkpoint"),
    ],
    ids=["truncated support", "unknown"],
)
def test_what_a_wrong_ratio_is_put_down_to(student, teacher, tmp_path, meta, part):
    drawn = sample_rollouts(student, PROMPTS, sampler(top_p=0.5))
    scores = score_rollouts(teacher, drawn, topk=12)
    scored = [with_teacher(rollout, score) for rollout, score in zip(drawn, scores, strict=True)]
    with opd_store.create(
        tmp_path / "cache", meta=dataclasses.replace(meta_of(student), **meta), topk=12, encoding="plain"
    ) as writer:
        writer.append_batch(scored)
    cache = opd_store.open(tmp_path / "cache")
    if "sampler" in meta:
        # Known from the cache, so it is a note: no number in it is wrong.
        assert any(part in note for note in check_start(cache, student).notes)
    else:
        with pytest.raises(MismatchError, match=part):
            check_start(cache, student)


def test_rollouts_of_another_model_are_noted(teacher, student, rollouts, tmp_path):
    cache = written(tmp_path / "cache", teacher, changed(rollouts, behaviour_logprob=lambda x: x / 2))
    assert any("sample from this student" in note for note in check_start(cache, student).notes)


def test_ids_beyond_the_students_vocabulary(student, rollouts, tmp_path, models):
    small = load_causal_lm(
        save_tiny(tmp_path / "small", vocab_size=VOCAB - 6, tokenizer=tiny_tokenizer(VOCAB - 6))
    )
    cache = written(tmp_path / "cache", student, rollouts)
    with pytest.raises(InvalidRolloutError, match=f"has {VOCAB - 6} logits"):
        check_start(cache, small)


def test_a_cache_that_says_little(student, teacher, rollouts, tmp_path):
    bare = [
        dataclasses.replace(
            r, behaviour_logprob=None, teacher_logprob=None, topk_ids=None, topk_logprob=None, log_tail=None
        )
        for r in rollouts
    ]
    with opd_store.create(tmp_path / "bare", meta=meta_of(student)) as writer:
        writer.append_batch(bare)
    report = check_start(opd_store.open(tmp_path / "bare"), student, n=5)
    assert (report.n_rollouts, report.ratio, report.topk_agreement, report.notes) == (5, None, None, ())
    with opd_store.create(tmp_path / "empty", meta=meta_of(student)):
        pass
    assert check_start(opd_store.open(tmp_path / "empty"), student).n_tokens == 0
