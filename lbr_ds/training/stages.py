"""The two stages as values: how each turns samples into work, and work into gradients.

`collate` packs a rank's share of a step into micro-batches (in a loader process, see work.py).
`forward_backward` runs the forward and backward passes and leaves the gradient of the whole step's
loss on the engine. The result depends neither on how a step is split into micro-batches nor on how
many ranks share it. Which split a stage trains on is in config/stages.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, Sequence, TextTokenizer, pack
from lbr_ds.batching.contrastive import Pairs
from lbr_ds.config import DistillationConfig, RunConfig, stages
from lbr_ds.distributed import World
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.gradient_caching import chunk_loss, vector_gradients
from lbr_ds.objectives.info_nce import NO_PREFIXES, STATS, info_nce
from lbr_ds.shards import Step
from lbr_ds.training.distillation import distillation_loss
from lbr_ds.training.transfer import ahead
from lbr_ds.training.work import Counts, Work, collate_contrastive, collate_generative

if TYPE_CHECKING:
    from lbr_ds.training.session import Session

Stats = dict[str, float]
_NO_TEACHER = DistillationConfig()
_ADDED = ("tokens", "skipped")  # counts of a step that also has a batch of stage 1


@dataclass(frozen=True)
class Totals:
    """The sums of a step's statistics over this rank's samples.

    They stay on the device, so that micro-batches follow each other without waiting for it; the
    engine sums them over the ranks and reads them with the gradient's norm.

    Attributes:
        sums: (n,) float64, on the device.
        divisors: what the sum over the ranks of each named statistic is divided by.
        counts: what all ranks hold.
        known: statistics that need no sums.
    """

    sums: Tensor
    divisors: dict[str, float]
    counts: Counts
    known: Stats = field(default_factory=dict)

    def stats(self, sums: list[float]) -> Stats:
        """Return the statistics, from the sums over the ranks."""
        means = {
            name: number / divisor
            for (name, divisor), number in zip(self.divisors.items(), sums, strict=True)
            if divisor  # a step may have no sample of a source
        }
        by_source = {
            f"{what}/{name}": float(getattr(own, what))
            for what in ("samples", "tokens")
            for name, own in self.counts.by_source.items()
        }
        return {**means, **by_source, **self.known}

    def beside(self, other: Totals) -> Totals:
        """Return these of stage 2 with those of the batch of stage 1 that the step replays.

        Samples count once, as those of stage 2; tokens and skipped samples are those of both.
        """
        both = {name: getattr(self.counts, name) + getattr(other.counts, name) for name in _ADDED}
        renamed = {_replayed(name): divisor for name, divisor in other.divisors.items()}
        return Totals(
            torch.cat([self.sums, other.sums]),
            {**self.divisors, **renamed},
            self.counts._replace(**both),
            {**self.known, **other.known},
        )


def _replayed(name: str) -> str:
    """Return the name of a statistic of stage 1 beside those of stage 2, which has a loss too."""
    return f"generative_{name}" if name.split("/")[0] == "loss" else name


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        number: 1 or 2.
        split: The split of the prepared data that it trains on.
        collate: `collate(run, tokenizer, step)` packs a rank's share of a step.
        forward_backward: `forward_backward(session, work)` computes the gradient of a step and
            returns the sums of its loss and statistics. Nothing is read from the device.
    """

    number: int
    split: str
    collate: Callable[[RunConfig, TextTokenizer, Step], Work]
    forward_backward: Callable[[Session, Work], Totals]


def forward_backward_generative(
    session: Session, work: Work, scale: float = 1.0, *, last: bool = True
) -> Totals:
    """Stage 1: the mean loss over all supervised tokens of a step, and likewise over all bags.

    Args:
        session: The session.
        work: This rank's share of the batch.
        scale: Weight of the gradient.
        last: Whether the step ends with this batch.
    """
    engine, world = session.engine, session.world
    counts = work.counts(world)
    divisors: dict[str, float] = {"loss": counts.targets}
    divisors |= {f"loss/{name}": own.targets for name, own in counts.by_source.items()}
    # DeepSpeed averages over ranks; times size / targets makes that the mean over the step.
    weights = {0: scale * world.size / counts.targets}
    if counts.bags:
        bag = scale * session.run.stage1.bag_of_words
        weights[len(divisors)] = bag / counts.bags * world.size
        divisors["bag_loss"] = counts.bags
    totals = torch.zeros(len(divisors), dtype=torch.float64, device=world.device)
    for index, batch, included in micro_batches(session, work, counts.micro_batches):
        # The losses themselves are computed in model/head.py, inside the engine's forward.
        sums = torch.atleast_1d(engine.forward(batch))
        loss = sum(sums[i] * (w * included) for i, w in weights.items() if i < len(sums))
        engine.backward(loss, last=last and index == counts.micro_batches - 1)
        totals[: len(sums)] += sums.detach().double() * included
    return Totals(totals, divisors, counts, {"target_tokens": float(counts.targets)})


def forward_backward_contrastive(session: Session, work: Work) -> Totals:
    """Stage 2: InfoNCE over the whole step, in one forward if it fits, else by gradient caching.

    A batch of stage 1 comes first (`stage2.generative`): its gradients stay on the engine, and
    those of InfoNCE are added to them.
    """
    assert work.pairs is not None
    world, config = session.world, session.run.stage2
    replayed = None
    if work.replay is not None:
        replayed = forward_backward_generative(session, work.replay, config.generative, last=False)
    loss_of = functools.partial(
        contrastive_loss,
        pairs=work.pairs.to(world.device),
        world=world,
        temperature=config.temperature,
        margin=config.false_negative_margin,
        prefixes=config.matryoshka,
        distillation=config.distillation,
        sources=tuple(work.by_source),
    )
    counts = work.counts(world)
    if counts.micro_batches == 1:
        ((_, batch, _),) = micro_batches(session, work, 1)
        loss, stats = loss_of(session.engine.forward(batch))
        session.engine.backward(loss, last=True)
    else:
        stats = _backward_cached(session, work, counts.micro_batches, loss_of)
    sums = torch.stack([stats[name].double() for name in stats])
    own = {
        f"{name}/{source}": float(part.samples)
        for name in STATS[:2]
        for source, part in counts.by_source.items()
    }
    divisors = {name: own.get(name, float(counts.samples)) for name in stats}
    totals = Totals(sums, divisors, counts)
    return totals if replayed is None else totals.beside(replayed)


def contrastive_loss(
    vectors: Tensor,
    pairs: Pairs,
    world: World,
    *,
    temperature: float,
    margin: float | None = None,
    prefixes: Mapping[int, float] = NO_PREFIXES,
    distillation: DistillationConfig = _NO_TEACHER,
    sources: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return InfoNCE of this rank's queries against the candidates of all ranks.

    A teacher's loss is added with its weight; a query without one has 0 there.

    Args:
        vectors: (n + n * (1 + M), D) of unit length: the queries, then their candidates.
        pairs: the texts' hashes, which say which candidates are not negatives of a query; on the
            device of the vectors.
        world: this rank's place among all ranks.
        temperature: of queries without one of their own in `pairs`.
        margin: see `info_nce`.
        prefixes: see `info_nce`.
        distillation: the teacher's loss, and both weights.
        sources: what the numbers in `pairs.kind` mean, for statistics.

    Returns:
        The loss, whose mean over the ranks (DeepSpeed's average) is the mean over all queries, and
        statistics as sums over this rank's queries.
    """
    n, device = pairs.num_queries, vectors.device
    kinds = (pairs.kind, len(sources)) if sources and pairs.kind is not None else None
    candidates = world.gather(vectors[n:])
    groups, texts, real = world.gather(pairs.candidate_labels()).T.contiguous()
    mask = FalseNegatives(pairs.group, pairs.known, groups, texts, real > 0)
    loss, stats = info_nce(
        vectors[:n],
        candidates,
        temperature=temperature if pairs.temperature is None else pairs.temperature,
        positives=world.rank * len(pairs.text) + torch.arange(n, device=device),
        mask=mask,
        margin=margin,
        prefixes=prefixes,
        kinds=kinds,
        reduction="sum",
    )
    if distillation.loss:
        taught, more = distillation_loss(
            vectors,
            candidates,
            pairs,
            world,
            distillation,
            temperature=temperature,
            prefixes=prefixes,
        )
        loss = distillation.info_nce * loss + distillation.weight * taught
        stats = {**stats, **more}
    return loss / (n * world.size) * world.size, _named(stats, sources)


def _named(stats: dict[str, Tensor], sources: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the statistics with the names of sources in place of their numbers."""
    names = {
        f"{name}/{number}": f"{name}/{source}"
        for name in STATS[:2]
        for number, source in enumerate(sources)
    }
    return {names.get(name, name): value for name, value in stats.items()}


def _backward_cached(
    session: Session,
    work: Work,
    count: int,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """Gradient caching over `count` micro-batches (`objectives/gradient_caching.py`).

    Both encodings visit the modules in one order, so ZeRO-3's prefetch trace stays valid.
    """
    engine, device = session.engine, session.world.device
    members = [rows.to(device, non_blocking=True) for rows in work.members]
    encoded = micro_batches(session, work, count)

    def encode(index: int) -> Tensor:
        return engine.forward(next(encoded)[1])

    gradients, stats = vector_gradients(encode, members, loss_of, count)
    once = session.one_reduction
    with engine.coalesced_reduction() if once else contextlib.nullcontext():
        for index, batch, included in micro_batches(session, work, count):
            rows = members[index if included else 0]
            loss = chunk_loss(engine.forward(batch), gradients[rows]) * included
            engine.backward(loss, last=index == count - 1)
    return stats


def micro_batches(
    session: Session, work: Work, count: int
) -> Iterator[tuple[int, PackedBatch, float]]:
    """Yield (index, micro-batch on the device, weight of its loss) of `count` micro-batches.

    A rank with fewer micro-batches than the others repeats its first one with weight 0.0; the
    others have weight 1.0.

    Dropout is seeded by (seed, step, rank, index): gradient caching encodes a micro-batch twice and
    must drop the same values both times, and a resumed step must drop what it would have.
    """
    run, world, own = session.run, session.world, len(work.micro_batches)
    chosen = (work.micro_batches[index if index < own else 0] for index in range(count))
    for index, batch in enumerate(ahead(chosen, world.device)):
        if run.lora.rank is not None and run.lora.dropout:
            words = [run.seed % (1 << 32), work.step, world.rank, index]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        yield index, batch, float(index < own)


def agreed_count(batches: list[PackedBatch], world: World) -> int:
    """Return how many micro-batches every rank runs: ZeRO-3 hangs if the ranks differ."""
    return int(world.max(len(batches))[0])


def rehearse(session: Session) -> None:
    """Run the largest micro-batch once, with weight 0, so that memory errors occur at the start."""
    run, tokenizer = session.run, session.tokenizer
    eos = tokenizer.backend.eos_token_id
    ids = tokenizer.wrap([eos] * tokenizer.max_length)
    for part in run.parts(session.stage.number):
        target = [eos] * run.stage1.max_target_length if part == 1 else []
        sequence = Sequence(ids, tokenizer.bottleneck_of(ids), target, cut=run.bottleneck.count > 0)
        fits = max(1, session.config.micro_tokens // len(sequence))
        result = session.engine.forward(pack([sequence] * fits).to(session.world.device))
        # The zero gradients stay on the engine and the first real ones are added to them.
        session.engine.backward(result.sum() * 0.0, last=False)


STAGES = {
    1: Stage(1, stages.STAGES[1].split, collate_generative, forward_backward_generative),
    2: Stage(2, stages.STAGES[2].split, collate_contrastive, forward_backward_contrastive),
}
