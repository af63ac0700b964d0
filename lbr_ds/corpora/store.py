"""Store what `prepare` finds out about the records: a DuckDB database, and files for all processes.

The processes that clean records write parts (`parts.py`); `stored.py` reads records and texts from
them. The database, which only this process opens, has numbers and names:

parts      which parts are written, see `parts.Part`
read_rows  a view of the rows of all parts with their numbers `seq`, until texts are gathered
records    seq, id, source, the source's group, instructions, pair, judges; without duplicates.
           instruction: NULL for a passage; pair: true for a question with answers, false for a
           passage or a fact, NULL until `knowledge.py` has decided; judges: true for a record of a
           source for evaluation only (role eval)
texts      num: every distinct normalised text, numbered from 0; hi and lo, the halves of its key;
           and the first record that has it, in which role and place
uses       which record has which text, in which role, and its length in characters
families   of each text: its family of near duplicates, and the leader of its cluster
members    the component and the group of each record
components, groups  their labels; of a component also size and number of pairs
placed     the component and split of each record that is kept
removed    the uses that records lose when they are written, since they would leak
state      progress: one JSON value per name, committed together with the work it describes
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import PythonUDFType
from numpy.typing import NDArray

from lbr_ds.corpora.curate.near_duplicates import SIGNATURE_BYTES
from lbr_ds.corpora.formats.interface import Piece
from lbr_ds.corpora.parts import Part, rows_file, signatures_file
from lbr_ds.corpora.store_files import Values
from lbr_ds.corpora.stored import NEGATIVE, PLACES, USE, Bodies, Files, Texts
from lbr_ds.system.atomic import write_json
from lbr_ds.system.process_pool import cores

_MEMORY, _ROW_BYTES = 512 << 20, 100  # of the database at least, and for each row
_BATCH = 1 << 16  # rows of a result that are in memory at once
_TABLES = """
CREATE TABLE IF NOT EXISTS state (name VARCHAR PRIMARY KEY, value VARCHAR);
CREATE TABLE IF NOT EXISTS parts
    (number INTEGER, name VARCHAR, piece VARCHAR, rows INTEGER, records INTEGER, bad INTEGER,
     fault VARCHAR);
CREATE TABLE IF NOT EXISTS records
    (seq INTEGER, id VARCHAR, source VARCHAR, own_group VARCHAR, instruction VARCHAR,
     document_instruction VARCHAR, pair BOOLEAN, judges BOOLEAN);
CREATE TABLE IF NOT EXISTS texts
    (num INTEGER, hi UBIGINT, lo UBIGINT, first_seq INTEGER, first_role TINYINT,
     first_place INTEGER, signature INTEGER);
CREATE TABLE IF NOT EXISTS uses
    (seq INTEGER, role TINYINT, place INTEGER, num INTEGER, chars INTEGER);
CREATE TABLE IF NOT EXISTS families (num INTEGER, family INTEGER, cluster INTEGER);
CREATE TABLE IF NOT EXISTS members (seq INTEGER, component INTEGER, grp INTEGER);
CREATE TABLE IF NOT EXISTS groups (grp INTEGER, label VARCHAR);
CREATE TABLE IF NOT EXISTS components
    (component INTEGER, label VARCHAR, draw BLOB, size INTEGER, pairs INTEGER);
CREATE TABLE IF NOT EXISTS placed (seq INTEGER, component INTEGER, split VARCHAR);
CREATE TABLE IF NOT EXISTS removed (seq INTEGER, role TINYINT, place INTEGER);
"""


class Store:
    """The tables, and the operations that several steps need. Changes are made inside `step`.

    Args:
        folder: The work folder.
    """

    def __init__(self, folder: Path) -> None:
        self.files = Files(folder)
        self.files.parts.mkdir(exist_ok=True)
        self.db: duckdb.DuckDBPyConnection = duckdb.connect(
            folder / "store.duckdb",
            config={
                "threads": cores(),
                "memory_limit": f"{_MEMORY}B",
                "temp_directory": str(folder / "spilled"),
                "autoinstall_known_extensions": False,
            },
        )
        self.db.execute(_TABLES)
        self.body, self.text = Bodies(self.files), Texts(self.files)
        self.total = self.recall("rows") or 0
        self._grant_memory()

    def close(self) -> None:
        """Close all files."""
        for file in (self.body, self.text, self.db):
            file.close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Commit all changes made inside, or none of them."""
        self.db.begin()
        try:
            yield
            self.db.commit()
        except BaseException:
            with suppress(duckdb.Error):  # an error of the disk has ended the transaction
                self.db.rollback()
            raise

    def recall(self, name: str) -> Any:
        """Return the value that `remember` stored under a name, else None."""
        found = self.rows("SELECT value FROM state WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value under a name."""
        self.db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    def number(self, query: str, *values: Any) -> int:
        """Return the single number that `query` selects; 0 for NULL."""
        return self.rows(query, *values)[0][0] or 0

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the few rows that `query` selects."""
        return self.db.execute(query, values).fetchall()

    def arrays(self, query: str, *values: Any) -> tuple[NDArray[Any], ...]:
        """Return the columns of numbers that `query` selects."""
        return tuple(self.db.execute(query, values).fetchnumpy().values())

    def batches(self, query: str, *values: Any) -> Iterator[pa.RecordBatch]:
        """Yield what `query` selects; the next query may run when this is finished."""
        yield from self.db.sql(query, params=values).to_arrow_reader(_BATCH)

    def insert(self, table: str, **columns: Any) -> None:
        """Insert rows, given as lists or arrays of the columns."""
        self.db.register("given", pa.table(columns))
        self.db.execute(f"INSERT INTO {table} BY NAME FROM given")
        self.db.unregister("given")

    def define(self, name: str, function: Callable[[str], bytes]) -> None:
        """Define a function of strings with values of bytes for queries."""

        def of_all(strings: Any) -> pa.Array:
            return pa.array([function(one) for one in strings.to_pylist()], pa.binary())

        with suppress(duckdb.InvalidInputException):  # there is none yet
            self.db.remove_function(name)
        self.db.create_function(name, of_all, ["VARCHAR"], "BLOB", type=PythonUDFType.ARROW)

    def delete_records(self, seqs: Any) -> None:
        """Delete records with the uses of their texts."""
        self.db.execute("CREATE TEMP TABLE gone (seq INTEGER)")
        self.insert("gone", seq=pa.array(seqs, pa.int32()))
        for table in ("uses", "records"):
            self.db.execute(f"DELETE FROM {table} WHERE seq IN (FROM gone)")
        self.db.execute("DROP TABLE gone")

    def parts(self, number: int) -> list[Part]:
        """Return the parts of a source that are written, in order."""
        rows = self.rows("FROM parts WHERE number = ? ORDER BY name", number)
        return [
            Part(number, name, Piece(*json.loads(piece)) if piece else None, *counts)
            for _, name, piece, *counts in rows
        ]

    def add_part(self, part: Part) -> None:
        """Store that a part is written."""
        piece = json.dumps(part.piece[:-1]) if part.piece else None  # without its bytes
        self.db.execute(
            "INSERT INTO parts VALUES (?, ?, ?, ?, ?, ?, ?)",
            (part.number, part.name, piece, *part[3:]),
        )

    def drop_parts(self, number: int) -> None:
        """Forget the parts of a source."""
        self.db.execute("DELETE FROM parts WHERE number = ?", (number,))

    def begin_tables(self) -> None:
        """Define `read_rows`, once all parts are written."""
        parts = self.rows("SELECT name, rows FROM parts ORDER BY number, name")
        ends = np.cumsum([0, *(rows for _, rows in parts)]).tolist()
        names = [name for name, _ in parts]
        write_json(self.files.index, [ends[:-1], names])
        self.total = ends[-1]
        self.remember("rows", self.total)
        self._grant_memory()
        files = [str(rows_file(self.files.parts, name)) for name in names]
        self.db.execute("CREATE OR REPLACE TEMP TABLE firsts (filename VARCHAR, first BIGINT)")
        self.insert("firsts", filename=files, first=ends[:-1])
        listed = ", ".join("'" + name.replace("'", "''") + "'" for name in files)
        self.db.execute(
            "CREATE OR REPLACE TEMP VIEW read_rows AS"
            " SELECT (first + file_row_number)::INTEGER AS seq, found.* EXCLUDE (filename,"
            f" file_row_number) FROM read_parquet([{listed}], filename = true,"
            " file_row_number = true) AS found JOIN firsts USING (filename)"
        )

    def _grant_memory(self) -> None:
        """Give the database memory for its size."""
        free = psutil.virtual_memory().available // 2
        memory = max(_MEMORY, min(self.total * _ROW_BYTES, free))
        self.db.execute(f"SET memory_limit = '{memory}B'")

    def _index(self) -> tuple[list[int], list[str]]:
        """Return the first `seq` and the name of each part."""
        firsts, names = json.loads(self.files.index.read_bytes())
        return firsts, names

    @property
    def texts(self) -> int:
        """How many distinct texts there are."""
        return self.number("SELECT count(*) FROM texts")

    def gather_texts(self, signed: bool) -> None:
        """Write the files of `Texts` and `Comparison`: of each text its place and its signature.

        Then the parts have only the records.
        """
        query = "SELECT first_seq, first_role, first_place FROM texts ORDER BY num"
        with self.files.places.open("wb") as file:
            for batch in self.batches(query):
                places = np.empty(batch.num_rows, PLACES)
                for name, column in zip(PLACES.fields or (), batch.columns, strict=True):
                    places[name] = column.to_numpy()
                file.write(places.tobytes())
        if signed:
            self._gather_signatures()
        self.db.execute("DROP VIEW IF EXISTS read_rows")
        for ending in (".rows", ".signatures"):
            for path in self.files.parts.glob(f"*{ending}"):
                path.unlink()

    def _gather_signatures(self) -> None:
        """Append the signatures of the parts in the order of the texts' numbers.

        The files of the parts are removed on the way. An interrupted run resumes at the text that
        comes next.
        """
        firsts, names = self._index()
        with self.files.signatures.open("ab") as file:
            done = file.tell() // SIGNATURE_BYTES
            file.truncate(done * SIGNATURE_BYTES)
            query = "SELECT first_seq, signature FROM texts WHERE num >= ? ORDER BY num"
            for batch in self.batches(query, done):
                seqs, numbers = (column.to_numpy() for column in batch.columns)
                parts = np.searchsorted(firsts, seqs, "right") - 1
                starts = np.flatnonzero(np.diff(parts, prepend=-1)).tolist()
                for begin, end in pairwise([*starts, len(parts)]):
                    path = signatures_file(self.files.parts, names[parts[begin]])
                    values = np.fromfile(path, np.dtype((np.void, SIGNATURE_BYTES)))
                    file.write(values[numbers[begin:end]].tobytes())
                file.flush()
                os.fsync(file.fileno())
                for name in names[parts[0] : parts[-1]]:
                    signatures_file(self.files.parts, name).unlink(missing_ok=True)

    def write_labels(self) -> None:
        """Write the files that `Records` needs beside the parts."""
        numbers = np.zeros(self.total, np.int32)
        query = (
            "SELECT seq, number FROM members JOIN (SELECT grp, row_number() OVER (ORDER BY grp) - 1"
            " AS number FROM groups) USING (grp)"
        )
        for batch in self.batches(query):
            seqs, groups = (column.to_numpy() for column in batch.columns)
            numbers[seqs] = groups
        numbers.tofile(self.files.groups)
        with closing(Values(self.files.labels)) as labels:
            for batch in self.batches("SELECT label FROM groups ORDER BY grp"):
                names = pa.array(batch.column(0)).cast(pa.large_binary())
                labels.add_joined(b"".join(names.to_pylist()), pc.binary_length(names).to_numpy())
        (uses,) = self.arrays(f"SELECT {USE} AS number FROM removed ORDER BY number")
        uses.tofile(self.files.removed)

    def families(self) -> NDArray[np.int32]:
        """Return the family of each text."""
        # DuckDB keeps the order of insertion (`preserve_insertion_order`), here and in `links`.
        return self.arrays("SELECT family FROM families")[0]

    def links(self, what: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the texts that link records: for each use its record, ascending, and `what`.

        what: "family" or "cluster" of the text.
        """
        seqs, numbers = self.arrays("SELECT seq, num FROM uses WHERE role < ?", NEGATIVE)
        return seqs, self.arrays(f"SELECT {what} FROM families")[0][numbers]

    def kept_records(self, sources: int) -> list[int]:
        """Return how many records of each source there are."""
        rows = self.rows("SELECT number, sum(rows) FROM parts GROUP BY number")
        read = dict(rows)
        ends = np.cumsum([read.get(number, 0) for number in range(sources)])
        (seqs,) = self.arrays("SELECT seq FROM records")
        return np.diff(np.searchsorted(np.sort(seqs), ends), prepend=0).tolist()

    def seqs_of(self, split: str) -> array[int]:
        """Return the records of a split, in random order that does not depend on the reading."""
        (seqs,) = self.arrays(
            "SELECT seq FROM placed JOIN components USING (component) JOIN records USING (seq)"
            " WHERE split = ? ORDER BY draw, id",
            split,
        )
        return array("q", seqs.astype(np.int64).tobytes())
