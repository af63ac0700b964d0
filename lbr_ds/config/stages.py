"""The two training stages: which split each trains on, and what it is called. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageInfo:
    """The facts about a stage that more than one room needs.

    Attributes:
        number: 1 or 2, as in `lbr-ds train --stage`.
        split: the split of the prepared data that it trains on.
        method: the paper's abbreviation.
    """

    number: int
    split: str
    method: str

    @property
    def folder(self) -> str:
        """The name of its folder inside a run folder, and of its section in a recipe."""
        return f"stage{self.number}"

    @property
    def title(self) -> str:
        """Its name in reports."""
        return f"stage {self.number} ({self.method})"


STAGES = {1: StageInfo(1, "gl", "IB-GL"), 2: StageInfo(2, "cl", "GR-CL")}
