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
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload
from urllib.parse import quote

from lbr_ds.corpora.curate.near_duplicates import SIGNATURE_BYTES
from lbr_ds.records import Record
from lbr_ds.shards.writer import Lazy

QUERY, POSITIVE, PASSAGE, NEGATIVE = range(4)  # the roles of a text in a record
_CACHE_KIB = 4_096
_AT_ONCE = 256  # values that one query looks for
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


class Use(NamedTuple):
    """A text of a record: its role, its place among those of this role, and its key."""

    role: int
    place: int
    key: bytes
    text: str


class Entry(NamedTuple):
    """A cleaned record as it is stored.

    Attributes:
        id: Its id.
        group: The source's group.
        pair: The value of the column `pair`.
        judges: Whether it only evaluates.
        body: The record without its group, as JSON.
        identity: Equal for exact duplicates.
        uses: Its texts.
    """

    id: str
    group: str
    pair: bool | None
    judges: bool
    body: str
    identity: bytes
    uses: list[Use]


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

    def places_of_ids(self, ids: list[str]) -> dict[str, str]:
        """Return where the ids that are already taken were read."""
        return dict(self._found("SELECT id, place FROM ids WHERE id IN", ids))

    def known_identities(self, identities: list[bytes]) -> set[bytes]:
        """Return which of the identities earlier records have."""
        query = "SELECT identity FROM identities WHERE identity IN"
        return {identity for (identity,) in self._found(query, identities)}

    def nums_of(self, keys: list[bytes]) -> dict[bytes, int]:
        """Return the numbers of the texts with these keys, as far as they are known."""
        return dict(self._found("SELECT key, num FROM texts WHERE key IN", keys))

    def _found(self, query: str, values: list[Any]) -> Iterator[Any]:
        """Yield the rows for the values, `_AT_ONCE` of them in one query."""
        for first in range(0, len(values), _AT_ONCE):
            part = values[first : first + _AT_ONCE]
            yield from self.db.execute(f"{query} ({', '.join('?' * len(part))})", part)

    def take_ids(self, places: dict[str, str]) -> None:
        """Take ids that are new; places: where each was read."""
        self.db.executemany("INSERT INTO ids VALUES (?, ?)", places.items())

    def add(self, entries: list[Entry], signatures: dict[bytes, bytes]) -> None:
        """Append records with new identities, and their texts with their signatures by key."""
        numbers = self.nums_of(list(dict.fromkeys(use.key for e in entries for use in e.uses)))
        texts: list[tuple[int, bytes, str]] = []
        rows: list[tuple[Any, ...]] = []
        uses: list[tuple[int, int, int, int, int]] = []
        for seq, entry in enumerate(entries, self.records):
            rows.append((seq, entry.id, entry.group, entry.pair, entry.judges, entry.body))
            for role, place, known, text in entry.uses:
                number = numbers.setdefault(known, self.texts)
                if number == self.texts:
                    texts.append((number, known, text))
                    self._signatures.write(signatures[known])
                    self.texts += 1
                uses.append((seq, role, place, number, len(text)))
        self.records += len(entries)
        identities = ((entry.identity,) for entry in entries)
        self.db.executemany("INSERT INTO identities VALUES (?)", identities)
        self.db.executemany("INSERT INTO texts VALUES (?, ?, ?)", texts)
        self.db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)
        self.db.executemany("INSERT INTO uses VALUES (?, ?, ?, ?, ?)", uses)

    def num_of(self, known: bytes) -> int | None:
        """Return the number of the text with this key, None if there is none."""
        row = self.db.execute("SELECT num FROM texts WHERE key = ?", (known,)).fetchone()
        return row[0] if row else None

    def seqs_of(self, split: str) -> array[int]:
        """Return the records of a split, in random order that does not depend on the reading."""
        ordered = self.db.execute(
            "SELECT seq FROM placed JOIN components USING (component) JOIN records USING (seq)"
            " WHERE split = ? ORDER BY draw, id",
            (split,),
        )
        return array("q", (seq for (seq,) in ordered))


class _Reader:
    """Read the file of a store. A copy sent to another process opens it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: sqlite3.Connection | None = None

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return type(self), (self._path,)

    @property
    def _db(self) -> sqlite3.Connection:
        if self._open is None:
            self._open = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True)
        return self._open

    def close(self) -> None:
        """Close this process's connection."""
        if self._open is not None:
            self._open.close()


class Texts(_Reader):
    """Return the text with a number."""

    def __call__(self, number: int) -> str:
        """Return a text."""
        query = "SELECT text FROM texts WHERE num = ?"
        return str(self._db.execute(query, (number,)).fetchone()[0])


class Records(_Reader):
    """Return records as they will be written: with their groups and the negatives that are left."""

    def __call__(self, seqs: Sequence[int]) -> list[Record]:
        """Return the records with these numbers, which are distinct."""
        query = (
            "SELECT seq, body, label FROM records JOIN members USING (seq) JOIN groups USING (grp)"
            f" WHERE seq IN ({', '.join('?' * len(seqs))})"
        )
        rows = {seq: (body, label) for seq, body, label in self._db.execute(query, list(seqs))}
        return [self._record(seq, *rows[seq]) for seq in seqs]

    def _record(self, seq: int, body: str, label: str) -> Record:
        fields = {**json.loads(body), "group": label}
        if "negatives" in fields:
            left = self._db.execute(
                "SELECT place FROM uses WHERE seq = ? AND role = ? ORDER BY place", (seq, NEGATIVE)
            )
            places = [place for (place,) in left]
            for name in ("negatives", "negative_scores"):
                if name in fields:
                    fields[name] = [fields[name][place] for place in places]
        return Record(**fields)


class Stored(Lazy):
    """Records of the store, each read when it is accessed."""

    def __init__(self, read: Records, seqs: array[int]) -> None:
        self._read, self.seqs = read, seqs

    def __len__(self) -> int:
        return len(self.seqs)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return self._read(self.seqs[place])
        return self._read([self.seqs[place]])[0]

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self.seqs), _AT_ONCE):
            yield from self._read(self.seqs[first : first + _AT_ONCE])

    def part(self, places: Sequence[int]) -> Stored:
        """Return those of the records that are at `places`."""
        return Stored(self._read, array("q", (self.seqs[place] for place in places)))


def roles(record: Record) -> list[tuple[int, str, list[str]]]:
    """Return (role, name of the field, texts) for each role of texts in a record."""
    return [
        (QUERY, "query", [record.query] if record.query else []),
        (POSITIVE, "positives", record.positives),
        (PASSAGE, "text", [record.text] if record.text else []),
        (NEGATIVE, "negatives", record.negatives),
    ]
