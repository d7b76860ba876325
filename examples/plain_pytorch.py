"""Distil from a cache in a loop of your own. After the commands under "First result" in the README:

python examples/plain_pytorch.py runs/tiny/cache runs/tiny/student
"""

from __future__ import annotations

import sys

import torch

import opd_store
from opd_train import CacheStream, check_cache, load_causal_lm, topk_forward_kl, topk_logprobs


def main(cache_uri: str, student_path: str) -> None:
    """Three epochs of forward KL on the cached top-k."""
    cache, student = opd_store.open(cache_uri), load_causal_lm(student_path)
    check_cache(cache.meta, student)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3)
    stream = CacheStream(cache, batch_rollouts=32, seed=0, epochs=3)
    for step, batch in enumerate(stream):
        ids, mask, source = batch.padded()
        # What predicts token t is the hidden state one before it; `source` says where that is.
        hidden = student.hidden(ids, mask).flatten(0, 1)[source]
        logprobs = topk_logprobs(hidden, student.logits, batch.topk_ids.long())
        loss = topk_forward_kl(logprobs, batch.topk_logprob, batch.log_tail)[batch.loss_mask].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: KL to the teacher {loss.item():.4f} nat a token")


if __name__ == "__main__":
    main(*sys.argv[1:])
