"""THE loop: one stage of one run, from config to last checkpoint. Both stages go through it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from lbr_ds.batching import TextEncoder
from lbr_ds.config import RunConfig
from lbr_ds.config.ds_config import Layout
from lbr_ds.distributed import World, join, leave
from lbr_ds.errors import ConfigError
from lbr_ds.model.bottleneck import Card, load_tokenizer, prepare_backbone
from lbr_ds.model.complete import check_positions
from lbr_ds.model.embedder import build_embedder
from lbr_ds.model.lora import adapting
from lbr_ds.runs import step_of
from lbr_ds.shards import Manifest
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json, write_text
from lbr_ds.system.failures import writing
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.urls import mask_record, mask_secrets
from lbr_ds.train.checkpoint import provenance
from lbr_ds.train.checkpoint.resume import find_checkpoint, load_checkpoint
from lbr_ds.train.checkpoint.saver import Saver
from lbr_ds.train.deepspeed.engine import Engine, load_layout
from lbr_ds.train.deepspeed.weights import Origin
from lbr_ds.train.feed import open_feed
from lbr_ds.train.guard import Guard
from lbr_ds.train.held_out import Examiner, Figures, draw_sample
from lbr_ds.train.meter import Meter, memory_gib
from lbr_ds.train.negatives import check_negatives, warn_without
from lbr_ds.train.optim import learning_rate
from lbr_ds.train.preempt import Preemption
from lbr_ds.train.stages import STAGES, Stage, Work, rehearse
from lbr_ds.train.starts import note_start, starting_point
from lbr_ds.train.watch import Watch, stragglers

log = logging.getLogger(__name__)


def train(run: RunConfig, number: int, *, force: bool = False) -> bool:
    """Train stage `number`, from the newest checkpoint if there is one.

    force: go on from it although recipe or data have changed. Returns whether it reached its end
    (false: preempted, and saved). An error leaves the last checkpoint as it is and issues no
    collectives: another rank may be gone.
    """
    stage, part = STAGES[number], run.stage(number)
    folder = run.run / f"stage{number}"
    layout = load_layout(run.engine.ds_config)
    manifest = Manifest.load(run.data.folder)
    num_steps = part.steps(num_samples := manifest.records(stage.split))
    world = join(run.engine.timeout_minutes)
    with Watch(world, run.engine.timeout_minutes) as watch, owned(run, world):
        open_log(folder / "log", world)
        check_negatives(run, number, manifest)
        found = find_checkpoint(run, number, world, force=force)
        origin = found or starting_point(run, number, world)
        data = open_stage(run, stage, origin, world, resumed=found is not None, force=force)
        start = step_of(found) if found else 0
        encoder = text_encoder(run)
        # Before the engine: a loader process is a fork, and would keep the pages that training
        # writes over, which is as much memory again.
        feed = open_feed(
            run,
            stage,
            encoder,
            rank=world.rank,
            world=world.size,
            start=start,
            stop=num_steps,
            fingerprint=data,
        )
        engine = build_engine(run, stage, layout, world, origin)
        counters = load_checkpoint(found, engine, world)
        note_start(folder, start, origin, world)
        watch.mark(start, "starts")
        log.info(
            "stage %d: world size %d, %s, %d samples, steps %d to %d",
            number,
            world.size,
            engine,
            num_samples,
            start,
            num_steps,
        )
        if start < num_steps:
            rehearse(engine, stage, run, encoder, world)
        step, stopped, sample = start, False, draw_sample(run, world)
        meter = Meter(folder, start=start, stop=num_steps, every=run.every.log, world=world)
        saver = Saver(run, number, engine, world)
        guard = Guard(run.guard, counters, folder, start, world)
        with meter, Preemption(world) as preemption, saver:
            examiner = Examiner(run, number, engine, encoder, sample, world, watch, preemption)
            while step < num_steps and not stopped:
                lr = learning_rate(step, num_steps, part.optim)
                values = take_step(engine, stage, run, feed, lr, world, guard, watch)
                step += 1
                warn_without(step, values, first=step == start + 1)
                saver.poll()
                meter.log(step, {**values, "save_seconds": saver.seconds})
                saves = step % run.every.save == 0 or step == num_steps
                figures: Figures = {}
                stopped = preemption.agreed()
                if not stopped and examiner.due(step, saves):
                    meter.evaluation(step, figures := examiner.examine(step))
                    stopped = preemption.agreed()
                if saves or stopped:
                    watch.mark(step, "saves")
                    saver.save(step, guard.state(), figures)
    leave()
    return step == num_steps


@contextlib.contextmanager
def owned(run: RunConfig, world: World) -> Iterator[None]:
    """Write in the run folder, which rank 0 owns for all ranks: no two stages do so at once."""
    cure = "wait until it has ended, or give another run folder with run=..."
    with (
        writing(run.run),
        lock_folder(run.run, cure=cure) if world.first else contextlib.nullcontext(),
    ):
        yield


def take_step(
    engine: Engine,
    stage: Stage,
    run: RunConfig,
    feed: Iterator[Work],
    lr: float,
    world: World,
    guard: Guard,
    watch: Watch,
) -> dict[str, float | list[float]]:
    """One optimizer step: wait for work, learn, update. Returns the step's metrics."""
    began = time.perf_counter()
    watch.mark(watch.step + 1, "waits for data")
    work = next(feed)
    waited = time.perf_counter() - began
    watch.mark(work.step + 1, "learns")
    stats = stage.learn(engine, work, run, world)
    watch.mark(work.step + 1, "updates")
    norm, applied = engine.step(lr, guard.judge(stats["loss"]))
    seconds = time.perf_counter() - began
    own = [0.0] * world.size
    own[world.rank] = watch.own_seconds(seconds)
    tokens, samples, skipped, *ranks = world.sum(work.num_tokens, work.samples, work.skipped, *own)
    guard.count(work, applied, int(skipped), run.data.folder, stage.split)
    part = run.stage(stage.number)
    return {
        **stats,
        "grad_norm": norm,
        "lr": lr,
        "samples": (work.step + 1) * part.samples_per_step,
        "skipped": skipped,
        "skipped_samples": guard.samples,
        "skipped_updates": guard.total,
        "tokens_per_second": tokens / seconds,
        "samples_per_second": samples / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": waited,
        "memory_gib": memory_gib(),
        **stragglers(ranks),
    }


def check_backbone(run: RunConfig, number: int, world: World) -> None:
    """Check that the prepared backbone can go through stage `number`. All ranks call it.

    Raises ConfigError when its sequences have more tokens than the backbone has positions, or when
    stage 1 has no head to train.
    """
    world.barrier()  # rank 0 has prepared it
    folder, what = run.run / "backbone", f"model.backbone={run.model.backbone!r}"
    lengths = {"model.max_length": run.model.max_length}
    if number == 1:
        lengths["stage1.max_target_length"] = run.stage1.max_target_length
        if not Card.load(folder).head:
            raise ConfigError(
                f"{what} holds no language-model head (lm_head.weight) and its config.json does "
                "not tie one to the embeddings: stage 1 trains it, so give the folder of the whole "
                "causal LM, or train stage 2 alone with stage2.from=backbone"
            )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=run.model.trust_remote_code)
    check_positions(what, config, lengths)


def build(
    run: RunConfig, stage: Stage, layout: Layout, world: World, origin: Path | None = None
) -> tuple[Engine, TextEncoder]:
    """The engine around the embedder, and the encoder of its prepared tokenizer."""
    return build_engine(run, stage, layout, world, origin), text_encoder(run)


def text_encoder(run: RunConfig) -> TextEncoder:
    """The encoder of the prepared backbone's tokenizer."""
    return TextEncoder(
        load_tokenizer(run.run / "backbone"),
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
        pool_instruction=run.model.pool_instruction,
    )


def build_engine(
    run: RunConfig, stage: Stage, layout: Layout, world: World, origin: Path | None = None
) -> Engine:
    """The engine around the embedder, with the weights of `origin`, a checkpoint or a folder.

    origin None: what the stage starts from at step 0.
    """
    origin = origin or starting_point(run, stage.number, world)
    weights = origin / "model" if (origin / "model").is_dir() else origin
    backbone = run.run / "backbone"
    make = functools.partial(
        build_embedder,
        backbone,
        activation_checkpointing=run.model.activation_checkpointing,
        trust_remote_code=run.model.trust_remote_code,
    )
    if layout.width == 2 and world.device.type == "cpu" and environment.cpu_lacks_bf16():
        log.warning(
            "engine.ds_config=%s: this CPU has no instructions for bf16 and takes several times as "
            "long as in fp32; take zero3_cpu",
            run.engine.ds_config,
        )
    seed_all(run.seed)
    return Engine(
        make,
        Origin(weights, spare=backbone if stage.number == 2 else None),
        layout=layout,
        optim=run.stage(stage.number).optim,
        world=world,
        adapt=adapting(run, backbone),
    )


def seed_all(seed: int) -> None:
    """Begin every random generator of this process alike, so that two runs end in equal states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def open_stage(
    run: RunConfig, stage: Stage, origin: Path, world: World, *, resumed: bool, force: bool
) -> str:
    """Compare where the stage starts with the recipe, then write what the run folder needs.

    All ranks call it. Returns the fingerprint of the data. Raises what `provenance.check_origin`,
    `open_run_folder` and `provenance.begin` raise.
    """
    provenance.check_origin(run, origin, world, prepared=False, force=force)
    if world.first:
        open_run_folder(run)
    check_backbone(run, stage.number, world)
    provenance.check_origin(run, origin, world, prepared=True, force=force)
    begun = None
    if world.first:
        begun = provenance.begin(run, stage.number, stage.split, origin, resumed=resumed)
    return str(world.share(begun and begun.fingerprint))


def open_run_folder(run: RunConfig) -> None:
    """Rank 0: the resolved recipe first, then the environment, then the prepared backbone."""
    write_text(run.run / "recipe.yaml", run.dump())
    submitted = Path(os.environ.get("LBR_SUBMIT_SCRIPT", ""))
    if submitted.is_file():  # SLURM's copy of the job script; a container may not see it
        text = submitted.read_text(encoding="utf-8", errors="replace")
        write_text(run.run / "submit.sbatch", mask_secrets(text))
    write_json(run.run / "environment.json", environment.describe(), indent=2)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)


class _LogFile(logging.FileHandler):
    """A log file whose disk may fill up: a line says so once, and training is not disturbed."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in place of an error of `emit`."""
        if not self.told:
            self.told = True
            print(f"{self.baseFilename}: log lines are lost ({sys.exc_info()[1]})", file=sys.stderr)


def open_log(folder: Path, world: World) -> None:
    """Every rank writes a file; rank 0 also speaks on the terminal (set up by the command line)."""
    folder.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger("lbr_ds")
    handler = _LogFile(folder / f"rank-{world.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(mask_record)
    root.addHandler(handler)
    if not world.first:
        for other in list(root.handlers):
            if other is not handler:
                root.removeHandler(other)
    log.info("rank %d of %d, process %d on %s", world.rank, world.size, os.getpid(), os.uname()[1])
