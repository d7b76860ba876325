"""`opd train`: distil a student, from a cache or from a live teacher."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from opd_store import CacheMeta, InvalidArgumentError
from opd_tools.console import AT_LEAST_0, AT_LEAST_1, Meter, access_options, command, load_model, printable
from opd_tools.drift import (
    NEEDED,
    REFRESH_OPTIONS,
    drift_options,
    is_refreshing,
    look_before_start,
    refreshing_source,
    show_alarm,
    split_allowed,
)
from opd_tools.loss_options import loss_options, read_loss

if TYPE_CHECKING:
    from opd_train import CausalLM, LossConfig, Stopwatch
    from opd_train.training.config import LoraConfig
    from opd_train.training.trainer import BatchSource


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
@click.option("--batch-tokens", default=16384, show_default=True, help="Most tokens per batch.")
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
    if live:
        _refuse_options((*_OFFLINE_ONLY, *REFRESH_OPTIONS), "--live")
    elif is_refreshing(options):
        _refuse_options(("topk",), "--refresh-*, which scores as many ranks as CACHE has")
    else:
        _refuse_options(_LIVE_ONLY, "a CACHE")
        _refuse_options(REFRESH_OPTIONS[2:], "neither --refresh-every nor --refresh-on-drift")
    if options["lora_rank"] is None:
        _refuse_options(("lora_alpha", "lora_targets"), "all weights trained (no --lora-rank)")
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
    prepare = _live if live else _offline
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


_OFFLINE_ONLY = (
    *("ranks", "workers", "shuffle", "window", "too_long"),
    *("storage_options", "cache_dir", "cache_gib"),
)
_LIVE_ONLY = (*NEEDED, "topk")


def _refuse_options(names: tuple[str, ...], mode: str) -> None:
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if option.name in names and given:
            raise InvalidArgumentError(f"{option.opts[0]} has no effect with {mode}; leave it out")


def _refuse_idle_options(options: dict[str, Any], loss: LossConfig) -> None:
    """Refuse what this loss and this order do not read."""
    if not loss.objective.needs_topk or loss.chosen_ids:
        # 0 has an effect: it chooses the objective.
        for name in ("ranks", "topk"):
            if options[name]:
                _refuse_options((name,), f"objective {loss.objective.value}, which compares on no top-k")
    kind = loss.correction.kind.value
    if kind != "ppo":
        _refuse_options(("proximal_every",), f"correction {kind}")
    if kind == "none":
        _refuse_options(("normalise",), "correction none")
    if options["shuffle"] != "block":
        _refuse_options(("window",), f"--shuffle {options['shuffle']}")


def progress_line(metrics: dict[str, float]) -> str:
    """The figures worth watching, in one line."""
    names = {"loss": "loss", "forward_kl": "KL", "log_gap": "gap", "ess": "ESS", "ratio_mean": "ratio"}
    shown = [f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics]
    return ", ".join([*shown, f"{metrics['tokens_per_s']:,.0f} tokens/s"])


Prepared = tuple["BatchSource", dict[str, Any], dict[str, Any]]


def _offline(uri: str | None, lm: CausalLM, stopwatch: Stopwatch, options: dict[str, Any]) -> Prepared:
    import opd_store
    from opd_train import CacheStream, Objective, check_cache

    assert uri is not None
    cache = opd_store.open(uri, **options["access"])
    topk = cache.topk if options["ranks"] is None else options["ranks"]
    fields = {"loss": read_loss(options, topk=topk, chosen=cache.schema.chosen)}
    _refuse_idle_options(options, fields["loss"])
    distilled = fields["loss"].objective is not Objective.CROSS_ENTROPY
    teacher_used = distilled or fields["loss"].correction.needs_advantage
    allow, allow_start = split_allowed(options["allow_mismatch"])
    allowed = check_cache(cache.meta, lm, allow=allow, teacher_used=teacher_used)
    if fields["loss"].correction.needs_behaviour and len(cache) and cache[0].behaviour_logprob is None:
        raise InvalidArgumentError(
            f"{cache.uri}: correction {fields['loss'].correction.kind.value!r} needs behaviour_logprob, "
            "which row 0 lacks; "
            "score again with --reference, or pass --correction none"
        )
    needs_topk = fields["loss"].objective.needs_topk and not fields["loss"].chosen_ids
    look_before_start(
        cache,
        lm,
        fields["loss"],
        options["out"],
        allow_start,
        teacher_used=teacher_used,
        speak=options["world"].first,
    )
    ranks = options["ranks"] if needs_topk else 0
    source: BatchSource
    if is_refreshing(options):
        source = refreshing_source(cache, lm, stopwatch, options, loss=fields["loss"], ranks=ranks)
    else:
        source = CacheStream(
            cache,
            batch_tokens=options["batch_tokens"],
            batch_rollouts=options["batch_rollouts"],
            seed=options["seed"],
            rank=options["world"].rank,
            world_size=options["world"].size,
            ranks=ranks,
            epochs=None,
            device=lm.device,
            vocab_size=lm.vocab_size,
            context=lm.context,
            workers=options["workers"],
            shuffle=options["shuffle"],
            window=options["window"],
            too_long=options["too_long"],
            draws=fields["loss"].objective.needs_draws,
            chosen=fields["loss"].chosen_ids,
        )
    teacher = cache.meta.sft_teacher
    if not distilled:
        teacher = cache.meta.behaviour
    provenance = {
        "cache": cache.digest,
        "allowed_mismatches": [dataclasses.asdict(mismatch) for mismatch in allowed],
        "doubts": _report_doubts(cache.meta, lm, options),
        "sft_teacher": None if teacher is None else teacher.to_json(),
    }
    return source, fields, provenance


def _report_doubts(meta: CacheMeta, lm: CausalLM, options: dict[str, Any]) -> list[str]:
    from opd_train import find_doubts

    doubts = find_doubts(meta, lm)
    for doubt in doubts if options["world"].first else ():
        click.echo(f"opd: note: {doubt}", err=True)
    return doubts


def _live(uri: str | None, lm: CausalLM, stopwatch: Stopwatch, options: dict[str, Any]) -> Prepared:
    from opd_store import SamplerInfo
    from opd_train import LiveSource, check_cache, read_prompts

    if not options["teacher"] or not options["prompts"]:
        raise InvalidArgumentError("--live needs --teacher and --prompts")
    teacher = load_model(options["teacher"], dtype="float32", device=str(lm.device))
    fields = {"loss": read_loss(options, topk=min(options["topk"], teacher.vocab_size))}
    _refuse_idle_options(options, fields["loss"])
    if fields["loss"].objective.needs_draws:
        raise InvalidArgumentError(
            "--live draws no ids, which objective 'random_sampling_kd' needs; give a CACHE"
        )
    described = CacheMeta(
        vocab_size=teacher.vocab_size,
        tokenizer_fingerprint=teacher.tokenizer_fingerprint,
        chat_template_digest=teacher.chat_template_digest,
        teacher=teacher.info,
        sft_teacher=lm.sft_teacher,
    )
    allowed = check_cache(described, lm, allow=options["allow_mismatch"])
    sampler = SamplerInfo(
        max_new_tokens=options["max_new_tokens"], seed=options["seed"], stop_token_ids=lm.stop_token_ids
    )
    source = LiveSource(
        lm,
        teacher,
        read_prompts(options["prompts"], lm),
        sampler,
        batch_rollouts=options["batch_rollouts"] or 64,
        topk=min(options["topk"], teacher.vocab_size) if fields["loss"].objective.needs_topk else 0,
        batch_tokens=options["batch_tokens"],
        stopwatch=stopwatch,
    )
    provenance = {
        "live_teacher": teacher.info.to_json(),
        "allowed_mismatches": [dataclasses.asdict(mismatch) for mismatch in allowed],
        "doubts": _report_doubts(described, lm, options),
        "sft_teacher": lm.sft_teacher and lm.sft_teacher.to_json(),
    }
    return source, fields, provenance
