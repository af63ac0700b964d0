"""The two stages as values: how each turns samples into work, and work into gradients.

`collate` packs a rank's share of a step into micro-batches (in a loader process, see work.py).
`forward_backward` runs the forward and backward passes and leaves the gradient of the whole step's
loss on the engine. The result depends neither on how a step is split into micro-batches nor on how
many ranks share it. Which split a stage trains on is in config/stages.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, Sequence, TextTokenizer, pack
from lbr_ds.batching.contrastive import Pairs
from lbr_ds.config import RunConfig, stages
from lbr_ds.distributed import World
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.gradient_caching import chunk_loss, vector_gradients
from lbr_ds.objectives.info_nce import NO_PREFIXES, info_nce
from lbr_ds.shards import Step
from lbr_ds.training.work import Work, collate_contrastive, collate_generative

if TYPE_CHECKING:
    from lbr_ds.training.session import Session

Stats = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        number: 1 or 2.
        split: The split of the prepared data that it trains on.
        collate: `collate(run, tokenizer, step)` packs a rank's share of a step.
        forward_backward: `forward_backward(session, work)` computes the gradient of a step and
            returns the step's loss and statistics, equal on all ranks.
    """

    number: int
    split: str
    collate: Callable[[RunConfig, TextTokenizer, Step], Work]
    forward_backward: Callable[[Session, Work], Stats]


def forward_backward_generative(session: Session, work: Work) -> Stats:
    """Stage 1: the mean loss over all supervised tokens of a step, and likewise over all bags."""
    engine, world = session.engine, session.world
    targets, bags = world.sum(work.num_targets, work.num_bags)
    weights = torch.tensor([1 / targets, session.run.stage1.bag_of_words / max(bags, 1)])
    count = agreed_count(work.micro_batches, world)
    totals = torch.zeros(2, dtype=torch.float64)
    for index in range(count):
        batch, included = micro_batch(session, work, index)
        # The losses themselves are computed in model/head.py, inside the engine's forward.
        sums = torch.atleast_1d(engine.forward(batch))
        # DeepSpeed averages over ranks; times size / targets makes that the mean over the step.
        loss = sums @ weights[: len(sums)].to(sums)
        engine.backward(loss * (included * world.size), last=index == count - 1)
        totals[: len(sums)] += sums.detach().double().cpu() * included
    loss_sum, bag_sum = world.sum(*totals.tolist())
    stats = {"loss": loss_sum / targets, "target_tokens": targets}
    return {**stats, "bag_loss": bag_sum / bags} if bags else stats


def forward_backward_contrastive(session: Session, work: Work) -> Stats:
    """Stage 2: InfoNCE over the whole step, in one forward if it fits, else by gradient caching."""
    assert work.pairs is not None
    world, config = session.world, session.run.stage2
    loss_of = functools.partial(
        contrastive_loss,
        pairs=work.pairs,
        world=world,
        temperature=config.temperature,
        margin=config.false_negative_margin,
        prefixes=config.matryoshka,
    )
    count = agreed_count(work.micro_batches, world)
    if count == 1:
        loss, stats = loss_of(session.engine.forward(micro_batch(session, work, 0)[0]))
        session.engine.backward(loss, last=True)
    else:
        stats = _backward_cached(session, work, count, loss_of)
    names = sorted(stats)
    sums = world.sum(*(float(stats[n]) for n in names), float(work.samples))
    return {name: value / sums[-1] for name, value in zip(names, sums, strict=False)}


def contrastive_loss(
    vectors: Tensor,
    pairs: Pairs,
    world: World,
    *,
    temperature: float,
    margin: float | None = None,
    prefixes: Mapping[int, float] = NO_PREFIXES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return InfoNCE of this rank's queries against the candidates of all ranks.

    Args:
        vectors: (n + n * (1 + M), D) of unit length: the queries, then their candidates.
        pairs: the texts' hashes, which say which candidates are not negatives of a query.
        world: this rank's place among all ranks.
        temperature: see `info_nce`.
        margin: see `info_nce`.
        prefixes: see `info_nce`.

    Returns:
        The loss, whose mean over the ranks (DeepSpeed's average) is the mean over all queries, and
        statistics as sums over this rank's queries.
    """
    n, device = pairs.num_queries, vectors.device
    candidates = world.gather(vectors[n:])
    groups, texts, real = world.gather(pairs.candidate_labels().to(device)).T.contiguous()
    mask = FalseNegatives(pairs.group.to(device), pairs.known.to(device), groups, texts, real > 0)
    loss, stats = info_nce(
        vectors[:n],
        candidates,
        temperature=temperature,
        positives=world.rank * len(pairs.text) + torch.arange(n, device=device),
        mask=mask,
        margin=margin,
        prefixes=prefixes,
        reduction="sum",
    )
    return loss / (n * world.size) * world.size, stats


def _backward_cached(
    session: Session,
    work: Work,
    count: int,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """Gradient caching over `count` micro-batches (`objectives/gradient_caching.py`).

    Both encodings visit the modules in one order, so ZeRO-3's prefetch trace stays valid.
    """
    engine = session.engine
    members = [rows.to(session.world.device) for rows in work.members]

    def encode(index: int) -> Tensor:
        return engine.forward(micro_batch(session, work, index)[0])

    gradients, stats = vector_gradients(encode, members, loss_of, count)
    with engine.coalesced_reduction():
        for index in range(count):
            batch, included = micro_batch(session, work, index)
            rows = members[index if included else 0]
            loss = chunk_loss(engine.forward(batch), gradients[rows]) * included
            engine.backward(loss, last=index == count - 1)
    return stats


def micro_batch(session: Session, work: Work, index: int) -> tuple[PackedBatch, float]:
    """Return micro-batch `index` on the device, and 1.0, the weight of its loss.

    A rank with fewer micro-batches than the others repeats its first one with weight 0.0.

    Dropout is seeded by (seed, step, rank, index): gradient caching encodes a micro-batch twice and
    must drop the same values both times, and a resumed step must drop what it would have.
    """
    run, world = session.run, session.world
    if run.lora.rank is not None and run.lora.dropout:
        words = [run.seed % (1 << 32), work.step, world.rank, index]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
    included = index < len(work.micro_batches)
    batch = work.micro_batches[index if included else 0]
    return batch.to(world.device), float(included)


def agreed_count(batches: list[PackedBatch], world: World) -> int:
    """Return how many micro-batches every rank runs: ZeRO-3 hangs if the ranks differ."""
    return int(world.max(len(batches))[0])


def rehearse(session: Session) -> None:
    """Run the largest micro-batch once, with weight 0, so that memory errors occur at the start."""
    run, tokenizer = session.run, session.tokenizer
    eos = tokenizer.backend.eos_token_id
    target = [eos] * run.stage1.max_target_length if session.stage.number == 1 else []
    ids = tokenizer.wrap([eos] * tokenizer.max_length)
    sequence = Sequence(ids, run.bottleneck.count, target, cut=run.bottleneck.count > 0)
    fits = max(1, session.config.micro_tokens // len(sequence))
    result = session.engine.forward(pack([sequence] * fits).to(session.world.device))
    # The zero gradients stay on the engine and the first real ones are added to them.
    session.engine.backward(result.sum() * 0.0, last=False)


STAGES = {
    1: Stage(1, stages.STAGES[1].split, collate_generative, forward_backward_generative),
    2: Stage(2, stages.STAGES[2].split, collate_contrastive, forward_backward_contrastive),
}
