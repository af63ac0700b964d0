"""Which written queries are kept, and why the others are not. The first rule that applies counts.

- surplus: the answer has more queries than were asked for.
- empty, too_short, too_long, too_few_tokens, too_many_tokens, other_language: the rules of `data`
  for any text, after the same cleaning.
- repeats_the_passage: it is nearly the same text as its passage.
- evaluation, near_evaluation: it equals, or nearly equals, a text of eval or control.
- duplicate, near_duplicate: likewise a query of cl or gl, or one that was written before it.
- not_retrieved: its passage is not among the `keep_rank` best for it (`round_trip.py`).

"Nearly" is `data.near_duplicate`, by families as in `prepare`: whatever is connected with a text of
eval through near duplicates is dropped.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from lbr_ds.corpora.curate.cleaning import Rules, clean
from lbr_ds.corpora.curate.near_duplicates import Comparison, families, signature
from lbr_ds.corpora.curate.segmentation import key, similarity
from lbr_ds.corpora.store_files import ValueReader, Values
from lbr_ds.records import Record
from lbr_ds.system.progress import Progress, no_progress

REASONS = (
    "surplus",
    "empty",
    "too_short",
    "too_long",
    "too_few_tokens",
    "too_many_tokens",
    "other_language",
    "repeats_the_passage",
    "evaluation",
    "duplicate",
    "near_evaluation",
    "near_duplicate",
    "not_retrieved",
)
_EXAMPLES = 3  # of each reason


@dataclass(frozen=True)
class Candidate:
    """One written query: the record of its passage, its number in the answer, and its text."""

    record: Record
    number: int
    query: str

    def pair(self) -> Record:
        """Return the query with its passage, as cl has it."""
        passage = self.record
        return Record(
            id=f"{passage.id}#q{self.number}",
            source=passage.source,
            query=self.query,
            positives=[passage.text],
            group=passage.group,
            instruction=passage.instruction,
            document_instruction=passage.document_instruction,
        )


@dataclass
class Refused:
    """How many queries each reason dropped, with examples that are drawn by seed."""

    seed: int
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    examples: dict[str, list[Candidate]] = field(default_factory=dict)

    def add(self, reason: str, candidate: Candidate) -> None:
        """Count a query that is dropped; every one of a reason is an example equally likely."""
        self.counts[reason] += 1
        shown, number = self.examples.setdefault(reason, []), self.counts[reason]
        if len(shown) < _EXAMPLES:
            shown.append(candidate)
            return
        place = Random(f"{self.seed}:{reason}:{number}").randrange(number)
        if place < _EXAMPLES:
            shown[place] = candidate


def well_formed(
    candidates: Iterable[Candidate], rules: Rules, near: float, wanted: int, refused: Refused
) -> Iterator[Candidate]:
    """Yield the cleaned queries that no rule for a single query drops; wanted: of a passage."""
    for raw in candidates:
        candidate = Candidate(raw.record, raw.number, clean(raw.query))
        passage, fault = raw.record.text, rules.fault(candidate.query)
        if raw.number > wanted:
            refused.add("surplus", candidate)
        elif fault:
            refused.add(fault[0], candidate)
        elif key(candidate.query) == key(passage) or similarity(candidate.query, passage) >= near:
            refused.add("repeats_the_passage", candidate)
        else:
            yield candidate


def distinct(
    candidates: Iterable[Candidate],
    held_out: Iterable[str],
    given: Iterable[str],
    near: float,
    refused: Refused,
    work: Path,
    progress: Progress = no_progress,
) -> list[Candidate]:
    """Return the queries that resemble no held-out text, no given query and no earlier one.

    Args:
        candidates: The queries in the order in which they count as earlier.
        held_out: All texts of eval and control.
        given: The queries of the training splits.
        near: `data.near_duplicate`.
        refused: Counts those that are dropped.
        work: A folder for the texts' signatures, 600 bytes of disk and 60 of memory each.
        progress: Called with what has been done.
    """
    judged = dict.fromkeys(map(key, held_out := list(held_out)))
    known = dict.fromkeys(map(key, given := list(given)))
    new: list[Candidate] = []
    for candidate in candidates:
        name = key(candidate.query)
        if name in judged or name in known:
            refused.add("evaluation" if name in judged else "duplicate", candidate)
        else:
            known[name] = None
            new.append(candidate)
    others = [*held_out, *given]
    roots = family_roots([*others, *(c.query for c in new)], near, work, progress)
    kept = []
    for place, candidate in enumerate(new, len(others)):
        if roots[place] < len(held_out):
            refused.add("near_evaluation", candidate)
        elif roots[place] < place:
            refused.add("near_duplicate", candidate)
        else:
            kept.append(candidate)
    return kept


@dataclass(frozen=True)
class _TextOf:
    """Return the text with a number, in any process."""

    read: ValueReader

    def __call__(self, number: int) -> str:
        return self.read(number).decode()


def family_roots(
    texts: Sequence[str], near: float, work: Path, progress: Progress = no_progress
) -> list[int]:
    """Return for each text the place of the first one in its family of near duplicates."""
    if near >= 1 or not texts:
        return list(range(len(texts)))
    folder = work / "families"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed command
    folder.mkdir(parents=True)
    signatures, stored = folder / "signatures", folder / "texts"
    try:
        with closing(Values(stored)) as values:
            values.add([text.encode() for text in texts])
        with signatures.open("wb") as file:
            for done, text in enumerate(texts, 1):
                file.write(signature(text))
                progress("sign texts", done, len(texts))
        with closing(ValueReader(stored)) as read:
            comparison = Comparison(signatures, near, _TextOf(read))
            forest = families(comparison, len(texts), progress)
    finally:
        shutil.rmtree(folder)
    roots: list[int] = forest.roots(np.arange(len(texts))).tolist()
    return roots
