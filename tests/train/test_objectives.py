"""The loss of a batch against float64 over the whole vocabulary, weights and masks included."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB, loaded, random_rollouts, scored_cache

from opd_store import InvalidArgumentError, layout
from opd_train import CorrectionConfig, CorrectionKind, Objective, collate
from opd_train.corrections import DriftGate, StalenessDecay
from opd_train.data.batches import TeacherTargets
from opd_train.head import HeadWeights, topk_logprobs
from opd_train.objective.batch_loss import distill_loss
from opd_train.objective.loss_config import LossConfig
from opd_train.objective.step_metrics import summarise
from opd_train.training.forward import response_hidden

NONE = CorrectionConfig()
TIS = CorrectionConfig(kind=CorrectionKind.TOKEN_TIS, cap=1.5)
SEQUENCE = CorrectionConfig(kind=CorrectionKind.SEQUENCE_TIS, cap=3.0)
PPO = CorrectionConfig(kind=CorrectionKind.PPO)
CLIP = 2.0


def config(objective, correction):
    return LossConfig(objective=objective, correction=correction, clip=CLIP)


@pytest.fixture(scope="module")
def batch(teacher, tmp_path_factory):
    rollouts = random_rollouts(9, seed=4)
    cache = scored_cache(tmp_path_factory.mktemp("objectives") / "cache", teacher, rollouts, topk=6)
    batch = collate(list(cache), vocab_size=VOCAB)
    assert 0 < batch.loss_mask.sum() < len(batch.loss_mask)
    n = len(batch.loss_mask)
    generator = torch.Generator().manual_seed(0)
    # As `draw_weights` makes them, and with a position of fewer ids.
    drawn = torch.stack([torch.randperm(VOCAB, generator=generator)[:4] for _ in range(n)]).int()
    weight = torch.softmax(torch.randn(n, 4, generator=generator), dim=-1)
    weight[1] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    logprob = torch.log_softmax(torch.randn(n, 9, generator=generator), dim=-1)[:, :4]
    logprob[1, 2:] = -torch.inf
    chosen = torch.stack([torch.randperm(VOCAB, generator=generator)[:3] for _ in range(n)]).int()
    return dataclasses.replace(
        batch,
        reference_logprob=batch.behaviour_logprob + 0.1,
        drawn_ids=drawn,
        drawn_logprob=logprob,
        drawn_weight=weight,
        chosen_ids=chosen,
        chosen_logprob=torch.full((n, 3), 0.2).log(),
        chosen_log_tail=torch.full((n,), 0.4).log(),
    )


@pytest.fixture(scope="module")
def student(models):
    return loaded(models["llama"])


@pytest.fixture(scope="module")
def hidden(student, batch):
    with torch.no_grad():
        return response_hidden(student, batch)


@pytest.fixture(scope="module", params=["callable", "weights"])
def lm_head(request, student):
    """The two ways to give a head: the second computes gradients piece by piece."""
    weight = student.model.get_output_embeddings().weight.detach()
    return student.logits if request.param == "callable" else HeadWeights(weight=weight)


def bins(batch, log_q, ids, logprob, log_tail):
    """Teacher and student on the ids and one bucket for the rest."""
    p = torch.cat([logprob, log_tail[:, None]], dim=1).double()
    rest = log_q.scatter(-1, ids.long(), -torch.inf)
    q = torch.cat([log_q.gather(-1, ids.long()), torch.logsumexp(rest, dim=-1, keepdim=True)], dim=1)
    return p, q


def kl(p, q):
    return (p.exp() * (p - q)).sum(dim=-1)


def reference_loss(config, batch, log_q):
    """[N] in float64 from the student's full distribution, before weights."""
    sampled = log_q.gather(-1, batch.target_ids[:, None])[:, 0]
    objective = config.objective
    if objective is Objective.CROSS_ENTROPY:
        return -sampled
    if objective is Objective.LIGHTNING:
        return -(batch.teacher_logprob.double() - sampled.detach()).clamp(-CLIP, CLIP) * sampled
    if objective is Objective.RANDOM_SAMPLING_KD:
        weight, logprob = batch.drawn_weight.double(), batch.drawn_logprob.double()
        gap = torch.where(weight > 0, logprob - log_q.gather(-1, batch.drawn_ids.long()), 0.0)
        return (weight * gap).sum(dim=-1)
    p, q = bins(batch, log_q, batch.topk_ids, batch.topk_logprob, batch.log_tail)
    if objective is Objective.FORWARD_KL:
        return kl(p, q)
    if objective is Objective.REVERSE_KL:
        return kl(q, p)
    if objective is Objective.JSD:
        mixture = (config.beta * p.exp() + (1 - config.beta) * q.exp()).log()
        return config.beta * kl(p, mixture) + (1 - config.beta) * kl(q, mixture)
    p, q = p[:, :-1], q[:, :-1]
    if objective is Objective.TRUNCATED_FORWARD_KL:
        return kl(p, q)
    p, q = torch.log_softmax(p, dim=-1), torch.log_softmax(q, dim=-1)
    return kl(p, q) if objective is Objective.RENORMALISED_FORWARD_KL else kl(q, p)


def expected_sums(config, batch, logits):
    """Loss sum and number of tokens, in float64 from the student's full logits."""
    correction = config.correction
    log_q = torch.log_softmax(logits.double(), dim=-1)
    sampled = log_q.gather(-1, batch.target_ids[:, None])[:, 0]
    mask = batch.loss_mask.clone()
    if correction.needs_behaviour:
        mask &= torch.isfinite(batch.behaviour_logprob)
    weight = torch.ones_like(sampled)
    log_rho = (sampled.detach() - batch.behaviour_logprob.double()).where(mask, torch.tensor(0.0).double())
    if correction.kind is CorrectionKind.TOKEN_TIS:
        weight = log_rho.exp().clamp(max=correction.cap)
    elif correction.kind is CorrectionKind.SEQUENCE_TIS:
        sums = [part.sum().expand(len(part)) for part in log_rho.split(batch.cu_responses.diff().tolist())]
        weight = torch.cat(sums).exp().clamp(max=correction.cap)
    loss = weight * reference_loss(config, batch, log_q)
    if config.cross_entropy:
        loss = (1 - config.cross_entropy) * loss - config.cross_entropy * sampled
    if correction.reference_kl:
        gap = sampled - batch.reference_logprob.double()
        loss = loss + correction.reference_kl * ((-gap).exp() - 1 + gap)
    return loss[mask].sum(), int(mask.sum())


CASES = [
    *[LossConfig(objective=objective, clip=CLIP) for objective in Objective],
    *[LossConfig(objective=objective, clip=CLIP, correction=TIS) for objective in Objective],
    LossConfig(objective=Objective.LIGHTNING, clip=CLIP, correction=SEQUENCE),
    LossConfig(objective=Objective.FORWARD_KL, correction=SEQUENCE),
    LossConfig(objective=Objective.JSD, beta=0.1),
    LossConfig(objective=Objective.REVERSE_KL, cross_entropy=0.3),
    LossConfig(objective=Objective.LIGHTNING, clip=CLIP, correction=CorrectionConfig(reference_kl=0.5)),
]


def name_of(config):
    extra = {"cross_entropy": config.cross_entropy, "beta": config.beta - 0.5}
    extra["reference_kl"] = config.correction.reference_kl
    return "-".join(
        [config.objective.value, config.correction.kind.value, *(name for name, on in extra.items() if on)]
    )


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_value_count_and_gradient(batch, student, hidden, lm_head, config, chunk):
    behaviour = batch.behaviour_logprob.clone()
    behaviour[::5] = float("nan")
    marked = dataclasses.replace(batch, behaviour_logprob=behaviour)
    exact = hidden.double().requires_grad_()
    head = student.model.get_output_embeddings().weight.detach()
    wanted, n = expected_sums(config, marked, exact @ head.double().T)
    wanted.backward()
    ours = hidden.clone().requires_grad_()
    result = distill_loss(config, hidden=ours, lm_head=lm_head, batch=marked, chunk=chunk)
    result.loss.backward()
    assert result.n_kept == n
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-4)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    masked = ~batch.loss_mask
    assert (ours.grad[masked] == 0).all(), "a masked token has no gradient"
    student.model.zero_grad()


@pytest.mark.parametrize("sum_in", ["all", "first rank"])
@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_sums_above_one_are_no_nan(batch, student, hidden, lm_head, config, sum_in):
    """A cache may claim roundings that lift a sum of probabilities as far as readers accept."""
    error = layout.LARGEST_SUM_ERROR
    if sum_in == "all":
        lifted = {"topk_logprob": batch.topk_logprob + error, "log_tail": batch.log_tail + error}
        lifted |= {name: getattr(batch, name) + error for name in ("chosen_logprob", "chosen_log_tail")}
    else:
        rest = torch.full_like(batch.topk_logprob[:, 1:], error / 5).log()
        lifted = {"topk_logprob": torch.cat([torch.zeros_like(rest[:, :1]), rest], dim=1)}
        lifted["log_tail"] = torch.full_like(batch.log_tail, -torch.inf)
    lifted["teacher_logprob"] = (batch.teacher_logprob + error).clamp(max=0)
    found = {}
    for name, one in {"lifted": dataclasses.replace(batch, **lifted), "batch": batch}.items():
        states = hidden.clone().requires_grad_()
        result = distill_loss(config, hidden=states, lm_head=lm_head, batch=one)
        result.loss.backward()
        assert torch.isfinite(result.loss)
        assert all(math.isfinite(value) for value in summarise(result.sums).values())
        found[name] = states.grad
    assert torch.isfinite(found["lifted"]).all()
    if sum_in == "all" and config.objective.dense:
        # A position weighs exp(error) times as much at most.
        change = (found["lifted"] - found["batch"]).norm()
        assert change <= 1.05 * math.expm1(error) * found["batch"].norm()
    student.model.zero_grad()


def test_chosen_ids_are_another_support(batch, student, hidden, lm_head):
    config = LossConfig(objective=Objective.REVERSE_KL, chosen_ids=True)
    log_q = torch.log_softmax(student.logits(hidden).detach().double(), dim=-1)
    p, q = bins(batch, log_q, batch.chosen_ids, batch.chosen_logprob, batch.chosen_log_tail)
    found = distill_loss(config, hidden=hidden, lm_head=lm_head, batch=batch)
    assert found.loss.item() == pytest.approx(kl(q, p)[batch.loss_mask].sum().item(), rel=1e-5)


@pytest.mark.parametrize("objective", [Objective.FORWARD_KL, Objective.LIGHTNING])
def test_several_teachers_are_averaged_with_their_weights(batch, student, hidden, lm_head, objective):
    other = TeacherTargets(
        teacher_logprob=batch.teacher_logprob - 0.5,
        topk_ids=batch.topk_ids.roll(1, dims=0)[:, :4],
        topk_logprob=batch.topk_logprob.roll(1, dims=0)[:, :4],
        log_tail=torch.logaddexp(
            batch.log_tail.roll(1), torch.logsumexp(batch.topk_logprob.roll(1, dims=0)[:, 4:], dim=-1)
        ),
    )
    both = dataclasses.replace(batch, joined=(other,))
    alone = dataclasses.replace(batch, **dataclasses.asdict(other))

    def loss(batch, weights=()):
        config = LossConfig(objective=objective, clip=CLIP, teacher_weights=weights)
        return distill_loss(config, hidden=hidden, lm_head=lm_head, batch=batch).loss.item()

    expected = 0.75 * loss(batch) + 0.25 * loss(alone)
    assert loss(both, (3.0, 1.0)) == pytest.approx(expected, rel=1e-5)
    assert loss(both, (1.0, 0.0)) == pytest.approx(loss(batch), rel=1e-6)
    assert loss(both) == loss(batch), "without weights, joined teachers are only read along"
    with pytest.raises(InvalidArgumentError, match=r"teacher_weights: 3 for 2 teachers"):
        loss(both, (1.0, 1.0, 1.0))
    with pytest.raises(InvalidArgumentError, match=r"joined teacher 1: objective .* needs"):
        loss(dataclasses.replace(batch, joined=(TeacherTargets(),)), (1.0, 1.0))


def test_ppo_clips_around_the_proximal_policy(batch, student, hidden, lm_head):
    config = LossConfig(objective=Objective.LIGHTNING, clip=CLIP, correction=PPO)
    log_q = torch.log_softmax(student.logits(hidden).detach().double(), dim=-1)
    sampled = log_q.gather(-1, batch.target_ids[:, None])[:, 0]
    proximal = sampled.float() + torch.linspace(-0.5, 0.5, len(sampled))
    gap = (batch.teacher_logprob.double() - sampled).clamp(-CLIP, CLIP)
    ratio = (sampled - proximal.double()).exp()
    clipped = torch.where(gap > 0, ratio > PPO.high, ratio < PPO.low)
    stale = (proximal.double() - batch.behaviour_logprob.double()).exp().clamp(max=PPO.cap)
    weight = torch.where(clipped, 0.0, ratio * stale)
    found = distill_loss(
        config, hidden=hidden, lm_head=lm_head, batch=batch, chunk=7, proximal_logprob=proximal
    )
    expected = -(weight * gap * sampled)[batch.loss_mask].sum().item()
    assert found.loss.item() == pytest.approx(expected, rel=1e-4)
    assert 0 < clipped.sum() < len(clipped)


@pytest.mark.parametrize("objective", [Objective.LIGHTNING, Objective.FORWARD_KL])
def test_weights_of_prefixes_and_positions(batch, student, hidden, lm_head, objective):
    correction = CorrectionConfig(kind="prefix_is", cap=3.0, step_cap=1.5, position_gain=0.4)
    found = distill_loss(config(objective, correction), hidden=hidden, lm_head=lm_head, batch=batch)
    log_q = torch.log_softmax(student.logits(hidden).detach().double(), dim=-1)
    sampled, mask = log_q.gather(-1, batch.target_ids[:, None])[:, 0], batch.loss_mask
    log_rho = ((sampled - batch.behaviour_logprob) * mask).tolist()
    gaps = ((batch.teacher_logprob - sampled).clamp(-CLIP, CLIP).abs() * mask).tolist()
    weights, bounds = [], batch.cu_responses.tolist()
    for first, last in pairwise(bounds):
        for at in range(first, last):
            before = sum(min(step, np.log(1.5)) for step in log_rho[first:at])
            # A loss over the distribution does not depend on the token drawn there.
            own = 0.0 if objective.dense else log_rho[at]
            share = sum(gaps[first:at]) / sum(gaps[first:last])
            weights.append(min(np.exp(before + own), 3.0) * (1 + 0.4 * (1 - share)))
    loss = reference_loss(config(objective, correction), batch, log_q) * torch.tensor(weights)
    assert found.loss.item() == pytest.approx(loss[mask].sum().item(), rel=1e-5)
    assert len({round(weight, 3) for weight in weights}) > 10


def test_an_old_rollout_counts_less(batch, student, hidden, lm_head):
    stale = StalenessDecay(full_until=1, rate=0.5, drop_after=4)
    config = LossConfig(objective=Objective.FORWARD_KL, correction=CorrectionConfig(staleness=stale))
    age = torch.arange(len(batch.cu_responses) - 1)
    found = distill_loss(config, hidden=hidden, lm_head=lm_head, batch=batch, age=age)
    log_q = torch.log_softmax(student.logits(hidden).detach().double(), dim=-1)
    age_N = torch.repeat_interleave(age, batch.cu_responses.diff().long())
    weight = torch.exp(-0.5 * (age_N - 1).clamp(min=0)).where(age_N <= 4, torch.tensor(0.0))
    expected = (weight * reference_loss(config, batch, log_q))[batch.loss_mask].sum().item()
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.n_kept == int((batch.loss_mask & (age_N <= 4)).sum())
    with pytest.raises(InvalidArgumentError, match="age"):
        distill_loss(config, hidden=hidden, lm_head=lm_head, batch=batch)


def test_the_monitors(batch, student, hidden):
    behaviour = batch.behaviour_logprob.clone()
    # A token without ratio is in no figure about ratios.
    behaviour[torch.nonzero(batch.loss_mask)[:3, 0]] = torch.nan
    batch = dataclasses.replace(batch, behaviour_logprob=behaviour)
    with torch.no_grad():
        result = distill_loss(
            config(Objective.FORWARD_KL, TIS), hidden=hidden, lm_head=student.logits, batch=batch
        )
        log_q = torch.log_softmax(student.logits(hidden).double(), dim=-1)[batch.loss_mask]
    found = summarise(result.sums)
    mask = batch.loss_mask
    sampled = log_q.gather(-1, batch.target_ids[mask][:, None])[:, 0].numpy()
    rho = np.exp(sampled - behaviour[mask].double().numpy())[3:]
    weight = np.minimum(rho, TIS.cap)
    gap = batch.teacher_logprob[mask].double().numpy() - sampled
    tail = batch.log_tail[mask].double()
    q = log_q.gather(-1, batch.topk_ids[mask].long()).exp()
    expected = {
        "loss": result.loss.item() / result.n_kept,
        "dropped": 3 / len(sampled),
        "weight_ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()),
        "k3": (rho - 1 - np.log(rho)).mean(),
        "clipped": (np.abs(gap) >= CLIP).mean(),
        "tail_kl": (tail.exp() * (tail - (1 - q.sum(-1)).log())).mean().item(),
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


@pytest.mark.parametrize(
    "modifier",
    [
        {"normalise": "tokens"},
        {"normalise": "sequences"},
        {"drift_gate": DriftGate()},
        {"position_gain": 0.7},
        {"opsm_delta": 0.0},
    ],
    ids=str,
)
def test_what_is_capped_does_not_depend_on_modifiers(batch, student, hidden, modifier):
    def capped(correction):
        with torch.no_grad():
            result = distill_loss(
                config(Objective.LIGHTNING, correction), hidden=hidden, lm_head=student.logits, batch=batch
            )
        return summarise(result.sums)["capped"], result.sums["w"]

    expected, weights = capped(TIS)
    found, modified = capped(dataclasses.replace(TIS, **modifier))
    assert modified != pytest.approx(weights)
    assert found == expected
    assert 0 < expected < 1


@pytest.mark.parametrize("case", ["proximal", "student", "behaviour"])
def test_what_is_capped_for_ppo_is_the_ratio_that_its_cap_holds(batch, student, hidden, case):
    # The proximal policy is off the sampler by up to 2 nats, the student off the proximal one by 1 nat.
    anchor = "behaviour" if case == "behaviour" else "current"
    ppo = dataclasses.replace(PPO, low=0.0, high=1e6, cap=1.7, anchor=anchor)
    with torch.no_grad():
        sampled = student.logits(hidden).log_softmax(-1).gather(-1, batch.target_ids[:, None])[:, 0]
        steps = torch.linspace(-1.0, 1.0, len(sampled))
        drifts = torch.linspace(-2.0, 2.0, len(sampled)).roll(len(sampled) // 3)
        given = dataclasses.replace(batch, behaviour_logprob=sampled - steps - drifts)
        found = distill_loss(
            config(Objective.LIGHTNING, ppo),
            hidden=hidden,
            lm_head=student.logits,
            batch=given,
            proximal_logprob=sampled - steps if case == "proximal" else None,
        )
    held = {"proximal": drifts, "student": steps + drifts, "behaviour": torch.zeros_like(drifts)}[case]
    expected = (held.exp() >= 1.7)[batch.loss_mask].double().mean().item()
    assert summarise(found.sums)["capped"] == pytest.approx(expected)
    assert (0 < expected < 1) == (case != "behaviour")


@pytest.mark.parametrize("kind", [kind for kind in CorrectionKind if kind not in ("ppo", "gspo")])
@pytest.mark.parametrize("objective", [Objective.LIGHTNING, Objective.REVERSE_KL, Objective.CROSS_ENTROPY])
def test_equal_policies_weigh_exactly_one(batch, student, hidden, objective, kind):
    def run(correction, batch):
        return distill_loss(config(objective, correction), hidden=hidden, lm_head=student.logits, batch=batch)

    mask = batch.loss_mask
    with torch.no_grad():
        now = topk_logprobs(hidden[mask], student.logits, batch.target_ids[mask][:, None])[:, 0]
    # A behaviour policy that gave every token just the log-prob that the student gives it now.
    equal = dataclasses.replace(batch, behaviour_logprob=torch.zeros(len(mask)).masked_scatter(mask, now))
    weighted = run(CorrectionConfig(kind=kind), equal)
    assert weighted.sums["w"] == weighted.sums["w2"] == weighted.n_kept
    assert weighted.loss.item() == run(NONE, batch).loss.item()
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


def test_a_loss_from_json_is_the_same_loss():
    config = LossConfig(
        objective=Objective.LIGHTNING,
        clip=5.0,
        correction=CorrectionConfig(
            kind=CorrectionKind.PREFIX_IS,
            step_cap=1.5,
            drift_gate=DriftGate(block=8),
            staleness=StalenessDecay(rate=0.1, drop_after=5),
        ),
    )
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))
    assert LossConfig.from_json(as_json, where="loss.json") == config
    assert LossConfig.from_json({"objective": "jsd"}, where="loss.json") == LossConfig(
        objective=Objective.JSD
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"loss.json: expected an object, found \[\]"),
        ({}, "loss.json: .*objective"),
        ({"objective": "win"}, "loss.json: 'win' is not a valid Objective"),
        ({"objective": "jsd", "gamma": 1}, "loss.json: 'gamma' is not one of beta, chosen_ids, clip"),
        ({"objective": "jsd", "beta": "half"}, "loss.json: '<'"),
        ({"objective": "jsd", "beta": 2}, "loss.json: beta: expected between 0 and 1, found 2"),
        ({"objective": "jsd", "correction": {"kind": "cap"}}, "loss.json: correction: 'cap' is not a valid"),
        (
            {"objective": "jsd", "correction": {"drift_gate": {"blok": 8}}},
            "loss.json: correction.drift_gate: 'blok' is not one of block, rate",
        ),
        ({"objective": "jsd", "correction": {"kind": "none", "cap": 2.0}}, "loss.json: correction: cap"),
    ],
    ids=range(9),
)
def test_a_loss_from_json_that_makes_no_sense(value, message):
    with pytest.raises(InvalidArgumentError, match=message):
        LossConfig.from_json(value, where="loss.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "forward_kl", "temperature": 2.0}, "temperature: 2.0 with objective 'forward_kl'"),
        ({"objective": "lightning", "chosen_ids": True}, "chosen_ids: objective 'lightning'"),
        ({"objective": "forward_kl", "cross_entropy": 1.5}, "cross_entropy: expected 0 to 1"),
        ({"objective": "forward_kl", "teacher_weights": (0.0,)}, "teacher_weights: expected one above 0"),
        ({"objective": "forward_kl", "teacher_weights": (-1.0,)}, "teacher_weights: expected 0 or more"),
        ({"objective": "random_sampling_kd", "teacher_weights": (1.0, 1.0)}, "teacher_weights: of joined"),
        ({"objective": "forward_kl", "correction": PPO}, "correction 'ppo' clips by the sampled token's"),
        ({"objective": "cross_entropy", "correction": PPO}, "objective 'cross_entropy' does not have"),
    ],
    ids=range(8),
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        LossConfig(**settings)
