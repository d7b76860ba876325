"""The loss of a batch against float64 over the whole vocabulary, weights and masks included."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, loaded, random_rollouts, scored_cache

from opd_store import InvalidArgumentError
from opd_train import CorrectionConfig, CorrectionKind, Objective, collate, correction_weights
from opd_train.forward import response_hidden
from opd_train.objectives import LossConfig, distill_loss, summarise

NONE = CorrectionConfig()
TIS = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=1.5)
CLIP = 2.0


def config(objective, correction):
    return LossConfig(objective=objective, correction=correction, clip=CLIP)


@pytest.fixture(scope="module")
def batch(teacher, tmp_path_factory):
    rollouts = random_rollouts(9, seed=4)
    cache = scored_cache(tmp_path_factory.mktemp("objectives") / "cache", teacher, rollouts, topk=6)
    batch = collate(list(cache), vocab_size=VOCAB)
    assert 0 < batch.loss_mask.sum() < len(batch.loss_mask)
    return batch


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


@pytest.fixture(scope="module")
def hidden(student, batch):
    with torch.no_grad():
        return response_hidden(student, batch)


def expected_sums(objective, correction, batch, logits, behaviour):
    """Loss sum and number of tokens, in float64 from the student's full logits."""
    log_q = torch.log_softmax(logits.double(), dim=-1)
    sampled = log_q.gather(-1, batch.target_ids[:, None])[:, 0]
    mask = batch.loss_mask.clone()
    weight = torch.ones_like(sampled)
    if correction.kind is CorrectionKind.TOKEN_TIS:
        mask &= torch.isfinite(behaviour)
        weight = (sampled.detach() - behaviour.double()).exp().clamp(max=correction.cap)
        weight = torch.where(mask, weight, 0.0)
    if objective is Objective.CROSS_ENTROPY:
        loss = -weight * sampled
    elif objective is Objective.LIGHTNING:
        gap = (batch.teacher_logprob.double() - sampled.detach()).clamp(-CLIP, CLIP)
        loss = -weight * gap * sampled
    else:
        p = torch.cat([batch.topk_logprob, batch.log_tail[:, None]], dim=1).double()
        rest = log_q.scatter(-1, batch.topk_ids, -torch.inf)
        tail = torch.logsumexp(rest, dim=-1, keepdim=True)
        q = torch.cat([log_q.gather(-1, batch.topk_ids), tail], dim=1)
        first, second = (p, q) if objective is Objective.FORWARD_KL else (q, p)
        loss = weight * (first.exp() * (first - second)).sum(dim=-1)
    return loss[mask].sum(), int(mask.sum())


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("correction", [NONE, TIS], ids=["none", "token_tis"])
@pytest.mark.parametrize("objective", list(Objective))
def test_value_count_and_gradient(batch, student, hidden, objective, correction, chunk):
    behaviour = batch.behaviour_logprob.clone()
    behaviour[::5] = float("nan")
    marked = dataclasses.replace(batch, behaviour_logprob=behaviour)
    exact = hidden.double().requires_grad_()
    head = student.model.get_output_embeddings().weight.detach()
    wanted, n = expected_sums(objective, correction, marked, exact @ head.double().T, behaviour)
    wanted.backward()
    ours = hidden.clone().requires_grad_()
    result = distill_loss(
        config(objective, correction), hidden=ours, lm_head=student.logits, batch=marked, chunk=chunk
    )
    result.loss.backward()
    assert result.n_kept == n
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-4)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    masked = ~batch.loss_mask
    assert (ours.grad[masked] == 0).all(), "a masked token has no gradient"
    student.model.zero_grad()


def test_the_monitors(batch, student, hidden):
    with torch.no_grad():
        result = distill_loss(
            config(Objective.FORWARD_KL, TIS), hidden=hidden, lm_head=student.logits, batch=batch
        )
        log_q = torch.log_softmax(student.logits(hidden).double(), dim=-1)[batch.loss_mask]
    found = summarise(result.sums)
    mask = batch.loss_mask
    sampled = log_q.gather(-1, batch.target_ids[mask][:, None])[:, 0].numpy()
    rho = np.exp(sampled - batch.behaviour_logprob[mask].double().numpy())
    weight = np.minimum(rho, TIS.cap)
    q = log_q.gather(-1, batch.topk_ids[mask]).exp()
    expected = {
        "loss": result.loss.item() / result.n_kept,
        "dropped": 0.0,
        "ratio_mean": rho.mean(),
        "chi2": (rho**2).mean() - 1,
        "ess": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
        "capped": (rho >= TIS.cap).mean(),
        "weight_mean": weight.mean(),
        "log_gap": (sampled - batch.teacher_logprob[mask].double().numpy()).mean(),
        "student_mass": q.sum(-1).mean().item(),
        "teacher_mass": batch.topk_logprob[mask].double().exp().sum(-1).mean().item(),
        "top1": (q.argmax(-1) == 0).double().mean().item(),
    }
    assert set(expected) | {"forward_kl", "reverse_kl"} == set(found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("objective", list(Objective))
def test_equal_policies_weigh_exactly_one(batch, student, hidden, objective, monkeypatch):
    def spy(config, student_logprob, *rest):
        seen.append(student_logprob.clone())
        return weights(config, student_logprob, *rest)

    def run(correction, batch):
        return distill_loss(config(objective, correction), hidden=hidden, lm_head=student.logits, batch=batch)

    seen, weights = [], correction_weights
    monkeypatch.setattr("opd_train.objectives.correction_weights", spy)
    plain = run(NONE, batch)
    # A behaviour policy that gave every token just the log-prob that the student gives it now.
    weighted = run(TIS, dataclasses.replace(batch, behaviour_logprob=seen[0]))
    assert weighted.sums["w"] == weighted.sums["w2"] == weighted.n_kept
    assert weighted.loss.item() == plain.loss.item()
    assert summarise(weighted.sums)["ratio_mean"] == summarise(weighted.sums)["ess"] == 1.0


def test_what_an_objective_lacks_is_named(batch, student, hidden):
    def run(objective, correction=NONE, **missing):
        lacking = dataclasses.replace(batch, **missing)
        distill_loss(config(objective, correction), hidden=hidden, lm_head=student.logits, batch=lacking)

    with pytest.raises(InvalidArgumentError, match="'lightning' needs teacher_logprob"):
        run(Objective.LIGHTNING, teacher_logprob=None)
    for objective in (Objective.FORWARD_KL, Objective.REVERSE_KL):
        with pytest.raises(InvalidArgumentError, match=f"'{objective.value}' needs top-k"):
            run(objective, topk_ids=None)
    with pytest.raises(InvalidArgumentError, match="needs behaviour_logprob"):
        run(Objective.FORWARD_KL, TIS, behaviour_logprob=None)
    run(Objective.CROSS_ENTROPY, teacher_logprob=None, topk_ids=None, behaviour_logprob=None)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_batch_without_a_counted_token_has_a_zero_gradient(batch, student, hidden, objective):
    masked = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    ours = hidden.clone().requires_grad_()
    result = distill_loss(config(objective, NONE), hidden=ours, lm_head=student.logits, batch=masked)
    assert result.n_kept == 0
    result.loss.backward()
    assert result.loss.item() == 0
    assert ours.grad is None or (ours.grad == 0).all()
    assert summarise(result.sums)["loss"] == 0


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_clip_that_makes_no_sense(clip):
    with pytest.raises(InvalidArgumentError, match="clip: expected more than 0"):
        LossConfig(objective=Objective.LIGHTNING, clip=clip)
