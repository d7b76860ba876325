"""One process of a vocabulary-parallel head: python sharded_head.py RANK STORE OUT."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from train.heads import CURVES, problem, solve

from opd_train.head import HeadWeights, VocabShard

SHAPES = [(11, 7, 331, 5), (1, 3, 2, 4), (0, 3, 5, 2)]
SPLITS = [0.5, 0.9]
"""Share of the vocabulary in the first of two shards."""
FORMS = ("recompute", "fused")


def shards(v: int, share: float) -> list[slice]:
    """Rows of the two shards."""
    middle = min(v - 1, max(1, int(v * share)))
    return [slice(0, middle), slice(middle, v)]


def main(rank: int, store: str, out: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD
    results = {}
    for shape in SHAPES:
        for share in SPLITS:
            for dtype in (torch.float64, torch.float32):
                given = problem(*shape, CURVES["all"]).to(dtype)
                rows = shards(shape[2], share)[rank]
                given.weight = given.weight.detach()[rows].clone().requires_grad_()
                given.bias = given.bias.detach()[rows].clone().requires_grad_()
                head = HeadWeights(
                    weight=given.weight,
                    bias=given.bias,
                    scale=given.curve.scale,
                    softcap=given.curve.softcap,
                    shard=VocabShard(group, rows.start, shape[2]),
                )
                for form in FORMS:
                    results[shape, share, dtype, form] = solve(given, form, 4, head=head)
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
