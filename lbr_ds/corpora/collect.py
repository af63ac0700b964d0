"""The sources of a recipe -> cleaned records with unique ids in the store, and what was left out.

Reading is one process's; cleaning and hashing are shared by all cores. What is done is kept every
few thousand records: an interrupted run reads on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.cleaning import Cleaned, Rules, clean_record
from lbr_ds.corpora.curate.knowledge import ASKED
from lbr_ds.corpora.curate.near_duplicates import signature
from lbr_ds.corpora.formats.rows import Found, Tally
from lbr_ds.corpora.process_pool import in_order
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.store import Store, roles
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.system.locate import refetch_hint
from lbr_ds.system.progress import Progress

_CHUNK_RECORDS, _CHUNK_CHARS = 256, 1 << 20  # of one job
_CHUNKS_A_STEP = 16
_CURE = "check data.sources.format, shape, columns and encoding"
_UNSIGNED = bytes(512)  # where near duplicates are not asked for


class Job(NamedTuple):
    """Rows of one source and the rules for them."""

    found: list[Found]
    rules: Rules
    signed: bool


class Done(NamedTuple):
    """The rows again, records cleaned, and the signatures of their texts by key."""

    found: list[tuple[str, Cleaned | Any]]
    signatures: dict[bytes, bytes]


@dataclass
class Collected:
    """How many rows were read from each source, records kept, and rows at fault; tallies."""

    read: list[int]
    kept: list[int]
    bad: list[int]
    records: Tally = field(default_factory=Tally)  # records left out, by rule
    texts: Tally = field(default_factory=Tally)  # texts taken out of records that stay

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "records": self.records.plain(),
            "texts": self.texts.plain(),
        }

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Collected:
        """What `plain` told."""
        collected = cls(plain["read"], plain["kept"], plain["bad"])
        collected.records.restore(plain["records"])
        collected.texts.restore(plain["texts"])
        return collected


def collect(
    data: DataConfig, corpora: list[Corpus], tokenizer: str, store: Store, progress: Progress
) -> Collected:
    """Read and clean every source into the store; goes on where an earlier run was stopped.

    tokenizer: a file that the bounds in tokens count with; empty where there are none.

    Raises DataError for a bad record or a repeated id (strict), and for a source without records.
    """
    kept = store.recall("collected")
    none = [0] * len(corpora)
    collected = Collected.restored(kept) if kept else Collected(none, list(none), list(none))
    if store.recall("collect"):
        return collected
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


def _check_read(corpus: Corpus, read: int, bad: int, collected: Collected) -> None:
    """Raise DataError for a source of which no row could be used."""
    if not read:
        raise DataError(f"{corpus.path}: holds no records; check data.sources.path and format")
    if bad == read:
        first = collected.records.examples["bad_record"][0]
        raise DataError(
            f"{corpus.path}: all of its {bad} rows are at fault; {_CURE}. An example: {first}"
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
    found = islice(corpus.read(), collected.read[number], corpus.source.max_records)
    signed, asked = data.near_duplicate < 1, ASKED[corpus.source.role]
    done = in_order(_work, (Job(chunk, rules, signed) for chunk in _chunks(found)))
    while first := next(done, None):
        with store.step():
            for chunk in chain([first], islice(done, _CHUNKS_A_STEP - 1)):
                sound = any(isinstance(entry, Cleaned) for _, entry in chunk.found)
                for where, entry in chunk.found:
                    if isinstance(entry, DataError):
                        collected.bad[number] += 1
                        _refuse(data, "bad_record", str(entry), collected, sound)
                    elif isinstance(entry, Cleaned):
                        kept = _take(data, where, entry, chunk.signatures, store, collected, asked)
                        collected.kept[number] += kept
                    else:
                        collected.records.add(entry.rule, entry.example)
                collected.read[number] += len(chunk.found)
                progress(f"read {corpus.name}", collected.read[number], None)
            store.remember("collected", collected.plain())


def _chunks(found: Iterator[Found]) -> Iterator[list[Found]]:
    chunk: list[Found] = []
    chars = 0
    for where, entry in found:
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
    found: list[tuple[str, Any]] = []
    signatures: dict[bytes, bytes] = {}
    for where, entry in job.found:
        if not isinstance(entry, Record):
            found.append((where, entry))
            continue
        cleaned = clean_record(entry, job.rules)
        found.append((where, cleaned))
        for _, name, texts in roles(cleaned.record) if cleaned.keys else ():
            for known, text in zip(cleaned.keys[name], texts, strict=True):
                if known not in signatures:
                    signatures[known] = signature(text) if job.signed else _UNSIGNED
    return Done(found, signatures)


def _refuse(data: DataConfig, rule: str, fault: str, collected: Collected, sound: bool) -> None:
    """Count a row at fault, or raise DataError where none is to be left out.

    sound: whether rows near it are without fault; only then is it any use to leave such rows out.
    """
    if data.on_error == "strict":
        told = "data.sources" in fault  # what to correct there
        fix = "" if told else "; fix this row"
        skip = f"{fix}, or set data.on_error=skip to drop and count such rows"
        cure = skip if sound else "" if told else f"; {_CURE}"
        raise DataError(f"{fault:.1000}{cure}")
    collected.records.add(rule, fault)


def _take(
    data: DataConfig,
    where: str,
    cleaned: Cleaned,
    signatures: dict[bytes, bytes],
    store: Store,
    collected: Collected,
    asked: bool | None,
) -> bool:
    """Put one record into the store, or count why not."""
    first = store.taken(cleaned.record.id, where)
    if first is None:
        return _keep(cleaned, signatures, store, collected, asked)
    fault = f"{where}: id {cleaned.record.id!r:.80} is taken already, at {first}"
    _refuse(data, "duplicate_id", fault, collected, sound=True)
    return False


def _keep(
    cleaned: Cleaned,
    signatures: dict[bytes, bytes],
    store: Store,
    collected: Collected,
    asked: bool | None,
) -> bool:
    record = cleaned.record
    fact = b"fact" if asked is False and record.query else b""  # no duplicate of an equal pair
    for rule, example in cleaned.removed:
        collected.texts.add(rule, example)
    if cleaned.dropped:
        collected.records.add(*cleaned.dropped)
        return False
    if not store.is_new(cleaned.identity + fact):
        collected.records.add("duplicate", f"{record.id}: {record.query or record.text}")
        return False
    store.add(record, cleaned.keys, signatures, asked)
    return True
