"""The quick check of a record says yes exactly where the one that names faults does."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards.reader import decode_valid

_ABSENT = object()
_CHOICES: dict[str, list[Any]] = {
    "id": ["i", " ", _ABSENT, 3],
    "source": ["s", "", _ABSENT],
    "query": ["q", "", " ", _ABSENT, None],
    "positives": [["p"], ["p", "\u00e9"], [], [" "], ["p", 1], "p", _ABSENT],
    "negatives": [["n", ""], [], [None], {}, _ABSENT],
    "text": ["t", "", " ", _ABSENT, ["t"]],
    "group": ["g", _ABSENT, 1.5],
    "qqqqq": [_ABSENT, "x"],
}


def checked(raw: Any) -> Record | None:
    try:
        return Record.from_dict(raw, "here")
    except DataError:
        return None


def test_quick_check_equals_the_one_that_names_faults() -> None:
    counts = {True: 0, False: 0}
    for values in itertools.product(*_CHOICES.values()):
        pairs = zip(_CHOICES, values, strict=True)
        raw = {name: value for name, value in pairs if value is not _ABSENT}
        found = Record.from_valid(raw)
        assert found == checked(raw), raw
        counts[found is not None] += 1
    assert min(counts.values()) > 10
    assert [Record.from_valid(raw) for raw in (None, [], "x", 3)] == [None] * 4


_SCORES = [[], [1], [0.5, -2], [1, 2, 3], ["1", 1], [True, 1], [math.nan, 1], 1.5, "x", None]


def test_scores_are_numbers_one_for_each_passage() -> None:
    kept = []
    for positive, negative in itertools.product(_SCORES, _SCORES):
        raw = {"id": "i", "source": "s", "query": "q", "positives": ["p"], "negatives": ["n", "m"]}
        raw |= {"positive_scores": positive, "negative_scores": negative}
        found = Record.from_valid(raw)
        assert found == checked(raw), raw
        kept += [] if found is None else [(positive, negative)]
        plain = Record.from_valid({"id": "i", "source": "s", "text": "t", **raw, "query": ""})
        assert plain is None
    assert kept == list(itertools.product([[], [1]], [[], [0.5, -2]]))
    raw = {"id": "i", "source": "s", "text": "t", "positive_scores": [1.0]}
    assert Record.from_valid(raw) is None
    assert checked(raw) is None
    with pytest.raises(DataError, match=r"here: negative_scores .* it has 1 for 0"):
        Record.from_dict({**raw, "positive_scores": [], "negative_scores": [1.0]}, "here")


def test_a_record_with_scores_is_read_as_it_was_written() -> None:
    plain = Record("i", "s", "q", ["p"], ["n", "m"])
    assert "scores" not in plain.to_json()
    scored = replace(plain, positive_scores=[0.25], negative_scores=[-1.5, 2.0])
    assert Record.from_valid(json.loads(scored.to_json())) == scored
    assert scored.to_json().startswith(plain.to_json()[:-1])


def test_records_share_no_list() -> None:
    first, second = (Record.from_valid({"id": "i", "source": "s", "text": "t"}) for _ in range(2))
    assert first is not None
    assert second is not None
    first.positives.append("p")
    first.negatives.append("n")
    first.positive_scores.append(1.0)
    assert second == Record("i", "s", text="t")


@pytest.mark.parametrize("bad", [b"", b" ", b"1", b"[]", b"{", b"\xff", b"{},{}", b"[" * 10**5])
def test_one_bad_text_among_many(bad: bytes) -> None:
    good = b'{"id": "i", "source": "s", "text": "t"}'
    assert decode_valid([good, good]) == [Record("i", "s", text="t")] * 2
    assert decode_valid([good, bad, good]) is None
    assert decode_valid([]) == []
