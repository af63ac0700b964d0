"""What one step sends through the model, on one rank, when every text is as long as it may be.

Shorter texts take proportionally less time and no more memory: a micro-batch holds a number of
tokens, and the rehearsal step before training fills one to the brim.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbr_ds.cluster import flops
from lbr_ds.cluster.plan.shape import Shape
from lbr_ds.config import OBJECTIVES, STAGES, RunConfig
from lbr_ds.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """A rank's share of one step of a stage.

    sequences of `length` tokens, `supervised` of them with a loss; `copies` rows that attention
    sees twice (the bottleneck's); `pairs` query-key pairs; all four a sequence. packed: sequences
    in a full micro-batch. micro_batches: how many the share makes. cached: gradient caching, so
    each micro-batch is encoded once more without a graph. queries and candidates: vectors of this
    rank that InfoNCE compares; 0 in stage 1.
    """

    stage: int
    sequences: int
    length: int
    supervised: int
    copies: int
    pairs: float
    packed: int
    micro_batches: int
    cached: bool
    queries: int
    candidates: int

    @property
    def tokens(self) -> int:
        """Tokens of the rank's share."""
        return self.sequences * self.length

    @property
    def micro_tokens(self) -> int:
        """Tokens of a full micro-batch."""
        return self.packed * self.length

    @property
    def passes(self) -> int:
        """Times that the layers are gathered for a forward, over the whole step."""
        return self.micro_batches * (2 if self.cached else 1)

    def useful(self, shape: Shape) -> int:
        """Operations of the share, strictly counted (cluster/flops.py)."""
        return flops.flops(
            shape.sizes,
            tokens=self.tokens,
            pairs=round(self.sequences * self.pairs),
            scored=self.sequences * self.supervised,
            adapters=shape.in_adapters,
        )

    def again(self, shape: Shape) -> int:
        """Operations of one more forward through the layers, without the head."""
        return flops.flops(
            shape.sizes,
            tokens=self.tokens,
            pairs=round(self.sequences * self.pairs),
            passes=1,
            adapters=shape.in_adapters,
        )


def work_of(run: RunConfig, stage: int, world: int) -> Work:
    """The share of each of `world` ranks. Raises ConfigError when a step cannot be shared so."""
    part = run.stage(stage)
    if part.samples_per_step % world:
        raise ConfigError(
            f"stage{stage}.samples_per_step={part.samples_per_step} is not a multiple of "
            f"{world} ranks; take other --nodes and --gpus, or "
            f"stage{stage}.samples_per_step={-(-part.samples_per_step // world) * world}"
        )
    samples, context = part.samples_per_step // world, run.model.max_length
    if stage == 1:
        length, target, copies, pairs = _generative(run)
        sequences, queries, candidates = samples, 0, 0
    else:
        target, copies, pairs = 0, 0, float(flops.causal_pairs(context))
        queries, candidates = samples, samples * (1 + run.stage2.num_negatives)
        sequences, length = queries + candidates, context
    packed = max(1, part.micro_batch_tokens // length)
    count = -(-sequences // packed)
    return Work(
        stage=stage,
        sequences=sequences,
        length=length,
        supervised=target,
        copies=copies,
        pairs=pairs,
        packed=packed,
        micro_batches=count,
        cached=stage == 2 and count > 1,
        queries=queries,
        candidates=candidates,
    )


def _generative(run: RunConfig) -> tuple[int, int, int, float]:
    """Return (length, supervised, copies, pairs) of a stage-1 sequence: means over the mixture."""
    rows = run.bottleneck.count
    total = sum(run.stage1.objective.values())
    length = pairs = 0.0
    target = run.stage1.max_target_length
    copies = 0
    for name, weight in run.stage1.objective.items():
        kind = OBJECTIVES[name]
        context, target = kind.longest(
            max_length=run.model.max_length,
            max_target_length=run.stage1.max_target_length,
            num_bottleneck=rows,
        )
        length += weight / total * (context + target)
        if kind.cut:
            copies = rows
            pairs += weight / total * flops.bottleneck_pairs(context - rows, rows, target)
        else:
            pairs += weight / total * flops.causal_pairs(context + target)
    return round(length), target, copies, pairs


def num_steps(run: RunConfig, stage: int, prepared: int | None) -> int | None:
    """Optimizer steps of the stage; None when the recipe tells neither steps nor record counts.

    prepared: records of the stage's split where the data stands already.
    """
    part = run.stage(stage)
    if part.num_steps is not None:
        return part.num_steps
    if prepared is None and not run.data.splits.are_shares:
        asked = getattr(run.data.splits, STAGES[stage].split)
        prepared = int(asked) or None  # protocol knowledge gives gl no size
    return None if prepared is None else part.steps(prepared)
