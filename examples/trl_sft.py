"""Distil from a cache in TRL's SFTTrainer. After the commands under "First result" in the README:

python examples/trl_sft.py runs/tiny/cache runs/tiny/student runs/tiny/trl
"""

from __future__ import annotations

import sys

import torch
from trl import SFTConfig

import opd_store
from opd_train import CorrectionConfig, LossConfig, Objective, load_causal_lm
from opd_train.adapters.trl import CacheCollator, DistillSFTTrainer, row_dataset


def main(cache_uri: str, student_path: str, out: str) -> None:
    """One epoch of the sampled-token objective with truncated importance weights."""
    cache = opd_store.open(cache_uri)
    args = SFTConfig(
        out,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_train_epochs=1,
        logging_steps=1,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    correction = CorrectionConfig(kind="token_tis", cap=2.0)
    trainer = DistillSFTTrainer(
        load_causal_lm(student_path),
        args,
        CacheCollator(cache, ranks=0),
        loss=LossConfig(objective=Objective.LIGHTNING, correction=correction),
        train_dataset=row_dataset(cache),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
