"""Read and clean the sources of a recipe into the store; count what is left out, and why.

One process reads; all cores clean and hash. The state is stored every few thousand records: an
interrupted run resumes from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.cleaning import Cleaned, Rules, clean_record
from lbr_ds.corpora.curate.knowledge import IS_PAIR
from lbr_ds.corpora.curate.near_duplicates import signature
from lbr_ds.corpora.curate.tally import EXAMPLE_CHARS, Tally
from lbr_ds.corpora.formats.interface import Skipped
from lbr_ds.corpora.formats.shapes import Outcome
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.store import Entry, Store, Use, roles
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.system.locate import refetch_hint
from lbr_ds.system.process_pool import map_in_order
from lbr_ds.system.progress import Progress

log = logging.getLogger(__name__)
_CHUNK_RECORDS, _CHUNK_CHARS = 256, 1 << 20  # of one job
_CHUNKS_A_STEP = 16
_CURE = "check data.sources.format, shape, columns and encoding"
_UNSIGNED = bytes(512)  # if near duplicates are not searched for


class Job(NamedTuple):
    """Rows of one source and the rules for them."""

    outcomes: list[Outcome]
    rules: Rules
    role: str  # of the source
    signed: bool  # whether MinHash signatures are needed


class Kept(NamedTuple):
    """A record that cleaning keeps, and an example for the tally if it is a duplicate."""

    entry: Entry
    example: str
    removed: list[tuple[str, str]]


class Left(NamedTuple):
    """A record that cleaning drops: its id, rule and example, and the texts that it lost before."""

    id: str
    dropped: tuple[str, str]
    removed: list[tuple[str, str]]


class Done(NamedTuple):
    """The rows of a job with their records cleaned, and the signatures of the texts by key."""

    outcomes: list[tuple[str, Kept | Left | DataError | Skipped]]
    signatures: dict[bytes, bytes]


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
    stored = store.recall("collected")
    none = [0] * len(corpora)
    collected = Collected.from_dict(stored) if stored else Collected(none, list(none), list(none))
    if store.recall("collect"):
        return collected
    _tell_forms(corpora)
    for number, corpus in enumerate(corpora):
        if store.recall(f"collect {number}"):
            continue
        rules = Rules.of(data, corpus, tokenizer)
        try:
            _read(data, corpus, number, rules, store, collected, progress)
            _check_read(corpus, collected.read[number], collected.bad[number], collected)
        except DataError as error:
            raise DataError(f"{error}{refetch_hint(corpus.path)}") from None
        with store.step():
            store.remember(f"collect {number}", True)
    if not store.records:
        reasons = ", ".join(f"{n} {rule}" for rule, n in sorted(collected.records.counts.items()))
        raise DataError(f"data.sources: no record is left of {sum(collected.read)} ({reasons})")
    with store.step():
        store.remember("collect", True)
    return collected


def _tell_forms(corpora: list[Corpus]) -> None:
    """Log what the rows of each source were recognised as."""
    for corpus in corpora:
        try:
            told = corpus.form.told
        except DataError as error:
            raise DataError(f"{error}{refetch_hint(corpus.path)}") from None
        if told:
            log.info("%s", told)


def _check_read(corpus: Corpus, read: int, bad: int, collected: Collected) -> None:
    """Raise DataError for a source without a single valid row."""
    if not read:
        raise DataError(f"{corpus.path}: contains no records; check data.sources.path and format")
    if bad == read:
        first = collected.records.examples["bad_record"][0]
        raise DataError(
            f"{corpus.path}: all of its {bad} rows are invalid; {_CURE}. For example: {first}"
        )


def _read(
    data: DataConfig,
    corpus: Corpus,
    number: int,
    rules: Rules,
    store: Store,
    collected: Collected,
    progress: Progress,
) -> None:
    outcomes = islice(corpus.read(), collected.read[number], corpus.source.max_records)
    signed, role = data.near_duplicate < 1, corpus.source.role
    done = map_in_order(_work, (Job(chunk, rules, role, signed) for chunk in _chunks(outcomes)))
    while first := next(done, None):
        with store.step():
            for chunk in chain([first], islice(done, _CHUNKS_A_STEP - 1)):
                _take(data, chunk, number, store, collected)
                collected.read[number] += len(chunk.outcomes)
                progress(f"read {corpus.name}", collected.read[number], None)
            store.remember("collected", collected.to_dict())


def _chunks(outcomes: Iterator[Outcome]) -> Iterator[list[Outcome]]:
    chunk: list[Outcome] = []
    chars = 0
    for where, entry in outcomes:
        chunk.append((where, entry))
        if isinstance(entry, Record):
            chars += sum(map(len, entry.texts()))
        if len(chunk) >= _CHUNK_RECORDS or chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _work(job: Job) -> Done:
    """Clean a chunk and sign its texts; runs in any process."""
    outcomes: list[tuple[str, Kept | Left | DataError | Skipped]] = []
    signatures: dict[bytes, bytes] = {}
    for where, outcome in job.outcomes:
        if not isinstance(outcome, Record):
            outcomes.append((where, outcome))
            continue
        cleaned = clean_record(outcome, job.rules)
        if cleaned.dropped:
            left = Left(cleaned.record.id, cleaned.dropped, cleaned.removed)
            outcomes.append((where, left))
            continue
        record, entry = cleaned.record, _entry(cleaned, job.role)
        example = f"{record.id}: {record.query or record.text}"[: EXAMPLE_CHARS + 1]
        outcomes.append((where, Kept(entry, example, cleaned.removed)))
        for use in entry.uses:
            if use.key not in signatures:
                signatures[use.key] = signature(use.text) if job.signed else _UNSIGNED
    return Done(outcomes, signatures)


def _entry(cleaned: Cleaned, role: str) -> Entry:
    record = cleaned.record
    # A fact is no duplicate of an equal pair, nor is what evaluates one of what trains.
    kind = b"eval" if role == "eval" else b"fact" if role == "fact" and record.query else b""
    return Entry(
        record.id,
        record.group,
        IS_PAIR[role] if record.query else False,
        role == "eval",
        (replace(record, group="") if record.group else record).to_json(),
        cleaned.identity + kind,
        [
            Use(number, place, known, text)
            for number, name, texts in roles(record)
            for place, (known, text) in enumerate(zip(cleaned.keys[name], texts, strict=True))
        ],
    )


def _refuse(data: DataConfig, rule: str, fault: str, collected: Collected, any_valid: bool) -> None:
    """Count an invalid row, or raise DataError with `on_error=strict`.

    any_valid: Whether a row near it is valid; only then does it help to skip such rows.
    """
    if data.on_error == "strict":
        names_key = "data.sources" in fault  # the message already says what to correct
        fix = "" if names_key else "; fix this row"
        skip = f"{fix}, or set data.on_error=skip to drop and count such rows"
        cure = skip if any_valid else "" if names_key else f"; {_CURE}"
        raise DataError(f"{fault:.1000}{cure}")
    collected.records.add(rule, fault)


def _take(data: DataConfig, done: Done, number: int, store: Store, collected: Collected) -> None:
    """Add the records of a chunk to the store, or count why not."""
    any_valid = any(isinstance(entry, (Kept, Left)) for _, entry in done.outcomes)
    kept = [one.entry for _, one in done.outcomes if isinstance(one, Kept)]
    left = [one.id for _, one in done.outcomes if isinstance(one, Left)]
    used = store.places_of_ids([*(entry.id for entry in kept), *left])
    known = store.known_identities([entry.identity for entry in kept])
    ids: dict[str, str] = {}
    new: list[Entry] = []
    for where, one in done.outcomes:
        if isinstance(one, DataError):
            collected.bad[number] += 1
            _refuse(data, "bad_record", str(one), collected, any_valid)
            continue
        if isinstance(one, Skipped):
            collected.records.add(one.rule, one.example)
            continue
        name = one.entry.id if isinstance(one, Kept) else one.id
        if (first := used.get(name)) is not None:
            fault = f"{where}: id {name!r:.80} is already used at {first}"
            _refuse(data, "duplicate_id", fault, collected, any_valid=True)
            continue
        used[name] = ids[name] = where
        for rule, example in one.removed:
            collected.texts.add(rule, example)
        if isinstance(one, Left):
            collected.records.add(*one.dropped)
        elif one.entry.identity in known:
            collected.records.add("duplicate", one.example)
        else:
            known.add(one.entry.identity)
            new.append(one.entry)
            collected.kept[number] += 1
    store.take_ids(ids)
    store.add(new, done.signatures)
