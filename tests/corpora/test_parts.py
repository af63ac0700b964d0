"""Parts, the view of their rows, and exact duplicates equal a plain program over all records."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.corpora import store as store_module
from lbr_ds.corpora.curate.cleaning import Rules, clean_record
from lbr_ds.corpora.curate.exact_duplicates import drop_exact_duplicates, repeated_ids
from lbr_ds.corpora.curate.near_duplicates import signature
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.parts import Part, PartWriter
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import FIELDS, Records, roles
from lbr_ds.records import Record

RULES = Rules(2, 1000, 0, None, "", (), False, None)
WORDS = ["alpha", "beta", "gamma", "Gamma", "x", "中文", "ภาษา", "  "]


def drawn(draw: random.Random, number: int) -> Record:
    """A record that often repeats an id or the texts of others, or breaks a rule."""

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 2)))

    name = f"r{number if draw.random() < 0.9 else draw.randrange(number + 1)}"
    if draw.random() < 0.3:
        return Record(id=name, text=text(), source="s", group=draw.choice(["", "g"]))
    positives, negatives = [text(), text()], [text() for _ in range(draw.randrange(3))]
    return Record(
        id=name,
        query=text(),
        positives=positives,
        negatives=negatives,
        source="s",
    )


@dataclass
class Plain:
    """What the store must hold, by dictionaries."""

    ids: dict[str, int] = field(default_factory=dict)
    identities: set[bytes] = field(default_factory=set)
    records: dict[int, Record] = field(default_factory=dict)
    texts: dict[bytes, str] = field(default_factory=dict)
    uses: list[tuple[int, int, int, int]] = field(default_factory=list)
    dropped: Tally = field(default_factory=Tally)
    removed: Tally = field(default_factory=Tally)

    def take(self, seq: int, record: Record) -> None:
        cleaned = clean_record(record, RULES)
        if record.id in self.ids:
            return
        self.ids[record.id] = seq
        for rule, example in cleaned.removed:
            self.removed.add(rule, example)
        record = cleaned.record
        if cleaned.dropped:
            self.dropped.add(*cleaned.dropped)
        elif cleaned.identity in self.identities:
            self.dropped.add("duplicate", f"{record.id}: {record.query or record.text}")
        else:
            self.identities.add(cleaned.identity)
            self.records[seq] = replace(record, group="")
            for role, name, texts in roles(record):
                for place, (key, text) in enumerate(zip(cleaned.keys[name], texts, strict=True)):
                    self.texts.setdefault(key, text)
                    self.uses.append((seq, role, place, list(self.texts).index(key)))


def filled(folder: Path, oracle: Plain) -> Iterator[tuple[int, str, int]]:
    """Write three parts of drawn rows; yield the part's number, its name and its rows."""
    draw = random.Random(5)
    seq = 0
    for number, count in enumerate((40, 0, 25)):
        name = f"{number:03d}-0000000"
        with PartWriter(folder, name, "pair", signed=True) as part:
            for row in range(count):
                if draw.random() < 0.1:
                    part.add_fault(f"row {row}", "bad_record", f"row {seq} is bad")
                    oracle.dropped.add("bad_record", f"row {seq} is bad")
                else:
                    record = drawn(draw, seq)
                    part.add(f"{number}:{row}", clean_record(record, RULES))
                    oracle.take(seq, record)
                seq += 1
        yield number, name, count


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Store, Plain, Tally, Tally]]:
    oracle = Plain()
    with closing(Store(tmp_path)) as store:
        with store.step():
            for number, name, rows in filled(store.files.parts, oracle):
                store.add_part(Part(number, name, None, rows, rows, 0, ""))
            store.begin_tables()
            repeated_ids(store)
            dropped, removed = Tally(), Tally()
            drop_exact_duplicates(store, dropped, removed)
        yield store, oracle, dropped, removed


def test_what_stays_equals_a_plain_program(made: tuple[Store, Plain, Tally, Tally]) -> None:
    store, oracle, dropped, removed = made
    assert dropped.to_dict() == oracle.dropped.to_dict()
    assert removed.to_dict() == oracle.removed.to_dict()
    assert set(dropped.counts) >= {"bad_record", "duplicate", "too_short"}
    assert [seq for (seq,) in store.rows("SELECT seq FROM records")] == list(oracle.records)
    assert {seq: store.body(seq) for seq in oracle.records} == oracle.records
    kept = [
        sum(first <= seq < last for seq in oracle.records) for first, last in ((0, 40), (40, 65))
    ]
    assert store.kept_records(3) == [kept[0], 0, kept[1]]
    keys = store.rows("SELECT hi, lo FROM texts ORDER BY num")
    assert [hi.to_bytes(8, "big") + lo.to_bytes(8, "big") for hi, lo in keys] == list(oracle.texts)
    found = store.rows("SELECT seq, role, place, num FROM uses ORDER BY seq, role, place")
    assert found == oracle.uses


def test_texts_and_signatures_by_number(
    made: tuple[Store, Plain, Tally, Tally], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gathering was interrupted, with files of parts already removed."""
    store, oracle, *_ = made
    monkeypatch.setattr(store_module, "_BATCH", 7)
    store.gather_texts(signed=True)
    texts = list(oracle.texts.values())
    assert [store.text(number) for number in range(store.texts)] == texts
    assert [pickle.loads(pickle.dumps(store.text))(number) for number in (0, 1)] == texts[:2]
    whole = b"".join(map(signature, texts))
    assert store.files.signatures.read_bytes() == whole
    assert not list(store.files.parts.glob("*.signatures"))


def test_gathering_signatures_resumes(
    made: tuple[Store, Plain, Tally, Tally], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, oracle, *_ = made
    monkeypatch.setattr(store_module, "_BATCH", 7)
    batches, stop = Store.batches, iter([True])

    def killed(self: Store, query: str, *values: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(self, query, *values)):
            if "signature" in query and number == 4 and next(stop, False):
                with self.files.signatures.open("ab") as file:
                    file.write(b"half of a signature")
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Store, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        store.gather_texts(signed=True)
    store.gather_texts(signed=True)
    expected = b"".join(map(signature, oracle.texts.values()))
    assert store.files.signatures.read_bytes() == expected


def test_records_are_read_as_they_are_written(made: tuple[Store, Plain, Tally, Tally]) -> None:
    """With the labels of their groups, and without the texts that are removed."""
    store, oracle, *_ = made
    expected: dict[int, Record] = {}
    removed: list[tuple[int, int, int]] = []
    for seq, record in oracle.records.items():
        kept = record.negatives[1:] if seq % 2 else record.negatives
        removed += [(seq, FIELDS.index("negatives"), 0)] * (len(kept) < len(record.negatives))
        label = f"label {seq % 4}"
        expected[seq] = replace(record, group=label, negatives=kept)
    with store.step():
        store.insert("members", seq=list(expected), grp=[10 * (seq % 4) for seq in expected])
        store.insert("groups", grp=[30, 0, 10, 20], label=[f"label {n}" for n in (3, 0, 1, 2)])
        seqs, places, numbers = zip(*removed, strict=True)
        store.insert("removed", seq=seqs, role=places, place=numbers)
        store.write_labels()
    with closing(Records(store.files)) as read:
        assert read(list(expected)) == list(expected.values())
    assert removed
