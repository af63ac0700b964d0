"""Write cleaned rows of a source as a part: files that any process writes and any other reads.

A part has the rows of the source as columns in `NAME.rows` (Parquet, see ROWS), its records as JSON
in `NAME.bodies`, and the MinHash signatures of its distinct texts in `NAME.signatures`.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lbr_ds.corpora.curate.cleaning import Cleaned
from lbr_ds.corpora.curate.near_duplicates import signature
from lbr_ds.corpora.curate.tally import EXAMPLE_CHARS
from lbr_ds.corpora.formats.interface import Piece
from lbr_ds.corpora.store_files import Values
from lbr_ds.corpora.stored import body_file, roles

# Whether the questions of a source of this role are pairs; None: `choose_facts` decides.
_IS_PAIR = {"pair": True, "eval": True, "fact": False, "both": None}
_USE = {
    "role": pa.int8(),
    "place": pa.int32(),
    "hi": pa.uint64(),  # the halves of the text's key, big-endian
    "lo": pa.uint64(),
    "chars": pa.int32(),
    "signature": pa.int32(),  # its place in the part's file of signatures
}
_EVENT = {"of_text": pa.bool_(), "rule": pa.string(), "example": pa.string()}
KEY_BYTES = 16
_SHARED = "-shared"
_AT_ONCE = 512  # records that are written at once
_STRINGS = ("place", "id", "source", "own_group", "instruction", "document_instruction")
# A row without `id` was no record, and one without `hi` and `lo` (the halves of what is equal for
# exact duplicates) was not kept. `events`: the records and texts that cleaning left out, and why.
ROWS = pa.schema(
    [
        *((name, pa.string()) for name in _STRINGS),
        ("pair", pa.bool_()),
        ("judges", pa.bool_()),
        ("hi", pa.uint64()),
        ("lo", pa.uint64()),
        ("uses", pa.list_(pa.struct(_USE))),
        ("events", pa.list_(pa.struct(_EVENT))),
    ]
)


class Part(NamedTuple):
    """A part that is written.

    Attributes:
        number: Of the source.
        name: Of its files, which orders the parts of a source.
        piece: The piece that was read, without its bytes; None if the source is not read in pieces.
        rows: How many rows it has.
        records: How many of them are records, kept or not.
        bad: How many of them are invalid.
        fault: Why the first of these is invalid.
    """

    number: int
    name: str
    piece: Piece | None
    rows: int
    records: int
    bad: int
    fault: str


def part_name(number: int, place: int, shared: bool) -> str:
    """Return the name of a part, by which it is ordered among those of its source.

    Args:
        number: Of the source.
        place: Of the part in the source.
        shared: Whether several nodes read it. Their pieces may be others than those of one node.
    """
    return f"{number:03d}-{place:07d}{_SHARED if shared else ''}"


def is_shared(name: str) -> bool:
    """Return whether the part with this name was read by several nodes."""
    return name.endswith(_SHARED)


def rows_file(folder: Path, name: str) -> Path:
    """Return the file of a part's rows."""
    return folder / f"{name}.rows"


def signatures_file(folder: Path, name: str) -> Path:
    """Return the file of the signatures of a part's texts."""
    return folder / f"{name}.signatures"


class PartWriter:
    """Writes the rows of a part: records and signatures at once, the columns in the end.

    It is a context manager, and the file of the columns is written if no exception ends the block.

    Args:
        folder: Where parts are written.
        name: The name of the part.
        role: The role of the source in the recipe.
        signed: Whether MinHash signatures are needed.
    """

    def __init__(self, folder: Path, name: str, role: str, signed: bool) -> None:
        self._folder, self._name, self._role, self._signed = folder, name, role, signed
        self._columns: dict[str, list[Any]] = {name: [] for name in ROWS.names}
        self._uses = array("i")  # role, place, chars and signature of each
        self._keys = bytearray()  # of the uses
        self._events: list[tuple[bool, str, str]] = []
        self._known: dict[bytes, int] = {}  # of each distinct text its place
        folder.mkdir(exist_ok=True)
        self._waiting: list[bytes] = []  # records that are not written yet
        self._bodies = Values(body_file(folder, name))
        self._signatures = signatures_file(folder, name).open("wb")

    def __len__(self) -> int:
        return len(self._columns["id"])

    def add(self, place: str, cleaned: Cleaned) -> None:
        """Add a record, whether it is kept or not.

        Args:
            place: Where it was read.
            cleaned: The record.
        """
        for rule, example in cleaned.removed:
            self._event(True, rule, example)
        record = cleaned.record
        if cleaned.dropped:
            self._event(False, *cleaned.dropped)
            self._row(b"", place=place, id=record.id)
            return
        identity = cleaned.identity
        # A fact is no duplicate of an equal pair, nor is what evaluates one of what trains.
        fact = self._role == "fact" and record.query
        if kind := b"eval" if self._role == "eval" else b"fact" if fact else b"":
            identity = blake2b(identity + kind, digest_size=len(identity)).digest()
        for role, name, texts in roles(record):
            for number, (key, text) in enumerate(zip(cleaned.keys[name], texts, strict=True)):
                self._uses.extend((role, number, len(text), self._signature(key, text)))
                self._keys += key
        self._row(
            (replace(record, group="") if record.group else record).to_json().encode(),
            place=place,
            id=record.id,
            source=record.source,
            own_group=record.group,
            instruction=None if record.text else record.instruction,
            document_instruction=record.document_instruction,
            pair=_IS_PAIR[self._role] if record.query else False,
            judges=self._role == "eval",
            hi=int.from_bytes(identity[:8], "big"),
            lo=int.from_bytes(identity[8:], "big"),
        )

    def add_fault(self, place: str, rule: str, example: str) -> None:
        """Add a row that is no record; rule, example: why."""
        self._event(False, rule, example)
        self._row(b"", place=place)

    def _signature(self, key: bytes, text: str) -> int:
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self._known)
            if self._signed:
                self._signatures.write(signature(text))
        return number

    def _event(self, of_text: bool, rule: str, example: str) -> None:
        self._events.append((of_text, rule, example[: EXAMPLE_CHARS + 1]))

    def _row(self, body: bytes, **values: Any) -> None:
        self._waiting.append(body)
        if len(self._waiting) == _AT_ONCE:
            self._flush()
        for name, column in self._columns.items():
            column.append(values.get(name))
        self._columns["uses"][-1] = len(self._keys) // KEY_BYTES
        self._columns["events"][-1] = len(self._events)

    def _flush(self) -> None:
        self._bodies.add(self._waiting)
        self._waiting = []

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flush()
        self._bodies.close()
        self._signatures.close()
        if kind is None:
            pq.write_table(self._table(), rows_file(self._folder, self._name), compression="zstd")

    def _table(self) -> pa.Table:
        columns = {**self._columns}
        for of, arrays in (("uses", self._use_arrays()), ("events", self._event_arrays())):
            kind = ROWS.field(of).type.value_type
            values = pa.StructArray.from_arrays(list(arrays.values()), fields=list(kind))
            columns[of] = pa.ListArray.from_arrays(pa.array([0, *columns[of]], pa.int32()), values)
        return pa.table(columns, ROWS)

    def _use_arrays(self) -> dict[str, pa.Array]:
        numbers = np.frombuffer(self._uses, np.int32).reshape(-1, 4).T
        hi, lo = halves(bytes(self._keys))
        found = dict(zip(("role", "place", "chars", "signature"), numbers, strict=True))
        found |= {"hi": hi, "lo": lo}
        return {name: pa.array(found[name]).cast(kind) for name, kind in _USE.items()}

    def _event_arrays(self) -> dict[str, pa.Array]:
        columns = list(zip(*self._events, strict=True)) or [(), (), ()]
        pairs = zip(_EVENT.items(), columns, strict=True)
        return {name: pa.array(column, kind) for (name, kind), column in pairs}


def halves(keys: bytes) -> NDArray[np.uint64]:
    """Return keys of 16 bytes as (2, n) numbers that order as the keys do."""
    return np.ascontiguousarray(np.frombuffer(keys, ">u8").astype(np.uint64).reshape(-1, 2).T)
