"""Suite `peers`: our trainer against the trainers that people use today, and against a bare loop.

Both sides of a row have the same weights, texts, precision and optimizer; their losses are compared
at every step, and a difference ends the suite. `--data FILE` names the texts (records with queries
and answers); without it the demo's corpus serves.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from lbr_ds.batching import Sequence
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.bench.attention import dense_ib_mask
from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.prepare import prepare
from lbr_ds.distributed import join
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.plan.flops import Sizes, bottleneck_pairs, flops, sizes_of
from lbr_ds.training.deepspeed.engine import Engine
from lbr_ds.training.feed import open_feed
from lbr_ds.training.loop import take_step
from lbr_ds.training.session import Session, build_engine, build_session
from lbr_ds.training.work import Work, split_into_micro_batches
from tests.benchmarks import peers_stage2
from tests.benchmarks.texts import pairs

SAME_LOSS = 1e-3  # relative difference of two losses that counts as none
SAMPLES = 16  # a step of stage1_over_hf_dense
TARGET = 512  # tokens of an answer there, at most: the default of recipes
RECORDS = 500  # the corpus of trainer_over_bare_loop


QUICK = {"rounds": 1, "layers": 1, "stage2": peers_stage2.QUICK}


def suite(
    data: Path | None = None,
    rounds: int = ROUNDS,
    layers: int = 8,
    stage2: dict[str, Any] | None = None,
) -> list[Row]:
    """All rows. layers: of the 135M backbone in stage1_over_hf_dense; stage2: other sizes there."""
    return [
        stage1_over_hf_dense(data, rounds, layers),
        trainer_over_bare_loop(data, 5 * rounds),  # of a step each: its bound is a fine one
        *peers_stage2.rows(data, **{"rounds": rounds, **(stage2 or {})}),
    ]


def stage1_over_hf_dense(data: Path | None, rounds: int, layers: int) -> Row:
    """Tokens/s of stage 1 over Hugging Face's Trainer with a dense 4D mask on padded batches."""
    with tempfile.TemporaryDirectory() as folder:
        run = demo_run(
            Path(folder) / "run",
            [
                f"model.num_layers={layers}",
                "stage1.micro_batch_tokens=8192",
                "stage1.num_steps=1000",
                f"stage1.samples_per_step={SAMPLES}",
                f"stage1.max_target_length={TARGET}",
                "stage1.optim={lr: 1.0e-5, weight_decay: 0, clip: 1.0}",
            ],
        )
        session = build_session(run, 1, build_engine(run, 1, join(30)))
        records = pairs(data, SAMPLES * (rounds + 1))
        sequences = [
            generative_sequence(
                record, "ib_sft", session.tokenizer, turn=0, max_target_length=TARGET
            )
            for record in records
        ]
        batches = [sequences[i : i + SAMPLES] for i in range(0, len(sequences), SAMPLES)]
        losses: tuple[list[float], list[float]] = ([], [])
        ours = our_step(session, batches, losses)
        theirs = hugging_face_step(run, batches, losses)
        found = interleaved(ours, theirs, rounds)
        config = session.engine.engine.module.backbone.config.to_dict()
        return ratio(
            "stage1_over_hf_dense",
            [(b, a) for a, b in found],
            goal=2.5,
            better="higher",
            floor=1.5,
            theory=dense_over_ib(sizes_of(config), batches[1:]),
            about=f"tokens/s of whole steps, {SAMPLES} answers of at most {TARGET} tokens a step, "
            "ZeRO-3 on one rank over transformers.Trainer with a dense 4D mask, SDPA, padding to "
            "the longest; losses equal at every step; theory: FLOPs of a padded dense step / ours",
        )


def demo_run(folder: Path, overrides: list[str]) -> RunConfig:
    """The demo's run in `folder`, otherwise as `overrides` say, with its backbone prepared."""
    run = load("demo", [f"run={folder}", "model.max_length=512", *overrides])
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    return run


def our_step(
    session: Session,
    batches: list[list[Sequence]],
    losses: tuple[list[float], list[float]],
) -> Callable[[], float]:
    """Seconds of our next step, packing included."""

    def run_step() -> float:
        number = len(losses[0])
        batch = batches[number]
        begin = perf_counter()
        packed = split_into_micro_batches(batch, session.config.micro_tokens)
        session.feed = iter([Work(number, len(batch), 0, *packed, [])])
        values = take_step(session, session.config.optim.lr)
        seconds = perf_counter() - begin
        losses[0].append(cast("float", values["loss"]))
        compare(losses)
        return seconds

    return run_step


def hugging_face_step(
    run: RunConfig, batches: list[list[Sequence]], losses: tuple[list[float], list[float]]
) -> Callable[[], float]:
    """Seconds of the next step of transformers.Trainer, collation included, start-up not."""
    from transformers import (
        AutoModelForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Clock(TrainerCallback):
        begin = end = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.end = perf_counter()

    optim = run.stage1.optim
    with peers_stage2.no_local_rank():
        args = TrainingArguments(
            output_dir=str(run.run / "peer"),
            use_cpu=not torch.cuda.is_available(),
            max_steps=1,
            per_device_train_batch_size=SAMPLES,
            learning_rate=optim.lr,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            weight_decay=0.0,
            max_grad_norm=optim.clip,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        model = AutoModelForCausalLM.from_pretrained(
            run.run / "backbone",
            attn_implementation="sdpa",
            dtype=torch.float32,
            trust_remote_code=False,
        )
        stamps = Clock()
        trainer = Trainer(
            model, args, data_collator=dense_batch, train_dataset=batches[0], callbacks=[stamps]
        )

    trainer.remove_callback(PrinterCallback)

    def run_step() -> float:
        trainer.train_dataset = batches[len(losses[1])]
        with peers_stage2.no_local_rank():
            done = trainer.train()
        losses[1].append(done.training_loss)
        compare(losses)
        return stamps.end - stamps.begin

    return run_step


def dense_batch(sequences: list[Sequence]) -> dict[str, torch.Tensor]:
    """What the usual way feeds: ids, labels and the rule as (N, 1, L, L), filled up to L."""
    width = max(len(s) for s in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(sequences), 1, 1, 1).transpose(0, 1)
    mask = mask.reshape(len(sequences), 1, width, width).clone()
    for i, sequence in enumerate(sequences):
        n, context = len(sequence), len(sequence.context)
        tokens[i, :n] = torch.tensor(sequence.context + sequence.target)
        labels[i, context:n] = tokens[i, context:n]
        mask[i, 0, :n, :n] = dense_ib_mask(sequence)
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def compare(losses: tuple[list[float], list[float]]) -> None:
    """Raises RuntimeError when the newest losses of both sides differ."""
    ours, theirs = losses
    if len(ours) != len(theirs):
        return
    if not math.isclose(ours[-1], theirs[-1], rel_tol=SAME_LOSS):
        raise RuntimeError(
            f"step {len(ours)}: our loss is {ours[-1]}, the peer's {theirs[-1]}: not the same task"
        )


def dense_over_ib(shape: Sizes, batches: list[list[Sequence]]) -> float:
    """FLOPs of padded dense steps over those of packed ones."""
    dense = ours = 0
    for batch in batches:
        width = max(len(s) for s in batch)
        tokens = len(batch) * width
        dense += flops(shape, tokens=tokens, pairs=tokens * width, scored=tokens)
        for s in batch:
            source = len(s.context) - s.num_bottleneck
            ours += flops(
                shape,
                tokens=len(s),
                scored=len(s.target),
                pairs=bottleneck_pairs(source, s.num_bottleneck, len(s.target)),
            )
    return dense / ours


def trainer_over_bare_loop(data: Path | None, rounds: int) -> Row:
    """Seconds of our step, all included, over a loop that only calls the same DeepSpeed engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = rounds + 1
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(r.to_json() + "\n" for r in pairs(data, RECORDS)))
        run = demo_run(
            folder / "run",
            [
                f"data.folder={folder / 'data'}",
                f"data.sources=[{{path: '{corpus}'}}]",
                f"stage1.num_steps={total}",
                "model.max_length=64",
                "every.log=1",
            ],
        )
        prepare(run.data, run.seed)
        session = build_session(run, 1, build_engine(run, 1, join(30)))
        ready = list(feed(session))
        session.feed = feed(session)
        with session.watch, session.meter, session.preemption:

            def ours() -> float:
                begin = perf_counter()
                values = take_step(session, 1e-6)
                session.meter.log(session.step, values)
                session.preemption.agreed()
                return perf_counter() - begin

            found = interleaved(ours, bare_loop(session.engine, ready), rounds)
        return ratio(
            "trainer_over_bare_loop",
            found,
            goal=1.01,
            better="lower",
            floor=1.03,
            theory=1.0,
            about="a step of stage 1 (the demo's model and batch) with loader, metrics, guards and "
            "signals, over DeepSpeed's forward, backward and step on ready batches",
        )


def feed(session: Session) -> Iterator[Work]:
    """The work of all steps, as the trainer gets it."""
    run, stop = session.run, session.num_steps
    return open_feed(run, session.stage, session.tokenizer, session.world, start=0, stop=stop)


def bare_loop(engine: Engine, ready: list[Work]) -> Callable[[], float]:
    """Seconds of the next step by DeepSpeed's engine alone."""
    deepspeed, works = engine.engine, iter(ready)

    def run_step() -> float:
        begin = perf_counter()
        work = next(works)
        for index, batch in enumerate(work.micro_batches):
            last = index + 1 == len(work.micro_batches)
            deepspeed.set_gradient_accumulation_boundary(last)
            loss = deepspeed(batch.to(deepspeed.device))
            deepspeed.backward(loss / work.num_targets)
        deepspeed.step()
        return perf_counter() - begin

    return run_step
