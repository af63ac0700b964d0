"""The records between reading and writing: an SQLite file and a file of signatures, both in the
work folder, so that memory does not grow with the corpus.

records    seq, id, its own group, pair, body (JSON); in reading order. pair: 1 for a question that
           may be asked, 0 for a passage or a fact, NULL while `knowledge.py` has not decided
texts      num, key, text: every distinct normalised text, numbered from 0
uses       which record has which text, as what, and how long it is there
families   of each text: its family of near duplicates, the leader of its cluster
members    after uniting: the component and the group of each record
components, groups  their labels; of a component also size and pairs
placed     after division: the component and split of each record that stays
state      what is done: one JSON value a name, written with the work that it tells of
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lbr_ds.corpora.curate.near_duplicates import SIGNATURE_BYTES
from lbr_ds.records import Record

QUERY, POSITIVE, PASSAGE, NEGATIVE = range(4)  # what a record has a text as
_CACHE_KIB = 4_096
_TABLES = """
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records
    (seq INTEGER PRIMARY KEY, id TEXT, own_group TEXT, pair INTEGER, body TEXT);
CREATE TABLE IF NOT EXISTS identities (identity BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (num INTEGER PRIMARY KEY, key BLOB UNIQUE, text TEXT);
CREATE TABLE IF NOT EXISTS uses
    (seq INTEGER, role INTEGER, place INTEGER, num INTEGER, chars INTEGER,
     PRIMARY KEY (seq, role, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS families (num INTEGER PRIMARY KEY, family INTEGER, cluster INTEGER);
CREATE TABLE IF NOT EXISTS members (seq INTEGER PRIMARY KEY, component INTEGER, grp INTEGER);
CREATE TABLE IF NOT EXISTS groups (grp INTEGER PRIMARY KEY, label TEXT);
CREATE TABLE IF NOT EXISTS components
    (component INTEGER PRIMARY KEY, label TEXT, draw BLOB, size INTEGER, pairs INTEGER);
CREATE TABLE IF NOT EXISTS placed (seq INTEGER PRIMARY KEY, component INTEGER, split TEXT);
"""


class Store:
    """The tables, with what several stages do with them. Use `with` a folder; see `step`."""

    def __init__(self, folder: Path) -> None:
        self.signatures_path = folder / "signatures"
        self.path = folder / "records.sqlite"
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self.db.execute("PRAGMA temp_store = FILE")
        self.db.executescript(f"BEGIN; {_TABLES} COMMIT;")
        self.texts = self.number("SELECT count(*) FROM texts")
        self.records = self.number("SELECT count(*) FROM records")
        # What an interrupted run wrote after its last commit is cut off.
        self._signatures = self.signatures_path.open("ab")
        self._signatures.truncate(self.texts * SIGNATURE_BYTES)

    def close(self) -> None:
        """Close both files."""
        self._signatures.close()
        self.db.close()

    def number(self, query: str, *values: Any) -> int:
        """The one number that `query` gives; 0 for NULL."""
        return self.db.execute(query, values).fetchone()[0] or 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """All changes inside are kept together, or none of them."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._signatures.flush()
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def recall(self, name: str) -> Any:
        """What `remember` was told under this name, else None."""
        found = self.db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        text = json.dumps(value)
        self.db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, text))

    def take_id(self, name: str, place: str) -> str | None:
        """Where the id was used before; None when it is new, and now taken."""
        found = self.db.execute("SELECT place FROM ids WHERE id = ?", (name,)).fetchone()
        if found:
            return str(found[0])
        self.db.execute("INSERT INTO ids VALUES (?, ?)", (name, place))
        return None

    def is_new(self, identity: bytes) -> bool:
        """Whether no record of this identity came before."""
        query = "INSERT OR IGNORE INTO identities VALUES (?)"
        return self.db.execute(query, (identity,)).rowcount == 1

    def add(
        self,
        record: Record,
        keys: dict[str, list[bytes]],
        signatures: dict[bytes, bytes],
        asked: bool | None = True,
    ) -> None:
        """Append a record and the texts that it brings; asked: what `pair` is of a question."""
        body = replace(record, group="").to_json()
        row = (self.records, record.id, record.group, asked if record.query else False, body)
        self.db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", row)
        for role, name, texts in roles(record):
            for place, (known, text) in enumerate(zip(keys[name], texts, strict=True)):
                number = self._text(known, text, signatures)
                use = (self.records, role, place, number, len(text))
                self.db.execute("INSERT INTO uses VALUES (?, ?, ?, ?, ?)", use)
        self.records += 1

    def _text(self, known: bytes, text: str, signatures: dict[bytes, bytes]) -> int:
        found = self.num_of(known)
        if found is not None:
            return found
        self.db.execute("INSERT INTO texts VALUES (?, ?, ?)", (self.texts, known, text))
        self._signatures.write(signatures[known])
        self.texts += 1
        return self.texts - 1

    def num_of(self, known: bytes) -> int | None:
        """The number of the text with this key."""
        found = self.db.execute("SELECT num FROM texts WHERE key = ?", (known,)).fetchone()
        return found[0] if found else None

    def record(self, seq: int) -> Record:
        """A record as it will be written: with its group and the negatives that are left."""
        body, label = self.db.execute(
            "SELECT body, label FROM records JOIN members USING (seq) JOIN groups"
            " USING (grp) WHERE seq = ?",
            (seq,),
        ).fetchone()
        record = Record(**json.loads(body))
        negatives = record.negatives
        if negatives:
            left = self.db.execute(
                "SELECT place FROM uses WHERE seq = ? AND role = ? ORDER BY place", (seq, NEGATIVE)
            )
            negatives = [record.negatives[place] for (place,) in left]
        return replace(record, group=label, negatives=negatives)


class Texts:
    """A text of a store by its number, for any process: a copy that is sent opens the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def __reduce__(self) -> tuple[type[Texts], tuple[Path]]:
        return Texts, (self._path,)

    def __call__(self, number: int) -> str:
        if self._db is None:
            self._db = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True)
        query = "SELECT text FROM texts WHERE num = ?"
        return str(self._db.execute(query, (number,)).fetchone()[0])

    def close(self) -> None:
        """Close this process's connection."""
        if self._db is not None:
            self._db.close()


def roles(record: Record) -> list[tuple[int, str, list[str]]]:
    """What a record has texts as: role, name of the field, the texts."""
    return [
        (QUERY, "query", [record.query] if record.query else []),
        (POSITIVE, "positives", record.positives),
        (PASSAGE, "text", [record.text] if record.text else []),
        (NEGATIVE, "negatives", record.negatives),
    ]
