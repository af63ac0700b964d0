"""What the model in training makes of held-out texts, between two steps.

The task is the final one (`evaluate/judgements.py`), on a sample unless told otherwise, with the
same scores and the same measures of the space. All ranks share the encoding through the engine, in
micro-batches of training's size, so memory is bounded as in a step.

Nothing of training changes: no generator is drawn from, the module's mode is put back, and a
forward without a graph leaves no gradient. A signal ends an evaluation after the micro-batch in
hand.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, TextEncoder, pack
from lbr_ds.batching.generative import draw, generative_sequence
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World, shared
from lbr_ds.errors import DataError
from lbr_ds.evaluate import geometry
from lbr_ds.evaluate.judgements import Judgements, read_held_out
from lbr_ds.evaluate.retrieval_metrics import rank_scores
from lbr_ds.records import Record
from lbr_ds.train.deepspeed.engine import Engine
from lbr_ds.train.preempt import Preemption
from lbr_ds.train.stages import agreed_count, cut
from lbr_ds.train.watch import Watch

log = logging.getLogger(__name__)
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """Texts and judgements, and the records whose queries they are, in the order of those."""

    judged: Judgements
    records: list[Record]


class _Signalled(Exception):
    """All ranks raise it at the same micro-batch."""


def draw_sample(run: RunConfig, world: World) -> Sample | None:
    """The held-out sample of a run, the same at every evaluation; None: there is nothing to judge.

    Rank 0 reads the eval split, once; all ranks call it. What is wrong with that split is said and
    does not end the training.
    """
    if run.every.evaluate is None:
        return None
    found = world.share(_read(run) if world.first else None)
    if isinstance(found, str):
        log.warning("training goes without evaluation: %s", found)
        return None
    assert isinstance(found, Sample)
    return found


def _read(run: RunConfig) -> Sample | str:
    """The sample, or why there is none."""
    part = run.evaluation
    try:
        asked = read_held_out(run.data.folder, run.data.cache_gib)[0]
    except DataError as error:
        return str(error)
    judged, record = asked.judged, dict(zip(asked.judged.queries, asked.records, strict=True))
    if part.max_queries is not None:
        judged = judged.choose(judged.sample(part.max_queries, run.seed))
    if part.max_passages is not None:
        judged = judged.narrow(part.max_passages, run.seed)
    return Sample(judged, [record[i] for i in judged.queries])


@dataclass
class Examiner:
    """Judges the engine's module as it is now. sample None: it never does."""

    run: RunConfig
    stage: int
    engine: Engine
    encoder: TextEncoder
    sample: Sample | None
    world: World
    watch: Watch
    preemption: Preemption
    step: int = 0  # being judged

    def due(self, step: int, saves: bool) -> bool:
        """Whether to judge after optimizer step `step`; saves: a checkpoint follows."""
        every = self.run.every.evaluate
        return self.sample is not None and (saves or (isinstance(every, int) and step % every == 0))

    def examine(self, step: int) -> Figures:
        """The figures after `step`, on rank 0; {} elsewhere, and when a signal came in between.

        All ranks call it. Scores (`rank_scores`), geometry (`geometry.measure`), in stage 1 the
        losses of `_losses`; how many queries and passages, and the seconds that it took. None for
        what is not defined, as of vectors that are not finite.
        """
        assert self.sample is not None
        began, judged = time.perf_counter(), self.sample.judged
        figures: Figures = {}
        self.step = step
        try:
            with self.engine.looking():
                vectors = shared(
                    self.world, [*judged.queries.values(), *judged.documents.values()], self._encode
                )
                if self.stage == 1:
                    figures |= self._losses()
        except _Signalled:
            log.info("step %d: a signal ended the evaluation", step)
            return {}
        finally:
            self.watch.pause()
        if not self.world.first:
            return {}
        figures |= _judge(vectors, judged)
        sizes = {"queries": len(judged.queries), "passages": len(judged.documents)}
        seconds = round(time.perf_counter() - began, 3)
        return {**{k: _finite(v) for k, v in figures.items()}, **sizes, "seconds": seconds}

    def _encode(self, texts: list[str]) -> np.ndarray:
        """(n, D) float32; every rank calls it, with texts of its own."""
        batches, members = cut(self.encoder.embed(texts), self._budget)
        rows = [vectors.float().cpu() for vectors in self._forwards(batches, batches[0])]
        found = torch.empty(len(texts), rows[0].shape[1])
        found[torch.cat(members)] = torch.cat(rows)
        return found.numpy()

    def _losses(self) -> Figures:
        """Loss on the held-out Y, per token: as it is learnt, and with the bottleneck hidden.

        `loss_without_bottleneck`: B's rows are zeroed for Y, in the one sense that leaves attention
        well defined: their keys and values are not among those that Y's rows see, in any layer. So
        Y is told from itself alone, at the same positions. Y's first token is predicted by the last
        row of B itself, in both losses alike: the difference is what the others read out of B.
        Objectives that do not cut Y off from X have no such loss.
        """
        weights, whole = self.run.stage1.objective, []
        assert self.sample is not None
        for place, record in enumerate(self.sample.records):
            whole.append(
                generative_sequence(
                    record,
                    draw(weights, self.run.seed, place),
                    self.encoder,
                    turn=0,
                    max_target_length=self.run.stage1.max_target_length,
                )
            )
        kinds = {"loss": whole}
        if any(sequence.cut for sequence in whole):
            # Without bottleneck rows to copy, the segment of a cut Y is Y alone (`batching.pack`).
            kinds["loss_without_bottleneck"] = [
                replace(sequence, num_bottleneck=0) if sequence.cut else sequence
                for sequence in whole
            ]
        targets = sum(len(sequence.target) for sequence in whole)
        found: Figures = {}
        for name, sequences in kinds.items():
            order = sorted(sequences, key=len, reverse=True)
            batches, _ = cut(order[self.world.rank :: self.world.size], self._budget)
            # A rank with no sequence of its own still runs along.
            mine = sum(loss.item() for loss in self._forwards(batches, pack(order[-1:])))
            found[name] = self.world.sum(mine)[0] / targets
        return found

    def _forwards(self, batches: list[PackedBatch], spare: PackedBatch) -> Iterator[Tensor]:
        """The output of each batch; ranks with fewer of them run the spare one along (ZeRO-3)."""
        for index in range(agreed_count(batches, self.world)):
            if self.preemption.agreed():
                raise _Signalled
            self.watch.mark(self.step, "evaluates")
            own = index < len(batches)
            output = self.engine((batches[index] if own else spare).to(self.world.device))
            if own:
                yield output

    @property
    def _budget(self) -> int:
        return self.run.stage(self.stage).micro_batch_tokens


def _judge(vectors: np.ndarray, judged: Judgements) -> Figures:
    """vectors (Q + N, D): of the queries, then of the documents."""
    queries, passages = np.split(vectors, [len(judged.queries)])
    if not np.isfinite(vectors).all():
        names = (
            "recall_at_10",
            "ndcg_at_10",
            "separation_ratio",
            "alignment",
            "uniformity",
            "effective_rank",
        )
        return dict.fromkeys(names)
    return {
        **rank_scores(queries, passages, judged),
        **geometry.measure(queries, passages, *judged.places()),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
