"""The texts of documents that a source names by id, in a temporary file."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lbr_ds.corpora.formats.interface import Row, listing
from lbr_ds.corpora.formats.scores import SIDES
from lbr_ds.corpora.formats.values import ID_NAMES, as_text, passage_texts
from lbr_ds.errors import DataError


class Documents:
    """Replaces the ids in a record's positives and negatives by texts."""

    def __init__(self, store: sqlite3.Connection, place: str) -> None:
        self._store = store
        self._place = place

    def __call__(self, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the fields of a record with texts in place of ids.

        Raises:
            DataError: A document is not there.
        """
        named = {
            name: ids
            for name in ("positives", "negatives")
            if isinstance(ids := raw.get(name), list) and all(isinstance(one, str) for one in ids)
        }  # anything else is an error of the record
        found = dict(raw)
        for name, ids in named.items():
            texts = [self._text(ident, where) for ident in ids]
            found[name] = [text for text in texts if text]
            scores = raw.get(SIDES[name])
            if isinstance(scores, list) and len(scores) == len(texts):
                pairs = zip(scores, texts, strict=True)
                found[SIDES[name]] = [score for score, text in pairs if text]
        return found

    def _text(self, ident: str, where: str) -> str:
        row = self._store.execute("SELECT text FROM texts WHERE id = ?", (ident,)).fetchone()
        if row is None:
            raise DataError(f"{where}: names document {ident!r:.60}, which is not in {self._place}")
        return row[0] or ""


@contextmanager
def documents(rows: Iterable[Row], place: str) -> Iterator[Documents]:
    """Yield the documents of rows with an id and a text.

    Args:
        rows: The rows of the documents.
        place: Their file, for messages.

    Raises:
        DataError: A row has no id or no text, or repeats an id.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lbr-ds-") as folder,
        closing(sqlite3.connect(Path(folder) / "documents.sqlite")) as store,
    ):
        store.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        for row in rows:
            try:
                store.execute("INSERT INTO texts VALUES (?, ?)", _named_text(row))
            except sqlite3.IntegrityError:
                raise DataError(
                    f"{row.where}: its document id is taken by an earlier row"
                ) from None
        yield Documents(store, place)


def _named_text(row: Row) -> tuple[str, str]:
    """Return id and `title. text` of a row; the text may be empty."""
    if not isinstance(row.columns, dict):
        raise DataError(str(row.columns))
    name = next((name for name in ID_NAMES if name in row.columns), "")
    ident = as_text(row.columns[name]) if name else ""
    if not ident or "text" not in row.columns:
        raise DataError(
            f"{row.where}: a document needs {' or '.join(ID_NAMES)}, and text; it has "
            f"{listing(row.columns)}"
        )
    return ident, "".join(passage_texts(row.columns, "text", row.where))
