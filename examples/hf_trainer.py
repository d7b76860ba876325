"""Distil from a cache in Hugging Face's Trainer. After the commands under "First result" in the README:

python examples/hf_trainer.py runs/tiny/cache runs/tiny/student runs/tiny/hf
"""

from __future__ import annotations

import sys

import torch
from transformers import TrainingArguments

import opd_store
from opd_train import load_causal_lm
from opd_train.adapters.hf import CacheCollator, CacheDataset, DistillTrainer


def main(cache_uri: str, student_path: str, out: str) -> None:
    """One epoch, evaluated on held-out rollouts."""
    cache = opd_store.open(cache_uri)
    train, held_out = opd_store.split(cache, 0.1)
    args = TrainingArguments(
        out,
        remove_unused_columns=False,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_train_epochs=1,
        logging_steps=1,
        eval_strategy="epoch",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DistillTrainer(
        load_causal_lm(student_path),
        args,
        CacheCollator(cache, ranks=4),
        train_dataset=CacheDataset(cache, train),
        eval_dataset=CacheDataset(cache, held_out),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
