"""Turn a rank's share of a step into packed micro-batches, in a loader process.

Which sequences share a micro-batch follows from their lengths alone, so that there are few
micro-batches and they are full (`fill_by_tokens`). A rank tokenises only the samples of its own
lanes: to balance tokens between ranks, each rank would have to read the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, starmap
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, Sequence, TextTokenizer, fill_by_tokens, pack
from lbr_ds.batching.contrastive import Pairs, contrastive_pairs
from lbr_ds.batching.crop import crop
from lbr_ds.batching.generative import draw, generative_sequence, with_bag
from lbr_ds.batching.pack import with_tensors
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.records import Record
from lbr_ds.shards import Sample, Step
from lbr_ds.shards.teacher import teacher_vectors
from lbr_ds.training.by_source import (
    SourceCounts,
    count_by_source,
    kinds_of,
    query_tokens,
    with_sources,
)

SampleName = tuple[str, int, int]  # record id, number of its shard, row in the shard


class Counts(NamedTuple):
    """What the shares of all ranks hold together: sums, but for `micro_batches`.

    Attributes:
        micro_batches: the most that any rank has.
        targets: supervised tokens (stage 1).
        bags: texts with a bag-of-words loss (stage 1).
        tokens: tokens that go through the model.
        samples: samples.
        skipped: samples that could not be read.
        by_source: what each source has, where there are several.
    """

    micro_batches: int
    targets: int
    bags: int
    tokens: int
    samples: int
    skipped: int
    by_source: Mapping[str, SourceCounts] = MappingProxyType({})


@dataclass(frozen=True)
class Work:
    """A rank's share of one step, packed into micro-batches.

    Attributes:
        step: Number of the step, from 0.
        samples: How many samples the share has.
        skipped: How many samples of the share could not be read.
        micro_batches: The sequences, packed; on the CPU.
        members: For each micro-batch the indices of its sequences within the share, int64.
        names: Of each sample, for messages.
        pairs: Stage 2: which sequence is a query and which of the others are its candidates.
        by_source: What the share has of each source, where there are several.
        replay: Stage 2: the share of the batch of stage 1 that the step trains as well.
    """

    step: int
    samples: int
    skipped: int
    micro_batches: list[PackedBatch]
    members: list[Tensor]
    names: list[SampleName]
    pairs: Pairs | None = None
    by_source: dict[str, SourceCounts] = field(default_factory=dict)
    replay: Work | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that go through the model."""
        return sum(m.num_tokens for m in self.micro_batches)

    @property
    def num_targets(self) -> int:
        """Number of supervised tokens (stage 1)."""
        return sum(m.supervised for m in self.micro_batches)

    def pin_memory(self) -> Work:
        """Return the share in pinned memory, from which a GPU copies while it computes."""
        return with_tensors(self, lambda tensor: tensor.pin_memory())

    def counts(self, world: World) -> Counts:
        """Return what all ranks hold, by one exchange on the host. All ranks call it."""
        own = (
            len(self.micro_batches),
            self.num_targets,
            self.num_bags,
            self.num_tokens,
            self.samples,
            self.skipped,
        )
        found = world.exchange(*own, *chain(*self.by_source.values()))
        sums = [int(number) for number in found.sum(0)]
        each = zip(*[iter(sums[len(own) :])] * len(SourceCounts._fields), strict=True)
        by_source = zip(self.by_source, starmap(SourceCounts, each), strict=True)
        _, targets, bags, tokens, samples, skipped = sums[: len(own)]
        most = int(found[:, 0].max())
        return Counts(most, targets, bags, tokens, samples, skipped, dict(by_source))

    @property
    def num_bags(self) -> int:
        """Number of texts with a bag-of-words loss (stage 1)."""
        return sum(len(m.bags.read) for m in self.micro_batches if m.bags is not None)


def sample_names(step: Step) -> list[SampleName]:
    """Return what names a step's samples in messages."""
    return [(sample.record.id, sample.shard, sample.row) for sample in step.samples]


def split_into_micro_batches(
    sequences: list[Sequence], max_tokens: int, num_kinds: int = 0
) -> tuple[list[PackedBatch], list[Tensor]]:
    """Pack sequences into micro-batches of at most `max_tokens` tokens; num_kinds: see `pack`.

    Returns:
        The micro-batches, and for each of them the indices of its sequences, int64.
    """
    chosen = fill_by_tokens(sequences, max_tokens)
    batches = [pack([sequences[i] for i in numbers], num_kinds) for numbers in chosen]
    return batches, [torch.tensor(numbers) for numbers in chosen]


def collate_generative(
    run: RunConfig, tokenizer: TextTokenizer, step: Step, budget: int | None = None
) -> Work:
    """Stage 1: draw each sample's objective by (seed, epoch, step, lane), and pack [X ; B ; Y].

    The draw does not depend on earlier steps, so a mixture of objectives resumes exactly.

    Args:
        run: The recipe.
        tokenizer: Turns texts into token ids.
        step: This rank's samples.
        budget: Most tokens of a micro-batch; None: `stage1.micro_batch_tokens`.
    """
    sequences, kinds = [], kinds_of(step)
    for sample, kind in zip(step.samples, kinds, strict=True):
        key = (run.seed, sample.epoch, step.index, sample.lane)
        objective = draw(run.stage1.objective, *key)
        sequence = generative_sequence(
            sample.record,
            objective,
            tokenizer,
            turn=sample.epoch,
            max_target_length=run.stage1.max_target_length,
        )
        sequence = with_bag(sequence, tokenizer) if run.stage1.bag_of_words else sequence
        sequences.append(replace(sequence, kind=kind))
    budget, names = budget or run.stage1.micro_tokens, step.sources
    batches, members = split_into_micro_batches(sequences, budget, len(names))
    targets = [len(one.target) for one in sequences]
    counts = count_by_source(names, kinds, map(len, sequences), targets)
    return Work(
        step.index,
        len(sequences),
        step.skipped,
        batches,
        members,
        sample_names(step),
        by_source=counts,
    )


def _pair(run: RunConfig, sample: Sample) -> Record:
    """Return the record with a query and positives, as `stage2.pairs` says."""
    if run.stage2.pairs == "given":
        return sample.record
    bounds = run.stage2.crop
    return crop(sample.record, bounds.query, bounds.positive, seed=run.seed, epoch=sample.epoch)


def collate_contrastive(run: RunConfig, tokenizer: TextTokenizer, step: Step) -> Work:
    """Stage 2: pack queries and candidates [X ; B]; a micro-batch may have some of each.

    A share that fits into micro_batch_tokens is one micro-batch; a larger one is split into
    micro-batches of chunk_tokens.
    """
    records = [_pair(run, sample) for sample in step.samples]
    turns = [sample.epoch for sample in step.samples]
    distillation, data = run.stage2.distillation, run.data
    pairs = contrastive_pairs(
        records,
        turns,
        tokenizer,
        run.stage2.num_negatives,
        scored=distillation.by_scores,
        teacher=teacher_vectors(data.folder, data.cache_gib).of
        if distillation.by_vectors
        else None,
    )
    budget = whole = run.stage2.micro_tokens
    if sum(len(sequence) for sequence in pairs.sequences) > whole:
        budget = run.stage2.chunk_tokens or whole
    batches, members = split_into_micro_batches(pairs.sequences, budget)
    kinds = kinds_of(step)
    counts = count_by_source(step.sources, kinds, query_tokens(pairs), [0] * len(kinds))
    pairs = with_sources(pairs, run, records, kinds)
    pairs = replace(pairs, sequences=[])  # they are in the micro-batches
    return Work(
        step.index,
        len(records),
        step.skipped,
        batches,
        members,
        sample_names(step),
        pairs,
        counts,
    )
