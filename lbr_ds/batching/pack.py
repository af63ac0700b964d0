"""Sequences -> one packed batch: no padding anywhere but inside attention.

A packed batch is one row of T tokens, the sequences one after another, positions starting at 0 in
each. Attention is told by `Segments` which rows attend together:

1. `[X ; B]` of a sequence is one causal segment.
2. Y of a cut sequence is the tail of a second causal segment `[B ; Y]`: B's rows are copied, and
   the copy's outputs dropped. So Y sees B and earlier Y, never X, and both kinds are *plain causal
   attention over equal queries and keys*: no mask is ever built, any fast kernel serves.
3. Y of a sequence that is not cut simply lengthens the first segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching.encode import Sequence

# A kernel call costs about as much as this many query-key pairs: fewer calls may fill that many up.
_PAIRS_PER_CALL = 2048


@dataclass(frozen=True)
class Spread:
    """The rows of a batch laid out for a kernel, and back.

    take (P,) int64: the batch's row behind each kernel row. put (T,) int64: for each row of the
    batch, the kernel row that holds its output. twice, again (C,) int64: the rows of the batch that
    stand a second time (B's), and the kernel rows where they do.
    """

    take: Tensor
    put: Tensor
    twice: Tensor
    again: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a packed batch attend together.

    flat: segment after segment, nothing between (P = S rows); starts (G+1,) int32: where each
    begins. longest: tokens of the longest segment. identity: flat is the batch itself.
    grid: for kernels that take rectangles: segments of like length together, short ones filled up
    at the end. shapes: the (n, L) of each rectangle, one after the other in grid's rows.
    lengths (G,) int64: tokens of each segment in grid's order, for kernels that need a mask.
    """

    flat: Spread
    starts: Tensor
    longest: int
    identity: bool
    grid: Spread
    shapes: tuple[tuple[int, int], ...]
    lengths: Tensor


@dataclass(frozen=True)
class Bags:
    """The words that the ends of contexts are to tell: one entry a word, bag after bag.

    read (N,) int64: a row of `PackedBatch.read` for each of the N bags. bag (W,) int64: whose word.
    word (W,) int64: its id.
    """

    read: Tensor
    bag: Tensor
    word: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """What the model takes.

    ids, positions (1, T) int64. read (R,) int64: rows whose final state is read: those that predict
    a target id, or each sequence's last row when there are no targets. targets (R,) int64 or None.
    starts (N+1,) int64: where each sequence begins, for mean pooling. bags: None where none is.
    unpooled (N,) int64: rows at the start of each sequence that mean pooling leaves out, or None.
    """

    ids: Tensor
    positions: Tensor
    segments: Segments
    read: Tensor
    targets: Tensor | None
    starts: Tensor
    bags: Bags | None = None
    unpooled: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.starts) - 1

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return _moved(self, device)


def _moved(part: Any, device: torch.device) -> Any:
    """A copy of a dataclass of tensors on `device`."""
    values = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        elif is_dataclass(value):
            value = _moved(value, device)
        values[f.name] = value
    return type(part)(**values)


def pack(sequences: list[Sequence]) -> PackedBatch:
    """One packed batch; generative when any sequence has a target, else for embedding."""
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
        segments=_segments(sequences),
        read=torch.tensor(read if generative else [s - 1 for s in starts[1:]]),
        targets=torch.tensor(targets) if generative else None,
        starts=torch.tensor(starts),
        bags=_bags(bagged, bags),
        unpooled=torch.tensor(unpooled) if any(unpooled) else None,
    )


def _bags(read: list[int], bags: list[list[int]]) -> Bags | None:
    if not bags:
        return None
    sizes = torch.tensor([len(bag) for bag in bags])
    owner = torch.arange(len(bags)).repeat_interleave(sizes)
    return Bags(torch.tensor(read), owner, torch.tensor([word for bag in bags for word in bag]))


def _segments(sequences: list[Sequence]) -> Segments:
    first: list[int] = []  # the batch's row at which each segment begins
    lengths: list[int] = []
    copies: list[int] = []  # how many rows at the segment's begin stand in the one before it too
    begin = 0
    for seq in sequences:
        context, target = len(seq.context), len(seq.target)
        if target and not seq.cut:
            context, target = context + target, 0
        first.append(begin)
        lengths.append(context)
        copies.append(0)
        if target:
            first.append(begin + context - seq.num_bottleneck)
            lengths.append(seq.num_bottleneck + target)
            copies.append(seq.num_bottleneck)
        begin += context + target
    told = np.array([first, lengths, copies])
    order, shapes = _rectangles(lengths)
    widths = np.array([width for count, width in shapes for _ in range(count)])
    starts = np.cumsum([0, *lengths])
    flat = _spread(told, told[1], begin)
    return Segments(
        flat=flat,
        starts=torch.from_numpy(starts.astype(np.int32)),
        longest=max(lengths),
        identity=len(flat.take) == begin,
        grid=_spread(told[:, order], widths, begin),
        shapes=shapes,
        lengths=torch.from_numpy(told[1][order]),
    )


def _spread(told: np.ndarray, widths: np.ndarray, num_rows: int) -> Spread:
    """Segments one after the other, each filled up to its width by its own last row.

    told (3, G): where each begins in the batch, its length, its copied rows. The filling stands
    behind its segment, where the causal flag hides it; a last row of another segment could bring a
    NaN with it, which no weight of zero would stop.
    """
    first, lengths, copies = (np.repeat(x, widths) for x in told)
    inside = np.arange(len(first)) - np.repeat(np.cumsum(widths) - widths, widths)
    take = first + np.minimum(inside, lengths - 1)
    again = np.flatnonzero(inside < copies)
    once = np.flatnonzero((inside >= copies) & (inside < lengths))
    put = np.empty(num_rows, np.int64)
    put[take[once]] = once
    return Spread(*(torch.from_numpy(x) for x in (take, put, take[again], again)))


def _rectangles(lengths: list[int]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """(segments from long to short, the (n, L) of the rectangles that they fill in that order).

    A rectangle is closed when going on would fill up more pairs than another call costs.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shapes: list[tuple[int, int]] = []
    filled = 0
    for segment in order:
        length = lengths[segment]
        if shapes:
            count, width = shapes[-1]
            filled += (width * width - length * length) // 2
            if filled <= _PAIRS_PER_CALL:
                shapes[-1] = (count + 1, width)
                continue
        shapes.append((1, length))
        filled = 0
    return order, tuple(shapes)


def split_by_tokens(sequences: list[Sequence], budget: int) -> list[list[int]]:
    """Indices of `sequences` in order, cut into micro-batches of at most `budget` tokens.

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
    """Indices of `sequences` in as few micro-batches of at most `budget` tokens as best fit finds.

    The longest first, each into the fullest micro-batch that still takes it (best-fit decreasing:
    at most 11/9 of the fewest). A sequence longer than the budget makes a micro-batch of its own.
    Indices rise inside a micro-batch; the result depends on the lengths alone.
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
