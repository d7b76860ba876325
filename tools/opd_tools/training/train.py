"""`opd train`: distil a student, from a cache or from a live teacher."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opd_store import InvalidArgumentError
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, access_options, command, load_model, printable
from opd_tools.training.drift import drift_options, show_alarm
from opd_tools.training.idle_options import refuse_idle_of_mode
from opd_tools.training.loss_options import loss_options
from opd_tools.training.train_source import live_source, offline_source

if TYPE_CHECKING:
    from opd_train.training.config import LoraConfig


@click.command("train")
@click.argument("cache", required=False)
@click.option("--student", required=True, help="Hugging Face directory to start from.")
@click.option("--out", required=True, help="Directory for checkpoints, metrics.jsonl and the final model.")
@loss_options
@click.option("--steps", type=int, required=True, help="Optimizer steps.")
@click.option("--lr", default=2e-6, show_default=True, help="Peak learning rate.")
@click.option(
    "--final-lr-share",
    default=1.0,
    show_default=True,
    help="Linear decay after warm-up, to this share of --lr; 1 keeps it constant.",
)
@click.option("--warmup-steps", default=0, show_default=True, help="Steps of linear warm-up.")
@click.option("--weight-decay", default=0.1, show_default=True, help="AdamW weight decay.")
@click.option("--grad-clip", default=1.0, show_default=True, help="Largest gradient norm; 0 for none.")
@click.option(
    "--batch-tokens",
    default=16384,
    show_default=True,
    help="Most tokens per batch; with --live, padded tokens of one pass of the teacher.",
)
@click.option(
    "--batch-rollouts", type=AT_LEAST_1, help="Most rollouts per batch; with --live, exactly so many."
)
@click.option("--accumulate", default=1, show_default=True, help="Batches per step, one denominator.")
@click.option(
    "--proximal-every",
    type=AT_LEAST_1,
    default=1,
    show_default=True,
    help="Steps between refreshes of the proximal policy of --correction ppo; 1 is the student itself.",
)
@click.option("--lora-rank", type=AT_LEAST_1, help="Train adapters of this rank instead of all weights.")
@click.option("--lora-alpha", type=AT_LEAST_1, help="Adapters count alpha / rank times. Default: 2 * rank.")
@click.option(
    "--lora-targets",
    metavar="NAMES",
    help="Layers that get an adapter, such as q_proj,v_proj. Default: every linear layer but the head.",
)
@click.option("--ranks", type=AT_LEAST_0, help="Cached ranks to use. Default: all.")
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle and of live draws.")
@click.option("--save-every", default=50, show_default=True, help="Steps between checkpoints; 0: at the end.")
@click.option("--gradient-checkpointing", is_flag=True, help="Trade time for memory.")
@click.option(
    "--head-chunk",
    type=AT_LEAST_1,
    default=1024,
    show_default=True,
    help="Positions whose logits exist at a time; fewer take less memory.",
)
@click.option("--bf16", is_flag=True, help="bfloat16 forward and backward over float32 weights; for GPUs.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--attention", help="transformers' attention, such as flash_attention_2. Default: its choice.")
@click.option(
    "--allow-mismatch",
    multiple=True,
    metavar="FIELD",
    help="Train although this field of cache and student differs; recorded in the checkpoint. Repeatable.",
)
@click.option("--live", is_flag=True, help="No cache: fresh rollouts and a teacher in memory at each step.")
@click.option("--teacher", help="With --live or --refresh-*: the teacher's directory.")
@click.option("--prompts", help="With --live or --refresh-*: prompts as JSONL.")
@click.option(
    "--max-new-tokens",
    type=AT_LEAST_1,
    default=256,
    show_default=True,
    help="With --live or --refresh-*: longest response.",
)
@click.option(
    "--topk",
    type=AT_LEAST_0,
    default=64,
    show_default=True,
    help="With --live and a KL objective: ranks to score.",
)
@click.option(
    "--workers", type=AT_LEAST_0, default=1, show_default=True, help="Threads that prepare batches ahead."
)
@click.option(
    "--shuffle",
    type=click.Choice(["block", "global", "none"]),
    default="block",
    show_default=True,
    help="block: record batches in random order, rollouts mixed within --window of them; global: exactly "
    "uniform, best for local caches; none: as stored.",
)
@click.option(
    "--window",
    type=AT_LEAST_1,
    default=32,
    show_default=True,
    help="Record batches mixed by --shuffle block.",
)
@click.option(
    "--too-long",
    type=click.Choice(["error", "truncate", "skip"]),
    default="error",
    show_default=True,
    help="What to do with rollouts longer than a batch or the student's context.",
)
@drift_options
@access_options
@command
def train(cache: str | None, student: str, out: str, live: bool, device: str, **options: Any) -> None:  # noqa: ANN401
    """Distil the model --student from CACHE, without a teacher in memory.

    Refuses a cache of another tokenizer, vocabulary, chat template, temperature or teacher, unless the field
    is named with --allow-mismatch. A killed run goes on from its newest checkpoint when the same command is
    given again, and ends in the same weights. The result is OUT/final, a Hugging Face directory.

    On several GPUs: torchrun --nproc-per-node 8 -m opd_tools.main train ... Weights are sharded, each GPU
    gets batches of its own, and OUT has to be one directory that all of them see. A run may go on with more
    or fewer GPUs.

    \b
    Example: opd train runs/cache --student models/student --out runs/distilled --steps 150
    """
    from opd_train.training.distributed import join_world

    if live == (cache is not None):
        raise InvalidArgumentError("give either CACHE, or --live with --teacher and --prompts")
    refuse_idle_of_mode(options, live=live)
    with join_world(device) as world:
        if live and world.size > 1:
            raise InvalidArgumentError("--live samples in one process; start it without torchrun")
        _train(cache, student, Path(out), live, device, options | {"world": world, "out": Path(out)})


def _train(
    cache: str | None,
    student: str,
    out: Path,
    live: bool,
    device: str,
    options: dict[str, Any],
) -> None:
    from opd_train import DistillConfig, Stopwatch, Trainer
    from opd_train.training.monitors import DriftMonitor

    world = options["world"]
    place = device if world.device is None else str(world.device)
    lm = load_model(student, dtype="float32", device=place, attention=options["attention"])
    stopwatch = Stopwatch()
    prepare = live_source if live else offline_source
    source, fields, provenance = prepare(cache, lm, stopwatch, options)
    config = DistillConfig(
        steps=options["steps"],
        lr=options["lr"],
        warmup_steps=options["warmup_steps"],
        final_lr_share=options["final_lr_share"],
        weight_decay=options["weight_decay"],
        grad_clip=options["grad_clip"],
        accumulate=options["accumulate"],
        proximal_every=options["proximal_every"],
        lora=_lora(options),
        head_chunk=options["head_chunk"],
        gradient_checkpointing=options["gradient_checkpointing"],
        autocast=options["bf16"],
        save_every=options["save_every"],
        seed=options["seed"],
        **fields,
    )
    with Meter("training", "steps") if world.first else nullcontext() as meter:

        def show(step: int, metrics: dict[str, float]) -> None:
            if meter is not None:
                meter.update(step, config.steps, f"step {step}/{config.steps} {progress_line(metrics)}")

        trainer = Trainer(
            lm,
            source,
            config,
            out=out,
            provenance=provenance,
            stopwatch=stopwatch,
            on_step=show,
            world=world,
            monitor=DriftMonitor(on_alarm=show_alarm),
        )
        trainer.run()
    if world.first:
        click.echo(printable(trainer.final_dir, None))


def _lora(options: dict[str, Any]) -> LoraConfig | None:
    from opd_train.training.config import LoraConfig

    rank = options["lora_rank"]
    if rank is None:
        return None
    targets = tuple(filter(None, (options["lora_targets"] or "").split(",")))
    return LoraConfig(rank=rank, alpha=options["lora_alpha"] or 2 * rank, targets=targets)


def progress_line(metrics: dict[str, float]) -> str:
    """The figures worth watching, in one line."""
    names = {"loss": "loss", "forward_kl": "KL", "log_gap": "gap", "ess": "ESS", "ratio_mean": "ratio"}
    shown = [f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics]
    return ", ".join([*shown, f"{metrics['tokens_per_s']:,.0f} tokens/s"])
