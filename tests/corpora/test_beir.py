"""Folders in the BEIR layout as they are found: gaps, TREC judgements, doubles, numbers as ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig
from lbr_ds.corpora.formats.interface import Skipped
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from tests.corpora.test_formats import read
from tests.corpora.toy import read_all

HEAD = "query-id\tcorpus-id\tscore\n"


def folder(
    tmp_path: Path, qrels: str, *, name: str = "train.tsv", corpus: Any = (), queries: Any = ()
) -> Path:
    """Documents d0 to d3 and queries q0 to q2, with `corpus` and `queries` beside or instead."""
    made = tmp_path / "beir"
    documents = {f"d{i}": {"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(4)}
    asked = {f"q{i}": {"_id": f"q{i}", "text": f"ask {i}"} for i in range(3)}
    documents |= {line["_id"]: line for line in corpus}
    asked |= {line["_id"]: line for line in queries}
    (made / "qrels").mkdir(parents=True)
    for file, lines in (("corpus", documents), ("queries", asked)):
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        (made / f"{file}.jsonl").write_text(text)
    (made / "qrels" / name).write_bytes(
        gzip.compress(qrels.encode()) if name.endswith(".gz") else qrels.encode()
    )
    return made


def parts(found: list[Any]) -> tuple[list[tuple[str, list[str], list[str]]], list[str], list[str]]:
    """(id, positives, negatives) of the records; the rules of what was left out; the faults."""
    records = [(r.id, r.positives, r.negatives) for r in found if isinstance(r, Record)]
    skipped = [r.rule for r in found if isinstance(r, Skipped)]
    return records, skipped, [str(r) for r in found if isinstance(r, DataError)]


PLAIN = "q0\td0\t1\nq0\td1\t0\nq1\td2\t2\nq2\td3\t1\n"
WANTED = [
    ("q0", ["T. text 0"], ["T. text 1"]),
    ("q1", ["T. text 2"], []),
    ("q2", ["T. text 3"], []),
]
SPELLINGS: dict[str, tuple[str, str]] = {
    "as BEIR has it": (HEAD + PLAIN, "train.tsv"),
    "another header": ("qid\tpid\trel\n" + PLAIN, "train.tsv"),
    "no header": (PLAIN, "train.tsv"),
    "byte order mark, no header": ("\ufeff" + PLAIN, "train.tsv"),
    "Windows line ends": ((HEAD + PLAIN).replace("\n", "\r\n"), "train.tsv"),
    "gzip": (HEAD + PLAIN, "train.tsv.gz"),
    "TREC with tabs": (
        "".join(f"{q}\t0\t{d}\t{s}\n" for q, d, s in (line.split() for line in PLAIN.splitlines())),
        "train.tsv",
    ),
    "TREC in a .qrels": (
        "".join(f"{q} Q0  {d} {s}\n" for q, d, s in (line.split() for line in PLAIN.splitlines())),
        "a.qrels",
    ),
    "blanks, no header": (PLAIN.replace("\t", "  "), "train.tsv"),
    "empty lines and no last end": ("\n" + PLAIN.replace("\n", "\n\n").rstrip(), "train.tsv"),
    "scores with a point": (PLAIN.replace("\t1\n", "\t1.0\n"), "train.tsv"),
}


@pytest.mark.parametrize(("qrels", "name"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_all_judgements(tmp_path: Path, qrels: str, name: str) -> None:
    assert parts(read(folder(tmp_path, qrels, name=name))) == (WANTED, [], [])


def test_all_files_gzipped(tmp_path: Path) -> None:
    made = folder(tmp_path, PLAIN, name="train.tsv.gz")
    for name in ("corpus.jsonl", "queries.jsonl"):
        (made / f"{name}.gz").write_bytes(gzip.compress((made / name).read_bytes()))
        (made / name).unlink()
    assert parts(read(made)) == (WANTED, [], [])


EMPTY = [
    {"_id": "d0", "title": "", "text": ""},
    {"_id": "d1", "title": "Only", "text": ""},
    {"_id": "d2", "text": " \u200b\n"},
    {"_id": "d3", "title": None, "text": "Alone"},
]
GAPS: dict[str, tuple[str, list[Any], list[Any], list[Any], list[str]]] = {
    "one good and one empty answer": (
        "q0\td0\t1\nq0\td1\t1\n",
        EMPTY,
        [],
        [("q0", ["Only"], [])],
        ["empty_document"],
    ),
    "an empty negative": (
        "q0\td3\t1\nq0\td2\t0\n",
        EMPTY,
        [],
        [("q0", ["Alone"], [])],
        ["empty_document"],
    ),
    "only empty answers": (
        "q0\td0\t1\nq0\td2\t1\nq1\td1\t1\n",
        EMPTY,
        [],
        [("q1", ["Only"], [])],
        ["empty_document", "empty_document", "no_positive"],
    ),
    "judged only 0": (
        "q0\td0\t0\nq0\td1\t0\nq1\td2\t1\n",
        [],
        [],
        [("q1", ["T. text 2"], [])],
        ["no_positive"],
    ),
    "judged below 0": (
        "q0\td0\t-1\nq0\td1\t1\n",
        [],
        [],
        [("q0", ["T. text 1"], ["T. text 0"])],
        [],
    ),
    "an empty query": (
        "q0\td0\t1\nq1\td1\t1\n",
        [],
        [{"_id": "q0", "text": ""}],
        [("q1", ["T. text 1"], [])],
        ["empty_query"],
    ),
    "judged twice alike": (
        "q0\td0\t1\nq0\td0\t1\n",
        [],
        [],
        [("q0", ["T. text 0"], [])],
        ["judged_twice"],
    ),
    "judged twice, the higher counts": (
        "q0\td0\t0\nq0\td1\t0\nq0\td0\t1\n",
        [],
        [],
        [("q0", ["T. text 0"], ["T. text 1"])],
        ["judged_twice"],
    ),
}


@pytest.mark.parametrize(
    ("qrels", "corpus", "queries", "records", "rules"), GAPS.values(), ids=GAPS
)
def test_gaps_are_counted_and_left_out(
    tmp_path: Path,
    qrels: str,
    corpus: list[Any],
    queries: list[Any],
    records: list[Any],
    rules: list[str],
) -> None:
    found = parts(read(folder(tmp_path, HEAD + qrels, corpus=corpus, queries=queries)))
    judged = {line.split("\t")[0] for line in qrels.splitlines()}
    assert found == (records, rules + ["not_judged"] * (3 - len(judged)), [])
    asked = parts(read(tmp_path / "beir", split="train"))
    assert asked == (records, rules, [])  # the others are of other splits


def test_ids_as_numbers(tmp_path: Path) -> None:
    corpus = [{"_id": 7, "title": 2024, "text": 1.5}]
    queries = [{"_id": 12, "text": 99}]
    found = read(folder(tmp_path, "12\t7\t1\n", corpus=corpus, queries=queries), split="train")
    assert found == [Record("12", "toy", "99", ["2024. 1.5"])]


def test_faults_are_named(tmp_path: Path) -> None:
    corpus = [{"_id": "", "text": "a"}, {"_id": "d9", "text": ["x"]}]
    made = folder(tmp_path, PLAIN + "q0\td7\t1\nq0\td1\tyes\nq0\n q0\td1\n", corpus=corpus)
    with (made / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d0", "text": "other"}\n')
    records, rules, faults = parts(read(made))
    train, documents = made / "qrels" / "train.tsv", made / "corpus.jsonl"
    assert (records, rules) == (WANTED, [])
    assert faults == [
        f"{documents}:5: needs _id and text; it has _id, text",
        f"{documents}:6: text must be a text or a number, not ['x']",
        f"{documents}:7: _id 'd0' is taken by an earlier line",
        f"{train}:5: names document 'd7', which is not in corpus.jsonl",
        f"{train}:6: score 'yes' is not a number",
        f"{train}:7: score 'q0' is not a number",
        f"{train}:8: score 'd1' is not a number",
    ]


def test_prepare_does_not_stop_and_counts(tmp_path: Path) -> None:
    """Strict as it is by default: gaps are no faults."""
    corpus = [{"_id": f"e{i}", "text": f"long text {i}"} for i in range(30)]
    queries = [{"_id": f"p{i}", "text": f"long question {i}"} for i in range(32)]
    lines = "".join(f"p{i}\te{i}\t1\n" for i in range(30)) + "p30\te3\t0\nq0\td0\t1\nq0\td1\t1\n"
    empty = [{"_id": "d0", "title": "", "text": ""}]
    made = folder(tmp_path, lines, corpus=[*corpus, *empty], queries=queries)
    sources = [{"path": str(made), "name": "toy"}]
    curation = prepare(DataConfig.model_validate({"folder": tmp_path / "d", "sources": sources}), 0)
    counts = {rule: entry["count"] for rule, entry in curation["dropped_records"].items()}
    assert counts == {"empty_document": 1, "no_positive": 1, "not_judged": 3}
    records = [record for split in read_all(tmp_path / "d").values() for record in split]
    assert {(r.id, *r.positives) for r in records} == {
        ("q0", "T. text 1"),
        *((f"p{i}", f"long text {i}") for i in range(30)),
    }
