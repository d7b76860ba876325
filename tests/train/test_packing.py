"""The two ways to run a batch, packed for variable-length attention and padded for the rest, agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train.tiny_models import VOCAB

from opd_store.testing import random_rollout
from opd_train import collate
from opd_train.training.forward import length_groups, packed_hidden, padded_hidden, response_hidden


def test_groups_hold_each_row_once_and_no_row_below_half_of_the_longest():
    lengths = [7, 100, 3, 55, 49, 4, 100]
    groups = length_groups(lengths)
    assert groups == [[1, 3, 6], [4], [0, 5], [2]]
    assert length_groups([5, 5, 5]) == [[0, 1, 2]]


@pytest.mark.parametrize("lengths", [(5,), (1, 7, 3), (2, 2, 20, 9, 1)])
def test_packed_rows_do_not_see_each_other(any_model, lengths):
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(rng, vocab_size=VOCAB, prompt_len=1 + n % 3, response_len=n) for n in lengths]
    batch = collate(rollouts, vocab_size=VOCAB)
    with torch.no_grad():
        packed, padded = packed_hidden(any_model, batch), padded_hidden(any_model, batch)
        alone = torch.cat([padded_hidden(any_model, collate([r], vocab_size=VOCAB)) for r in rollouts])
        chosen = response_hidden(any_model, batch)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chosen, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [packed_hidden, padded_hidden])
def test_padding_changes_no_hidden_state(any_model, run):
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(rng, vocab_size=VOCAB, prompt_len=2, response_len=n) for n in (9, 3, 4)]
    with torch.no_grad():
        plain, padded = (run(any_model, collate(rollouts, vocab_size=VOCAB, multiple_of=n)) for n in (1, 32))
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
