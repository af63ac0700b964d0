"""Open a session: join the ranks, check what the stage starts from, and resume it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World, join
from lbr_ds.errors import ConfigError
from lbr_ds.lineage import fingerprint_of
from lbr_ds.model.bottleneck import Card, prepare_backbone
from lbr_ds.model.complete import check_positions
from lbr_ds.runs import EVALUATIONS, step_of
from lbr_ds.shards import Manifest
from lbr_ds.shards.in_use import in_use
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json, write_text
from lbr_ds.system.failures import writing
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.masking import mask_secrets
from lbr_ds.training import guard, meter
from lbr_ds.training.auto import settle
from lbr_ds.training.by_source import check_sources
from lbr_ds.training.checkpoint import provenance
from lbr_ds.training.checkpoint.resume import find_checkpoint, load_checkpoint
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.distillation import check_teacher
from lbr_ds.training.feed import open_feed
from lbr_ds.training.held_out import read_held_out_sample
from lbr_ds.training.logs import open_log
from lbr_ds.training.negatives import check_negatives
from lbr_ds.training.session import Session, build_engine, build_session, text_tokenizer
from lbr_ds.training.stages import STAGES, Stage
from lbr_ds.training.starts import note_start, starting_point
from lbr_ds.training.trackers import check_packages
from lbr_ds.training.watch import Watch

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_session(run: RunConfig, number: int, *, force: bool = False) -> Iterator[Session]:
    """Open the session in which stage `number` is trained; all ranks call it.

    The session is at the step of the newest complete checkpoint, or at step 0.

    Args:
        run: The recipe.
        number: 1 or 2.
        force: Resume even if the recipe or the data changed.
    """
    stage, folder = STAGES[number], run.run / f"stage{number}"
    load_layout(run.engine.ds_config)  # a wrong name is an error before the ranks meet
    check_packages(run.every.trackers)
    manifest = Manifest.load(run.data.folder)
    num_samples = manifest.records(stage.split)
    stop = run.stage(number).steps(num_samples)
    world = join(run.engine.timeout_minutes)
    with (
        Watch(world, run.engine.timeout_minutes) as watch,
        locked(run, world),
        in_use(manifest, *(STAGES[part].split for part in run.parts(number))),
    ):
        open_log(folder / "log", world)
        check_negatives(run, number, manifest)
        check_teacher(run, number, manifest, world)
        check_sources(run, manifest)
        checkpoint = find_checkpoint(run, number, world, force=force)
        origin = checkpoint or starting_point(run, number, world)
        start = step_of(checkpoint) if checkpoint else 0
        data = open_stage(run, stage, origin, world, resumed=checkpoint is not None, force=force)
        run, layout = settle(run, number, world, checkpoint)
        # Before the engine: a loader process is a fork, and would keep the pages that training
        # writes over, which is as much memory again.
        feed = open_feed(
            run, stage, text_tokenizer(run), world, start=start, stop=stop, fingerprint=data
        )
        engine = build_engine(run, number, world, layout=layout, origin=origin)
        counters = load_checkpoint(checkpoint, engine, world)
        session = build_session(run, number, engine, watch, feed=feed, start=start, num_steps=stop)
        session.guard.load_state_dict(counters)
        note_start(folder, start, origin, world)
        session.unevaluated = bool(counters.get("unevaluated"))
        session.held_out = read_held_out_sample(run, world)
        session.meter.trackers.sent = forget_steps_after(folder, start, world)
        watch.mark(start, "starts")
        log.info(
            "stage %d: world size %d, %s, %d samples, steps %d to %d",
            number,
            world.size,
            engine,
            num_samples,
            start,
            stop,
        )
        with session.meter, session.preemption, session.saver:
            yield session


def forget_steps_after(folder: Path, start: int, world: World) -> dict[str, int]:
    """Rank 0: drop the lines about steps after `start` from the files of a stage.

    Returns:
        The last step that each file was about.
    """
    names = (meter.METRICS, EVALUATIONS, guard.SKIPPED) if world.first else ()
    return {name: meter.forget_after(folder / name, start) for name in names}


@contextlib.contextmanager
def locked(run: RunConfig, world: World) -> Iterator[None]:
    """Lock the run folder, on rank 0 for all ranks: two stages never write it at the same time."""
    cure = "wait until it has ended, or give another run folder with run=..."
    with (
        writing(run.run),
        lock_folder(run.run, cure=cure) if world.first else contextlib.nullcontext(),
    ):
        yield


def check_backbone(run: RunConfig, number: int, world: World) -> None:
    """Check that the prepared backbone can be trained in stage `number`. All ranks call it.

    Raises:
        ConfigError: The stage's sequences have more tokens than the backbone has positions, or
            stage 1 has no head to train.
    """
    world.barrier()  # rank 0 has prepared it
    folder, what = run.run / "backbone", f"model.backbone={run.model.backbone!r}"
    lengths = {"model.max_length": run.model.max_length}
    if 1 in run.parts(number):
        lengths["stage1.max_target_length"] = run.stage1.max_target_length
        if not Card.load(folder).head:
            raise ConfigError(
                f"{what} has no language-model head (lm_head.weight) and its config.json does "
                "not tie one to the embeddings: stage 1 trains it, so give the folder of the whole "
                "causal LM, or train stage 2 only, with stage2.from=backbone and no "
                "stage2.generative"
            )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=run.model.trust_remote_code)
    check_positions(what, config, lengths)
    size = config.get_text_config().hidden_size
    if number == 2 and (longest := max(run.stage2.matryoshka, default=0)) >= size:
        raise ConfigError(
            f"stage2.matryoshka: {longest} is not shorter than the vectors of {what}, which have "
            f"{size} components; give lengths below {size}"
        )


def open_stage(
    run: RunConfig, stage: Stage, origin: Path, world: World, *, resumed: bool, force: bool
) -> str:
    """Check that `origin` fits the recipe, then write the run folder. All ranks call it.

    Args:
        run: The recipe.
        stage: The stage.
        origin: The checkpoint or folder of weights that the stage starts from.
        world: This rank's place.
        resumed: Whether `origin` is a checkpoint of this stage.
        force: Whether differences are only logged.

    Returns:
        The fingerprint of what the stage reads (`lineage.fingerprint_of`).
    """
    provenance.check_origin(run, origin, world, prepared=False, force=force)
    if world.first:
        open_run_folder(run)
    check_backbone(run, stage.number, world)
    provenance.check_origin(run, origin, world, prepared=True, force=force)
    data = None
    if world.first:
        data = provenance.begin(run, stage.number, stage.split, origin, resumed=resumed)
    return str(world.share(data and fingerprint_of(data, stage.number)))


def open_run_folder(run: RunConfig) -> None:
    """Write the resolved recipe, the environment, and the prepared backbone. Rank 0 calls it."""
    write_text(run.run / "recipe.yaml", run.dump())
    submitted = Path(os.environ.get("LBR_SUBMIT_SCRIPT", ""))
    if submitted.is_file():  # SLURM's copy of the job script; a container may not see it
        text = submitted.read_text(encoding="utf-8", errors="replace")
        write_text(run.run / "submit.sbatch", mask_secrets(text))
    write_json(run.run / "environment.json", environment.describe(), indent=2)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
