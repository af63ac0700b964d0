"""Rows and their targets, and how two ways of doing one thing are compared.

A row is one measured figure. `interleaved` runs two ways alternately and `Target.ratio` makes the
row of their ratio, with its spread. `Comparison` is such a pair.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

log = logging.getLogger(__name__)

ROUNDS = 7  # the fewest rounds of a row of times


@dataclass(frozen=True)
class Row:
    """One measured figure and its targets.

    Attributes:
        measure: its name.
        value: the median of the rounds; None if it could not be measured, and `about` says why.
        unit: unit of the value.
        goal: the value aimed at.
        better: whether a lower or a higher value is better.
        floor: what must be reached.
        quartiles: the first and the third quartile of the rounds.
        rounds: the number of rounds.
        about: what exactly was measured.
        theory: what arithmetic predicts, if it does.
        first_seconds: the first calls, before the rounds; they include compilation.
        compile_seconds: what torch.compile took during the row.
        seconds: the whole row, with its set-up.
    """

    measure: str
    value: float | None
    unit: str
    goal: float
    better: Literal["lower", "higher"]
    floor: float
    quartiles: tuple[float, float]
    rounds: int
    about: str
    theory: float | None = None
    first_seconds: float | None = None
    compile_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Target:
    """A row that a suite can measure, and what it has to reach.

    Attributes:
        measure: its name.
        floor: what must be reached.
        goal: the value aimed at.
        better: whether a lower or a higher value is better.
        about: what it is, in a few words.
        unit: unit of the value.
        seconds: how long the row takes at full size, with set-up and compilation. With a time
            budget a row is not begun when less is left.
    """

    measure: str
    floor: float
    goal: float
    better: Literal["lower", "higher"]
    about: str
    unit: str = "ratio"
    seconds: float = 60.0

    def row(
        self,
        values: Sequence[float],
        *,
        about: str,
        theory: float | None = None,
        first_seconds: float | None = None,
    ) -> Row:
        """Return the row of the figures of each round.

        Args:
            values: one figure for each round.
            about: what exactly was measured.
            theory: what arithmetic predicts.
            first_seconds: seconds of the first calls, before the rounds.
        """
        low, value, high = summary(values)
        return Row(
            self.measure,
            value,
            self.unit,
            self.goal,
            self.better,
            self.floor,
            (low, high),
            len(values),
            about,
            theory,
            first_seconds,
        )

    def ratio(
        self,
        pairs: Sequence[tuple[float, float]],
        *,
        about: str,
        theory: float | None = None,
        first_seconds: float | None = None,
    ) -> Row:
        """Return the row of `a` over `b` from the figures (a, b) of each round."""
        values = [a / b for a, b in pairs]
        return self.row(values, about=about, theory=theory, first_seconds=first_seconds)

    def not_measured(self, about: str) -> Row:
        """Return the row without a value; about: why."""
        return Row(
            self.measure,
            None,
            self.unit,
            self.goal,
            self.better,
            self.floor,
            (0.0, 0.0),
            0,
            f"not measured: {about}",
        )


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    a: Callable[[], float], b: Callable[[], float], rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """Return the figures of `a` and `b` in each round; they take turns in running first.

    So other load on the machine affects both. One run of each, which is not recorded, comes first.
    """
    a(), b()
    figures = []
    for number in range(rounds):
        gc.collect()
        if number % 2:
            second, first = b(), a()
        else:
            first, second = a(), b()
        figures.append((first, second))
    return figures


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing one thing; each function times one run of its way.

    Attributes:
        ours: the numerator.
        theirs: the denominator.
        about: what the ratio is of.
        theory: the ratio that arithmetic predicts.
    """

    ours: Callable[[], float]
    theirs: Callable[[], float]
    about: str
    theory: float | None = None

    def row(self, target: Target, rounds: int) -> Row:
        """Measure the ratio in `rounds` rounds, after a first call of both ways."""
        begin = perf_counter()
        self.ours(), self.theirs()
        first = perf_counter() - begin
        pairs = interleaved(self.ours, self.theirs, rounds)
        return target.ratio(pairs, about=self.about, theory=self.theory, first_seconds=first)


def ratio(
    measure: str,
    pairs: list[tuple[float, float]],
    *,
    goal: float,
    better: Literal["lower", "higher"],
    floor: float,
    about: str,
    theory: float | None = None,
) -> Row:
    """Return and log the row of `a` over `b` from the figures of each round."""
    target = Target(measure, floor, goal, better, about)
    row = target.ratio(pairs, about=about, theory=theory)
    log.info("%s: %.3g", measure, row.value)
    return row
