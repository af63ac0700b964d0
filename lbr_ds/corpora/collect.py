"""Read and clean the sources of a recipe into the store; count what is left out, and why.

All cores read and clean records, compute signatures, and write parts (`reading.py`). This process
stores which parts are written, so that an interrupted run resumes after them. Then it drops records
with repeated ids and exact duplicates of all parts at once (`curate/exact_duplicates.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.cleaning import Rules
from lbr_ds.corpora.curate.exact_duplicates import Repeated, drop_exact_duplicates, repeated_ids
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.formats.interface import RESTORE
from lbr_ds.corpora.parts import Part, is_shared
from lbr_ds.corpora.reading import READ, Source, hinting, made
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.store import Store
from lbr_ds.errors import DataError
from lbr_ds.system.process_pool import forget_phase, is_spread
from lbr_ds.system.progress import Progress

log = logging.getLogger(__name__)
_CURE = "check data.sources.format, shape, columns and encoding"


@dataclass
class Collected:
    """What was read.

    Attributes:
        read: Rows read from each source.
        kept: Records kept of each source.
        bad: Invalid rows of each source.
        records: Dropped records by rule.
        texts: Texts removed from records that stay, by rule.
    """

    read: list[int]
    kept: list[int]
    bad: list[int]
    records: Tally = field(default_factory=Tally)
    texts: Tally = field(default_factory=Tally)

    def to_dict(self) -> dict[str, Any]:
        """Return a value for JSON."""
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "records": self.records.to_dict(),
            "texts": self.texts.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Collected:
        """Return the value that `to_dict` was called on."""
        tallies = Tally.from_dict(plain["records"]), Tally.from_dict(plain["texts"])
        return cls(plain["read"], plain["kept"], plain["bad"], *tallies)


def collect(
    data: DataConfig, corpora: list[Corpus], tokenizer: str, store: Store, progress: Progress
) -> Collected:
    """Read and clean every source into the store; resume an interrupted run.

    Args:
        data: The recipe's data section.
        corpora: The sources.
        tokenizer: The file of the tokenizer for limits in tokens; empty without such limits.
        store: Where records and the state are stored.
        progress: Called with the rows read.

    Raises:
        DataError: There is an invalid record or a repeated id (with `on_error=strict`), or a source
            without records.
    """
    if not (stored := store.recall("collected")):
        written = _read(data, corpora, tokenizer, store, progress)
        progress("exact duplicates", 0, 1)
        with store.step():
            stored = _number(data, store, written).to_dict()
            store.remember("collected", stored)
        progress("exact duplicates", 1, 1)
    if not store.recall("gathered"):
        store.gather_texts(data.near_duplicate < 1)
        with store.step():
            store.remember("gathered", True)
        forget_phase(READ)
    return Collected.from_dict(stored)


def _read(
    data: DataConfig, corpora: list[Corpus], tokenizer: str, store: Store, progress: Progress
) -> list[list[Part]]:
    """Read and clean every source; return the parts of each."""
    _tell_forms(corpora)
    every = [
        Source(corpus, Rules.of(data, corpus, tokenizer), data.near_duplicate < 1)
        for corpus in corpora
    ]
    complete = {n for n in range(len(corpora)) if store.recall(f"read {n}")}
    written = [_written(store, number, number in complete) for number in range(len(corpora))]
    for number, parts in made(every, complete, written, store.files.parts):
        corpus = corpora[number]
        with hinting(corpus):
            _add(data, corpus, written[number], parts, store, progress)
            _check_read(corpus, written[number])
            corpus.check_unchanged()
        with store.step():
            store.remember(f"read {number}", True)
    return written


def _number(data: DataConfig, store: Store, written: list[list[Part]]) -> Collected:
    """Drop duplicates, and number what stays; written: the parts of each source."""
    collected = Collected(
        [sum(part.rows for part in parts) for parts in written],
        [],
        [sum(part.bad for part in parts) for parts in written],
    )
    store.begin_tables()
    _refuse_repeated_ids(data, repeated_ids(store), collected)
    drop_exact_duplicates(store, collected.records, collected.texts)
    collected.kept = store.kept_records(len(written))
    if not sum(collected.kept):
        counts = sorted(collected.records.counts.items())
        reasons = ", ".join(f"{n} {rule}" for rule, n in counts)
        raise DataError(f"data.sources: no record is left of {sum(collected.read)} ({reasons})")
    return collected


def _written(store: Store, number: int, complete: bool) -> list[Part]:
    """Return the parts of a source that are written, in order."""
    parts = store.parts(number)
    if not complete and any(is_shared(part.name) != is_spread() for part in parts):
        # Several nodes read other pieces than one, so the source is read from its start.
        with store.step():
            store.drop_parts(number)
        return []
    return parts


def _tell_forms(corpora: list[Corpus]) -> None:
    """Log the shape that was recognised for each source."""
    for corpus in corpora:
        with hinting(corpus):
            told = corpus.form.told
        if told:
            log.info("%s", told)


def _check_read(corpus: Corpus, parts: list[Part]) -> None:
    """Raise DataError for a source without a single valid row."""
    read, bad = sum(part.rows for part in parts), sum(part.bad for part in parts)
    if not read:
        raise DataError(f"{corpus.path}: contains no records; check data.sources.path and format")
    if bad == read:
        first = next(part.fault for part in parts if part.fault)
        raise DataError(
            f"{corpus.path}: all of its {bad} rows are invalid; {_CURE}. For example: {first}"
        )


def _add(
    data: DataConfig,
    corpus: Corpus,
    written: list[Part],
    parts: Iterator[Part],
    store: Store,
    progress: Progress,
) -> None:
    """Store which parts of a source are written; `written` grows by them."""
    length = sum(part.piece.length for part in written if part.piece)
    for part in parts:
        if part.bad and data.on_error == "strict":
            raise DataError(_refusal(part.fault, any(p.records for p in [*written, part])))
        with store.step():
            store.add_part(part)
        written.append(part)
        if part.piece:
            length += part.piece.length
            progress(f"read {corpus.name} (MiB)", length >> 20, corpus.size >> 20)
        else:
            progress(f"read {corpus.name}", sum(p.rows for p in written), None)


def _refusal(fault: str, any_valid: bool) -> str:
    """Return the message for an invalid row with `on_error=strict`.

    any_valid: Whether a row before or near it is valid; only then does it help to skip such rows.
    """
    names_key = "data.sources" in fault  # the message already says what to correct
    fix = "" if names_key or fault.endswith(RESTORE) else "; fix this row"
    skip = f"{fix}, or set data.on_error=skip to drop and count such rows"
    cure = skip if any_valid else "" if names_key else f"; {_CURE}"
    return f"{fault:.1000}{cure}"


def _refuse_repeated_ids(data: DataConfig, found: Repeated, collected: Collected) -> None:
    """Count the records whose ids earlier ones have, or raise DataError with `on_error=strict`."""
    faults = [
        f"{place}: id {name!r:.80} is already used at {first}" for name, place, first in found.first
    ]
    if faults and data.on_error == "strict":
        raise DataError(_refusal(faults[0], any_valid=True))
    collected.records.add_some("duplicate_id", faults, found.records)
