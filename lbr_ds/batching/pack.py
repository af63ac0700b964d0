"""Sequences -> one packed batch: no padding anywhere but inside attention.

A packed batch is one row of T tokens, the sequences one after another, with positions that start at
0 in each. Its `segments` tell attention which rows attend to each other
(`objectives/ib_segments.py`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lbr_ds.batching.tokenizer import Sequence
from lbr_ds.objectives.ib_segments import Segments, ib_segments


@dataclass(frozen=True)
class Bags:
    """The tokens that the states at the ends of contexts have to predict.

    Attributes:
        read: (N,) int64, the row of `PackedBatch.read` whose state predicts each bag.
        tokens: (N, M) int64, the ids of each bag, padded with -1.
    """

    read: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """The input of the model: N sequences of T tokens together.

    Attributes:
        ids: (1, T) int64 token ids.
        positions: (1, T) int64 positions, which start at 0 in each sequence.
        segments: which rows attend to each other.
        read: (R,) int64, rows whose final state is read: those that predict a target, or each
            sequence's last row where there are no targets.
        targets: (R,) int64 token ids, or None.
        starts: (N+1,) int64, where each sequence begins, for mean pooling.
        bags: what the bag-of-words loss predicts, or None.
        unpooled: (N,) int64, rows at the start of each sequence that mean pooling leaves out, or
            None.
        kind: (R,) int64, the kind of each target's sequence, or None: no statistics by kind.
        num_kinds: How many kinds there are.
    """

    ids: Tensor
    positions: Tensor
    segments: Segments
    read: Tensor
    targets: Tensor | None
    starts: Tensor
    bags: Bags | None = None
    unpooled: Tensor | None = None
    kind: Tensor | None = None
    num_kinds: int = 0

    @property
    def kinds(self) -> tuple[Tensor, int] | None:
        """`kind` and `num_kinds` in one."""
        return None if self.kind is None else (self.kind, self.num_kinds)

    @property
    def supervised(self) -> int:
        """The number of targets."""
        return 0 if self.targets is None else len(self.targets)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on another device; from pinned memory the host does not wait."""
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


T = TypeVar("T")


def with_tensors(part: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of dataclasses and lists of tensors, with every tensor changed."""
    whole: Any = part
    if isinstance(whole, Tensor):
        whole = change(whole)
    elif isinstance(whole, list):
        whole = [with_tensors(value, change) for value in whole]
    elif is_dataclass(whole):
        values = {f.name: with_tensors(getattr(whole, f.name), change) for f in fields(whole)}
        whole = type(part)(**values)
    return cast("T", whole)


def pack(sequences: list[Sequence], num_kinds: int = 0) -> PackedBatch:
    """Pack sequences into one batch: generative if any has a target, else for embedding.

    num_kinds: With targets, how many kinds of sequences the loss is also summed for.
    """
    ids: list[int] = []
    positions: list[int] = []
    read: list[int] = []
    targets: list[int] = []
    starts = [0]
    bagged: list[int] = []
    bags: list[list[int]] = []
    for seq in sequences:
        start = len(ids)
        ids += seq.context + seq.target
        positions += range(len(seq))
        if seq.target:
            # The last row of the context predicts Y's first id, each Y but the last the next one.
            first = start + len(seq.context) - 1
            if seq.bag:
                bagged.append(len(read))
                bags.append(seq.bag)
            read += range(first, first + len(seq.target))
            targets += seq.target
        starts.append(len(ids))
    generative = bool(targets)
    unpooled = [seq.unpooled for seq in sequences]
    return PackedBatch(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        segments=ib_segments(
            [len(seq.context) for seq in sequences],
            [len(seq.target) for seq in sequences],
            num_bottleneck=[seq.num_bottleneck for seq in sequences],
            cut=[seq.cut for seq in sequences],
        ),
        read=torch.tensor(read if generative else [s - 1 for s in starts[1:]]),
        targets=torch.tensor(targets) if generative else None,
        starts=torch.tensor(starts),
        bags=_bags(bagged, bags),
        unpooled=torch.tensor(unpooled) if any(unpooled) else None,
        kind=_kinds(sequences) if num_kinds and generative else None,
        num_kinds=num_kinds,
    )


def _kinds(sequences: list[Sequence]) -> Tensor:
    """Return the kind of each target."""
    return torch.tensor([seq.kind for seq in sequences for _ in seq.target])


def _bags(read: list[int], bags: list[list[int]]) -> Bags | None:
    if not bags:
        return None
    most = max(map(len, bags))
    return Bags(torch.tensor(read), torch.tensor([bag + [-1] * (most - len(bag)) for bag in bags]))


def split_by_tokens(sequences: list[Sequence], budget: int) -> list[list[int]]:
    """Return the indices of `sequences` in order, split into batches of at most `budget` tokens.

    A sequence longer than the budget makes a micro-batch of its own.
    """
    batches: list[list[int]] = []
    tokens = budget + 1
    for index, seq in enumerate(sequences):
        if tokens + len(seq) > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += len(seq)
    return batches


def fill_by_tokens(sequences: list[Sequence], budget: int) -> list[list[int]]:
    """Return the indices of `sequences` in few micro-batches of at most `budget` tokens.

    Best-fit decreasing: the longest first, each into the fullest micro-batch that has room for it
    (at most 11/9 of the fewest possible). A sequence longer than the budget makes a micro-batch of
    its own. Indices ascend inside a micro-batch; the result depends on the lengths alone.
    """
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        tokens = len(sequences[index])
        at = bisect_left(room, (tokens, 0))
        left, number = room.pop(at) if at < len(room) else (budget, len(batches))
        if number == len(batches):
            batches.append([])
        batches[number].append(index)
        insort(room, (left - tokens, number))
    return [sorted(batch) for batch in batches]
