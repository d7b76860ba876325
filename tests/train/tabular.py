"""A world small enough to enumerate: every response, with its probability, as one packed batch.

Axes: S = all responses, N = their tokens end to end, P = prefixes (states), V = vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB = 3
LONGEST = 3
STOP = 0


@dataclass(frozen=True)
class World:
    """Responses end with token 0 or at the third token. Policies are logits [P, V]."""

    state_N: Tensor
    token_N: Tensor
    cu_seqlens: Tensor
    n_states: int

    @property
    def rollout_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.cu_seqlens) - 1), self.cu_seqlens.diff())

    def logprob(self, policy_PV: Tensor) -> Tensor:
        """[N] of each response token."""
        return torch.log_softmax(policy_PV, dim=-1)[self.state_N, self.token_N]

    def logprob_of_sequences(self, policy_PV: Tensor) -> Tensor:
        """[S]."""
        zeros = torch.zeros(len(self.cu_seqlens) - 1, dtype=torch.float64)
        return zeros.index_add(0, self.rollout_N, self.logprob(policy_PV))

    def visits(self, policy_PV: Tensor) -> Tensor:
        """[N] probability of the response that each token belongs to, detached."""
        return self.logprob_of_sequences(policy_PV).exp().detach()[self.rollout_N]

    def state_visits(self, policy_PV: Tensor) -> Tensor:
        """[P] how often the policy reaches each state, by following the tree from its root."""
        reach_P = torch.zeros(self.n_states, dtype=torch.float64)
        reach_P[0] = 1.0
        probs_PV = torch.softmax(policy_PV.detach(), dim=-1)
        for state, prefix in enumerate(_PREFIXES[1:], start=1):
            parent = _PREFIXES.index(prefix[:-1])
            reach_P[state] = reach_P[parent] * probs_PV[parent, prefix[-1]]
        return reach_P

    def sample_of(self, counts_S: list[int]) -> tuple[Tensor, Tensor]:
        """Token rows and cu_seqlens of a batch that holds each response so often."""
        spans = list(itertools.pairwise(self.cu_seqlens.tolist()))
        chosen = [span for span, n in zip(spans, counts_S, strict=True) for _ in range(n)]
        rows = torch.cat([torch.arange(start, end) for start, end in chosen])
        lengths = torch.tensor([0] + [end - start for start, end in chosen])
        return rows, lengths.cumsum(0)


_GOING_ON = [token for token in range(VOCAB) if token != STOP]
_PREFIXES = [p for length in range(LONGEST) for p in itertools.product(_GOING_ON, repeat=length)]


def make_world() -> World:
    responses = [(*prefix, STOP) for prefix in _PREFIXES]
    responses += itertools.product(_GOING_ON, repeat=LONGEST)
    state, token, lengths = [], [], [0]
    for response in responses:
        state += [_PREFIXES.index(response[:t]) for t in range(len(response))]
        token += response
        lengths.append(len(response))
    cu_seqlens = torch.tensor(lengths).cumsum(0)
    return World(torch.tensor(state), torch.tensor(token), cu_seqlens, len(_PREFIXES))


def random_policy(seed: int, *, spread: float = 1.0) -> Tensor:
    """[P, V] logits, float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(len(_PREFIXES), VOCAB, generator=generator, dtype=torch.float64)
