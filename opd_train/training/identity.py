"""Does this cache belong to this run? Compared before the first step, by digests and not by names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from opd_store import RENORMALISED_TOPK, CacheMeta, InvalidArgumentError, MismatchError, teacher_consistency
from opd_train.models import CausalLM

FIELDS = (
    "tokenizer_fingerprint",
    "vocab_size",
    "chat_template_digest",
    "teacher_temperature",
    "logprob_mode",
    "teacher_consistency",
)
"""What `check_cache` compares, and what may be named to be ignored."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One field on which cache and run disagree."""

    field: str
    expected: str
    found: str
    remedy: str


def find_mismatches(
    meta: CacheMeta, student: CausalLM, *, teacher_used: bool = True, renormalised: bool = False
) -> list[Mismatch]:
    """Every field of FIELDS on which they disagree. What the cache does not know is not a disagreement.

    Args:
        teacher_used: whether the objective reads the teacher's log-probs at all.
        renormalised: whether it renormalises them over the top-k.
    """
    found = []
    if meta.tokenizer_fingerprint != student.tokenizer_fingerprint:
        remedy = "use a student with the teacher's tokenizer"
        pair = (student.tokenizer_fingerprint, meta.tokenizer_fingerprint)
        found.append(Mismatch("tokenizer_fingerprint", *pair, remedy))
    if meta.vocab_size != student.vocab_size:
        remedy = "resize the student's output head to the teacher's number of logits"
        found.append(Mismatch("vocab_size", str(student.vocab_size), str(meta.vocab_size), remedy))
    templates = (student.chat_template_digest, meta.chat_template_digest)
    if None not in templates and templates[0] != templates[1]:
        remedy = "give the student the chat template that the rollouts were made with"
        found.append(Mismatch("chat_template_digest", str(templates[0]), str(templates[1]), remedy))
    if not teacher_used:
        return found
    temperature = meta.teacher.logprob_temperature if meta.teacher is not None else None
    if temperature not in (None, 1.0):
        remedy = "score the rollouts again at temperature 1"
        found.append(Mismatch("teacher_temperature", "1.0", str(temperature), remedy))
    mode = meta.teacher.logprob_mode if meta.teacher is not None else None
    if mode == RENORMALISED_TOPK and not renormalised:
        remedy = "use a renormalised objective, since nobody knows the mass outside these ranks"
        found.append(Mismatch("logprob_mode", "log-probs over the vocabulary", mode, remedy))
    for sft_teacher in (meta.sft_teacher, student.sft_teacher):
        if teacher_consistency(dataclasses.replace(meta, sft_teacher=sft_teacher)) == "inconsistent":
            assert meta.teacher is not None
            assert sft_teacher is not None
            pair = (
                f"{sft_teacher.name} {sft_teacher.weights_digest}",
                f"{meta.teacher.name} {meta.teacher.weights_digest}",
            )
            remedy = "score with the teacher whose samples the student was fine-tuned on"
            found.append(Mismatch("teacher_consistency", *pair, remedy))
            break
    return found


def find_doubts(meta: CacheMeta, student: CausalLM) -> list[str]:
    """What cannot be ruled out, one sentence each; reported and recorded, not refused."""
    doubts = []
    known = dataclasses.replace(meta, sft_teacher=meta.sft_teacher or student.sft_teacher)
    if meta.teacher is not None and teacher_consistency(known) == "unknown":
        doubts.append("It is not known whether the student was fine-tuned on samples of this teacher.")
    behaviour = meta.behaviour and meta.behaviour.weights_digest
    if meta.teacher is not None and behaviour not in (None, student.info.weights_digest):
        doubts.append("The rollouts were not sampled from this student, so training starts off-policy.")
    return doubts


def check_cache(
    meta: CacheMeta,
    student: CausalLM,
    *,
    allow: Collection[str] = (),
    teacher_used: bool = True,
    renormalised: bool = False,
) -> list[Mismatch]:
    """Refuse a cache that does not belong to the student.

    Args:
        allow: fields to ignore, out of FIELDS.
        teacher_used, renormalised: as for `find_mismatches`.

    Returns:
        The mismatches that were allowed; they belong into the checkpoint.

    Raises:
        MismatchError: names the first field that was not allowed, with both values and a remedy.
        InvalidArgumentError: `allow` names no field of FIELDS.
    """
    unknown = sorted(set(allow) - set(FIELDS))
    if unknown:
        raise InvalidArgumentError(f"allow_mismatch: {unknown[0]!r:.100} is not one of {', '.join(FIELDS)}")
    mismatches = find_mismatches(meta, student, teacher_used=teacher_used, renormalised=renormalised)
    for mismatch in mismatches:
        if mismatch.field not in allow:
            raise MismatchError(
                f"{mismatch.field}: the run expects {mismatch.expected}, the cache has {mismatch.found}. "
                f"{mismatch.remedy[0].upper()}{mismatch.remedy[1:]}, or pass --allow-mismatch "
                f"{mismatch.field}.",
                field=mismatch.field,
                expected=mismatch.expected,
                found=mismatch.found,
            )
    return mismatches
