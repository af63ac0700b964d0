"""A teacher's scores of a row's passages: one number for each positive and negative, in order."""

from __future__ import annotations

import math
from typing import Any

from lbr_ds.corpora.formats.values import flattened, objects, passage_texts

SIDES = {"positives": "positive_scores", "negatives": "negative_scores"}


def are_numbers(value: Any) -> bool:
    """Return whether a value is a finite number, or a list of some."""
    return all(type(one) in (int, float) and math.isfinite(one) for one in flattened(value))


def items_of(values: list[Any]) -> list[Any]:
    """Return each passage of some columns, whether it has a text or not."""
    return [
        one
        for value in values
        for outer in flattened(value)
        for one in (objects(outer) if isinstance(outer, dict) else [outer])
    ]


def scores_inside(items: list[Any]) -> list[float]:
    """Return the scores that passages carry themselves, if all of them do; else nothing."""
    found: list[Any] = [one.get("score") if isinstance(one, dict) else None for one in items]
    return [float(one) for one in found] if are_numbers(found) else []


def without_empty(
    scores: list[float], items: list[Any], column: str, where: str, by_id: bool
) -> list[float]:
    """Return the scores of the passages that have a text; those without are no passages."""
    if len(scores) != len(items):
        return scores  # the record's own check names the error
    pairs = zip(scores, items, strict=True)
    return [score for score, one in pairs if passage_texts(one, column, where, by_id)]


def of_tuple(value: Any, count: int) -> dict[str, list[float]]:
    """Return the scores of a positive and `count` negatives, as sentence-transformers has them.

    A list of 1 + count numbers: the positive's score, then the negatives'. A list of count numbers,
    or one number beside one negative: by how much the positive scores higher. Anything else says
    nothing about passages.
    """
    if not are_numbers(value):
        return {}
    scores = [float(one) for one in flattened(value)]
    if count and len(scores) == count:
        scores = [0.0, *(-margin for margin in scores)]
    if not count or len(scores) != 1 + count:
        return {}
    return {"positive_scores": scores[:1], "negative_scores": scores[1:]}
