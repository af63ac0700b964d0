"""The record: what every corpus is turned into and every shard contains, as one JSON object."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from lbr_ds.errors import DataError
from lbr_ds.instructions import instruct


@dataclass(frozen=True)
class Record:
    """One query with its answers, or one plain passage (`text`), never both.

    Attributes:
        id: Unique in the data.
        source: The name of the corpus.
        query: A question, or whatever is searched with.
        positives: Passages that answer the query.
        negatives: Passages that look like answers and are not.
        group: Records of one group are never negatives of each other (same entity, same document).
        instruction: Prefix of the query when a model encodes it, `{instruction}{query}`. It is not
            part of the texts that are compared.
        document_instruction: The same for the passages of the record.
        text: A plain passage.
        positive_scores: A teacher's score of each positive for the query, or empty. Only the
            differences between a record's scores mean something.
        negative_scores: The same for the negatives.
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
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return every text that could leak from one split into another."""
        own = (self.query, *self.positives, *self.negatives, self.text)
        return [text for text in own if text]

    def instructed_query(self) -> str:
        """Return the query as a model encodes it: `Instructed` if there is an instruction."""
        return instruct(self.instruction, self.query, self)

    def instructed_passage(self, passage: str) -> str:
        """Return one of the record's passages as a model encodes it."""
        return instruct(self.document_instruction, passage, self)

    def to_json(self) -> str:
        """Return one line of JSON without empty fields; equal records give equal bytes."""
        kept = {k: v for k, v in vars(self).items() if v}  # asdict copies deeply, which is slow
        return json.dumps(kept, ensure_ascii=False)

    @classmethod
    def from_valid(cls, raw: Any) -> Record | None:
        """Return the record of a valid parsed object, else None; `from_dict` names the fault.

        The loader uses it since it is several times faster than `from_dict`. A test compares both.
        """
        if type(raw) is not dict:
            return None
        fields = {**_BLANK, **{name: [] for name in _LISTS}, **raw}
        if list(map(type, fields.values())) != _TYPES:  # an unknown field makes it longer
            return None
        if not _is_valid(*_judged(fields)):
            return None
        if raw.keys() & _SCORES and not all(_are_scores(fields, *pair) for pair in _SCORES.items()):
            return None
        record = object.__new__(cls)
        object.__setattr__(record, "__dict__", fields)
        return record

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> Record:
        """Return the record of a parsed object.

        Args:
            raw: The parsed JSON.
            where: File and line, or member of a shard, with which every message begins.

        Raises:
            DataError: A field is unknown, missing or of the wrong type.
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
        _check_scores(raw, where)
        return record


def _is_valid(
    id: str, source: str, query: str, positives: list[Any], negatives: list[Any], text: str
) -> bool:
    """Return whether no field is missing, empty or superfluous; the types are checked before."""
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


def _are_scores(raw: dict[str, Any], name: str, scored: str) -> bool:
    """Return whether the list `name` is missing or empty, or has a number for each passage."""
    scores = raw.get(name)
    if not scores:
        return True
    finite = all(type(score) in (int, float) and math.isfinite(score) for score in scores)
    return finite and len(scores) == len(raw.get(scored, ()))


def _check_scores(raw: dict[str, Any], where: str) -> None:
    """Raise DataError unless each list of scores is empty, or has a number for each passage."""
    for name, scored in _SCORES.items():
        scores, passages = raw.get(name, []), raw.get(scored, [])
        if not _are_scores(raw, name, scored):
            raise DataError(
                f"{where}: {name} must have one finite number for each of {scored}: it has "
                f"{len(scores)} for {len(passages)}: {scores!r:.60}"
            )


def _are_strings(texts: list[Any]) -> bool:
    return all(type(text) is str for text in texts)


_SCORES = {"positive_scores": "positives", "negative_scores": "negatives"}
_LISTS = (*_SCORES.values(), *_SCORES)
_judged = itemgetter("id", "source", "query", "positives", "negatives", "text")
_BLANK = vars(Record(id="", source=""))  # in the order of the fields
_TYPES = [type(value) for value in _BLANK.values()]


def _check_types(raw: dict[str, Any], where: str) -> None:
    """Raise DataError unless passages and scores are lists, of strings, and the rest strings."""
    for name, value in raw.items():
        if name in _SCORES:
            if not isinstance(value, list):
                raise DataError(f"{where}: {name} must be a list of numbers, not {value!r:.60}")
            continue
        if name in ("positives", "negatives"):
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise DataError(f"{where}: {name} must be a list of strings, not {value!r:.60}")
        elif not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a string, not {value!r:.60}")
