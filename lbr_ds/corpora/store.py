"""Hold the records while they are prepared: an SQLite file and a file of MinHash signatures.

Both are in the work folder, so that memory does not grow with the corpus.

records    seq, id, the source's group, pair, judges, body (JSON); in reading order. pair: 1 for a
           question with answers, 0 for a passage or a fact, NULL until `knowledge.py` has decided;
           judges: 1 for a record of a source that only evaluates (role eval)
texts      num, key, text: every distinct normalised text, numbered from 0
uses       which record has which text, in which role, and its length in characters
families   of each text: its family of near duplicates, and the leader of its cluster
members    the component and the group of each record
components, groups  their labels; of a component also size and number of pairs
placed     the component and split of each record that is kept
state      progress: one JSON value per name, committed together with the work it describes
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

QUERY, POSITIVE, PASSAGE, NEGATIVE = range(4)  # the roles of a text in a record
_CACHE_KIB = 4_096
_TABLES = """
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records
    (seq INTEGER PRIMARY KEY, id TEXT, own_group TEXT, pair INTEGER, judges INTEGER, body TEXT);
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
    """The tables, and the operations that several steps need. Changes are made inside `step`."""

    def __init__(self, folder: Path) -> None:
        self.signatures_path = folder / "signatures"
        self.path = folder / "records.sqlite"
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self.db.execute("PRAGMA temp_store = FILE")
        self.db.executescript(f"BEGIN; {_TABLES} COMMIT;")
        self.texts = self.number("SELECT count(*) FROM texts")
        self.records = self.number("SELECT count(*) FROM records")
        # Cut off what an interrupted run wrote after its last commit.
        self._signatures = self.signatures_path.open("ab")
        self._signatures.truncate(self.texts * SIGNATURE_BYTES)

    def close(self) -> None:
        """Close both files."""
        self._signatures.close()
        self.db.close()

    def number(self, query: str, *values: Any) -> int:
        """Return the single number that `query` selects; 0 for NULL."""
        return self.db.execute(query, values).fetchone()[0] or 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Commit all changes made inside, or none of them."""
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
        """Return the value that `remember` stored under a name, else None."""
        row = self.db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value under a name."""
        text = json.dumps(value)
        self.db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, text))

    def take_id(self, name: str, place: str) -> str | None:
        """Take an id; return where it was used before, None if it is new."""
        row = self.db.execute("SELECT place FROM ids WHERE id = ?", (name,)).fetchone()
        if row:
            return str(row[0])
        self.db.execute("INSERT INTO ids VALUES (?, ?)", (name, place))
        return None

    def is_new(self, identity: bytes) -> bool:
        """Return whether no earlier record has this identity."""
        query = "INSERT OR IGNORE INTO identities VALUES (?)"
        return self.db.execute(query, (identity,)).rowcount == 1

    def add(
        self,
        record: Record,
        keys: dict[str, list[bytes]],
        signatures: dict[bytes, bytes],
        is_pair: bool | None = True,
        *,
        judges: bool = False,
    ) -> None:
        """Append a record and its texts; is_pair: the value of `pair` for a question."""
        body = replace(record, group="").to_json()
        pair = is_pair if record.query else False
        row = (self.records, record.id, record.group, pair, judges, body)
        self.db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", row)
        for role, name, texts in roles(record):
            for place, (known, text) in enumerate(zip(keys[name], texts, strict=True)):
                number = self._text(known, text, signatures)
                use = (self.records, role, place, number, len(text))
                self.db.execute("INSERT INTO uses VALUES (?, ?, ?, ?, ?)", use)
        self.records += 1

    def _text(self, known: bytes, text: str, signatures: dict[bytes, bytes]) -> int:
        number = self.num_of(known)
        if number is not None:
            return number
        self.db.execute("INSERT INTO texts VALUES (?, ?, ?)", (self.texts, known, text))
        self._signatures.write(signatures[known])
        self.texts += 1
        return self.texts - 1

    def num_of(self, known: bytes) -> int | None:
        """Return the number of the text with this key, None if there is none."""
        row = self.db.execute("SELECT num FROM texts WHERE key = ?", (known,)).fetchone()
        return row[0] if row else None

    def record(self, seq: int) -> Record:
        """Return a record as it will be written: with its group and the negatives that are left."""
        body, label = self.db.execute(
            "SELECT body, label FROM records JOIN members USING (seq) JOIN groups"
            " USING (grp) WHERE seq = ?",
            (seq,),
        ).fetchone()
        record = Record(**json.loads(body))
        if not record.negatives:
            return replace(record, group=label)
        left = self.db.execute(
            "SELECT place FROM uses WHERE seq = ? AND role = ? ORDER BY place", (seq, NEGATIVE)
        )
        places = [place for (place,) in left]
        return replace(
            record,
            group=label,
            negatives=[record.negatives[place] for place in places],
            negative_scores=[record.negative_scores[place] for place in places]
            if record.negative_scores
            else [],
        )


class Texts:
    """Return the text with a number. A copy sent to another process opens the file again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def __reduce__(self) -> tuple[type[Texts], tuple[Path]]:
        return Texts, (self._path,)

    def __call__(self, number: int) -> str:
        """Return a text."""
        if self._db is None:
            self._db = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True)
        query = "SELECT text FROM texts WHERE num = ?"
        return str(self._db.execute(query, (number,)).fetchone()[0])

    def close(self) -> None:
        """Close this process's connection."""
        if self._db is not None:
            self._db.close()


def roles(record: Record) -> list[tuple[int, str, list[str]]]:
    """Return (role, name of the field, texts) for each role of texts in a record."""
    return [
        (QUERY, "query", [record.query] if record.query else []),
        (POSITIVE, "positives", record.positives),
        (PASSAGE, "text", [record.text] if record.text else []),
        (NEGATIVE, "negatives", record.negatives),
    ]
