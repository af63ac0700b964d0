"""Read what `eval` wrote, checked: a file of that name may be of another program, or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lbr_ds.config.validation import describe_error
from lbr_ds.errors import DataError
from lbr_ds.system.yaml_json import read_json

_AGAIN = "make it again with `lbr-ds eval`, or remove it"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Compressed(_Part):
    dimensions: int
    precision: str
    bytes: int
    recall_at_10: float
    ndcg_at_10: float


class _Source(_Part):
    queries: int
    recall_at_10: float
    ndcg_at_10: float


class _Task(_Part):
    recall_at_10: float | None = None
    ndcg_at_10: float | None = None
    mrr_at_10: float | None = None
    main_score: float | None = None
    metric: str | None = None
    queries: int | None = None
    documents: int | None = None
    compressed: list[_Compressed] = []
    by_source: dict[str, _Source] = {}


class _Passage(_Part):
    text: str
    right: bool


class _Example(_Part):
    id: str
    query: str
    answers: list[str]
    first_right: int | None
    passages: list[_Passage]


class _Scores(_Part):
    tasks: dict[str, _Task]
    per_query: dict[str, dict[str, float]] = {}
    examples: list[_Example] = []
    protocol: str = ""
    max_queries: int | None = None


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that `eval` wrote. Raises DataError for any other."""
    found = read_json(path, "a result of `lbr-ds eval`", DataError, _AGAIN, strict=False)
    try:
        _Scores.model_validate(found)
    except ValidationError as error:
        fault = describe_error(error, _Scores)
        raise DataError(f"{path}: not a result of `lbr-ds eval` ({fault}); {_AGAIN}") from None
    return found
