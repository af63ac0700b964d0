"""Evaluate the model in training on held-out texts, between two steps.

The task, the scores and the geometry are those of `lbr-ds eval` (`evaluation/judgements.py`), by
default on a sample. All ranks encode a share each, through the engine, in micro-batches of
training's size, so memory is bounded as in a training step.

Training is not affected: no random generator is used, the module's mode is restored, and a forward
without a graph leaves no gradient. A signal ends an evaluation after the current micro-batch.
"""

from __future__ import annotations

import functools
import logging
import math
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, pack
from lbr_ds.batching.generative import draw, generative_sequence
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import DataError
from lbr_ds.evaluation import geometry
from lbr_ds.evaluation.across_ranks import encode_across_ranks
from lbr_ds.evaluation.judgements import Judgements, read_held_out
from lbr_ds.evaluation.retrieval_metrics import rank_scores
from lbr_ds.instructions import bare
from lbr_ds.records import Record
from lbr_ds.runs import evaluations
from lbr_ds.training.stages import agreed_count
from lbr_ds.training.work import split_into_micro_batches

if TYPE_CHECKING:
    from lbr_ds.training.session import Session

log = logging.getLogger(__name__)
Figures = dict[str, float | None]
EXAMPLE_COLUMNS = ("query", "nearest answer", "its rank", "first", "second", "third")
_EXAMPLES, _EXAMPLE_LETTERS = 8, 300


@dataclass(frozen=True)
class HeldOutSample:
    """Held-out queries and passages with their relevance judgements.

    Attributes:
        judged: Texts and judgements.
        records: The records that the queries come from, in the order of the queries.
    """

    judged: Judgements
    records: list[Record]


class _SignalReceived(Exception):
    """Raised on all ranks at the same micro-batch."""


def read_held_out_sample(run: RunConfig, world: World) -> HeldOutSample | None:
    """Read the held-out sample of a run, the same at every evaluation. All ranks call it.

    Rank 0 reads the eval split, once. A fault of that split is logged and does not end the
    training.

    Returns:
        The sample; None where there is nothing to evaluate on.
    """
    if run.every.evaluate is None:
        return None
    sample = world.share(_read(run) if world.first else None)
    if isinstance(sample, str):
        log.warning("training without evaluation: %s", sample)
        return None
    assert isinstance(sample, HeldOutSample)
    return sample


def _read(run: RunConfig) -> HeldOutSample | str:
    """Return the sample, or why there is none."""
    part = run.evaluation
    try:
        split = read_held_out(run.data.folder, run.data.cache_gib)[0]
    except DataError as error:
        return str(error)
    judged, record = split.judged, dict(zip(split.judged.queries, split.records, strict=True))
    if part.max_queries is not None:
        judged = judged.select(judged.sample(part.max_queries, run.seed))
    if part.max_passages is not None:
        judged = judged.limit_documents(part.max_passages, run.seed)
    return HeldOutSample(judged, [record[i] for i in judged.queries])


def evaluate(session: Session, *, checkpoint_due: bool) -> Figures | None:
    """Evaluate the model on the held-out sample and write the figures, if that is due.

    It is due before every checkpoint, and every `every.evaluate` steps where that is a number. All
    ranks call it.

    Returns:
        The figures, on rank 0; {} elsewhere and when nothing is due. None on all ranks when a
        signal prevented the evaluation: `evaluate_resumed` makes it when the stage resumes.
    """
    if session.held_out is None or not _due(session, checkpoint_due):
        return {}
    if session.preemption.agreed():
        return None
    figures = measure(session, session.held_out)
    session.meter.evaluation(session.step, figures or {})
    return figures


def evaluate_resumed(session: Session) -> bool:
    """Make the evaluation that a signal prevented before the stage was resumed, if there is one.

    The stage then has the evaluations of an uninterrupted one, and ends at the same step. All ranks
    call it before the first step.

    Returns:
        False when a signal prevented it again.
    """
    if not session.unevaluated:
        return True
    made = session.world.first and session.step in evaluations(session.meter.folder)
    if session.world.share(made):
        return True
    return evaluate(session, checkpoint_due=True) is not None


def patience_exhausted(session: Session, *, checkpoint_due: bool) -> bool:
    """Return whether the last `stage2.patience` evaluations brought no higher nDCG@10.

    It follows from the stage's evaluations on disk, so a stage that has ended this way does not
    continue when it is started again. All ranks call it after `evaluate`.
    """
    patience = session.run.stage2.patience
    if session.stage.number == 1 or patience is None or not _due(session, checkpoint_due):
        return False
    rows = evaluations(session.meter.folder) if session.world.first else {}
    values = [row.get("ndcg_at_10") or 0.0 for row in rows.values()]
    without_gain = len(values) - 1 - values.index(max(values)) if values else 0
    if not session.world.share(without_gain >= patience):
        return False
    log.info(
        "stage 2 ends at step %d of %d: nDCG@10 has not risen in the last %d evaluations "
        "(stage2.patience)",
        session.step,
        session.num_steps,
        patience,
    )
    return True


def _due(session: Session, checkpoint_due: bool) -> bool:
    every = session.run.every.evaluate
    asked = checkpoint_due or (isinstance(every, int) and session.step % every == 0)
    return session.held_out is not None and asked


def measure(session: Session, sample: HeldOutSample) -> Figures | None:
    """Measure the session's model on `sample`. All ranks call it.

    Returns:
        On rank 0 the scores (`rank_scores`), the geometry of the vectors (`geometry.measure`), the
        losses of `_losses` where stage 1's loss is trained, the number of queries and passages, and
        the seconds taken; None for a figure that is not defined, for example of vectors that are
        not finite. {} on other ranks; None on all when a signal ended the evaluation.
    """
    began, judged, run = time.perf_counter(), sample.judged, session.run
    texts = [*judged.queries.values(), *judged.documents.values()]
    figures: Figures = {}
    try:
        with session.engine.evaluation_mode():
            vectors = encode_across_ranks(session.world, texts, functools.partial(_encode, session))
            if 1 in run.parts(session.stage.number):
                figures |= _losses(session, sample.records)
    except _SignalReceived:
        log.info("step %d: a signal ended the evaluation", session.step)
        return None
    finally:
        session.watch.pause()
    if not session.world.first:
        return {}
    figures |= _scores(vectors, judged)
    session.meter.examples(session.step, EXAMPLE_COLUMNS, examples(vectors, judged, run.seed))
    sizes = {"queries": len(judged.queries), "passages": len(judged.documents)}
    seconds = round(time.perf_counter() - began, 3)
    return {**{k: _finite(v) for k, v in figures.items()}, **sizes, "seconds": seconds}


def _encode(session: Session, texts: list[str]) -> np.ndarray:
    """Return (n, D) float32; every rank calls it with texts of its own."""
    sequences = session.tokenizer.embed(texts)
    batches, members = split_into_micro_batches(sequences, session.config.micro_tokens)
    rows = [vectors.float().cpu() for vectors in _forwards(session, batches, batches[0])]
    vectors = torch.empty(len(texts), rows[0].shape[1])
    vectors[torch.cat(members)] = torch.cat(rows)
    return vectors.numpy()


def _losses(session: Session, records: list[Record]) -> Figures:
    """Return the loss per token of the held-out Y, as trained and with the bottleneck hidden.

    For `loss_without_bottleneck` the rows of Y do not attend to the bottleneck's keys and values in
    any layer, so Y is predicted from itself alone, at the same positions. The first token of Y is
    predicted by the last bottleneck row in both losses: the difference is what the other tokens
    read from the bottleneck. Objectives that do not separate Y from X have no such loss.
    """
    run, world = session.run, session.world
    whole = [
        generative_sequence(
            record,
            draw(run.stage1.objective, run.seed, place),
            session.tokenizer,
            turn=0,
            max_target_length=run.stage1.max_target_length,
        )
        for place, record in enumerate(records)
    ]
    variants = {"loss": whole}
    if any(sequence.cut for sequence in whole):
        # Without bottleneck rows to copy, the segment of a cut Y is Y alone (`batching.pack`).
        variants["loss_without_bottleneck"] = [
            replace(sequence, num_bottleneck=0) if sequence.cut else sequence for sequence in whole
        ]
    targets = sum(len(sequence.target) for sequence in whole)
    figures: Figures = {}
    for name, sequences in variants.items():
        order = sorted(sequences, key=len, reverse=True)
        own = order[world.rank :: world.size]
        batches, _ = split_into_micro_batches(own, session.config.micro_tokens)
        # A rank without sequences of its own still takes part.
        total = sum(loss.item() for loss in _forwards(session, batches, pack(order[-1:])))
        figures[name] = world.sum(total)[0] / targets
    return figures


def _forwards(session: Session, batches: list[PackedBatch], spare: PackedBatch) -> Iterator[Tensor]:
    """Yield the output of each batch; ranks with fewer batches run `spare` meanwhile (ZeRO-3)."""
    for index in range(agreed_count(batches, session.world)):
        if session.preemption.agreed():
            raise _SignalReceived
        session.watch.mark(session.step, "evaluates")
        own = index < len(batches)
        output = session.engine.forward((batches[index] if own else spare).to(session.world.device))
        if own:
            yield output


def _scores(vectors: np.ndarray, judged: Judgements) -> Figures:
    """Return the scores of vectors (Q + N, D): of Q queries, then of N documents."""
    queries, passages = np.split(vectors, [len(judged.queries)])
    if not np.isfinite(vectors).all():
        return dict.fromkeys(("recall_at_10", "ndcg_at_10", *geometry.MEASURES))
    return {
        **rank_scores(queries, passages, judged),
        **geometry.measure(queries, passages, *judged.document_indices()),
    }


def examples(vectors: np.ndarray, judged: Judgements, seed: int) -> list[list[str | int]]:
    """Return a few queries with what the model finds, by EXAMPLE_COLUMNS.

    Args:
        vectors: (Q + N, D): of Q queries, then of N documents.
        judged: Their texts and judgements.
        seed: Of the choice of queries, the same at every evaluation.
    """
    if not np.isfinite(vectors).all():
        return []
    queries, passages = np.split(geometry.normalised(vectors), [len(judged.queries)])
    ids, row = list(judged.documents), {name: i for i, name in enumerate(judged.queries)}
    rows: list[list[str | int]] = []
    for chosen in judged.sample(_EXAMPLES, seed):
        cosines = passages @ queries[row[chosen]]
        order = np.argsort(-cosines, kind="stable")
        right = judged.relevant[chosen]
        rank = next(rank for rank, i in enumerate(order, 1) if ids[i] in right)
        answer = judged.documents[ids[order[rank - 1]]]
        found = [f"{cosines[i]:.3f} {_text(judged.documents[ids[i]])}" for i in order[:3]]
        found += [""] * (3 - len(found))
        rows.append([_text(judged.queries[chosen]), _text(answer), rank, *found])
    return rows


def _text(text: str) -> str:
    return textwrap.shorten(bare(text), _EXAMPLE_LETTERS, placeholder=" ...")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
