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
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lbr_ds.batching.encode import Sequence

_PAD_WASTE = 0.25  # a group of segments is closed when padding would exceed this share


@dataclass(frozen=True)
class Segments:
    """Which rows of a packed batch attend together.

    rows (S,) int64: the batch's row behind each segment row, segment after segment; B's rows of a
    cut sequence stand twice. starts (G+1,) int32: where each segment begins in `rows`.
    keep (T,) int64: for each row of the batch, the segment row that holds its output.
    longest: tokens of the longest segment. identity: rows is 0..T-1, so nothing need be moved.
    groups: for kernels that take rectangles: (n, L) int64 indices into `rows`, segments of like
    length together, a short one filled up with its own last row; flat (S,): where each segment
    row lands in the groups laid end to end.
    """

    rows: Tensor
    starts: Tensor
    keep: Tensor
    longest: int
    identity: bool
    groups: tuple[Tensor, ...]
    flat: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """What the model takes.

    ids, positions (1, T) int64. read (R,) int64: rows whose final state is read: those that predict
    a target id, or each sequence's last row when there are no targets. targets (R,) int64 or None.
    starts (N+1,) int64: where each sequence begins, for mean pooling.
    """

    ids: Tensor
    positions: Tensor
    segments: Segments
    read: Tensor
    targets: Tensor | None
    starts: Tensor

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
        elif isinstance(value, tuple):
            value = tuple(v.to(device, non_blocking=True) for v in value)
        elif isinstance(value, Segments):
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
    for seq in sequences:
        start = len(ids)
        ids += seq.context + seq.target
        positions += range(len(seq))
        if seq.target:
            # The last row of the context predicts Y's first id, each Y but the last the next one.
            first = start + len(seq.context) - 1
            read += range(first, first + len(seq.target))
            targets += seq.target
        starts.append(len(ids))
    generative = bool(targets)
    return PackedBatch(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        segments=_segments(sequences),
        read=torch.tensor(read if generative else [s - 1 for s in starts[1:]]),
        targets=torch.tensor(targets) if generative else None,
        starts=torch.tensor(starts),
    )


def _segments(sequences: list[Sequence]) -> Segments:
    rows: list[Tensor] = []
    keep: list[Tensor] = []
    begin = end = 0  # next row of the batch, next segment row
    for seq in sequences:
        context, target = len(seq.context), len(seq.target)
        if target and not seq.cut:
            context, target = context + target, 0
        rows.append(torch.arange(begin, begin + context))
        keep.append(torch.arange(end, end + context))
        end += context
        if target:
            bottleneck = seq.num_bottleneck
            second = bottleneck + target
            rows.append(torch.arange(begin + context - bottleneck, begin + context + target))
            keep.append(torch.arange(end + bottleneck, end + second))
            end += second
        begin += context + target
    lengths = torch.tensor([len(r) for r in rows])
    starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
    starts[1:] = lengths.cumsum(0)
    groups, flat = _group(starts[:-1], lengths)
    return Segments(
        rows=torch.cat(rows),
        starts=starts.to(torch.int32),
        keep=torch.cat(keep),
        longest=int(lengths.max()),
        identity=end == begin,
        groups=groups,
        flat=flat,
    )


def _group(starts: Tensor, lengths: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Rectangles of segments of like length, and where each segment row lands in them."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    groups: list[Tensor] = []
    flat = torch.empty(int(lengths.sum()), dtype=torch.int64)
    offset = 0
    while order:
        width = int(lengths[order[0]])
        used = taken = 0
        for segment in order:
            used += int(lengths[segment])
            if used < (1 - _PAD_WASTE) * width * (taken + 1):
                break
            taken += 1
        chosen = torch.tensor(order[:taken])
        order = order[taken:]
        # Fill with the segment's own last row: under a causal mask no real row sees it.
        inside = torch.minimum(torch.arange(width), lengths[chosen, None] - 1)
        groups.append(starts[chosen, None] + inside)
        real = torch.arange(width) < lengths[chosen, None]
        flat[groups[-1][real]] = offset + real.flatten().nonzero().flatten()
        offset += taken * width
    return tuple(groups), flat


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
