"""What the ranks of `test_distributed` do: run by torchrun, with a directory that the test has prepared.

All jobs are done by the same two processes, since starting them takes longer than the jobs. Never imported by
a test for anything but `Dealt`, `SCENARIOS` and `config_of`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from train.training import CONFIG, Stop, run, trainer

import opd_store
from opd_store import OpdError
from opd_train import (
    CacheStream,
    DistillConfig,
    LossConfig,
    Objective,
    Trainer,
    default_loss,
    load_causal_lm,
)
from opd_train.training.config import LoraConfig
from opd_train.training.distributed import join_world

SCENARIOS = {
    "llama": {},
    "tied": {"gradient_checkpointing": True},
    "gemma2": {},
    "mixtral": {},
    "lightning": {"loss": LossConfig(objective=Objective.LIGHTNING)},
    "lora": {"lora": LoraConfig(rank=3, alpha=6)},
}
"""What differs from `CONFIG`, by name; a name that no model has means "llama"."""
STEPS = 6
COMMAND = DistillConfig(loss=default_loss(topk=6), steps=25, lr=3e-3, save_every=4)


class Dealt:
    """Batches dealt to the ranks in turn, so that one rank with two batches a step sees the same."""

    def __init__(self, cache, rank=0, size=1):
        stream = CacheStream(cache, batch_tokens=60, epochs=None)
        self._batches = [stream.next_batch() for _ in range(2 * STEPS)]
        self._rank, self._size, self._given = rank, size, 0

    def next_batch(self):
        self._given += 1
        return self._batches[(self._given - 1) * self._size + self._rank]

    def identity(self):
        return {}

    def state_dict(self):
        return {"batches": self._given * self._size}

    def load_state_dict(self, state):
        state = state[0] if isinstance(state, list) else state
        self._given = state["batches"] // self._size


def config_of(name, size):
    """Two batches a step over all ranks."""
    config = dataclasses.replace(CONFIG, steps=STEPS, accumulate=2 // size, weight_decay=0.0)
    return dataclasses.replace(config, **SCENARIOS[name])


def main(root):
    with join_world("cpu") as world:
        own = {"rank": world.rank, "world_size": world.size}
        cache = opd_store.open(root / "cache")

        def train(name, out, log=None, **kwargs):
            model = root / name if (root / name).exists() else root / "llama"
            config = kwargs.pop("config", None) or dataclasses.replace(
                config_of(name, 2), **kwargs.pop("change", {})
            )
            kwargs.setdefault("source", lambda _: Dealt(cache, world.rank, 2))
            return run(cache, model, config, root / out, log=log, world=world, **kwargs)

        found = {}
        for name in SCENARIOS:
            log = []
            train(name, f"two/{name}", log)
            found[name] = log

        # Cut and resumed at the same number of ranks, and taken over from one rank.
        for name in ("tied", "lora"):
            try:
                train(name, f"cut/{name}", stop=3)
            except Stop:
                train(name, f"cut/{name}")
        # The config of two ranks with one batch each is not that of one rank with two.
        log = []
        train("tied", "from_one", log, change={"accumulate": 2, "steps": 4}, source=None, **own)
        found["from_one"] = [step for step, _ in log]
        assert train("tied", "two/tied")[1] == {}, "a finished run is taken, not repeated"

        # What the command does in `test_the_command_under_torchrun`.
        stream = CacheStream(cache, batch_tokens=60, epochs=None, **own)
        Trainer(load_causal_lm(root / "llama"), stream, COMMAND, out=root / "api", world=world).run()

        # Ranks that were started differently.
        try:
            trainer(cache, root / "llama", dataclasses.replace(CONFIG, seed=world.rank), world=world)
        except OpdError as error:
            found["differ"] = str(error)

        # One rank's batch is bad, and all ranks hear of it.
        made = trainer(cache, root / "llama", config_of("llama", 2), root / "bad", world=world, **own)
        if world.rank == 1:
            draw = made._source.next_batch

            def bad_batch():
                batch = draw()
                return dataclasses.replace(batch, topk_logprob=batch.topk_logprob * torch.nan)

            made._source.next_batch = bad_batch
        try:
            made.run()
        except OpdError as error:
            found["bad"] = [str(error), world.gather(str(error))[1 - world.rank]]

        # One rank's disk is full.
        try:
            if world.rank == 1:
                import opd_train.training.checkpoint as module

                def full(*_):
                    raise OSError(28, "No space left on device")

                module.safetensors.torch.save_file = full
            train("llama", "full")
        except OpdError as error:
            found["full"] = [type(error).__name__, str(error)]
        if world.first:
            shutil.rmtree(root / "bad" / "step-00000002", ignore_errors=True)
            (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
