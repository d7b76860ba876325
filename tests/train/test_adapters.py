"""Rows of a cache as padded tensors, and in Hugging Face's own Trainer."""

from __future__ import annotations

import os
import pickle
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import DistributedType
from train.adapter_problems import (
    COMMON,
    Recording,
    assert_close,
    counting_rollouts,
    reference_run,
    weights,
)
from train.tiny_models import (
    CONTEXT,
    VOCAB,
    loaded,
    meta_of,
    random_rollouts,
    save_tiny,
    scored_cache,
    tiny_tokenizer,
)

import opd_store
from opd_store import InvalidArgumentError, InvalidRolloutError, MismatchError, OpdError
from opd_train import (
    BatchAssembler,
    CorrectionConfig,
    LossConfig,
    Objective,
    collate,
    default_loss,
    load_causal_lm,
    score_cache,
)
from opd_train.adapters.hf import CacheCollator, CacheDataset, DistillTrainer, require_whole_weights
from opd_train.adapters.neutral import from_padded, to_padded
from opd_train.capture.drawing import Draws
from opd_train.corrections import StalenessDecay
from opd_train.objective.batch_loss import distill_loss
from opd_train.training.forward import response_hidden

TIS = CorrectionConfig(kind="token_tis", cap=2.0)
LOSSES = {
    "lightning": LossConfig(objective=Objective.LIGHTNING, correction=TIS),
    "forward_kl": LossConfig(objective=Objective.FORWARD_KL),
    "reverse_kl": LossConfig(objective=Objective.REVERSE_KL, correction=TIS),
    # Weights from whole prefixes, whose loss is not computed piece by piece.
    "prefix": LossConfig(
        objective=Objective.FORWARD_KL, correction=CorrectionConfig(kind="prefix_is", cap=2.0)
    ),
}


class Recorded(Recording, DistillTrainer):
    pass


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "cache"
    return scored_cache(path, teacher, random_rollouts(24, seed=3), topk=6)


@pytest.fixture(scope="module")
def ragged(teacher, cache, tmp_path_factory):
    """The same rollouts, with only as many ranks as hold 40 % of the probability."""
    uri = tmp_path_factory.mktemp("ragged") / "cache"
    cut = opd_store.Cut("mass", 0.4)
    with opd_store.create(uri, meta=cache.meta, topk=6, encoding="plain", cut=cut) as writer:
        writer.append_batch(cache)
    return opd_store.open(uri)


@pytest.fixture(scope="module")
def counting(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("counting") / "cache"
    return scored_cache(path, loaded(models["successor"]), counting_rollouts(30), topk=3)


def hf_trainer(cache, student, out, *, loss=None, cls=Recorded, eval_dataset=None, **options):
    collator = options.pop("data_collator", None) or CacheCollator(cache)
    dataset = options.pop("train_dataset", None) or CacheDataset(cache)
    own = {name: options.pop(name) for name in ("allow_mismatch", "compute_metrics") if name in options}
    args = transformers.TrainingArguments(str(out), **COMMON | options)
    return cls(
        load_causal_lm(student),
        args,
        collator,
        loss=loss,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        **own,
    )


def items(cache, rows):
    dataset = CacheDataset(cache)
    return [dataset[row] for row in rows]


ROWS = [7, 0, 23, 11, 2]


@pytest.mark.parametrize("which", ["cache", "ragged", "counting"])
def test_padding_and_packing_again_gives_the_same_bits(request, which):
    cache = request.getfixturevalue(which)
    expected = BatchAssembler([cache]).assemble(0, ROWS).tensors()
    found = from_padded(CacheCollator(cache)(items(cache, ROWS))).tensors()
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("which", ["cache", "ragged"])
def test_every_field_says_what_the_rollout_says_of_the_token_at_its_position(request, which):
    cache = request.getfixturevalue(which)
    batch = CacheCollator(cache)(items(cache, ROWS))
    n_short = 0
    for at, row in enumerate(ROWS):
        rollout = cache[row]
        length, prompt = len(rollout.token_ids), rollout.prompt_len
        inside = slice(prompt, length)
        one = {name: tensor[at] for name, tensor in batch.items()}
        assert one["row_ids"] == row
        assert one["input_ids"][:length].tolist() == rollout.token_ids.tolist()
        assert one["position_ids"].tolist() == [*range(length), *[0] * (len(one["input_ids"]) - length)]
        assert one["attention_mask"].sum() == length
        assert one["prompt_lens"] == prompt
        mask = [True] * rollout.response_len if rollout.loss_mask is None else rollout.loss_mask.tolist()
        assert one["loss_mask"][inside].tolist() == mask
        assert one["loss_mask"].sum() == sum(mask)
        expected = [int(i) if m else -100 for i, m in zip(rollout.response_ids, mask, strict=True)]
        assert one["labels"][inside].tolist() == expected
        assert one["labels"].ne(-100).sum() == sum(mask)
        scalars = {
            "teacher_logprob_sampled": rollout.teacher_logprob,
            "rollout_logprobs": rollout.behaviour_logprob,
            "teacher_log_tail": rollout.log_tail,
        }
        for name, values in scalars.items():
            assert one[name][inside].tolist() == values.tolist(), name
            assert one[name].count_nonzero() == (values != 0).sum(), name
        padded = rollout.topk_ids == opd_store.NO_ID
        n_short += int(padded.sum())
        ids = rollout.topk_ids.astype("int64")
        ids[padded] = -1
        assert one["teacher_ids"][inside].tolist() == ids.tolist()
        assert one["teacher_logprobs"][inside].tolist() == rollout.topk_logprob.tolist()
        outside = torch.ones_like(one["loss_mask"])
        outside[inside] = False
        assert one["teacher_ids"][outside].eq(-1).all()
        assert one["teacher_logprobs"][outside].isneginf().all()
        assert torch.equal(one["teacher_ids"].eq(-1), one["teacher_logprobs"].isneginf())
    assert (n_short > 0) == (which == "ragged")


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_only_the_stated_shift_hits(counting, shift):
    batch = CacheCollator(counting)(items(counting, range(30)))
    first, mask = batch["teacher_ids"][..., 0].roll(shift, dims=1), batch["loss_mask"]
    rate = (first == batch["input_ids"])[mask].float().mean().item()
    assert rate == 1.0 if shift == 0 else rate < 0.02


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_shift_costs_tens_of_nats(counting, models, tmp_path, shift):
    collator = CacheCollator(counting)
    batch = collator(items(counting, range(30)))
    for name in ("teacher_ids", "teacher_logprobs", "teacher_log_tail"):
        batch[name] = batch[name].roll(shift, dims=1)
    # Where the shift leaves a token without a teacher, there is nothing to compare.
    batch["loss_mask"] &= batch["teacher_ids"][..., 0] >= 0
    loss = LOSSES["forward_kl"]
    trainer = hf_trainer(counting, models["successor"], tmp_path, loss=loss)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch).item()
    assert abs(found) < 1e-6 if shift == 0 else found > 20


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_two_steps_equal_our_own_trainers(cache, models, tmp_path, name, accumulate):
    trainer = hf_trainer(
        cache, models["llama"], tmp_path, loss=LOSSES[name], gradient_accumulation_steps=accumulate
    )
    trainer.train()
    batches = [rows for rows, _ in trainer.seen]
    assert len(batches) == 2 * accumulate
    expected, losses = reference_run(cache, models["llama"], LOSSES[name], batches, accumulate=accumulate)
    parts = [loss for _, loss in trainer.seen]
    found = [sum(parts[at : at + accumulate]) for at in range(0, len(parts), accumulate)]
    assert found == pytest.approx(losses, rel=1e-5)
    assert_close(weights(trainer.model), expected)
    untrained = weights(loaded(models["llama"]).model)
    assert (expected["lm_head.weight"] - untrained["lm_head.weight"]).abs().max() > 1e-3


def test_accumulating_two_batches_equals_one_large_batch(cache, models, tmp_path):
    # Batches of unequal numbers of tokens: a mean of means would show.
    found = {}
    for size, accumulate in ((8, 1), (4, 2)):
        trainer = hf_trainer(
            cache,
            models["llama"],
            tmp_path / str(size),
            loss=LOSSES["reverse_kl"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        found[size] = weights(trainer.model)
    assert_close(found[4], found[8])


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_other_architectures_train_as_in_our_own_trainer(cache, models, tmp_path, kind):
    student = models[kind]
    trainer = hf_trainer(cache, student, tmp_path, loss=LOSSES["forward_kl"], activation_checkpointing=True)
    trainer.train()
    expected, _ = reference_run(cache, student, LOSSES["forward_kl"], [rows for rows, _ in trainer.seen])
    assert_close(weights(trainer.model), expected)


def test_bf16_trains_float32_weights_within_its_precision(cache, models, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = hf_trainer(
            cache, models["llama"], tmp_path / str(bf16), loss=LOSSES["forward_kl"], bf16=bf16
        )
        hidden = []
        watch = trainer.model.model.layers[0].mlp.register_forward_hook(
            lambda *call, kept=hidden: kept.append(call[2])
        )
        trainer.train()
        watch.remove()
        assert {tensor.dtype for tensor in hidden} == {torch.bfloat16 if bf16 else torch.float32}
        assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}
        losses.append([loss for _, loss in trainer.seen])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_resumed_run_ends_in_the_same_weights(cache, models, tmp_path):
    options = {"loss": LOSSES["forward_kl"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = hf_trainer(cache, models["llama"], tmp_path / "whole", **options)
    whole.train()
    again = hf_trainer(cache, models["llama"], tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert again.seen == whole.seen[2:]
    assert_close(weights(again.model), weights(whole.model), atol=0)
    other = hf_trainer(cache, models["llama"], tmp_path / "other", **options | {"loss": LOSSES["reverse_kl"]})
    with pytest.raises(MismatchError, match=r"belongs to another run: config is .*forward_kl.*reverse_kl"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    # A saved model is one of ours: it knows what it was trained on.
    saved = load_causal_lm(tmp_path / "whole/checkpoint-4")
    assert saved.provenance["source"]["cache"] == cache.digest
    assert saved.tokenizer_fingerprint == cache.meta.tokenizer_fingerprint


def test_evaluation_gives_the_mean_loss_of_held_out_rows(cache, models, tmp_path):
    held_out = [1, 5, 9, 13]
    trainer = hf_trainer(
        cache,
        models["llama"],
        tmp_path,
        loss=LOSSES["forward_kl"],
        eval_dataset=CacheDataset(cache, held_out),
        per_device_eval_batch_size=4,
    )
    trainer.train()
    before = weights(trainer.model)
    metrics = trainer.evaluate()
    lm, batch = trainer.student, BatchAssembler([cache]).assemble(0, held_out)
    with torch.no_grad():
        result = distill_loss(
            LOSSES["forward_kl"], hidden=response_hidden(lm, batch), lm_head=lm.logits, batch=batch
        )
    assert metrics["eval_loss"] == pytest.approx(result.loss.item() / result.n_kept, rel=1e-5)
    assert_close(weights(trainer.model), before, atol=0)
    logged = trainer.state.log_history
    assert {"loss", "forward_kl", "ess", "top1"} <= logged[0].keys()
    assert logged[-1]["eval_forward_kl"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert trainer.predict(CacheDataset(cache, held_out)).predictions is None


def test_worker_processes_give_the_same_batches(cache, models, tmp_path):
    seen = []
    for workers in (0, 1):
        trainer = hf_trainer(cache, models["llama"], tmp_path, dataloader_num_workers=workers)
        trainer.train()
        seen.append(trainer.seen)
    assert seen[0] == seen[1]
    copied = pickle.loads(pickle.dumps(CacheCollator(cache, ranks=2)))
    assert copied(items(cache, [3]))["teacher_ids"].shape[-1] == 2


def norms(trainer):
    """Gradient norms by step."""
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def _process(rank, meeting, uri, student, out, results):
    # accelerate asks for an address, and does not use it.
    os.environ |= {"MASTER_ADDR": "localhost"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    # A file, since another program can take a port between finding and using it.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    trainer = hf_trainer(opd_store.open(uri), student, out, loss=LOSSES["lightning"], **options)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save((weights(trainer.model), norms(trainer)), f"{results}/{rank}.pt")
    torch.distributed.barrier()
    # Freeing the reducer waits for a thread of gloo, with the lock held that this thread may wait for.
    os._exit(0)


def test_two_processes_equal_one(cache, models, tmp_path):
    arguments = (tmp_path / "meeting", cache.uri, models["llama"], tmp_path / "two", tmp_path)
    torch.multiprocessing.spawn(_process, arguments, nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert_close(found[0][0], found[1][0], atol=0)
    trainer = hf_trainer(
        cache,
        models["llama"],
        tmp_path / "one",
        loss=LOSSES["lightning"],
        per_device_train_batch_size=8,
    )
    trainer.train()
    assert_close(found[0][0], weights(trainer.model))
    # Adam does not notice a factor.
    assert found[0][1] == pytest.approx(norms(trainer), rel=1e-4)


REFUSED = {
    "remove_unused_columns": (True, "remove_unused_columns: found True, expected False: the model's forward"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor: found 0.1"),
    "torch_compile": (True, "torch_compile: found True"),
    "compute_metrics": (len, "compute_metrics: found .* logits never exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_it_cannot_honour_are_refused(cache, models, tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=message):
        hf_trainer(cache, models["llama"], tmp_path, **{name: value})


@pytest.mark.parametrize("found", ["FSDP", "DEEPSPEED", "cp", "tp"])
def test_weights_that_are_spread_over_processes_are_refused(found):
    parallel = SimpleNamespace(**{f"{found}_enabled": True})
    kind = DistributedType(found) if found.isupper() else DistributedType.MULTI_GPU
    with pytest.raises(InvalidArgumentError, match=f"accelerate: found {found}, expected whole weights"):
        require_whole_weights(SimpleNamespace(distributed_type=kind, parallelism_config=parallel))


def test_a_model_or_collator_of_another_kind_is_refused(cache, models, tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), **COMMON)
    lm = loaded(models["llama"])
    with pytest.raises(InvalidArgumentError, match="expected a CausalLM, found LlamaForCausalLM"):
        DistillTrainer(lm.model, args, CacheCollator(cache))
    with pytest.raises(InvalidArgumentError, match="expected a CacheCollator, found function"):
        DistillTrainer(lm, args, transformers.default_data_collator)


def test_a_cache_of_another_tokenizer_is_refused(cache, models, tmp_path):
    student = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(first="A"))
    with pytest.raises(MismatchError, match="tokenizer_fingerprint: the run expects sha256"):
        hf_trainer(cache, student, tmp_path)


def test_a_student_with_fewer_logits_than_the_teachers_ids(cache, models, tmp_path):
    small = VOCAB - 5
    student = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(), vocab_size=small)
    with pytest.raises(MismatchError, match="vocab_size: the run expects 32, the cache has 37"):
        hf_trainer(cache, student, tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"CacheCollator\(\.\.\., vocab_size=32\)"):
        hf_trainer(cache, student, tmp_path, allow_mismatch=["vocab_size"])
    collator = CacheCollator(cache, vocab_size=small)
    trainer = hf_trainer(cache, student, tmp_path, allow_mismatch=["vocab_size"], data_collator=collator)
    with pytest.raises(InvalidRolloutError, match=r"row \d+, t\w+_ids: id 3\d outside the vocabulary of 32"):
        trainer.train()


def test_an_objective_that_needs_topk_from_a_cache_without(teacher, models, tmp_path):
    bare = scored_cache(tmp_path / "bare", teacher, random_rollouts(4), topk=0)
    with pytest.raises(InvalidArgumentError, match="needs top-k, but this cache stores none"):
        hf_trainer(bare, models["llama"], tmp_path, loss=LOSSES["forward_kl"])
    trainer = hf_trainer(bare, models["llama"], tmp_path)
    assert trainer.loss_config == default_loss(topk=0)


def test_ids_that_the_collator_has_to_bring(teacher, models, tmp_path):
    """Drawn and chosen ids, from a cache without top-k."""
    meta, path = meta_of(teacher), tmp_path / "drawn"
    options = {"draws": Draws(4), "chosen": 3, "chooser": loaded(models["llama"])}
    score_cache(teacher, random_rollouts(8), meta, path, topk=0, encoding="plain", **options)
    drawn = opd_store.open(path)
    losses = {
        "draws": LossConfig(objective=Objective.RANDOM_SAMPLING_KD),
        "chosen": LossConfig(objective=Objective.REVERSE_KL, chosen_ids=True),
    }
    for option, loss in losses.items():
        with pytest.raises(InvalidArgumentError, match=rf"pass CacheCollator\(\.\.\., {option}=True\)"):
            hf_trainer(drawn, models["llama"], tmp_path, loss=loss)
        collator = CacheCollator(drawn, **{option: True})
        trainer = hf_trainer(drawn, models["llama"], tmp_path, loss=loss, data_collator=collator)
        trainer.train()
        batches, losses_seen = zip(*trainer.seen, strict=True)
        assembler = BatchAssembler([drawn], **{option: True})
        lm = loaded(models["llama"])
        batch = assembler.assemble(0, batches[0])
        with torch.no_grad():
            hidden = response_hidden(lm, batch)
            result = distill_loss(loss, hidden=hidden, lm_head=lm.logits, batch=batch)
        assert losses_seen[0] == pytest.approx(result.loss.item() / result.n_kept, rel=1e-5)


def test_a_student_with_more_logits_than_the_teacher(cache, tmp_path):
    student = save_tiny(tmp_path / "model", tokenizer=tiny_tokenizer(), vocab_size=VOCAB + 11)
    with pytest.raises(MismatchError, match="vocab_size: the run expects 48, the cache has 37"):
        hf_trainer(cache, student, tmp_path)
    loss = LOSSES["forward_kl"]
    trainer = hf_trainer(cache, student, tmp_path, loss=loss, allow_mismatch=["vocab_size"])
    trainer.train()
    expected, _ = reference_run(cache, student, loss, [rows for rows, _ in trainer.seen])
    assert_close(weights(trainer.model), expected)


def test_a_rollouts_age_is_counted_from_the_step(cache, models, tmp_path):
    stale = CorrectionConfig(staleness=StalenessDecay(rate=0.3, drop_after=4))
    loss = LossConfig(objective=Objective.FORWARD_KL, correction=stale)
    trainer = hf_trainer(cache, models["llama"], tmp_path, loss=loss)
    fields = CacheCollator(cache)(items(cache, ROWS))
    trainer.state.global_step = 5
    # One too old, and one of a policy that is yet to come.
    found = trainer.compute_loss(trainer.model, fields | {"policy_version": torch.tensor([0, 2, 4, 5, 9])})
    lm, batch, age = loaded(models["llama"]), from_padded(fields), torch.tensor([5, 3, 1, 0, 0])
    result = distill_loss(loss, hidden=response_hidden(lm, batch), lm_head=lm.logits, batch=batch, age=age)
    assert found.item() == pytest.approx(result.loss.item() / result.n_kept, rel=1e-5)


def test_rows_of_another_cache_are_noticed(cache, counting, models, tmp_path):
    collator = CacheCollator(cache)
    with pytest.raises(MismatchError, match="row 3 is of another cache"):
        collator(items(counting, [3]))
    with pytest.raises(InvalidArgumentError, match="use a CacheDataset"):
        collator([{"input_ids": [1]}])
    for rows in ([], [24], [-1], [0.5]):
        with pytest.raises(InvalidArgumentError, match="rows: expected"):
            CacheDataset(cache, rows)
    trainer = hf_trainer(cache, models["llama"], tmp_path)
    with pytest.raises(InvalidArgumentError, match="expected 'attention_mask', found input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})


def test_rollouts_beyond_the_context_are_refused_or_cut(teacher, cache, models, tmp_path):
    long = random_rollouts(4, response=(CONTEXT - 10, CONTEXT - 7))
    lm = load_causal_lm(save_tiny(tmp_path / "wide", max_position_embeddings=2 * CONTEXT))
    wide = scored_cache(tmp_path / "cache", lm, long, topk=2)
    short = save_tiny(tmp_path / "short", max_position_embeddings=CONTEXT // 2)
    with pytest.raises(InvalidRolloutError, match=r"row \d: \d+ tokens, but the student's context is 32"):
        hf_trainer(wide, short, tmp_path).train()
    trainer = hf_trainer(wide, short, tmp_path, data_collator=CacheCollator(wide, max_tokens=CONTEXT // 2))
    trainer.train()
    assert len(trainer.seen) == 2


def test_a_loss_that_is_not_finite_names_its_rows(cache, models, tmp_path):
    trainer = hf_trainer(cache, models["llama"], tmp_path, loss=LOSSES["forward_kl"])
    batch = CacheCollator(cache)(items(cache, [4, 8]))
    batch["teacher_log_tail"][batch["loss_mask"]] = torch.nan
    with pytest.raises(OpdError, match=r"loss is nan on cache rows \[4, 8\]"):
        trainer.compute_loss(trainer.model, batch)


def test_a_batch_from_rollouts_that_never_were_in_a_cache():
    batch = collate(counting_rollouts(5), vocab_size=VOCAB)
    padded = to_padded(batch)
    assert padded["row_ids"].tolist() == [-1] * 5
    assert (
        not {"teacher_ids", "teacher_logprob_sampled", "rollout_logprobs", "policy_version"} & padded.keys()
    )
    assert torch.equal(from_padded(padded).input_ids, batch.input_ids)
