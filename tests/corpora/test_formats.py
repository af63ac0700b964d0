"""Every format and shape gives the records that the recipe's words say; odd rows are named."""

from __future__ import annotations

import ast
import gzip
import json
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import SourceConfig, load
from lbr_ds.corpora.curate.cleaning import shares_letters
from lbr_ds.corpora.sources import find
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record

ROWS = [
    {"question": f"What, is {i}?", "reply": f'It "is"\nnumber {i}.', "page": f"p{i // 2}", "n": i}
    for i in range(5)
]


def read(path: Path, **fields: Any) -> list[Any]:
    """The records of a source, with DataErrors and Skipped in their places."""
    source = SourceConfig.model_validate({"path": str(path), "name": "toy", **fields})
    return [record for _, record in find(source).read()]


def one(path: Path, **fields: Any) -> Any:
    (record,) = read(path, **fields)
    return record


def write_table(folder: Path, kind: str) -> Path:
    """ROWS as a file of that kind."""
    path = folder / f"raw.{kind}"
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind.startswith("csv"):
        import csv
        import io

        text_io = io.StringIO()
        writer = csv.DictWriter(text_io, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        text = ("\ufeff" + text_io.getvalue()).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind == "tsv":
        lines = ["\t".join(ROWS[0])]
        lines += ["\t".join(str(v).replace("\n", " ") for v in row.values()) for row in ROWS]
        path.write_text("\n".join(lines) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(ROWS)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet", "arrow"])
def test_one_table_in_every_format(tmp_path: Path, kind: str) -> None:
    columns = {"query": "question", "positives": "reply", "group": "page", "id": "n"}
    records = read(write_table(tmp_path, kind), columns=columns)
    assert [(r.id, r.query, r.group) for r in records] == [
        (str(row["n"]), row["question"], row["page"]) for row in ROWS
    ]
    answers = [r.positives[0] for r in records]
    assert [" ".join(a.split()) for a in answers] == [" ".join(r["reply"].split()) for r in ROWS]


def test_a_folder_of_files_is_one_corpus(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write_table(tmp_path / part, "csv")
    found = read(tmp_path, columns={"query": "question", "positives": "reply"})
    assert len(found) == 10
    (tmp_path / "b" / "notes.txt").write_text("odd")
    with pytest.raises(ConfigError, match="holds files of csv, text; name the format"):
        read(tmp_path)


LETTERS = "question,A,B,C,label\nWhich?,one,two,three,{}\n"
CHOICES: dict[str, tuple[str, str, str, str]] = {
    "letter": ("csv", LETTERS.format("B"), "letter", "two"),
    "letter in brackets": ("csv", LETTERS.format("(c)"), "letter", "three"),
    "from zero": ("csv", LETTERS.format("0"), "from_0", "one"),
    "from one": ("csv", LETTERS.format("3"), "from_1", "three"),
    "text": ("csv", LETTERS.format("TWO"), "text", "two"),
    "list": (
        "jsonl",
        '{"question": "Which?", "options": ["one", "two"], "label": 1}',
        "from_0",
        "two",
    ),
    "mapping": (
        "jsonl",
        '{"question": "Which?", "options": {"1": "one", "2": "two"}, "label": 2}',
        "letter",
        "two",
    ),
    "labels and texts": (
        "jsonl",
        '{"question": "Which?", "options": {"text": ["one", "two"], "label": ["A", "B"]},'
        ' "label": "B"}',
        "letter",
        "two",
    ),
    "list in a cell": (
        "csv",
        'question,options,label\nWhich?,"[""one"", ""two""]",A\n',
        "letter",
        "one",
    ),
}


@pytest.mark.parametrize(("kind", "text", "told", "right"), CHOICES.values(), ids=CHOICES)
def test_choices(tmp_path: Path, kind: str, text: str, told: str, right: str) -> None:
    path = tmp_path / f"raw.{kind}"
    path.write_text(text)
    options = ["A", "B", "C"] if "A,B,C" in text else "options"
    columns = {"query": "question", "options": options, "answer": "label"}
    record = one(path, shape="choices", columns=columns, answer_as=told)
    assert (record.query, record.positives) == ("Which?", [right])
    every = ["one", "two", "three"] if "A,B,C" in text else ["one", "two"]
    assert record.negatives == [option for option in every if option != right]


@pytest.mark.parametrize(
    ("told", "answer"),
    [("letter", "D"), ("from_0", "3"), ("from_1", "0"), ("from_0", "B"), ("text", "four")],
)
def test_an_answer_that_is_no_option(tmp_path: Path, told: str, answer: str) -> None:
    path = tmp_path / "raw.csv"
    path.write_text(LETTERS.format(answer))
    columns = {"query": "question", "options": ["A", "B", "C"], "answer": "label"}
    found = one(path, shape="choices", columns=columns, answer_as=told)
    assert str(found) == (
        f"{path}:2: answer {answer!r} read as {told} is none of the options A, B, C; "
        "check data.sources.answer_as"
    )


def test_titles_templates_nested_columns_and_where(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_text(
        '{"title": "T", "body": "B", "meta": {"lang": "en", "key": 7}, "names": ["x1", "y", "z"]}\n'
        '{"title": "U", "body": "C", "meta": {"lang": "de", "key": 8}, "names": ["w"]}\n'
    )
    titled = read(path, shape="titled", where={"meta.lang": "en|fr"})
    assert titled[0] == Record("toy-1", "toy", "T", ["B"])
    assert titled[1].rule == "not_where"
    assert titled[1].example == f"{path}:2: meta.lang is 'de'"
    columns = {"query": "names", "positives": "{title}: {body}", "group": "meta.key"}
    found = read(path, columns=columns, where={"names": "[a-z]"})
    assert [(r.id, r.query, r.positives, r.group) for r in found] == [
        ("toy-1-1", "y", ["T: B"], "7"),
        ("toy-1-2", "z", ["T: B"], "7"),
        ("toy-2", "w", ["U: C"], "8"),
    ]
    passages = read(path, shape="passages", columns={"text": "{title}. {body}"})
    assert [r.text for r in passages] == ["T. B", "U. C"]
    several = read(path, columns={"query": "title", "positives": ["body", "names"]})
    assert several[0].positives == ["B", "x1", "y", "z"]


def test_header_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "raw.tsv"
    path.write_text('7\taspirin\tasa\t"acetyl\n8\tether\n9\n')
    columns = {"query": "name", "positives": "rest", "id": "number"}
    found = read(path, header=["number", "name", "*rest"], columns=columns)
    assert found[0] == Record("7", "toy", "aspirin", ["asa", '"acetyl'])
    assert str(found[1]).endswith(
        "raw.tsv:2: positives is empty; give at least one non-empty answer"
    )
    assert "raw.tsv:3: the row has 1 cells, but the header has 2" in str(found[2])


def test_text_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("First\nparagraph.\n\n\nSecond.\n")
    (tmp_path / "deep" / "b.md").write_bytes(b"Good.\n\nBad \xff.\n")
    found = read(tmp_path)
    assert [(r.id, r.text, r.group) for r in found[:3]] == [
        ("toy-a.txt-1", "First\nparagraph.\n", "a.txt"),
        ("toy-a.txt-2", "Second.\n", "a.txt"),
        ("toy-deep/b.md-1", "Good.\n", "deep/b.md"),
    ]
    assert str(found[3]) == (
        f"{tmp_path}/deep/b.md:3: not UTF-8 at byte 4 of the line; it can be decoded as "
        "cp1252 ('Bad ÿ.'): in the recipe, add `encoding: cp1252` to this entry of data.sources, "
        "provided that the whole file can"
    )


def beir(folder: Path) -> Path:
    """Four documents, three queries, qrels in two splits."""
    corpus = [{"_id": f"d{i}", "title": "T" if i else "", "text": f"text {i}"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(3)]
    (folder / "qrels").mkdir()
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(
        head + "q2\td0\t1\nq0\td1\t2\nq0\td2\t0\nq2\td3\t1\n"
    )
    (folder / "qrels" / "train.tsv").write_text(head + "q1\td1\t1\n")
    return folder


def test_beir(tmp_path: Path) -> None:
    found = read(beir(tmp_path))
    assert [(r.id, r.query, r.positives, r.negatives) for r in found] == [
        ("q2", "ask 2", ["text 0", "T. text 3"], []),
        ("q0", "ask 0", ["T. text 1"], ["T. text 2"]),
        ("q1", "ask 1", ["T. text 1"], []),
    ]
    assert [r.id for r in read(tmp_path, split="train")] == ["q1"]
    with (tmp_path / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\td9\t1\nq1\td1\tyes\n")
    bad = [str(r) for r in read(tmp_path, split="train") if isinstance(r, DataError)]
    assert bad[0].endswith("train.tsv:3: names document 'd9', which is not in corpus.jsonl")
    assert bad[1].endswith("train.tsv:4: score 'yes' is not a number")
    with pytest.raises(DataError, match=r"holds no qrels/dev\.tsv"):
        read(tmp_path, split="dev")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no corpus\.jsonl; BEIR has"):
        read(tmp_path)


SOURCE = '''
import os

class Box:
    @property
    def weigh(self, unit="kg"):
        """Return the weight of the box. Slow.

        More words.
        """
        total = self.weigh_all(unit)
        total += self.tare
        return total if unit else self.weigh

    def __len__(self):
        """Return the number of things inside."""
        self.open()
        self.count()
        return 0

def brief(): "One line with its docstring."; return 1

def short(x):
    """Return x as it is."""
    return x

def silent(a):
    b = a
    return b
'''


def test_functions(tmp_path: Path) -> None:
    body = textwrap.dedent("""\
        def function(self, unit="kg"):
            total = self.weigh_all(unit)
            total += self.tare
            return total if unit else self.function""")
    package = tmp_path / "pack"
    (package / "tests").mkdir(parents=True)
    (package / "box.py").write_text(SOURCE)
    (package / "tests" / "box.py").write_text(SOURCE)
    (package / "bad.py").write_text("def (:\n")
    bad, good = read(package, format="python")
    assert (good.id, good.query, good.positives) == (
        "toy-box.py-6",
        "Return the weight of the box.",
        [body],
    )
    assert str(bad).startswith(f"{package}/bad.py: not Python (")
    wheel = tmp_path / "pack-1.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(package / "box.py", "pack/box.py")
    assert one(wheel).positives == [body]
    assert one(package / "box.py").positives == [body]
    wheel.write_bytes(b"PK no wheel")
    with pytest.raises(DataError, match="not a wheel"):
        read(wheel)
    with pytest.raises(DataError, match="python:no_such_thing: no such package is installed"):
        find(SourceConfig(path="python:no_such_thing"))
    installed = find(SourceConfig(path="python:lbr_ds"))
    assert (installed.format, installed.keep_lines) == ("python", True)


OBO = r"""format-version: 1.2

[Term]
id: X:1
name: Macrocephaly
def: "A head \"too\" large." [ref:1]
synonym: "Big head" EXACT layperson [] {x="y"}
synonym: "Megacephaly" RELATED [ref:2]

[Term]
id: X:2
name: gone
synonym: "Old" EXACT []
is_obsolete: true

[Typedef]
id: part_of
synonym: "no term" EXACT []
"""


def test_obo(tmp_path: Path) -> None:
    path = tmp_path / "x.obo"
    path.write_text(OBO)
    assert [(r.id, r.query, r.positives, r.group) for r in read(path)] == [
        ("toy-X:1-0", "Macrocephaly", ['A head "too" large.'], "X:1"),
        ("toy-X:1-1", "Big head", ['A head "too" large.'], "X:1"),
        ("toy-X:1-2", "Megacephaly", ['A head "too" large.'], "X:1"),
    ]
    name, lay, other = read(path, where={"type": "layperson"})
    assert (lay.query, name.rule, other.rule) == ("Big head", "not_where", "not_where")
    assert [getattr(r, "query", "") for r in read(path, where={"scope": "NAME"})] == [
        "Macrocephaly",
        "",
        "",
    ]
    second, *left = read(path, where={"number": "[2-9]"})[::-1]
    assert (second.query, len(left)) == ("Megacephaly", 2)
    path.write_text("nothing")
    with pytest.raises(DataError, match=r"contains no \[Term\]; not an OBO file"):
        read(path)


COUNTS = {  # records, groups; from the packages that the recipes name
    "medical-demo": [(12_569, 6_805), (6_663, 3_907)],
    "chemistry-demo": [(13_895, 13_895), (6_305, 6_305)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_domains_have_their_sizes(name: str) -> None:
    """The records of the shipped recipes, before duplicates are dropped."""
    for source, (rows, groups) in zip(load(name).data.sources, COUNTS[name], strict=True):
        found = [record for _, record in find(source).read() if isinstance(record, Record)]
        letters = source.max_shared_letters
        if letters is not None:
            found = [record for record in found if not shares_letters(record, letters)]
        assert (len(found), len({record.group for record in found})) == (rows, groups)


@pytest.mark.slow
def test_standard_library_has_enough_functions() -> None:
    (source,) = load("code-demo").data.sources
    found = [record for _, record in find(source).read()]
    assert len(found) > 2_000, sys.version
    assert all(isinstance(record, Record) for record in found)
    for record in found[:500]:
        (function,) = ast.parse(record.positives[0]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?d", "e{1,2}"])
def test_a_name_is_a_name_and_no_pattern(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    for stem in ("a1", "bb", "cxd", "e1", name):
        table = pyarrow.Table.from_pylist([{"query": "q", "positives": f"only in {stem}"}])
        pyarrow.parquet.write_table(table, tmp_path / f"{stem}.parquet")
    (record,) = read(tmp_path / f"{name}.parquet")
    assert record.positives == [f"only in {name}"]
