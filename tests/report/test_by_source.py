"""What each source contributed, computed by hand from made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.report import write_report

RECORDS = {"one": 60, "two": 20, "odd": 3, "even": 2}


def several(run: Path, every: int = 1) -> None:
    """Sources `one` and `two` in turn in stage 2, `others` never; and scores by source."""
    path = run / "stage2" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        name = "one" if row["step"] % 3 else "two"
        row |= {f"samples/{n}": 0.0 for n in ("one", "two", "others")}
        row |= {f"samples/{name}": 8.0, f"tokens/{name}": 100.0 if name == "one" else 50.0}
        row |= {f"loss/{name}": float(row["step"]), f"accuracy/{name}": 0.25}
    kept = [row for row in rows if row["step"] % every == 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    curation = {"splits": {"cl": {"records": 85, "by_source": RECORDS}}}
    (run.parent / "data" / "curation.json").write_text(json.dumps(curation))
    for number, key in enumerate(("base", "stage2")):
        file = run / "eval" / f"{key}.json"
        scores = json.loads(file.read_text())
        part = {"queries": 6, "recall_at_10": 0.5, "ndcg_at_10": 0.125 + number / 4}
        scores["tasks"]["made-up-eval"]["by_source"] = {"one": part, "two": {**part, "queries": 7}}
        file.write_text(json.dumps(scores))
    recipe = (run / "recipe.yaml").read_text()
    source = "sources: [{path: a, name: one, weight: 2, temperature: 0.1}]"
    (run / "recipe.yaml").write_text(recipe.replace("data: {", f"data: {{{source}, "))


@pytest.mark.parametrize("every", [1, 2])
def test_each_sources_part(run: Path, tmp_path: Path, every: int) -> None:
    several(run, every)
    report = write_report([run], tmp_path / "out")["runs"][0]
    (table,) = report["contributions"]
    assert (table["stage"], table["exact"]) == (2, every == 1)
    rows: dict[str, dict[str, Any]] = {row["source"]: row for row in table["rows"]}
    assert list(rows) == ["one", "others", "two"]
    assert sum(row["samples"] for row in rows.values()) == 240
    one, two = rows["one"], rows["two"]
    assert (one["samples"], one["share"], one["epochs"]) == pytest.approx((160, 2 / 3, 160 / 60))
    assert (two["samples"], two["tokens"]) == pytest.approx((80, 500))
    assert (one["weight"], one["temperature"], two["weight"]) == (2, 0.1, None)
    assert rows["others"]["records"] == 5  # odd and even
    assert rows["others"]["loss"] is None
    last = [step for step in range(1, 31) if step % 3 == 0 and step % every == 0][-10:]
    assert two["loss"] == pytest.approx(sum(last) / len(last))
    assert [part["queries"] for part in report["retrieval"][0]["by_source"]] == [6, 7]
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Loss by source", "In-batch accuracy by source", "By source of the query"):
        assert title in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| one | 60 | 2 | 0.1 | 160 | 0.667 | 2.67 | 2,000 |" in text
    assert "| two | 7 | 0.500 / 0.125 |" in text
    assert ("scaled to all steps" in text) is (every == 2)
