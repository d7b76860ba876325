"""Does this cache belong to this run?"""

from __future__ import annotations

import dataclasses

import pytest
from train.tiny_models import loaded, meta_of, model_info

from opd_store import RENORMALISED_TOPK, FormatError, InvalidArgumentError, MismatchError, ModelInfo
from opd_train import (
    CorrectionConfig,
    CorrectionKind,
    LossConfig,
    Objective,
    check_cache,
    default_loss,
    find_doubts,
    teacher_consistency,
)
from opd_train.objective.loss_config import require_topk
from opd_train.training.identity import FIELDS

OTHER = "sha256:" + "9" * 64
WRONG = {
    "tokenizer_fingerprint": ({"tokenizer_fingerprint": OTHER}, OTHER),
    "vocab_size": ({"vocab_size": 1000}, "1000"),
    "chat_template_digest": ({"chat_template_digest": OTHER}, OTHER),
    "teacher_temperature": ({"teacher": ModelInfo(name="t", logprob_temperature=0.7)}, "0.7"),
    "logprob_mode": (
        {"teacher": ModelInfo(name="t", logprob_mode=RENORMALISED_TOPK)},
        "renormalised_topk",
    ),
    "teacher_consistency": (
        {"teacher": model_info("big", "1"), "sft_teacher": model_info("small", "2")},
        "big sha256:" + "1" * 64,
    ),
}


@pytest.fixture(scope="module")
def student(models):
    return dataclasses.replace(loaded(models["llama"]), chat_template_digest="sha256:" + "7" * 64)


def expected_value(student, field):
    if field == "teacher_temperature":
        return "1.0"
    if field == "logprob_mode":
        return "log-probs over the vocabulary"
    if field == "teacher_consistency":
        return "small sha256:" + "2" * 64
    return str(getattr(student, field))


def test_every_field_has_a_case():
    assert set(WRONG) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_mismatch_is_refused_with_both_values_and_the_way_out(student, field):
    changes, found = WRONG[field]
    meta = dataclasses.replace(meta_of(student), **changes)
    expected = expected_value(student, field)
    with pytest.raises(MismatchError) as caught:
        check_cache(meta, student)
    error = caught.value
    assert (error.field, error.expected, error.found) == (field, expected, found)
    for part in (field, expected, found, f"--allow-mismatch {field}"):
        assert part in str(error)


@pytest.mark.parametrize("field", FIELDS)
def test_only_the_named_field_is_allowed_and_it_is_reported(student, field):
    changes, found = WRONG[field]
    meta = dataclasses.replace(meta_of(student), **changes)
    allowed = check_cache(meta, student, allow=[field])
    assert [(m.field, m.expected, m.found) for m in allowed] == [
        (field, expected_value(student, field), found)
    ]
    others = [name for name in FIELDS if name != field]
    with pytest.raises(MismatchError, match=field):
        check_cache(meta, student, allow=others)


def test_a_renormalised_objective_needs_no_tail(student):
    meta = dataclasses.replace(meta_of(student), **WRONG["logprob_mode"][0])
    for objective in Objective:
        loss = LossConfig(objective=objective)
        expected = [] if "renormalised" in objective.value else ["logprob_mode"]
        allowed = check_cache(meta, student, allow=["logprob_mode"], renormalised=loss.objective.renormalised)
        assert [mismatch.field for mismatch in allowed] == expected


def test_all_at_once(student):
    changes = {name: value for case, _ in WRONG.values() for name, value in case.items()}
    changes["teacher"] = dataclasses.replace(
        model_info("big", "1"), logprob_temperature=0.7, logprob_mode=RENORMALISED_TOPK
    )
    meta = dataclasses.replace(meta_of(student), **changes)
    assert [mismatch.field for mismatch in check_cache(meta, student, allow=FIELDS)] == list(FIELDS)


def test_what_the_cache_does_not_know_is_accepted(student):
    assert check_cache(meta_of(student), student) == []
    for known in (
        {"teacher": ModelInfo(name="t")},
        {"teacher": model_info("t", "1")},
        {"teacher": ModelInfo(name="t"), "sft_teacher": model_info("t", "1")},
        {"teacher": ModelInfo(name="t", logprob_temperature=1.0)},
    ):
        assert check_cache(dataclasses.replace(meta_of(student), **known), student) == []
    untemplated = dataclasses.replace(student, chat_template_digest=None)
    assert check_cache(dataclasses.replace(meta_of(student), chat_template_digest=OTHER), untemplated) == []


@pytest.mark.parametrize(
    ("teacher", "sft", "verdict"),
    [
        (None, None, "unknown"),
        (model_info("a", "1"), None, "unknown"),
        (None, model_info("a", "1"), "unknown"),
        (ModelInfo(name="a"), model_info("a", "1"), "unknown"),
        (model_info("a", "1"), ModelInfo(name="a"), "unknown"),
        (model_info("a", "1"), model_info("renamed", "1"), "consistent"),
        (model_info("a", "1"), model_info("a", "2"), "inconsistent"),
    ],
)
def test_consistency_is_of_digests_and_not_of_names(student, teacher, sft, verdict):
    meta = dataclasses.replace(meta_of(student), teacher=teacher, sft_teacher=sft)
    assert teacher_consistency(meta) == verdict


def test_an_unknown_field_cannot_be_allowed(student):
    with pytest.raises(InvalidArgumentError, match="'vocabulary' is not one of tokenizer_fingerprint"):
        check_cache(meta_of(student), student, allow=["vocabulary"])


def test_default_losses():
    tis = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS)
    assert default_loss(topk=1) == default_loss(topk=64) == LossConfig(objective=Objective.JSD)
    assert default_loss(topk=0) == LossConfig(objective=Objective.LIGHTNING, correction=tis, clip=1.0)
    for objective in Objective:
        require_topk(objective, topk=1)
        if objective.needs_topk:
            with pytest.raises(InvalidArgumentError, match=f"'{objective.value}' needs top-k"):
                require_topk(objective, topk=0)
        else:
            require_topk(objective, topk=0)


def test_what_the_student_says_of_its_sft_teacher_counts_too(student):
    meta = dataclasses.replace(meta_of(student), teacher=model_info("big", "1"), sft_teacher=None)
    said = dataclasses.replace(student, provenance={"sft_teacher": model_info("small", "2").to_json()})
    with pytest.raises(MismatchError, match=r"teacher_consistency.*small") as caught:
        check_cache(meta, said)
    assert caught.value.field == "teacher_consistency"
    same = dataclasses.replace(student, provenance={"sft_teacher": model_info("again", "1").to_json()})
    assert check_cache(meta, same) == []
    assert find_doubts(meta, same) == []


def test_what_cannot_be_ruled_out_is_said(student):
    known = {"teacher": model_info("big", "1"), "sft_teacher": model_info("big", "1")}
    meta = dataclasses.replace(meta_of(student), **known)
    assert find_doubts(meta, student) == []
    (doubt,) = find_doubts(dataclasses.replace(meta, sft_teacher=None), student)
    assert "fine-tuned" in doubt
    (doubt,) = find_doubts(dataclasses.replace(meta, behaviour=model_info("someone", "3")), student)
    assert "not sampled from this student" in doubt
    assert find_doubts(dataclasses.replace(meta, behaviour=student.info), student) == []


def test_a_broken_description_of_the_student_is_refused(student):
    broken = dataclasses.replace(student, provenance={"sft_teacher": {"nam": "x"}})
    with pytest.raises(FormatError, match=r"opd\.json: sft_teacher.*'nam'"):
        check_cache(meta_of(student), broken)
