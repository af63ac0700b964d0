"""Compare two ways of doing one thing: run them alternately and take the ratio, with its spread."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

ROUNDS = 7  # the fewest rounds of a row of times


@dataclass(frozen=True)
class Row:
    """One measured figure and its targets.

    Attributes:
        measure: its name.
        value: the median of the rounds; None if it could not be measured, and `about` says why.
        unit: of the value.
        goal: the aim.
        better: whether a lower or a higher value is better.
        floor: what must be reached.
        quartiles: the first and the third of the rounds.
        rounds: their number.
        about: what exactly was measured.
        theory: what arithmetic predicts, if it does.
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


def interleaved(
    a: Callable[[], float], b: Callable[[], float], rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """Return the figures of `a` and `b` in each round; they take turns in running first.

    Other load of the machine so falls on both. One unrecorded run of each comes first.
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
    ratios = [a / b for a, b in pairs]
    value = statistics.median(ratios)
    low, high = value, value
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    log.info("%s: %.3g", measure, value)
    return Row(
        measure, value, "ratio", goal, better, floor, (low, high), len(ratios), about, theory
    )
