"""A shape of rows of another trainer's files: what identifies it, and how its columns are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Skipped, listing
from lbr_ds.corpora.formats.scores import (
    SIDES,
    items_of,
    of_tuple,
    scores_inside,
    without_empty,
)
from lbr_ds.corpora.formats.values import (
    MissingColumn,
    cell_text,
    column_value,
    named_parts,
    numbers,
    objects,
    passage_texts,
)

Made = list[dict[str, Any]] | Skipped
"""The fields of the records of a row, or why it gives none."""
_NONE = "(?!)"  # the pattern that matches nothing


def is_text(value: Any) -> bool:
    """Return whether the value is a text."""
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    """Return whether the value is a text, or a list that contains no list and no object."""
    return not isinstance(value, list | dict) or (
        isinstance(value, list) and not any(isinstance(one, list | dict) for one in value)
    )


def is_list(value: Any) -> bool:
    """Return whether the value is a list of at least two texts."""
    return isinstance(value, list) and len(value) > 1 and all(map(is_text, value))


def is_nested(value: Any) -> bool:
    """Return whether the value is a list of lists, as of [instruction, text]."""
    return isinstance(value, list) and any(isinstance(one, list) for one in value)


def is_turns(value: Any) -> bool:
    """Return whether the value is a list of turns of a conversation."""
    turns = objects(value)
    return bool(turns) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    )


def is_number(value: Any) -> bool:
    """Return whether the value is a number, perhaps as a text; a label may also be a word."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def is_anything(value: Any) -> bool:
    """Return True."""
    return True


@dataclass(frozen=True)
class Peer:
    """A shape of rows of another trainer.

    Attributes:
        title: Its name in messages.
        query: The names that the column of the query may have.
        positives: The same for the positives.
        negatives: Patterns of the columns of negatives; all columns that match count.
        score: The names of the column that decides whether a row is a pair; one must be there.
        instruction: The column of the query's instruction.
        teacher: The names of the columns of a teacher's scores of the positives, and of the
            negatives. Passages that are objects may also have a `score` each.
        tuple_scores: The names of a column with the scores of the positive and of all negatives.
        unless: Pattern of columns with which a row has another meaning.
        is_query: What the query's value must be.
        is_positives: What the positives' value must be.
        is_score: What the score's value must be.
        make: Returns the records of a row.
        header: The columns of a table without a header line.
    """

    title: str
    query: tuple[str, ...]
    positives: tuple[str, ...] = ()
    negatives: str = _NONE
    score: tuple[str, ...] = ()
    instruction: str = ""
    teacher: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    tuple_scores: tuple[str, ...] = ()
    unless: str = _NONE
    is_query: Callable[[Any], bool] = is_text
    is_positives: Callable[[Any], bool] = is_anything
    is_score: Callable[[Any], bool] = is_anything
    make: Callable[[Peer, dict[str, Any], SourceConfig, str], Made] | None = None
    header: tuple[str, ...] = ()

    def fits(self, row: dict[str, Any]) -> bool:
        """Return whether a row has this shape."""
        query = _first(row, self.query)
        positives = _first(row, self.positives) if self.positives else query
        score = _first(row, self.score)
        if not query or not positives or (self.score and not score):
            return False
        if any(re.fullmatch(self.unless, name) for name in row):
            return False
        if score and not self.is_score(row[score]):
            return False
        return self.is_query(row[query]) and self.is_positives(row[positives])

    def used(self, names: Iterable[str]) -> list[str]:
        """Return those of a row's columns that are read."""
        known = {*self.query, *self.positives, *self.score, self.instruction, *self.tuple_scores}
        known |= {name for names in self.teacher for name in names}
        return [n for n in names if n in known or re.fullmatch(self.negatives, n)]

    def read(self, row: dict[str, Any], source: SourceConfig, where: str) -> Made:
        """Return the fields of the row's records, or why it is none; `columns` comes first.

        Raises:
            MissingColumn: The row lacks the query or the positives.
            DataError: A value has the wrong form.
        """
        if self.make:
            return self.make(self, row, source, where)
        return [{**self.texts(row, source, where), **named_parts(row, source, where)}]

    def texts(self, row: dict[str, Any], source: SourceConfig, where: str) -> dict[str, Any]:
        """Return query, positives, negatives and instruction of a row."""
        columns, by_id = source.columns, bool(source.documents)
        query = self.column(row, columns.query, self.query, where)
        asked = passage_texts(column_value(row, query, where), query, where)
        fields: dict[str, Any] = {"query": " ".join(asked)}
        answers = self.answers(row, source, where)
        for name, chosen in answers.items():
            fields[name] = [
                text
                for one in chosen
                for text in passage_texts(column_value(row, one, where), one, where, by_id)
            ]
        if self.instruction and (prompt := row.get(self.instruction)):
            fields["instruction"] = cell_text(prompt, self.instruction, where)
        if not (columns.positive_scores or columns.negative_scores):
            fields |= self.scores(row, answers, by_id, where)
        column = _first(row, self.tuple_scores)
        if column and len(fields["positives"]) == 1:
            fields |= of_tuple(row[column], len(fields["negatives"]))
        return fields

    def scores(
        self, row: dict[str, Any], answers: dict[str, list[str]], by_id: bool, where: str
    ) -> dict[str, list[float]]:
        """Return a teacher's scores of the passages in the columns `answers`."""
        found = {}
        for (side, columns), names in zip(answers.items(), self.teacher, strict=True):
            column = _first(row, names)
            items = items_of([column_value(row, one, where) for one in columns])
            scores = numbers(row[column], column, where) if column else scores_inside(items)
            if scores:
                place = columns[0] if columns else side
                found[SIDES[side]] = without_empty(scores, items, place, where, by_id)
        return found

    def answers(
        self, row: dict[str, Any], source: SourceConfig, where: str
    ) -> dict[str, list[str]]:
        """Return the columns of the positives and of the negatives."""
        columns = source.columns
        positives = columns.positives or self.column(row, "", self.positives, where)
        negatives = columns.negatives or list(_matching(self.negatives, tuple(row)))
        return {
            name: [chosen] if isinstance(chosen, str) else chosen
            for name, chosen in (("positives", positives), ("negatives", negatives))
        }

    @staticmethod
    def column(row: dict[str, Any], chosen: str, names: tuple[str, ...], where: str) -> str:
        """Return the column that the recipe names, or the first of `names` that the row has."""
        name = chosen or _first(row, names)
        if not name:
            raise MissingColumn(f"{where}: no column {names[0]!r}; it has {listing(row)}")
        return name


@lru_cache(maxsize=256)  # most rows have the same columns
def _matching(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if re.fullmatch(pattern, name))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), "")
