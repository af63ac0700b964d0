"""Read and clean the sources of a recipe into the store; count what is left out, and why.

One process reads; all cores clean and hash. The state is stored every few thousand records: an
interrupted run resumes from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.cleaning import Cleaned, Rules, clean_record
from lbr_ds.corpora.curate.knowledge import IS_PAIR
from lbr_ds.corpora.curate.near_duplicates import signature
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.formats.shapes import Outcome
from lbr_ds.corpora.process_pool import map_in_order
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.store import Store, roles
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.system.locate import refetch_hint
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
    signed: bool  # whether MinHash signatures are needed


class Done(NamedTuple):
    """The rows of a job with their records cleaned, and the signatures of the texts by key."""

    outcomes: list[tuple[str, Cleaned | Any]]
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
    done = map_in_order(_work, (Job(chunk, rules, signed) for chunk in _chunks(outcomes)))
    while first := next(done, None):
        with store.step():
            for chunk in chain([first], islice(done, _CHUNKS_A_STEP - 1)):
                any_valid = any(isinstance(entry, Cleaned) for _, entry in chunk.outcomes)
                for where, entry in chunk.outcomes:
                    if isinstance(entry, DataError):
                        collected.bad[number] += 1
                        _refuse(data, "bad_record", str(entry), collected, any_valid)
                    elif isinstance(entry, Cleaned):
                        signatures = chunk.signatures
                        kept = _take(data, where, entry, signatures, store, collected, role)
                        collected.kept[number] += kept
                    else:
                        collected.records.add(entry.rule, entry.example)
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
    outcomes: list[tuple[str, Any]] = []
    signatures: dict[bytes, bytes] = {}
    for where, entry in job.outcomes:
        if not isinstance(entry, Record):
            outcomes.append((where, entry))
            continue
        cleaned = clean_record(entry, job.rules)
        outcomes.append((where, cleaned))
        for _, name, texts in roles(cleaned.record) if cleaned.keys else ():
            for known, text in zip(cleaned.keys[name], texts, strict=True):
                if known not in signatures:
                    signatures[known] = signature(text) if job.signed else _UNSIGNED
    return Done(outcomes, signatures)


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


def _take(
    data: DataConfig,
    where: str,
    cleaned: Cleaned,
    signatures: dict[bytes, bytes],
    store: Store,
    collected: Collected,
    role: str,
) -> bool:
    """Add one record to the store, or count why not."""
    first = store.take_id(cleaned.record.id, where)
    if first is None:
        return _keep(cleaned, signatures, store, collected, role)
    fault = f"{where}: id {cleaned.record.id!r:.80} is already used at {first}"
    _refuse(data, "duplicate_id", fault, collected, any_valid=True)
    return False


def _keep(
    cleaned: Cleaned,
    signatures: dict[bytes, bytes],
    store: Store,
    collected: Collected,
    role: str,
) -> bool:
    record = cleaned.record
    # A fact is no duplicate of an equal pair, nor is what evaluates one of what trains.
    kind = b"eval" if role == "eval" else b"fact" if role == "fact" and record.query else b""
    for rule, example in cleaned.removed:
        collected.texts.add(rule, example)
    if cleaned.dropped:
        collected.records.add(*cleaned.dropped)
        return False
    if not store.is_new(cleaned.identity + kind):
        collected.records.add("duplicate", f"{record.id}: {record.query or record.text}")
        return False
    store.add(record, cleaned.keys, signatures, IS_PAIR[role], judges=role == "eval")
    return True
