"""Gradient caching: a contrastive loss over more sequences than fit in memory (Gao et al. 2021).

InfoNCE needs the vectors of the whole step at once, and so would the graph of every encoder call.
By the chain rule the gradient splits at the vectors v (arXiv 2101.06983, section 3.2):

    dL/dtheta = sum_chunks  (dL/dv_chunk) . (dv_chunk/dtheta)

1. Encode every chunk without a graph. 2. Compute the loss of all vectors and its gradient with
respect to them. 3. Encode each chunk again, and backpropagate its part of that gradient. Only the
vectors and their gradient, (N, D) each, grow with the step. Steps 1 and 2:

    >>> import torch
    >>> from lbr_ds.objectives.gradient_caching import chunk_loss, vector_gradients
    >>> _ = torch.manual_seed(0)
    >>> model, texts = torch.nn.Linear(5, 3), torch.randn(6, 5)
    >>> chunks = [torch.tensor([0, 4]), torch.tensor([1, 2, 3]), torch.tensor([5])]
    >>> def loss_of(vectors):
    ...     loss = (vectors @ vectors.T).logsumexp(1).sum()
    ...     return loss, {"loss": loss.detach()}
    >>> gradients, stats = vector_gradients(lambda i: model(texts[chunks[i]]), chunks, loss_of)

Step 3:

    >>> for rows in chunks:
    ...     chunk_loss(model(texts[rows]), gradients[rows]).backward()
    >>> loss, _ = loss_of(model(texts))
    >>> (whole,) = torch.autograd.grad(loss, model.weight)
    >>> torch.allclose(model.weight.grad, whole, atol=1e-5)
    True

Both encodings of a chunk must agree: give dropout the same seed each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Stats = TypeVar("Stats")


def vector_gradients(
    encode: Callable[[int], Tensor],
    members: Sequence[Tensor],
    loss: Callable[[Tensor], tuple[Tensor, Stats]],
    count: int | None = None,
) -> tuple[Tensor, Stats]:
    """Return the gradient of the loss with respect to every vector, (N, D), and the loss's stats.

    Args:
        encode: takes the number of a chunk and returns its vectors, (n, D); called without a graph.
        members: for each chunk the rows of its vectors among all N, int64.
        loss: takes all vectors, (N, D), and returns a scalar and anything else.
        count: chunks to encode, where that is more than `members` has: under ZeRO-3 all ranks must
            run the same number. The vectors of the others are dropped.
    """
    vectors: Tensor | None = None
    with torch.no_grad():
        for index in range(len(members) if count is None else count):
            part = encode(index)
            if vectors is None:
                vectors = part.new_empty(sum(len(rows) for rows in members), part.shape[1])
            if index < len(members):
                vectors[members[index]] = part
    assert vectors is not None
    vectors.requires_grad_()
    value, stats = loss(vectors)
    (gradients,) = torch.autograd.grad(value, vectors)
    return gradients, stats


def chunk_loss(vectors: Tensor, gradients: Tensor) -> Tensor:
    """Return a scalar whose gradient with respect to `vectors` is `gradients`, both (n, D)."""
    return (vectors * gradients).sum()
