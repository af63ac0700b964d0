"""How a stage draws from several sources: the share of each, and whether a step mixes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mixing:
    """The recipe's rule for drawing from sources; see `shards/mixture.py` for the order.

    Attributes:
        weights: Of sources by name; one that is missing has the weight 1.
        size_exponent: `data.size_exponent`.
        homogeneous: Whether all samples of a step come from one source.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    size_exponent: float = 1.0
    homogeneous: bool = False

    def shares(self, records: Mapping[str, int]) -> dict[str, float]:
        """Return the share of the samples that each source gets; together they are 1.

        Args:
            records: How many records each source has.
        """
        parts = {
            name: self.weights.get(name, 1.0) * count**self.size_exponent
            for name, count in records.items()
        }
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}
