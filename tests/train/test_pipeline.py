"""Rollouts and caches in chunks: what is recorded, and going on after an interruption."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from train.tiny_models import (
    EOS,
    VOCAB,
    loaded,
    meta_of,
    model_info,
    naive_logprobs,
    random_rollouts,
    save_tiny,
)

import opd_store
from opd_store import CacheExistsError, InvalidArgumentError, MismatchError, SamplerInfo
from opd_train import Prompt, load_causal_lm, roll_out, score_cache, score_rollouts
from opd_train.capture import pipeline as module
from opd_train.capture.drawing import Draws

SAMPLER = SamplerInfo(temperature=0.7, top_p=0.9, max_new_tokens=5, seed=3)
PROMPTS = [Prompt(ids=np.array([7 + i, 9], np.uint32), sample_id=f"p{i}", label=str(i)) for i in range(7)]


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


class Cut(Exception):
    """Stands for a kill."""


def cut_after(monkeypatch, name, calls):
    """Raise in the call after so many calls of a function of the pipeline."""
    left = [calls]

    def counted(*args, **kwargs):
        if not left[0]:
            raise Cut
        left[0] -= 1
        return original(*args, **kwargs)

    original = getattr(module, name)
    monkeypatch.setattr(module, name, counted)


def test_rollouts_record_who_sampled_them_and_how(student, tmp_path):
    roll_out(student, PROMPTS, tmp_path / "r", SAMPLER, samples_per_prompt=2, prompt_dataset="d")
    cache = opd_store.open(tmp_path / "r")
    meta = cache.meta
    assert meta.teacher is None
    assert meta.behaviour.weights_digest == meta.reference.weights_digest == student.info.weights_digest
    assert (meta.behaviour.logprob_temperature, meta.behaviour.logprob_mode) == (0.7, "processed")
    assert (meta.reference.logprob_temperature, meta.reference.logprob_mode) == (1.0, "raw")
    assert (meta.sampler.temperature, meta.sampler.top_p, meta.sampler.seed) == (0.7, 0.9, 3)
    assert meta.sampler.stop_token_ids == (EOS,)
    assert (meta.vocab_size, meta.tokenizer_fingerprint) == (VOCAB, student.tokenizer_fingerprint)
    assert (meta.prompt_dataset, meta.sft_teacher) == ("d", None)
    assert [rollout.sample_id for rollout in cache][:3] == ["p0", "p0#1", "p1"]
    assert [rollout.label for rollout in cache][:3] == ["0", "0", "1"]
    assert opd_store.verify(tmp_path / "r").ok


def test_the_teacher_of_a_trained_student_is_passed_on(tmp_path):
    sft = model_info("big", "3")
    path = save_tiny(tmp_path / "m", provenance={"sft_teacher": sft.to_json()})
    roll_out(load_causal_lm(path), PROMPTS[:1], tmp_path / "r", SAMPLER)
    assert opd_store.open(tmp_path / "r").meta.sft_teacher == sft


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_interrupted_rollouts_end_in_the_same_versions(student, tmp_path, monkeypatch, cut):
    def run(path):
        return roll_out(student, PROMPTS, path, SAMPLER, commit_rollouts=3)

    whole = run(tmp_path / "whole")
    assert whole.sequence == 3
    with monkeypatch.context() as patch:
        cut_after(patch, "sample_rollouts", cut)
        with pytest.raises(Cut):
            run(tmp_path / "cut")
    version = run(tmp_path / "cut")
    assert (version.sequence, version.digest) == (whole.sequence, whole.digest)
    assert run(tmp_path / "cut") == version, "nothing is left to do"


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("draws", [None, Draws(6, 1.2)], ids=["topk", "draws"])
def test_interrupted_scoring_ends_in_the_same_versions(teacher, tmp_path, monkeypatch, cut, draws):
    rollouts = random_rollouts(8)

    def run(path):
        return score_cache(teacher, rollouts, meta_of(teacher), path, topk=4, draws=draws, commit_rollouts=3)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_after(patch, "score_rollouts", cut)
        with pytest.raises(Cut):
            run(tmp_path / "cut")
    with monkeypatch.context() as patch:
        cut_after(patch, "score_rollouts", 3 - cut)
        version = run(tmp_path / "cut")
    assert (version.sequence, version.digest) == (whole.sequence, whole.digest)


@pytest.mark.parametrize(
    ("encoding", "error"), [("plain", 3e-5), ("f32", 3e-5), ("ladder/128", 1 / 256 + 3e-5)]
)
def test_a_scored_cache_holds_the_rollouts_and_the_teachers_numbers(
    student, teacher, tmp_path, encoding, error
):
    roll_out(student, PROMPTS, tmp_path / "r", SAMPLER)
    source = opd_store.open(tmp_path / "r")
    args = (teacher, source, source.meta, tmp_path / "c")
    score_cache(*args, topk=VOCAB, licence="CC0", encoding=encoding)
    cache = opd_store.open(tmp_path / "c")
    assert cache.encoding == encoding
    assert opd_store.verify(tmp_path / "c").ok
    assert cache.meta.teacher.weights_digest == teacher.info.weights_digest
    assert (cache.meta.licence, cache.meta.sampler) == ("CC0", source.meta.sampler)
    for found, rollout in zip(cache, source, strict=True):
        for name in ("token_ids", "behaviour_logprob", "reference_logprob"):
            np.testing.assert_array_equal(getattr(found, name), getattr(rollout, name))
        assert (found.sample_id, found.label) == (rollout.sample_id, rollout.label)
        assert found.finish_reason == rollout.finish_reason
        reference = naive_logprobs(teacher, found)
        np.testing.assert_allclose(
            found.topk_logprob, np.take_along_axis(reference, found.topk_ids, axis=1), rtol=1e-5, atol=error
        )


def test_how_it_is_stored_is_part_of_what_a_rerun_has_to_repeat(teacher, tmp_path):
    rollouts = random_rollouts(8)
    table = opd_store.build_id_table([np.arange(4, dtype=np.uint32)[None]], vocab_size=VOCAB)
    other = opd_store.build_id_table([np.arange(4, 8, dtype=np.uint32)[None]], vocab_size=VOCAB)

    def run(name, **options):
        return score_cache(teacher, rollouts, meta_of(teacher), tmp_path / name, topk=4, **options)

    version = run("auto")
    assert run("auto") == version
    for options, field in (
        ({"encoding": "ladder/64"}, "encoding is ladder/128"),
        ({"cut": opd_store.Cut("mass", 0.5)}, "cut is None"),
        ({"id_table": None}, "id_table is auto"),
        ({"id_table": table}, "id_table is auto"),
    ):
        with pytest.raises(MismatchError, match=f"{field} in the cache"):
            run("auto", **options)
    version = run("given", id_table=table)
    assert run("given", id_table=table) == version
    assert opd_store.open(tmp_path / "given").id_table.digest == table.digest
    with pytest.raises(MismatchError, match=f"id_table is {table.digest.hex()}"):
        run("given", id_table=other)


def test_a_cut_keeps_the_likely_ranks_and_the_rest_joins_the_tail(teacher, tmp_path):
    rollouts = random_rollouts(4)
    score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "all", topk=8, encoding="f32")
    cut = opd_store.Cut("probability", 0.05)
    score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "cut", topk=8, encoding="f32", cut=cut)
    for whole, kept in zip(opd_store.open(tmp_path / "all"), opd_store.open(tmp_path / "cut"), strict=True):
        present = kept.topk_ids != opd_store.NO_ID
        assert present[:, 0].all()
        assert not present.all()
        np.testing.assert_array_equal(present[:, 1:], np.exp(whole.topk_logprob[:, 1:]) >= 0.05)
        np.testing.assert_array_equal(kept.topk_ids[present], whole.topk_ids[present])
        total = np.exp(kept.topk_logprob.astype(float)).sum(1) + np.exp(kept.log_tail.astype(float))
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_the_reference_fills_in_what_is_missing_and_nothing_else(student, teacher, tmp_path):
    roll_out(student, PROMPTS, tmp_path / "r", SAMPLER)
    source = opd_store.open(tmp_path / "r")
    given = dataclasses.replace(source[0], behaviour_logprob=source[0].behaviour_logprob - 1)
    bare = [dataclasses.replace(r, behaviour_logprob=None, reference_logprob=None) for r in source][1:]
    score_cache(teacher, [given, *bare], source.meta, tmp_path / "c", topk=0, reference=student)
    cache = opd_store.open(tmp_path / "c")
    np.testing.assert_array_equal(cache[0].behaviour_logprob, given.behaviour_logprob)
    for found, rollout in zip(cache, source, strict=True):
        np.testing.assert_allclose(found.reference_logprob, rollout.reference_logprob, rtol=1e-5, atol=3e-5)
    for found, rollout in list(zip(cache, source, strict=True))[1:]:
        np.testing.assert_allclose(found.behaviour_logprob, rollout.behaviour_logprob, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampler": dataclasses.replace(SAMPLER, temperature=1.0)}, "temperature"),
        ({"sampler": dataclasses.replace(SAMPLER, seed=4)}, "seed"),
        ({"prompts": PROMPTS[::-1]}, "other prompts"),
        ({"prompts": [dataclasses.replace(p, ids=p.ids + 1) for p in PROMPTS]}, "other prompts"),
    ],
    ids=["temperature", "seed", "order", "ids"],
)
def test_rollouts_of_another_run_are_not_continued(student, tmp_path, change, field):
    roll_out(student, PROMPTS, tmp_path / "r", SAMPLER, commit_rollouts=3)
    before = opd_store.open(tmp_path / "r").digest
    arguments = {"prompts": PROMPTS, "sampler": SAMPLER} | change
    with pytest.raises(MismatchError, match=field):
        roll_out(student, arguments["prompts"], tmp_path / "r", arguments["sampler"], commit_rollouts=3)
    assert opd_store.open(tmp_path / "r").digest == before


def test_a_cache_of_another_teacher_or_topk_is_not_continued(student, teacher, tmp_path):
    rollouts = random_rollouts(3)
    score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "c", topk=4)
    with pytest.raises(MismatchError, match=r"teacher\.(name|weights_digest) is"):
        score_cache(student, rollouts, meta_of(teacher), tmp_path / "c", topk=4)
    with pytest.raises(MismatchError, match="topk is 4 in the cache, but 5"):
        score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "c", topk=5)


def test_something_else_at_the_place(teacher, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheExistsError):
        score_cache(teacher, random_rollouts(1), meta_of(teacher), tmp_path, topk=1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_rollouts_of_another_tokenizer_are_refused(teacher, tmp_path):
    meta = dataclasses.replace(meta_of(teacher), tokenizer_fingerprint="sha256:" + "0" * 64)
    with pytest.raises(MismatchError, match="tokenizer_fingerprint: the rollouts have sha256:0000"):
        score_cache(teacher, random_rollouts(1), meta, tmp_path / "c", topk=1)
    assert not (tmp_path / "c").exists()


def test_the_same_prompt_id_twice(student, tmp_path):
    with pytest.raises(InvalidArgumentError, match="1 of the ids occur twice"):
        roll_out(student, [PROMPTS[0], PROMPTS[0]], tmp_path / "r", SAMPLER)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize(("encoding", "error"), [("plain", 0.0), ("ladder/128", 1 / 256 + 1e-6)])
def test_draws_and_chosen_ids_are_in_the_cache(student, teacher, tmp_path, topk, encoding, error):
    rollouts = random_rollouts(6, seed=2)
    draws = Draws(9, 1.5, 3)
    options = {"topk": topk, "draws": draws, "chosen": 3, "chooser": student, "encoding": encoding}
    score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "c", commit_rollouts=4, **options)
    cache = opd_store.open(tmp_path / "c")
    assert opd_store.verify(tmp_path / "c").ok
    schema = cache.schema
    assert (schema.topk, schema.sampled, schema.sampled_temperature, schema.chosen) == (topk, 9, 1.5, 3)
    assert schema.encoding == encoding
    likely = [scores.topk_ids for scores in score_rollouts(student, rollouts, topk=3)]
    expected = score_rollouts(teacher, rollouts, topk=topk, draws=draws, chosen_ids=likely)
    for found, scores in zip(cache, expected, strict=True):
        for kind in ("sampled", "chosen"):
            # Rounded log-probs may tie, and ties go by id.
            ids, own_ids = (getattr(value, f"{kind}_ids") for value in (found, scores))
            order, own_order = np.argsort(ids, axis=1), np.argsort(own_ids, axis=1)
            for name, atol in (("ids", 0), ("draws", 0), ("logprob", error + 3e-5)):
                if (kind, name) != ("chosen", "draws"):
                    stored = np.take_along_axis(getattr(found, f"{kind}_{name}"), order, axis=1)
                    exact = np.take_along_axis(getattr(scores, f"{kind}_{name}"), own_order, axis=1)
                    np.testing.assert_allclose(stored, exact, rtol=0, atol=atol, err_msg=f"{kind}_{name}")
            tails = (getattr(value, f"{kind}_log_tail") for value in (found, scores))
            np.testing.assert_allclose(*tails, rtol=0, atol=error + 3e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"draws": None}, "sampled"),
        ({"draws": Draws(5)}, "sampled"),
        ({"draws": Draws(4, 2.0)}, "sampled_temperature"),
        ({"chosen": 0, "chooser": None}, "chosen"),
    ],
)
def test_other_draws_do_not_go_on_with_a_cache(student, teacher, tmp_path, change, field):
    def run(**options):
        args = (teacher, random_rollouts(2), meta_of(teacher), tmp_path / "c")
        return score_cache(
            *args, **({"topk": 2, "draws": Draws(4), "chosen": 2, "chooser": student} | options)
        )

    run()
    with pytest.raises(MismatchError, match=f": {field} is") as caught:
        run(**change)
    assert caught.value.field == field


def test_chosen_ids_are_those_that_both_models_have(teacher, tmp_path):
    # A student with more logits than the teacher, as where vocabularies are padded to other multiples.
    wide = load_causal_lm(save_tiny(tmp_path / "wide", vocab_size=VOCAB + 40))
    wide = dataclasses.replace(wide, tokenizer_fingerprint=teacher.tokenizer_fingerprint)
    rollouts = random_rollouts(5, seed=3)
    score_cache(teacher, rollouts, meta_of(teacher), tmp_path / "c", topk=0, chosen=20, chooser=wide)
    likely = [scores.topk_ids for scores in score_rollouts(wide, rollouts, topk=20)]
    assert max(ids.max() for ids in likely) >= VOCAB
    for ids, rollout in zip(likely, opd_store.open(tmp_path / "c"), strict=True):
        for own, all_of_student in zip(rollout.chosen_ids, ids, strict=True):
            assert set(all_of_student[all_of_student < VOCAB].tolist()) <= set(own.tolist())


def test_more_chosen_ids_than_the_teacher_has(teacher, tmp_path):
    wide = load_causal_lm(save_tiny(tmp_path / "wide", vocab_size=VOCAB + 40))
    wide = dataclasses.replace(wide, tokenizer_fingerprint=teacher.tokenizer_fingerprint)
    options = {"topk": 0, "chosen": VOCAB + 1, "chooser": wide}
    with pytest.raises(InvalidArgumentError, match=f"chosen: {VOCAB + 1} ids of a teacher with {VOCAB}"):
        score_cache(teacher, random_rollouts(1), meta_of(teacher), tmp_path / "c", **options)


@pytest.mark.parametrize("options", [{"chosen": 3}, {"chooser": "student"}])
def test_chosen_ids_need_somebody_who_chose(student, teacher, tmp_path, options):
    options = {name: student if value == "student" else value for name, value in options.items()}
    with pytest.raises(InvalidArgumentError, match=r"chosen, chooser: expected both or neither"):
        score_cache(teacher, random_rollouts(1), meta_of(teacher), tmp_path / "c", topk=2, **options)
