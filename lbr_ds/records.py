"""The text contract: what every corpus becomes and every shard holds (one JSON object a record)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any

from lbr_ds.errors import DataError
from lbr_ds.instructions import instruct


@dataclass(frozen=True)
class Record:
    """One question with its answers, or one plain passage (`text`), never both.

    query and positives: a question and the passages that answer it; negatives: passages that look
    like answers and are not. group: records of one group are never negatives of each other (same
    entity, same source document). instruction: put before the query, as `{instruction}{query}`,
    when a model encodes it; document_instruction: the same for the record's passages. Neither is
    part of the texts that are compared.
    """

    id: str
    source: str
    query: str = ""
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    group: str = ""
    instruction: str = ""
    document_instruction: str = ""
    text: str = ""

    def texts(self) -> list[str]:
        """Every text that could leak from one split into another."""
        return [t for t in (self.query, *self.positives, *self.negatives, self.text) if t]

    def asked(self) -> str:
        """The query as a model encodes it: `Instructed` where there is an instruction."""
        return instruct(self.instruction, self.query, self)

    def told(self, passage: str) -> str:
        """One of the record's passages as a model encodes it."""
        return instruct(self.document_instruction, passage, self)

    def to_json(self) -> str:
        """One line; empty fields left out, key order fixed: one record, one spelling."""
        kept = {k: v for k, v in asdict(self).items() if v}
        return json.dumps(kept, ensure_ascii=False)

    @classmethod
    def from_sound(cls, raw: Any) -> Record | None:
        """The record of a parsed object without a fault, else None: `from_dict` names the fault.

        The loader's way, some times faster than `from_dict` and held to it by a test.
        """
        if type(raw) is not dict:
            return None
        fields = {**_BLANK, "positives": [], "negatives": [], **raw}
        if list(map(type, fields.values())) != _TYPES:  # an unknown field makes it longer
            return None
        if not _is_sound(*_judged(fields)):
            return None
        record = object.__new__(cls)
        object.__setattr__(record, "__dict__", fields)
        return record

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> Record:
        """Check one parsed object; `where` (file and line, or shard member) begins every message.

        Raises DataError for an unknown, missing or wrongly typed field.
        """
        if not isinstance(raw, dict):
            raise DataError(f"{where}: a record must be a JSON object, not {type(raw).__name__}")
        unknown = sorted(set(raw) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise DataError(f"{where}: unknown field {unknown[0]!r:.60}; a record has {known}")
        _check_types(raw, where)
        record = cls(**{"id": "", "source": "", **raw})
        for name in ("id", "source"):
            if not getattr(record, name).strip():
                raise DataError(f"{where}: {name} is missing or empty")
        if record.text:
            if record.query or record.positives:
                raise DataError(f"{where}: has both text and query; plain text or a pair, not both")
        elif not record.query.strip():
            raise DataError(f"{where}: query is missing or empty (plain passages go in `text`)")
        elif not record.positives or not all(p.strip() for p in record.positives):
            raise DataError(f"{where}: positives is empty; give at least one non-empty answer")
        return record


def _is_sound(
    id: str, source: str, query: str, positives: list[Any], negatives: list[Any], text: str
) -> bool:
    """Whether nothing is missing, empty or doubled; the types of the fields are checked already."""
    if not (id.strip() and source.strip()):
        return False
    if text:
        return not query and not positives and _are_strings(negatives)
    if not (positives and query.strip()):
        return False
    for passage in positives:
        if type(passage) is not str or not passage.strip():
            return False
    return not negatives or _are_strings(negatives)


def _are_strings(texts: list[Any]) -> bool:
    return all(type(text) is str for text in texts)


_judged = itemgetter("id", "source", "query", "positives", "negatives", "text")
_BLANK = vars(Record(id="", source=""))  # in the order of the fields
_TYPES = [type(value) for value in _BLANK.values()]


def _check_types(raw: dict[str, Any], where: str) -> None:
    """positives and negatives are lists of strings, everything else is a string."""
    for name, value in raw.items():
        if name in ("positives", "negatives"):
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise DataError(f"{where}: {name} must be a list of strings, not {value!r:.60}")
        elif not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a string, not {value!r:.60}")
