"""Does this cache belong to this run? Compared before the first step, by digests and not by names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from opd_store import CacheMeta, InvalidArgumentError, MismatchError
from opd_train.corrections import CorrectionConfig
from opd_train.models import CausalLM
from opd_train.objectives import Objective

FIELDS = (
    "tokenizer_fingerprint",
    "vocab_size",
    "chat_template_digest",
    "teacher_temperature",
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


def teacher_consistency(meta: CacheMeta) -> str:
    """Whether the student was fine-tuned on samples of the same teacher that scored the cache.

    Returns:
        "consistent" or "inconsistent" where both weight digests are known, else "unknown".

    Source: arXiv 2604.13010, thm 3.8: otherwise the offline objective has a bias that no drift bound removes.
    """
    if meta.teacher is None or meta.sft_teacher is None:
        return "unknown"
    digests = meta.teacher.weights_digest, meta.sft_teacher.weights_digest
    if None in digests:
        return "unknown"
    return "consistent" if digests[0] == digests[1] else "inconsistent"


def find_mismatches(meta: CacheMeta, student: CausalLM) -> list[Mismatch]:
    """Every field of FIELDS on which they disagree. What the cache does not know is not a disagreement."""
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
    temperature = meta.teacher.logprob_temperature if meta.teacher is not None else None
    if temperature not in (None, 1.0):
        remedy = "score the rollouts again at temperature 1"
        found.append(Mismatch("teacher_temperature", "1.0", str(temperature), remedy))
    if teacher_consistency(meta) == "inconsistent":
        assert meta.teacher is not None
        assert meta.sft_teacher is not None
        pair = (
            f"{meta.sft_teacher.name} {meta.sft_teacher.weights_digest}",
            f"{meta.teacher.name} {meta.teacher.weights_digest}",
        )
        remedy = "score with the teacher whose samples the student was fine-tuned on"
        found.append(Mismatch("teacher_consistency", *pair, remedy))
    return found


def check_cache(meta: CacheMeta, student: CausalLM, *, allow: Collection[str] = ()) -> list[Mismatch]:
    """Refuse a cache that does not belong to the student.

    Args:
        allow: fields to ignore, out of FIELDS.

    Returns:
        The mismatches that were allowed; they belong into the checkpoint.

    Raises:
        MismatchError: names the first field that was not allowed, with both values and a remedy.
        InvalidArgumentError: `allow` names no field of FIELDS.
    """
    unknown = sorted(set(allow) - set(FIELDS))
    if unknown:
        raise InvalidArgumentError(f"allow_mismatch: {unknown[0]!r:.100} is not one of {', '.join(FIELDS)}")
    mismatches = find_mismatches(meta, student)
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


def resolve_objective(
    objective: Objective | None, correction: CorrectionConfig | None, *, topk: int
) -> tuple[Objective, CorrectionConfig]:
    """Fill in the defaults: forward KL where the cache has top-k, else the sampled token with truncated
    weights.

    Raises:
        InvalidArgumentError: an objective that needs top-k, from a cache without.
    """
    chosen = objective or (Objective.FORWARD_KL if topk else Objective.LIGHTNING)
    if chosen.needs_topk and not topk:
        raise InvalidArgumentError(
            f"objective {chosen.value!r} needs top-k, but this cache stores none; score it with "
            "--topk, or use 'lightning'"
        )
    if correction is None:
        correction = CorrectionConfig(kind="token_tis" if objective is None and not topk else "none")  # type: ignore[arg-type]
    return chosen, correction
