"""The norm of a step's gradient, its clipping, and the decision whether the update is applied.

DeepSpeed 0.19's optimizers compute the norm tensor by tensor and read it from the device up to four
times. Here the squared norm of this rank's whole gradient and the sums of the step's statistics go
into one all-reduce, and the host reads the result once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_ds.distributed import World
from lbr_ds.training.deepspeed.flat_gradients import FlatGradients

Accept = Callable[[float, list[float]], bool]


class Judge:
    """Takes the place of a DeepSpeed optimizer's norm, clipping and search for overflow.

    The optimizers (stage3.py, stage_1_and_2.py: step) skip an update on all ranks, and clear the
    gradients, when the norm is infinite; so a refused update reports an infinite norm.

    Attributes:
        norm: of the last gradient, before clipping.
    """

    def __init__(
        self, optimizer: Any, stage: int, world: World, clip: float, flat: FlatGradients | None
    ) -> None:
        """Replace the methods of the optimizer; flat: holds the gradients, if it is in use."""
        self._optimizer, self._stage, self._world = optimizer, stage, world
        self._clip, self._flat = clip, flat
        self.prepare(lambda norm, sums: True, None)
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        self._compute = getattr(optimizer, name)
        setattr(optimizer, name, self._decide)
        if clip:
            optimizer.unscale_and_clip_grads = self._clip_gradients
        # A gradient that is not finite has a norm that is not finite.
        optimizer.check_overflow = lambda partition_gradients=True: None

    def prepare(self, accept: Accept, sums: Tensor | None) -> None:
        """Set what decides about the next update, and what is summed over the ranks for it."""
        self.norm, self._accept, self._sums = math.nan, accept, sums

    def _decide(self) -> Any:
        """Return the norm if the update is applied, else infinity; under ZeRO-3 in a list."""
        self.norm, sums = self._read()
        applied = self._accept(self.norm, sums) and math.isfinite(self.norm)
        result = self.norm if applied else math.inf
        return [result] if self._stage == 3 else result

    def _clip_gradients(self, what: Any, norm: Any) -> None:
        """Clip gradients to the recipe's norm; what: a list, or the number of a sub-group."""
        if (excess := (self.norm + 1e-6) / self._clip) > 1:
            masters = self._optimizer.fp32_partitioned_groups_flat if self._stage == 3 else None
            torch._foreach_mul_([masters[what].grad] if masters else what, 1 / excess)

    def _read(self) -> tuple[float, list[float]]:
        """Return the norm of the whole gradient, and the sums over the ranks: one read."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(0, dtype=torch.float64, device=self._world.device)
        if (square := self._norm_squared()) is not None:
            square, *numbers = self._world.sum_on_device(torch.cat([square[None], sums])).tolist()
            return math.sqrt(square), numbers
        found = self._compute()  # of offloaded gradients: DeepSpeed has read them
        norms = [float(norm) for norm in (found if self._stage == 3 else [found])]
        # DeepSpeed writes -1 for a norm that is not finite.
        norm = math.nan if min(norms) < 0 else math.hypot(*norms)
        return norm, self._world.sum_on_device(sums).tolist()

    def _norm_squared(self) -> Tensor | None:
        """Return the squared norm of this rank's part of the gradient; None: it is elsewhere."""
        if self._flat is not None:
            return self._flat.norm_squared()
        if self._stage == 3 and not self._optimizer.offload_optimizer:
            part = self._optimizer.grad_partitions_flat_buffer
            return torch.linalg.vector_norm(part, dtype=torch.float32).double().square()
        return None
