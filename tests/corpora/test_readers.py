"""Raw files -> records, and every kind of bad input named by file and line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import SourceConfig, load
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.sources import find
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record
from lbr_ds.system.locate import locate
from tests.corpora.toy import pair, recipe, write_raw


def read(path: Path, format: str = "jsonl", name: str = "toy", **fields: Any) -> list[Any]:
    """The records of a source, with DataErrors and Skipped in their places."""
    source = SourceConfig(path=str(path), format=format, name=name, **fields)
    return [record for _, record in find(source).read()]


def test_jsonl_fills_id_and_source(tmp_path: Path) -> None:
    raws: list[dict[str, Any] | str] = [
        "",
        {"query": "q", "positives": ["a"]},
        {"id": "x", "source": "own", "text": "t"},
    ]
    path = write_raw(tmp_path / "raw.jsonl", raws)
    filled = Record(id="toy-2", source="toy", query="q", positives=["a"])
    assert read(path) == [filled, Record(id="x", source="own", text="t")]
    unnamed = read(path, name="")[0]
    assert isinstance(unnamed, Record)
    assert (unnamed.id, unnamed.source) == ("raw-2", "raw")


def test_jsonl_gz_whatever_its_name(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "raw.jsonl", map(pair, range(5)))
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read(zipped) == read(path)
    zipped.write_bytes(zipped.read_bytes()[:-20])
    with pytest.raises(DataError, match="zipped: cannot be read to its end"):
        read(zipped)


BAD_LINES = {
    "not_json": ("{", r"not JSON"),
    "not_an_object": ("[1]", r"a record must be a JSON object, not list"),
    "no_query": ('{"positives": ["a"]}', r"query is missing or empty"),
    "no_positives": ('{"query": "q"}', r"positives is empty"),
    "unknown_field": ('{"query": "q", "answer": "a"}', r"unknown field 'answer'"),
    "wrong_type": ('{"query": "q", "positives": "a"}', r"positives must be a list of strings"),
    "half_a_surrogate": (r'{"text": "\ud800"}', r"contains an unpaired UTF-16 surrogate"),
    "duplicate_id": (r'{"id": "r1", "text": "t"}', r"id 'r1' is already used at .*raw.jsonl:2"),
    "deep": ("[" * 100_000, r"not JSON"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(tmp_path: Path, line: str, message: str) -> None:
    raws: list[dict[str, Any] | str] = [pair(0), pair(1), line, *map(pair, range(3, 20))]
    strict = recipe(tmp_path, raws)
    with pytest.raises(DataError, match=rf"raw\.jsonl:3: {message}.*data\.on_error=skip"):
        prepare(strict, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.jsonl"]
    dropped = prepare(recipe(tmp_path, raws, on_error="skip"), 0)["dropped_records"]
    rule = "duplicate_id" if "r1" in line else "bad_record"
    assert dropped[rule]["count"] == 1
    assert "raw.jsonl:3: " in dropped[rule]["examples"][0]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    good, bad = read(path)
    assert isinstance(good, Record)
    told = f"{path}:2: not UTF-8 at byte 10 of the line; it can be decoded as cp1252 ("
    assert str(bad).startswith(told)


def test_empty_and_hopeless_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raw\.jsonl: contains no records; check data\.sources"):
        prepare(recipe(tmp_path, []), 0)
    with pytest.raises(DataError, match=r"raw\.jsonl: all of its 2 rows are invalid; check"):
        prepare(recipe(tmp_path, ["{", "{"], on_error="skip"), 0)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        prepare(recipe(tmp_path, [pair(0)], sources=[]), 0)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    def run(**source: str) -> Callable[[], object]:
        return lambda: prepare(recipe(tmp_path, [pair(0)], sources=[source]), 0)

    with pytest.raises(DataError, match="no/such: no such file"):
        run(path="no/such")()
    with pytest.raises(DataError, match="must be a file"):
        run(path=str(tmp_path), format="obo")()
    with pytest.raises(ConfigError, match="unknown format 'jsonk'; did you mean 'jsonl'"):
        run(path=str(tmp_path / "raw.jsonl"), format="jsonk")()


ICD = """<ICD10CM.tabular><chapter><desc>Chapter</desc><section id="A"><desc>Section</desc>
<diag><name>A22</name><desc>Anthrax</desc>
 <diag><name>A22.1</name><desc>Pulmonary anthrax</desc>
  <inclusionTerm><note>Ragpicker's disease</note><note>Inhalation anthrax</note></inclusionTerm>
  <diag><name>A22.11</name><desc>Deep</desc>
   <inclusionTerm><note>Deeper</note></inclusionTerm></diag>
 </diag></diag>
<diag><name>B1</name><desc>Top</desc><inclusionTerm><note>Alone</note></inclusionTerm></diag>
</section></chapter></ICD10CM.tabular>"""


def test_icd10cm(tmp_path: Path) -> None:
    path = tmp_path / "icd.xml"
    path.write_text(ICD)
    found = [record for record in read(path, "icd10cm", "icd") if isinstance(record, Record)]
    assert [(r.id, r.query, r.positives, r.group) for r in found] == [
        ("A22.11-1", "Deeper", ["Deep. In: Pulmonary anthrax; Anthrax"], "A22.11"),
        ("A22.1-1", "Ragpicker's disease", ["Pulmonary anthrax. In: Anthrax"], "A22.1"),
        ("A22.1-2", "Inhalation anthrax", ["Pulmonary anthrax. In: Anthrax"], "A22.1"),
        ("B1-1", "Alone", ["Top"], "B1"),
    ]
    path.write_text(ICD[:300])
    with pytest.raises(DataError, match=r"icd.xml: not the ICD-10-CM tabular XML \(.*line"):
        read(path, "icd10cm")


def test_icd10cm_counts_of_the_whole_list() -> None:
    source = load("demo").data.sources[0]
    found = [r for r in read(locate(source.path), "icd10cm") if isinstance(r, Record)]
    assert len(found) == 12_569
    assert len({record.group for record in found}) == 6_805
    assert len({record.id for record in found}) == 12_569
    example = next(record for record in found if record.query == "Ragpicker's disease")
    assert example.positives == ["Pulmonary anthrax. In: Anthrax"]
