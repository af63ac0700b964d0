"""Read BEIR and MS MARCO folders; each file may also be a .gz.

BEIR has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; MS MARCO collection.tsv, queries.SPLIT.tsv
and qrels.SPLIT.tsv, whose tables of texts have an id, a text and no header.

Each judged query is a row: its documents with a score above 0 are positives ("title. text"), those
with 0 or less are negatives. Documents without judgements are left out; add corpus.jsonl as a
source of its own (shape: passages) to train on them.

Judgements are `query document score`, as in BEIR, or `query 0 document score`, as in TREC; a first
line whose score is not a number is a header. What gives no pair is counted and left out: queries
without judgements or without one above 0, documents and queries without text, and repeated
judgements (the highest score counts).
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.curate.segmentation import visible
from lbr_ds.corpora.formats.delimited import read_tsv
from lbr_ds.corpora.formats.interface import Format, Row, Skipped, listing
from lbr_ds.corpora.formats.jsonl import JSONL
from lbr_ds.corpora.formats.lines import numbered_lines
from lbr_ds.corpora.formats.values import as_text
from lbr_ds.errors import DataError

_TABLE_ENDS = (".tsv", ".tsv.gz")
_TABLES = """
CREATE TABLE texts (kind TEXT, id TEXT, text TEXT, line TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE qrels (place INTEGER PRIMARY KEY, line TEXT, query TEXT, document TEXT, score REAL,
                    UNIQUE (query, document));
"""


def read_beir(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per query in the order of the qrels; of all splits, or the source's `split`.

    The corpus is held in a temporary file.

    Raises:
        DataError: The folder lacks a file of BEIR.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lbr-ds-") as folder,
        closing(sqlite3.connect(Path(folder) / "beir.sqlite")) as store,
    ):
        store.executescript(_TABLES)
        files = _msmarco(path, source) if is_msmarco(path) else _beir(path, source)
        for kind in ("document", "query"):
            for file in files[kind]:
                yield from _load(store, kind, file, source)
        texts = {kind: files[kind][0].name for kind in ("document", "query")}
        for file in files["qrels"]:
            yield from _judge(store, file, source, texts)
        yield from _queries(store)
        if not source.split:
            yield from _not_judged(store)


def is_msmarco(path: Path) -> bool:
    """Return whether a folder has the layout of MS MARCO."""
    return any((path / f"collection{end}").is_file() for end in _TABLE_ENDS)


def _msmarco(path: Path, source: SourceConfig) -> dict[str, list[Path]]:
    """Return the files of documents, queries and judgements of the split, or of all.

    The queries are those of the splits with judgements: others may repeat them (dev, dev.small).
    """
    qrels = _tables(path, f"qrels.{source.split}" if source.split else "qrels*")
    names = [file.name.removesuffix(".gz").removesuffix(".tsv") for file in qrels]
    queries = [_tables(path, name.replace("qrels", "queries", 1)) for name in names]
    return {
        "document": _tables(path, "collection"),
        "query": [file for (file, *_) in queries],
        "qrels": qrels,
    }


def _tables(path: Path, name: str) -> list[Path]:
    """Return the tables of that name. Raises DataError if there is none."""
    found = sorted(file for end in _TABLE_ENDS for file in path.glob(f"{name}{end}"))
    if not found:
        raise DataError(
            f"{path}: holds no {name}.tsv; correct `split:` of this entry of data.sources, or add "
            "the file"
        )
    return found


def _beir(path: Path, source: SourceConfig) -> dict[str, list[Path]]:
    """Return the files of documents, queries and judgements of the split, or of all."""
    split = source.split or "*"
    found = {"document": [_part(path, "corpus")], "query": [_part(path, "queries")]}
    ends = (".tsv", ".txt", ".qrels", ".tsv.gz", ".txt.gz")
    files = sorted(file for end in ends for file in (path / "qrels").glob(f"{split}{end}"))
    if not files:
        raise DataError(
            f"{path}: holds no qrels/{split}.tsv; correct `split:` of this entry of data.sources, "
            "or add the file"
        )
    return {**found, "qrels": files}


def _part(path: Path, name: str) -> Path:
    for end in (".jsonl", ".jsonl.gz", ".json", ".json.gz"):
        if (path / f"{name}{end}").is_file():
            return path / f"{name}{end}"
    raise DataError(
        f"{path}: holds no {name}.jsonl; BEIR has corpus.jsonl, queries.jsonl and qrels/train.tsv"
    )


def _load(store: sqlite3.Connection, kind: str, file: Path, source: SourceConfig) -> Iterator[Row]:
    """Put the texts of a file into the store; yield its invalid lines."""
    table = file.name.removesuffix(".gz").endswith(".tsv")
    if table:
        source = source.model_copy(update={"header": ["_id", "text"]})
    for row in (read_tsv if table else JSONL.read)(file, source):
        named = _named_text(row)
        if isinstance(named, DataError):
            yield Row(row.where, row.key, named)
            continue
        name, text = named
        try:
            store.execute("INSERT INTO texts VALUES (?, ?, ?, ?)", (kind, name, text, row.where))
        except sqlite3.IntegrityError:
            message = f"{row.where}: _id {name!r:.60} is taken by an earlier line"
            yield Row(row.where, row.key, DataError(message))


def _named_text(row: Row) -> tuple[str, str] | DataError:
    """Return (_id, `title. text`) of a line, or its error; the text may be empty."""
    if not isinstance(row.columns, dict):
        return DataError(str(row.columns))
    fields = {}
    for name in ("_id", "title", "text"):
        value = as_text(row.columns.get(name))
        if value is None:
            held = row.columns[name]
            return DataError(f"{row.where}: {name} must be a text or a number, not {held!r:.60}")
        fields[name] = value.strip() if visible(value) else ""
    if not fields["_id"]:
        return DataError(f"{row.where}: needs _id and text; it has {listing(row.columns)}")
    return fields["_id"], ". ".join(filter(None, (fields["title"], fields["text"])))


def _judge(
    store: sqlite3.Connection, file: Path, source: SourceConfig, texts: dict[str, str]
) -> Iterator[Row]:
    """Put the judgements of a file into the store; yield those that cannot be used."""
    for number, line in numbered_lines(file, source.encoding):
        where = f"{file}:{number}"
        if isinstance(line, DataError):
            yield Row(where, str(number), line)
        elif line.strip():
            fault = _insert(store, line, where, number == 1, texts)
            if fault:
                yield Row(where, str(number), fault)


def _insert(
    store: sqlite3.Connection, line: str, where: str, first: bool, texts: dict[str, str]
) -> DataError | Skipped | None:
    """Store one judgement, or return why not; a header is ignored."""
    cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
    try:
        number = float(cells[-1])
    except ValueError:
        return None if first else DataError(f"{where}: score {cells[-1]!r:.60} is not a number")
    if len(cells) not in (3, 4):
        return DataError(
            f"{where}: has {len(cells)} columns; qrels have query, document and score, "
            "or query, 0, document and score"
        )
    query, document = cells[0], cells[-2]
    for kind, name in (("query", query), ("document", document)):
        known = "SELECT 1 FROM texts WHERE kind = ? AND id = ?"
        if not store.execute(known, (kind, name)).fetchone():
            return DataError(f"{where}: names {kind} {name!r:.60}, which is not in {texts[kind]}")
    insert = "INSERT OR IGNORE INTO qrels VALUES (NULL, ?, ?, ?, ?)"
    if store.execute(insert, (where, query, document, number)).rowcount:
        return None
    store.execute(
        "UPDATE qrels SET score = max(score, ?) WHERE query = ? AND document = ?",
        (number, query, document),
    )
    return Skipped("judged_twice", f"{where}: {query} {document}")


def _queries(store: sqlite3.Connection) -> Iterator[Row]:
    """Yield a row per query, or why it has no positive, and a row per judged empty document."""
    ordered = store.execute(
        "SELECT first.place, qrels.line, qrels.query, q.text, d.id, d.text, qrels.score FROM qrels"
        " JOIN (SELECT query, min(place) AS place FROM qrels GROUP BY query) AS first"
        " ON first.query = qrels.query"
        " JOIN texts AS q ON q.kind = 'query' AND q.id = qrels.query"
        " JOIN texts AS d ON d.kind = 'document' AND d.id = qrels.document"
        " ORDER BY first.place, qrels.place"
    )
    for _, judged in groupby(ordered, key=lambda row: row[0]):
        rows = list(judged)
        _, where, name, query, *_ = rows[0]
        for _, line, _, _, document, text, _ in rows:
            if not text:
                example = f"{line}: document {document}, for query {name}"
                yield Row(line, name, Skipped("empty_document", example))
        positives = [text for *_, text, score in rows if text and score > 0]
        negatives = [text for *_, text, score in rows if text and score <= 0]
        if not query:
            yield Row(where, name, Skipped("empty_query", f"{where}: query {name}"))
        elif not positives:
            yield Row(where, name, Skipped("no_positive", f"{where}: query {name}: {query}"))
        else:
            record = {"id": name, "query": query, "positives": positives, "negatives": negatives}
            yield Row(where, name, record)


def _not_judged(store: sqlite3.Connection) -> Iterator[Row]:
    """Yield the queries without judgements."""
    rows = store.execute(
        "SELECT id, text, line FROM texts WHERE kind = 'query'"
        " AND id NOT IN (SELECT query FROM qrels) ORDER BY id"
    )
    for name, text, where in rows:
        yield Row(where, name, Skipped("not_judged", f"{where}: query {name}: {text}"))


BEIR = Format(read_beir, shape="records")
