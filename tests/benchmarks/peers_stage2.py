"""Rows of suite `peers`: stage 2 against sentence-transformers' trainer, its plain and cached loss.

Both sides learn from the same batch, again and again: same weights, texts, fp32, AdamW, clipping,
InfoNCE at one temperature. A side's step is all of it: tokens from texts, forward, backward,
update, and what its trainer does around it. The steps take turns inside one process: when theirs is
done, its callback runs ours. All losses are compared, the first before any figure counts.

Left at their defaults: everything of theirs that is not named here. Ours: DeepSpeed ZeRO-3 as
`lbr-ds train` has it without a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import datasets
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer import losses
from transformers import TrainerCallback

from lbr_ds.bench.measure import ROUNDS, Row, ratio
from lbr_ds.config import RunConfig
from lbr_ds.distributed import join
from lbr_ds.errors import LbrError
from lbr_ds.exporting import export
from lbr_ds.records import Record
from lbr_ds.shards import Sample, Step
from lbr_ds.training.loop import take_step
from lbr_ds.training.session import build_engine, build_session
from tests.benchmarks.texts import MAX_LENGTH, backbone, pairs, with_stage2

LR = 1e-5
CLOSE = 1e-3  # largest difference of a step's losses
PLAIN, CACHED = 16, 48  # pairs of a step
QUICK = {"rounds": 2, "plain": 4, "cached": 6, "num_layers": 2, "max_length": 64}
MINI = 16  # texts a forward of their cached loss; ours: as many of full length


def rows(
    data: Path | None = None,
    rounds: int = ROUNDS,
    plain: int = PLAIN,
    cached: int = CACHED,
    num_layers: int = 6,
    max_length: int = MAX_LENGTH,
) -> list[Row]:
    """stage2_over_st and stage2_cached_over_st_cached. data: see `material.pairs`.

    Raises LbrError when the two sides' losses differ.
    """
    made = []
    run = backbone(num_layers, max_length)
    for measure, count, mini in (
        ("stage2_over_st", plain, None),
        ("stage2_cached_over_st_cached", cached, MINI),
    ):
        records = pairs(data, count)
        found, tokens = _side_by_side(measure, run, records, mini, rounds)
        name = "Cached" * bool(mini) + "MultipleNegativesRankingLoss"
        made.append(
            ratio(
                measure,
                found,
                goal=1.8,
                better="higher",
                floor=1.3,
                about=f"samples/s over SentenceTransformerTrainer with {name}"
                f"{f' (mini_batch_size {mini})' if mini else ''}; {count} pairs, {tokens} tokens",
            )
        )
    return made


def _side_by_side(
    measure: str, run: RunConfig, records: list[Record], mini: int | None, rounds: int
) -> tuple[list[tuple[float, float]], int]:
    """(samples/s of ours and of theirs, of each round; tokens of a step)."""
    with tempfile.TemporaryDirectory() as folder:
        # One forward for the plain row; for the cached one as many tokens as MINI texts of theirs
        # can have at most.
        budget = (mini * run.model.max_length) if mini else 1 << 24
        optim = run.stage2.optim.model_copy(update={"weight_decay": 0.0})  # theirs goes elsewhere
        run = with_stage2(run, micro_batch_tokens=budget, optim=optim)
        exported = Path(folder) / "model"
        export(run.run / "backbone", exported)
        world = join(1)
        ours = _Ours(run, records, world)
        theirs = SentenceTransformer(str(exported), trust_remote_code=False)
        turns = _Turns(ours)
        with no_local_rank():
            trainer = _trainer(theirs, run, records, mini, rounds + 1, turns, Path(folder))
        with _without_stdout():
            trainer.train()
    for step, (a, b) in enumerate(zip(ours.losses, turns.losses, strict=True)):
        if not abs(a - b) <= CLOSE * max(1.0, abs(b)):
            raise LbrError(f"{measure}: at step {step + 1} our loss is {a:.5f}, theirs {b:.5f}")
    seconds = list(zip(ours.seconds, turns.seconds, strict=True))[1:]  # the first warms up
    return [(len(records) / a, len(records) / b) for a, b in seconds], ours.tokens


@contextlib.contextmanager
def no_local_rank() -> Iterator[None]:
    """Hide a world of one rank from libraries that take LOCAL_RANK as the sign of a launcher."""
    kept = os.environ.pop("LOCAL_RANK")
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = kept


class _Ours:
    """Our trainer's own step on one batch, from texts on."""

    def __init__(self, run: RunConfig, records: list[Record], world: Any) -> None:
        samples = [Sample(lane, 0, record, 0, lane) for lane, record in enumerate(records)]
        self.batch = Step(0, samples, 0)
        self.session = build_session(run, 2, build_engine(run, 2, world))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens = 0

    def step(self) -> None:
        begin = perf_counter()
        session = self.session
        work = session.stage.collate(session.run, session.tokenizer, self.batch)
        session.feed = iter([work])
        values = take_step(session, LR)
        self.seconds.append(perf_counter() - begin)
        self.losses.append(cast("float", values["loss"]))
        self.tokens = work.num_tokens


class _Turns(TrainerCallback):
    """After each of their steps, one of ours; their time runs from the end of ours."""

    def __init__(self, ours: _Ours) -> None:
        self.ours = ours
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = self.begin or perf_counter()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        self.seconds.append(perf_counter() - self.begin)
        self.ours.step()
        a, b = self.ours.losses[0], self.losses[0]
        if not abs(a - b) <= CLOSE:
            raise LbrError(f"the first losses differ: ours {a:.5f}, theirs {b:.5f}")
        self.begin = perf_counter()


def _trainer(
    model: SentenceTransformer,
    run: RunConfig,
    records: list[Record],
    mini: int | None,
    steps: int,
    turns: _Turns,
    folder: Path,
) -> SentenceTransformerTrainer:
    """Theirs: a data set of exactly one batch, so that each epoch is one step on all of it."""
    optim = run.stage2.optim
    scale = 1 / run.stage2.temperature
    loss: Any = losses.MultipleNegativesRankingLoss(model, scale=scale)
    if mini is not None:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=mini)
    arguments = Arguments(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=len(records),
        num_train_epochs=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        max_grad_norm=optim.clip,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
    )
    columns = {"anchor": [r.query for r in records], "positive": [r.positives[0] for r in records]}
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(columns), loss=loss
    )
    trainer.add_callback(turns)
    return trainer


@contextlib.contextmanager
def _without_stdout() -> Any:
    """Their trainer prints each log line on stdout, which is for results."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
