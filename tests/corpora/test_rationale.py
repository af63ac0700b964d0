"""A rationale is read from a column, and written only where it trains and does not leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lbr_ds.config import DataConfig
from lbr_ds.corpora.formats.values import RATIONALE_NAMES
from lbr_ds.corpora.prepare import prepare
from tests.corpora.toy import pair, read_all, recipe, write_raw

WHY = "because of reason"


def rows(column: str) -> list[dict[str, Any]]:
    """Rows of sentence-transformers; every third lacks the rationale."""
    return [
        {"anchor": f"question {n}", "positive": f"answer {n}", column: f"{WHY} {n}" * (n % 3 > 0)}
        for n in range(60)
    ]


def rationales(made: DataConfig) -> dict[str, str]:
    """Prepare the data; the rationale of each query that trains."""
    prepare(made, 0)
    splits = read_all(made.folder)
    assert not any(record.rationale for record in splits["eval"])
    return {r.query: r.rationale for name in ("gl", "cl") for r in splits[name]}


@pytest.mark.parametrize("column", [*RATIONALE_NAMES, "why"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_read_from_its_column(tmp_path: Path, column: str, suffix: str) -> None:
    """Usual names are recognised, others are named in the recipe."""
    path = tmp_path / f"raw.{suffix}"
    if suffix == "jsonl":
        write_raw(path, rows(column))
    else:
        pq.write_table(pa.Table.from_pylist(rows(column)), path)
    source: dict[str, Any] = {"path": str(path), "name": "toy", "license": "CC0"}
    if column == "why":
        source["columns"] = {"rationale": "why"}
    made = DataConfig.model_validate({"folder": tmp_path / "data", "sources": [source]})
    found = rationales(made)
    assert found == {
        query: f"{WHY} {query.split()[1]}" * (int(query.split()[1]) % 3 > 0) for query in found
    }
    assert any(found.values())


def test_not_those_of_a_passage(tmp_path: Path) -> None:
    raws = [{"text": f"a passage {n}", "rationale": WHY} for n in range(40)]
    assert set(rationales(recipe(tmp_path, raws)).values()) == {""}


def test_one_that_repeats_a_judged_text_is_dropped(tmp_path: Path) -> None:
    """And it ties no records together, or all of them would be in one split."""
    raws = [pair(n, rationale=f"answer {(n + 1) % 200}") for n in range(0, 200, 2)]
    raws += [pair(n, rationale="the same for all") for n in range(1, 200, 2)]
    data = recipe(tmp_path, raws)
    made = prepare(data, 0)
    splits = read_all(data.folder)
    assert set(made["leaks"].values()) == {0}
    judged = {text for record in splits["eval"] for text in record.texts()}
    wanted = {raw["id"]: raw["rationale"] for raw in raws if raw["rationale"] not in judged}
    trained = [record for name in ("gl", "cl") for record in splits[name]]
    assert {r.id: r.rationale for r in trained} == {r.id: wanted.get(r.id, "") for r in trained}
    dropped = sum(not record.rationale for record in trained)
    assert dropped == made["dropped_texts"]["rationale_is_in_other_split"]["count"] > 0
