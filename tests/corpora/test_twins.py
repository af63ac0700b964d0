"""A text that is its own answer or its own negative teaches nothing: counted and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbr_ds.corpora.curate.cleaning import Rules, clean_record
from lbr_ds.corpora.prepare import prepare
from lbr_ds.records import Record
from tests.corpora.toy import pair, read_all, recipe

RULES = Rules(1, 1000, 0, None, "", (), False, None)
Case = tuple[list[str], list[str], tuple[list[str], list[str]] | None, list[str]]
CASES: dict[str, Case] = {  # positives, negatives of the query "What is fever?"
    "an answer is the query": (
        ["Heat.", "what is  FEVER"],
        [],
        (["Heat."], []),
        ["positive_is_query"],
    ),
    "the only answer is the query": (["What is fever"], ["Cold."], None, []),
    "both answers are the query": (
        ["What is fever", "what is fever!"],
        [],
        None,
        ["repeated_in_positives"],
    ),
    "a negative is the query": (
        ["Heat."],
        ["WHAT is fever?", "Cold."],
        (["Heat."], ["Cold."]),
        ["negative_is_query"],
    ),
    "a negative is the answer": (
        ["Heat.", "Warmth."],
        ["warmth", "Cold."],
        (["Heat.", "Warmth."], ["Cold."]),
        ["negative_is_a_positive"],
    ),
    "none is another": (["Heat."], ["Cold."], (["Heat."], ["Cold."]), []),
}


@pytest.mark.parametrize(("positives", "negatives", "kept", "rules"), CASES.values(), ids=CASES)
def test_twins(
    positives: list[str],
    negatives: list[str],
    kept: tuple[list[str], list[str]] | None,
    rules: list[str],
) -> None:
    record = Record("r", "s", "What is fever?", positives, negatives)
    cleaned = clean_record(record, RULES)
    assert [rule for rule, _ in cleaned.removed] == rules
    if kept is None:
        assert cleaned.dropped == ("positive_is_query", "r: What is fever?")
        return
    assert cleaned.dropped is None
    assert (cleaned.record.positives, cleaned.record.negatives) == kept
    assert [len(cleaned.keys[name]) for name in ("positives", "negatives")] == [*map(len, kept)]


def test_they_are_counted(tmp_path: Path) -> None:
    raws: list[dict[str, Any]] = [*map(pair, range(30))]
    raws[3]["positives"] = ["Question 3!"]
    raws[4]["positives"].append("question 4.")
    raws[5]["negatives"] = ["QUESTION 5", "answer 5?", "sound"]
    made = prepare(recipe(tmp_path, raws), 0)
    assert made["dropped_records"]["positive_is_query"]["count"] == 1
    counts = {rule: entry["count"] for rule, entry in made["dropped_texts"].items()}
    assert counts == {"positive_is_query": 1, "negative_is_query": 1, "negative_is_a_positive": 1}
    kept = {r.id: r for split in read_all(tmp_path / "data").values() for r in split}
    assert kept.keys() == {f"r{n}" for n in range(30)} - {"r3"}
    assert kept["r4"].positives == ["answer 4"]
