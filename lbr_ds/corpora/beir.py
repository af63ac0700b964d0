"""The BEIR layout: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in one folder.

One row a judged query: its documents with a score above 0 are positives ("title. text"), those
with 0 are negatives. Documents that no query names are left out; name corpus.jsonl as a source of
its own (shape: passages) to learn from them.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.jsonl import read_jsonl
from lbr_ds.corpora.reading import Row
from lbr_ds.corpora.table import read_tsv
from lbr_ds.errors import DataError

_TABLES = """
CREATE TABLE texts (kind TEXT, id TEXT, text TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE qrels (place INTEGER PRIMARY KEY, line TEXT, query TEXT, document TEXT, score REAL);
"""


def read_beir(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row a query in the order of the qrels; all splits, or the source's `split`.

    The corpus lies in a temporary file meanwhile. Raises DataError for a folder that is not BEIR's.
    """
    with tempfile.TemporaryDirectory(prefix="lbr-ds-") as folder:
        store = sqlite3.connect(Path(folder) / "beir.sqlite")
        try:
            store.executescript(_TABLES)
            for kind, name in (("document", "corpus"), ("query", "queries")):
                yield from _load(store, kind, _part(path, f"{name}.jsonl"), source)
            yield from _judge(store, path, source)
            yield from _queries(store, path)
        finally:
            store.close()


def _part(path: Path, name: str) -> Path:
    for file in (path / name, path / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(
        f"{path}: holds no {name}; BEIR has corpus.jsonl, queries.jsonl and qrels/train.tsv"
    )


def _load(store: sqlite3.Connection, kind: str, file: Path, source: SourceConfig) -> Iterator[Row]:
    """Put one file's texts into the store; yields its bad lines."""
    for row in read_jsonl(file, source):
        text = row.columns if isinstance(row.columns, DataError) else _text(row)
        if isinstance(text, DataError):
            yield Row(row.where, row.key, text)
            continue
        name = str(_columns(row)["_id"])
        try:
            store.execute("INSERT INTO texts VALUES (?, ?, ?)", (kind, name, text))
        except sqlite3.IntegrityError:
            message = f"{row.where}: _id {name!r} is taken by an earlier line"
            yield Row(row.where, row.key, DataError(message))


def _columns(row: Row) -> dict[str, Any]:
    assert isinstance(row.columns, dict)
    return row.columns


def _text(row: Row) -> str | DataError:
    """`title. text`, or what is missing."""
    raw = _columns(row)
    if raw.get("_id") in (None, "") or not isinstance(raw.get("text"), str):
        return DataError(f"{row.where}: needs _id and text; it has {', '.join(raw)}")
    title = raw.get("title") or ""
    return f"{title}. {raw['text']}" if isinstance(title, str) and title else str(raw["text"])


def _judge(store: sqlite3.Connection, path: Path, source: SourceConfig) -> Iterator[Row]:
    """Put the judgements into the store; yields those that cannot be used."""
    files = sorted((path / "qrels").glob(f"{source.split or '*'}.tsv"))
    if not files:
        raise DataError(f"{path}: holds no qrels/{source.split or '*'}.tsv; check data.sources")
    for file in files:
        for row in read_tsv(file, source):
            fault = row.columns if isinstance(row.columns, DataError) else _insert(store, row)
            if fault:
                yield Row(row.where, row.key, fault)


def _insert(store: sqlite3.Connection, row: Row) -> DataError | None:
    cells = list(_columns(row).values())
    if len(cells) != 3:
        return DataError(
            f"{row.where}: has {len(cells)} columns; qrels have query, document, score"
        )
    query, document, score = cells
    try:
        number = float(score)
    except ValueError:
        return DataError(f"{row.where}: score {score!r} is not a number")
    for kind, name in (("query", query), ("document", document)):
        if not store.execute(
            "SELECT 1 FROM texts WHERE kind = ? AND id = ?", (kind, name)
        ).fetchone():
            return DataError(f"{row.where}: names {kind} {name!r}, which is in no line")
    store.execute(
        "INSERT INTO qrels VALUES (NULL, ?, ?, ?, ?)", (row.where, query, document, number)
    )
    return None


def _queries(store: sqlite3.Connection, path: Path) -> Iterator[Row]:
    """One row a query with a positive; a query whose judgements are all 0 is a bad row."""
    ordered = store.execute(
        "SELECT first.place, qrels.line, qrels.query, q.text, d.text, qrels.score FROM qrels"
        " JOIN (SELECT query, min(place) AS place FROM qrels GROUP BY query) AS first"
        " ON first.query = qrels.query"
        " JOIN texts AS q ON q.kind = 'query' AND q.id = qrels.query"
        " JOIN texts AS d ON d.kind = 'document' AND d.id = qrels.document"
        " ORDER BY first.place, qrels.place"
    )
    for _, judged in groupby(ordered, key=lambda row: row[0]):
        rows = list(judged)
        _, where, name, query, _, _ = rows[0]
        yield Row(where, name, {
            "id": name,
            "query": query,
            "positives": [text for *_, text, score in rows if score > 0],
            "negatives": [text for *_, text, score in rows if score <= 0],
        })  # fmt: skip
