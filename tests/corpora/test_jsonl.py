"""JSON in every layout that people save it in, and what `columns` reaches inside of it."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from tests.corpora.test_formats import one, read

ROWS: list[dict[str, Any]] = [
    {"query": f'ask "[{n}], {{"', "positives": [f"say {n}\n\\", "more"], "group": str(n % 3)}
    for n in range(50)
]
LAYOUTS: dict[str, str] = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "array in one line": json.dumps(ROWS),
    "array without blanks": json.dumps(ROWS, separators=(",", ":")),
    "array over lines": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array, a row a line": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "objects over lines": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "objects over lines, commas": ",\r\n".join(json.dumps(row, indent="\t") for row in ROWS),
    "two arrays": json.dumps(ROWS[:20]) + "\n" + json.dumps(ROWS[20:]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_every_layout_gives_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, piece: int
) -> None:
    """Wherever the pieces end that the file is read in."""
    monkeypatch.setattr("lbr_ds.corpora.formats.lines._CHUNK", piece)
    path = tmp_path / "raw.json"
    for mark in ("", "\ufeff \n"):
        for content in (raw := (mark + LAYOUTS[layout]).encode(), gzip.compress(raw)):
            path.write_bytes(content)
            found = read(path)
            assert [(r.query, r.positives, r.group) for r in found] == [
                (*row.values(),) for row in ROWS
            ]
            assert len({r.id for r in found}) == len(ROWS)


def test_an_array_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    text = "word " * 2000
    with path.open("w") as file:
        file.write("[")
        for n in range(3000):
            file.write(json.dumps({"query": f"ask {n}", "positives": [text]}) + ", \n"[: 2 + n % 2])
        file.write('{"query": "last", "positives": ["x"]}]')
    assert path.stat().st_size > 30_000_000
    from lbr_ds.config import SourceConfig
    from lbr_ds.corpora.formats.jsonl import JSONL

    tracemalloc.start()
    count = sum(isinstance(row.columns, dict) for row in JSONL.read(path, SourceConfig(path="x")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3001
    assert peak < 10_000_000


BROKEN: dict[str, tuple[str, str]] = {
    "cut": ('[{"query": "a",\n "positives": ["b"]},\n {"query"', r":3: not JSON \(Expecting ':'"),
    "not closed": ('[{"query": "a"},\n', r": ends before its array is closed; fetch it again"),
    "malformed": ('[{"query": "a"},\n {query: 1}]', r":2: not JSON \(Expecting property name"),
    "words behind": ('[{"query": "a"}]\n\nend', r":3: not JSON \(Expecting value"),
    "deep": ("[" * 100_000, r":1: not JSON \(maximum recursion depth"),
    "a long number": ("[1" + "0" * 5000 + "]", r":1: not JSON \(Exceeds the limit"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_a_broken_array_is_one_clear_line(
    tmp_path: Path, text: str, message: str, on_error: str
) -> None:
    path = tmp_path / "raw.json"
    path.write_text(text)
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}], "on_error": on_error}
    with pytest.raises(DataError, match=rf"^{path}{message}") as raised:
        prepare(DataConfig.model_validate(data), 0)
    assert "on_error" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_bad_values_of_an_array_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    path.write_text('[{"query": "a", "positives": ["b"]},\n 7, {"query": "\\ud800"}, ["x"], {}]')
    good, *bad = read(path)
    assert (good.query, good.id) == ("a", "toy-1")
    assert [str(row) for row in bad] == [
        f"{path}:2: item 2: a record must be a JSON object, not int",
        f"{path}:2: item 3: contains an unpaired UTF-16 surrogate (\\ud...)",
        f"{path}:2: item 4: a record must be a JSON object, not list",
        f"{path}:2: item 5: query is missing or empty (plain passages go in `text`)",
    ]


WRAPPED: dict[str, tuple[Any, int, str]] = {
    "deeper": ({"data": {"train": ROWS[:2]}}, 2, ".data.train[]"),
    "an odd key": ({"the data": {"train": ROWS[:2]}}, 2, '."the data".train[]'),
    "objects by id": ({f"q{n}": row for n, row in enumerate(ROWS)}, 50, ".[]"),
}


@pytest.mark.parametrize(("content", "count", "path_in"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("columns", [{}, {"query": "query", "positives": "positives"}])
def test_objects_around_the_records(
    tmp_path: Path,
    content: Any,
    count: int,
    path_in: str,
    indent: int | None,
    columns: dict[str, str],
) -> None:
    """Refused with the command that takes them out."""
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(content, indent=indent))
    source = {"path": str(path), "columns": columns}
    data = {"folder": tmp_path / "data", "sources": [source]}
    with pytest.raises(DataError) as raised:
        prepare(DataConfig.model_validate(data), 0)
    assert (
        f"; if the {count} object(s) in it are the records, write them to a file of their own, "
        f"one a line: jq -c '{path_in}' FILE > NEW.jsonl"
    ) in str(raised.value)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("columns", [{}, {"query": "query", "positives": "positives"}])
@pytest.mark.parametrize("shape", ["", "pairs"])
def test_an_object_around_one_list(
    tmp_path: Path, indent: int | None, columns: dict[str, str], shape: str
) -> None:
    path = tmp_path / "raw.json"
    for content in ({"version": 1, "the data": ROWS, "by": {"a": []}}, {"the data": ROWS}):
        path.write_text(json.dumps(content, indent=indent))
        found = read(path, columns=columns, shape=shape)
        assert [(r.query, r.positives) for r in found] == [(*row.values(),)[:2] for row in ROWS]
        assert len({r.id for r in found}) == len(ROWS)
    content = {"the data": [ROWS[0], 7, {"query": "x", "positives": []}], "seen": []}
    path.write_text(json.dumps(content) + "\n" + json.dumps({"other": 1}) + "\n")
    _, *bad = read(path, columns=columns, shape=shape)
    assert [str(row) for row in bad] == [
        f"{path}:1: the data 2: must be a JSON object, not int",
        f"{path}:1: the data 3: positives is empty; give at least one non-empty answer",
        f"{path}:2: needs 'the data', a list of records, as the first row has",
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_is_too_long_around_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    for module in ("lines", "jsonl"):
        monkeypatch.setattr(f"lbr_ds.corpora.formats.{module}.MAX_LINE", 1 << 20)
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({"data": [*ROWS, {"text": "x" * (5 << 20)}]}, indent=indent))
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}]}
    message = r"raw\.json:1: .*longer than 1 MiB; if it is around the array of the records, .*jq -c"
    with pytest.raises(DataError, match=message):
        prepare(DataConfig.model_validate(data), 0)


def test_a_cut_first_line_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    for cut in ('{"query": "a', '{"query": "a",', "{"):
        path.write_text(cut + "\n" + LAYOUTS["lines"])
        bad, *good = read(path)
        assert str(bad).startswith(f"{path}:1: not JSON (")
        assert len(good) == len(ROWS)


def test_no_json_at_all(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_text("query,positives\na,b\n" * 3)
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}]}
    for on_error in ("strict", "skip"):
        with pytest.raises(DataError) as raised:
            prepare(DataConfig.model_validate({**data, "on_error": on_error}), 0)
        line = str(raised.value)
        assert f"{path}:1: not JSON (Expecting value: line 1 column 1 (char 0))" in line
        assert "check data.sources.format" in line
        assert "on_error" not in line


NESTED: dict[str, Any] = {
    "query_id": 12,
    "query": "ask",
    "positive_passages": [
        {"docid": 1, "title": "T1", "text": "good 1"},
        {"docid": 2, "title": "T2", "text": "good 2"},
        {"docid": 3, "title": "T3"},
        {"docid": 4, "title": "T4", "text": None},
    ],
    "negative_passages": [],
    "questions": [["first?", "second?"], ["third?", ""]],
    "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
    "turns": [{"answers": [{"text": "a"}, {"text": "b"}]}, {"answers": []}],
    "scores": [1, 2.5, None],
    "sure": True,
    "meta": None,
}
REACHED: dict[str | tuple[str, ...], list[str]] = {
    "positive_passages.text": ["good 1", "good 2"],
    "positive_passages.1.text": ["good 2"],
    "positive_passages.-2.title": ["T3"],
    "positive_passages.9.text": [],
    "{positive_passages.title}. {positive_passages.text}": ["T1. good 1", "T2. good 2"],
    "{query}: {positive_passages.text}": ["ask: good 1", "ask: good 2"],
    "{questions}!": ["first?!", "second?!", "third?!"],
    "questions": ["first?", "second?", "third?"],
    "questions.1": ["third?"],
    "questions.0.1": ["second?"],
    "conversations.1.value": ["hi"],
    "{conversations.0.value} / {conversations.1.value}": ["hello / hi"],
    "turns.answers.text": ["a", "b"],
    "scores": ["1", "2.5"],
    "query_id": ["12"],
    "sure": ["true"],
    "meta": [],
    "meta.inner": [],
    "negative_passages.text": [],
    ("query", "questions.0"): ["ask", "first?", "second?"],
}


@pytest.mark.parametrize("column", REACHED, ids=str)
def test_what_columns_reach(tmp_path: Path, column: str | tuple[str, ...]) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([NESTED]))
    columns = {"query": "query", "positives": "query", "negatives": column, "id": "query_id"}
    record = one(path, columns=columns)
    assert (record.id, record.negatives) == ("12", REACHED[column])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("positive_passages.txt", "no column 'positive_passages.txt'; did you mean"),
        ("conversations.0.text", "no column 'conversations.0.text'; did you mean 'conversations'"),
        ("query.inner", "no column 'query.inner'; did you mean 'que"),
        ("conversations.0", "holds .*, not text; name a part of it, as conversations.0.from"),
        ("positive_passages", "holds .*, not text; name a part of it, as positive_passages.docid"),
        ("{questions} {scores}", "differ in length: {'questions': 4, 'scores': 3}"),
    ],
)
def test_what_columns_do_not_reach(tmp_path: Path, column: str, message: str) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([{**NESTED, **{f"column {n}" * 9: n for n in range(900)}}]))
    columns = {"query": "query", "positives": column}
    try:
        (found,) = read(path, columns=columns)
    except DataError as error:
        found = error
    assert str(found).startswith(f"{path}:1: item 1: ")
    assert re.search(message, str(found))
    assert len(str(found)) < 1000


def test_a_list_of_questions_is_one_group_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([{"questions": [["a", "b"]], "answers": ["c"]}]))
    found = read(path, columns={"query": "questions", "positives": "answers"})
    assert [(r.query, r.positives) for r in found] == [("a", ["c"]), ("b", ["c"])]


def test_numbers_are_their_text_everywhere(tmp_path: Path) -> None:
    """In records, in columns and in templates alike."""
    path = tmp_path / "raw.jsonl"
    row = {"id": 7, "group": 8.0, "query": 2.5, "positives": [3, True, None], "instruction": None}
    path.write_text(json.dumps(row))
    wanted = Record("7", "toy", "2.5", ["3", "true"], group="8")
    assert one(path) == wanted
    columns = {"id": "id", "group": "{group}", "query": "query", "positives": "positives"}
    assert one(path, columns=columns) == wanted
    for odd in ({"query": {"a": 1}}, {"id": [1]}, {"positives": [["x"]]}, {"group": {}}):
        path.write_text(json.dumps({**row, **odd}))
        (name,) = odd
        assert f"{path}:1: {name} must be a " in str(one(path))


def test_wrong_columns_are_not_counted_away(tmp_path: Path) -> None:
    """Where no row is a record, `skip` would leave nothing: the first fault is reported."""
    rows = [{"query": "", "positives": ["x"]} for _ in range(300)]
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(rows))
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}], "on_error": "skip"}
    with pytest.raises(DataError, match=r"all of its 300 rows are invalid; check data\.sources"):
        prepare(DataConfig.model_validate(data), 0)
    data["on_error"] = "strict"
    with pytest.raises(DataError, match=r"item 1: query is missing.*; check data\.sources\.format"):
        prepare(DataConfig.model_validate(data), 0)
