"""Which candidates are no negatives of a query: the mask of InfoNCE, a slice of rows at a time.

A candidate is masked for a query when it is

- a positive of a record of the query's `group`, on whatever rank, or
- the text of any of the query's own positives, whichever record brought it, or
- a placeholder for a hard negative that a record did not have.

Every other candidate is a negative, a mined hard negative too, unless `info_nce` has a `margin`.
Groups and texts are compared as 63-bit hashes (`batching.contrastive.hashed`), which all ranks
compute alike, so that only three integers per candidate have to be gathered.

    >>> import torch
    >>> from lbr_ds.objectives.false_negatives import FalseNegatives
    >>> mask = FalseNegatives(
    ...     group=torch.tensor([7, 8]),                   # of two queries
    ...     known=torch.tensor([[1, 3], [2, -1]]),        # texts that answer them; -1 fills up
    ...     groups=torch.tensor([7, 7, -1, -1]),          # of four candidates; -1: none
    ...     texts=torch.tensor([1, 2, 3, 9]),
    ...     real=torch.tensor([True, True, True, False]),
    ... )
    >>> mask(slice(0, 2)).int().tolist()
    [[1, 1, 1, 1], [0, 1, 0, 1]]

Pass it to `info_nce(..., mask=mask)`, which never masks a query's own positive.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FalseNegatives:
    """The mask of n queries and C candidates.

    Attributes:
        group: (n,) int64, the hash of each query's group.
        known: (n, P) int64, the hashes of all its positives; -1 fills up.
        groups: (C,) int64, the group of the record whose positive a candidate is; -1: none.
        texts: (C,) int64, the hash of each candidate's text.
        real: (C,) bool, False for a placeholder.
    """

    group: Tensor
    known: Tensor
    groups: Tensor
    texts: Tensor
    real: Tensor

    def __call__(self, rows: slice) -> Tensor:
        """Return (rows, C) bool, True where a candidate is no negative of a query."""
        mask = self.group[rows, None] == self.groups
        mask |= ~self.real
        for column in self.known[rows].T:
            mask |= column[:, None] == self.texts
        return mask
