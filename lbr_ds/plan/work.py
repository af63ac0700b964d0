"""What one rank computes in one step, if every text is as long as the recipe allows.

Shorter texts take proportionally less time and no more memory: a micro-batch holds a fixed number
of tokens, and the rehearsal step before training fills one completely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lbr_ds.config import OBJECTIVES, STAGES, RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.plan.flops import bottleneck_pairs, causal_pairs, flops
from lbr_ds.plan.shape import Shape


@dataclass(frozen=True)
class Work:
    """One rank's share of a step.

    Attributes:
        stage: 1 or 2.
        sequences: number of sequences, each of `length` tokens.
        length: tokens of a sequence.
        supervised: tokens of a sequence with a loss.
        copies: rows of a sequence that attention sees twice (those of the bottleneck).
        pairs: query-key pairs of a sequence.
        packed: sequences in a full micro-batch.
        micro_batches: number of micro-batches.
        cached: whether gradients are cached, so that each micro-batch is encoded once more.
        queries: vectors of this rank's queries that InfoNCE compares; 0 in stage 1.
        candidates: vectors of this rank's passages; 0 in stage 1.
        replay: the share of the batch of stage 1 that a step of stage 2 trains as well, or None.
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
    replay: Work | None = None

    @property
    def parts(self) -> tuple[Work, ...]:
        """The share itself, and what it replays."""
        return (self,) if self.replay is None else (self, self.replay)

    @property
    def tokens(self) -> int:
        """Tokens of the rank's share."""
        return self.sequences * self.length

    @property
    def micro_tokens(self) -> int:
        """Tokens of a full micro-batch."""
        return self.packed * self.length

    @property
    def forwards(self) -> int:
        """Forwards of a step, each of which gathers all layers."""
        return self.micro_batches * (2 if self.cached else 1)

    def useful_flops(self, shape: Shape) -> int:
        """Return the FLOPs of the share by the strict count of plan/flops.py."""
        return flops(
            shape,
            tokens=self.tokens,
            pairs=round(self.sequences * self.pairs),
            scored=self.sequences * self.supervised,
            adapters=shape.adapter_parameters,
        )

    def recompute_flops(self, shape: Shape) -> int:
        """Return the FLOPs of one more forward through the layers, without the head."""
        return flops(
            shape,
            tokens=self.tokens,
            pairs=round(self.sequences * self.pairs),
            passes=1,
            adapters=shape.adapter_parameters,
        )


def work_of(run: RunConfig, stage: int, world: int) -> Work:
    """Return the share of each of `world` ranks.

    Raises:
        ConfigError: the samples of a step cannot be divided among the ranks.
    """
    budget = run.stage(stage).micro_tokens
    own, *replayed = (_work(run, part, world, budget) for part in run.parts(stage))
    return replace(own, replay=replayed[0] if replayed else None)


def _work(run: RunConfig, stage: int, world: int, budget: int) -> Work:
    """Return the share of a stage's own samples, in micro-batches of at most `budget` tokens."""
    part = run.stage(stage)
    if part.samples_per_step % world:
        raise ConfigError(
            f"stage{stage}.samples_per_step={part.samples_per_step} is not a multiple of "
            f"{world} ranks; take other --nodes and --gpus, or "
            f"stage{stage}.samples_per_step={-(-part.samples_per_step // world) * world}"
        )
    samples = part.samples_per_step // world
    if stage == 1:
        length, target, copies, pairs = _generative_sequence(run)
        sequences, queries, candidates = samples, 0, 0
    else:
        length, target, copies = run.model.max_length, 0, 0
        pairs = float(causal_pairs(length))
        queries, candidates = samples, samples * (1 + run.stage2.num_negatives)
        sequences = queries + candidates
    packed = max(1, budget // length)
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


def _generative_sequence(run: RunConfig) -> tuple[int, int, int, float]:
    """Return (length, supervised, copies, pairs) of a stage-1 sequence: means over the mixture."""
    rows = run.bottleneck.count
    total = sum(run.stage1.objective.values())
    length = pairs = 0.0
    target = run.stage1.max_target_length
    copies = 0
    for name, weight in run.stage1.objective.items():
        objective = OBJECTIVES[name]
        context, target = objective.longest(
            max_length=run.model.max_length,
            max_target_length=run.stage1.max_target_length,
            num_bottleneck=rows,
        )
        length += weight / total * (context + target)
        if objective.cut:
            copies = rows
            pairs += weight / total * bottleneck_pairs(context - rows, rows, target)
        else:
            pairs += weight / total * causal_pairs(context + target)
    return round(length), target, copies, pairs


def num_steps(run: RunConfig, stage: int, records: int | None) -> int | None:
    """Return the optimizer steps of a stage; None if they depend on data that is not prepared.

    Args:
        run: the recipe.
        stage: 1 or 2.
        records: records of the stage's split, if the data is prepared.
    """
    part = run.stage(stage)
    if part.num_steps is not None:
        return part.num_steps
    if records is None and not run.data.splits.are_shares:
        # The protocol `knowledge` gives the split gl no size.
        records = int(getattr(run.data.splits, STAGES[stage].split)) or None
    return None if records is None else part.steps(records)
