"""Corpora of any size made from real text, with planted exact and near duplicates.

A passage is a run of fragments of 6 to 14 words, each from a random place of the real texts. It is
a pure function of the seed and its number, so that a duplicate can be made far from its original
and a corpus of millions of passages is never held in memory. Of 100 passages two are exact
duplicates (in capitals), and three are copies with some words replaced: from one in 75 to one in
10, so that some of them are just above and some just below the threshold of 0.7.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

_FRAGMENTS, _WORDS = (5, 10), (6, 14)  # of a passage; of a fragment
_EXACT, _NEAR = (49, 99), (19, 59, 79)  # of 100 passages


class Planted(NamedTuple):
    """A duplicate: its number, that of its original, and whether words were replaced."""

    copy: int
    original: int
    near: bool


class Recombined:
    """The passages of a corpus by number.

    Args:
        texts: Real texts.
        seed: Of the recombination.
    """

    def __init__(self, texts: list[str], seed: int) -> None:
        self.words = [word for text in texts for word in text.split()]
        self.seed = seed

    def passage(self, number: int) -> tuple[str, Planted | None]:
        """Return a passage, and what it is a duplicate of."""
        draw = random.Random((self.seed << 40) + number)
        if number % 100 not in _EXACT + _NEAR:
            return " ".join(self._original(draw)), None
        while (original := int(draw.random() * number)) % 100 in _EXACT + _NEAR:
            pass
        words = self._original(random.Random((self.seed << 40) + original))
        if number % 100 in _EXACT:
            return " ".join(words).upper(), Planted(number, original, False)
        for _ in range(1 + int(draw.random() * (len(words) // 10))):
            words[int(draw.random() * len(words))] = self._word(draw)
        return " ".join(words), Planted(number, original, True)

    def _original(self, draw: random.Random) -> list[str]:
        words: list[str] = []
        for _ in range(_within(draw, _FRAGMENTS)):
            first = int(draw.random() * (len(self.words) - _WORDS[1]))
            words += self.words[first : first + _within(draw, _WORDS)]
        return words

    def _word(self, draw: random.Random) -> str:
        return self.words[int(draw.random() * len(self.words))]


def _within(draw: random.Random, bounds: tuple[int, int]) -> int:
    return bounds[0] + int(draw.random() * (bounds[1] - bounds[0] + 1))


def write_corpus(path: Path, made: Recombined, count: int) -> list[Planted]:
    """Write `count` passages as JSON lines with their number as id; return the duplicates."""
    planted = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text, duplicate = made.passage(number)
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
            if duplicate is not None:
                planted.append(duplicate)
    return planted
