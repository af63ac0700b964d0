"""The information bottleneck as plain causal attention, without a mask (paper, section 3.2).

    X attends to earlier X;   B to X and earlier B;   Y to B and earlier Y, never to X.

Attention that is causal inside each of two segments is exactly that:

    segment 1   [ X ; B ]      rows of X and B, causal
    segment 2   [ B ; Y ]      B's rows copied in front of Y, causal; their outputs are dropped

So queries and keys are equal, no mask is built, and any fast causal kernel will do. Y of a sequence
that is not cut (plain causal learning) simply lengthens segment 1.

    >>> from lbr_ds.objectives.ib_segments import ib_segments
    >>> # One sequence of 2 tokens of X, 2 of B and 3 of Y: rows 0 to 6 of the batch.
    >>> segments = ib_segments([4], [3], num_bottleneck=[2], cut=[True])
    >>> segments.starts.tolist()                     # [X ; B] and [B ; Y], one after the other
    [0, 4, 9]
    >>> segments.flat.source.tolist()                # the batch's row behind each kernel row
    [0, 1, 2, 3, 2, 3, 4, 5, 6]
    >>> segments.flat.output.tolist()                # where each of the batch's rows is computed
    [0, 1, 2, 3, 6, 7, 8]

`model/attention.py` runs attention over such segments inside a transformers model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A kernel call costs about as much as this many query-key pairs: padding that costs less than that
# is worth a call saved.
_PAIRS_PER_CALL = 2048


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a batch are laid out for a kernel, and where its outputs are read.

    Attributes:
        source: (P,) int64, the batch's row behind each kernel row.
        output: (T,) int64, the kernel row that holds the output of each of the batch's rows.
        copied: (C,) int64, the rows of the batch that are laid out twice, those of B.
        copies: (C,) int64, the kernel rows of their copies, whose outputs are dropped.
    """

    source: Tensor
    output: Tensor
    copied: Tensor
    copies: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a packed batch attend to each other.

    Attributes:
        flat: one segment after the other, without padding (P = S rows).
        starts: (G+1,) int32, where each segment begins in `flat`.
        longest: tokens of the longest segment.
        identity: whether `flat` is the batch itself.
        grid: for kernels that take rectangles: segments of like length together, padded at the end.
        shapes: the (n, L) of each rectangle, one after the other in the rows of `grid`.
        lengths: (G,) int64, tokens of each segment in the order of `grid`.
        square_lengths: the sum of the squares of the segments' lengths.
    """

    flat: RowLayout
    starts: Tensor
    longest: int
    identity: bool
    grid: RowLayout
    shapes: tuple[tuple[int, int], ...]
    lengths: Tensor
    square_lengths: int

    @property
    def num_rows(self) -> int:
        """S, the rows of all segments."""
        return len(self.flat.source)


def ib_segments(
    contexts: Sequence[int],
    targets: Sequence[int],
    *,
    num_bottleneck: Sequence[int],
    cut: Sequence[bool],
) -> Segments:
    """Return the segments of sequences that are packed one after the other.

    Args:
        contexts: tokens of each sequence's `[X ; B]`.
        targets: tokens of its Y, which may be 0.
        num_bottleneck: tokens of its B, the last ones of the context.
        cut: whether its Y sees only B, and not X.
    """
    first: list[int] = []  # the batch's row at which each segment begins
    lengths: list[int] = []
    copies: list[int] = []  # rows at the segment's begin that are copies
    begin = 0
    for context, target, rows, is_cut in zip(contexts, targets, num_bottleneck, cut, strict=True):
        own = context if is_cut else context + target
        first.append(begin)
        lengths.append(own)
        copies.append(0)
        if target and is_cut:
            first.append(begin + context - rows)
            lengths.append(rows + target)
            copies.append(rows)
        begin += context + target
    table = np.array([first, lengths, copies])
    order, shapes = _rectangles(lengths)
    widths = np.array([width for count, width in shapes for _ in range(count)])
    flat = _row_layout(table, table[1], begin)
    return Segments(
        flat=flat,
        starts=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        longest=max(lengths),
        identity=len(flat.source) == begin,
        grid=_row_layout(table[:, order], widths, begin),
        shapes=shapes,
        lengths=torch.from_numpy(table[1][order]),
        square_lengths=sum(length * length for length in lengths),
    )


def _row_layout(segments: np.ndarray, widths: np.ndarray, num_rows: int) -> RowLayout:
    """Lay segments out one after the other, each padded to its width with its own last row.

    For X of 1 token, B of 2 and Y of 1, with widths (4, 3):

        batch rows     x0  b1  b2  y3
        kernel rows  |  0   1   2   3  |  4   5   6  |
        source       | x0  b1  b2  b2  | b1  b2  y3  |     kernel row 3 is padding
        output         0   1   2   6                       of x0, b1, b2, y3
        copied         b1  b2        copies   4   5

    Padding is behind its segment, where the causal flag hides it. It repeats a row of the same
    segment: that of another could bring a NaN, which even a weight of zero would let through.

    Args:
        segments: (3, G): where each begins in the batch, its length, its copied rows.
        widths: (G,) kernel rows of each.
        num_rows: rows of the batch.
    """
    first, lengths, num_copies = (np.repeat(x, widths) for x in segments)
    inside = np.arange(len(first)) - np.repeat(np.cumsum(widths) - widths, widths)
    source = first + np.minimum(inside, lengths - 1)
    copies = np.flatnonzero(inside < num_copies)
    computed = np.flatnonzero((inside >= num_copies) & (inside < lengths))
    output = np.empty(num_rows, np.int64)
    output[source[computed]] = computed
    return RowLayout(*(torch.from_numpy(x) for x in (source, output, source[copies], copies)))


def _rectangles(lengths: list[int]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Return (segments from long to short, the (n, L) of the rectangles that they fill in turn).

    A rectangle is closed when padding the next segment would cost more pairs than another call.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shapes: list[tuple[int, int]] = []
    padded = 0
    for segment in order:
        length = lengths[segment]
        if shapes:
            count, width = shapes[-1]
            padded += (width * width - length * length) // 2
            if padded <= _PAIRS_PER_CALL:
                shapes[-1] = (count + 1, width)
                continue
        shapes.append((1, length))
        padded = 0
    return order, tuple(shapes)
