"""Random students and teachers over a whole vocabulary, and what a cache would hold of them, in float64.

Axes: N = positions, V = vocabulary, K = ranks.
"""

from __future__ import annotations

import torch


def problem(n, v, k, *, seed=0, scale=2.0):
    """Student logits and teacher log-probs [N, V], both float64, and the teacher's top ids [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=generator, dtype=torch.float64) * scale
    teacher = torch.log_softmax(torch.randn(n, v, generator=generator, dtype=torch.float64) * scale, dim=-1)
    return student, teacher, teacher.topk(k, dim=-1).indices


def merged(logprob, ids):
    """[N, K + 1] float64: log-probs at the ids, and of everything else in one bucket (none if K = V)."""
    ranks = logprob.gather(-1, ids)
    if ids.shape[1] == logprob.shape[1]:
        return ranks
    rest = logprob.scatter(-1, ids, -torch.inf)
    return torch.cat([ranks, torch.logsumexp(rest, dim=-1, keepdim=True)], dim=-1)


def stored(teacher, ids, dtype=torch.float64):
    """The teacher's log-probs [N, K] and tail [N] at the ids."""
    buckets, k = merged(teacher, ids).to(dtype), ids.shape[1]
    tail = buckets[:, k] if buckets.shape[1] > k else torch.full((len(ids),), -torch.inf, dtype=dtype)
    return buckets[:, :k], tail


def on_cache(loss, student_logits, teacher, ids, dtype=torch.float64):
    """A divergence of the package on what a cache would hold."""
    student = torch.log_softmax(student_logits.to(dtype), dim=-1).gather(-1, ids)
    return loss(student, *stored(teacher, ids, dtype))


def kl(first, second):
    """[N] KL between log-probs [N, outcomes]."""
    return (first.exp() * (first - second)).sum(dim=-1)


def jsd(student, teacher, beta):
    """[N] beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student."""
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def dense(name, student, teacher):
    """[N] a divergence between log-probs over the same outcomes: "forward", "reverse" or "jsd0.3"."""
    if name.startswith("jsd"):
        return jsd(student, teacher, float(name[3:]))
    return kl(teacher, student) if name == "forward" else kl(student, teacher)


def through_softmax(student_logits, ids, g, g_tail):
    """[N, V] dL/dz from g = dL/dlog q at the ids [N, K] and for the tail [N, 1], in closed form.

    dL/dz_v = s_v (g_tail / q_tail - G) outside the ids and g_i - G q_i inside, G = sum of g and g_tail.
    """
    q = merged(torch.log_softmax(student_logits, dim=-1), ids).exp()
    total = g.sum(dim=-1, keepdim=True) + g_tail
    outside = torch.softmax(student_logits, dim=-1) * (g_tail / q[:, -1:] - total)
    return outside.scatter(-1, ids, g - total * q[:, :-1])
