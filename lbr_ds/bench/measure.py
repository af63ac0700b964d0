"""Two ways of doing one thing, run in turn -> the ratio of their figures, with its spread."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

ROUNDS = 7  # the least that a row of times may rest on


@dataclass(frozen=True)
class Row:
    """One measured figure beside what is wanted of it.

    goal: the aim; floor: what must be reached; better: which way is up. quartiles: the first and
    the third of the rounds, of which `value` is the median (None: it could not be measured, and
    about says why). about: what exactly was measured. theory: what arithmetic says, where it does.
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
    """The figures of `a` and `b` of each round, run one after the other, the first in turns.

    What the machine does besides falls on both. One unrecorded run of each comes first.
    """
    a(), b()
    found = []
    for number in range(rounds):
        gc.collect()
        if number % 2:
            second, first = b(), a()
        else:
            first, second = a(), b()
        found.append((first, second))
    return found


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
    """The row of `a` over `b` from the figures of each round; says so in the log."""
    ratios = [a / b for a, b in pairs]
    value = statistics.median(ratios)
    low, high = value, value
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    log.info("%s: %.3g", measure, value)
    return Row(
        measure, value, "ratio", goal, better, floor, (low, high), len(ratios), about, theory
    )
