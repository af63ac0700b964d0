"""What each source contributes to a step: counts, and the temperature of its queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lbr_ds.batching.contrastive import Pairs
from lbr_ds.config import RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, Step
from lbr_ds.shards.sources import OTHERS, split_sources


class SourceCounts(NamedTuple):
    """The samples of one source in a step, and their tokens.

    Attributes:
        samples: Number of samples.
        tokens: Tokens that go through the model.
        targets: Supervised tokens (stage 1).
    """

    samples: int
    tokens: int
    targets: int


def kinds_of(step: Step) -> list[int]:
    """Return the number of each sample's source in `step.sources`, -1 for none."""
    numbers = {name: number for number, name in enumerate(step.sources)}
    rest = numbers.get(OTHERS, -1)
    return [numbers.get(sample.record.source, rest) for sample in step.samples]


def count_by_source(
    names: Sequence[str], kinds: Sequence[int], tokens: Iterable[int], targets: Iterable[int]
) -> dict[str, SourceCounts]:
    """Return what a rank's share has of each source, from each sample's kind and tokens."""
    sums = [[0, 0, 0] for _ in names]
    for kind, own_tokens, own_targets in zip(kinds, tokens, targets, strict=True):
        if kind >= 0:
            for place, number in enumerate((1, own_tokens, own_targets)):
                sums[kind][place] += number
    return {name: SourceCounts(*own) for name, own in zip(names, sums, strict=True)}


def query_tokens(pairs: Pairs) -> list[int]:
    """Return the tokens of each query with its own candidates."""
    lengths = [len(sequence) for sequence in pairs.sequences]
    n = pairs.num_queries
    each = len(lengths) // n - 2  # hard negatives of a query, after all positives
    return [
        lengths[i] + lengths[n + i] + sum(lengths[2 * n + i * each : 2 * n + (i + 1) * each])
        for i in range(n)
    ]


def with_sources(pairs: Pairs, run: RunConfig, records: list[Record], kinds: list[int]) -> Pairs:
    """Return the pairs with the temperature and the kind of each query, of the recipe."""
    chosen, default = run.data.temperatures, run.stage2.temperature
    temperature: Tensor | None = None
    if chosen:
        own = [chosen.get(record.source, default) for record in records]
        temperature = torch.tensor(own, dtype=torch.float64)
    return replace(pairs, temperature=temperature, kind=torch.tensor(kinds))


def check_sources(run: RunConfig, manifest: Manifest) -> None:
    """Raise ConfigError where the recipe has a weight or temperature for an unknown source."""
    known = {name for split in manifest.splits for name in split_sources(manifest, split)}
    for key, named in (("weight", run.data.weights), ("temperature", run.data.temperatures)):
        for name in sorted(set(named) - known) if known else ():
            raise ConfigError(
                f"data.sources: {name!r} has a {key}, and no record in {manifest.place} is of that "
                f"source; the records are of {', '.join(sorted(known))}"
            )
