"""A table of bad inputs: one clear line that names file and row, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbr_ds.config import DataConfig, load
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError
from tests.corpora.test_formats import LETTERS, beir, write_table
from tests.corpora.toy import pair, read_all, recipe, write_raw

PAIRS = {"query": "question", "positives": "reply"}


def sourced(tmp_path: Path, path: Path | str, **fields: Any) -> DataConfig:
    on_error = fields.pop("on_error", "strict")
    sources = [{"path": str(path), "name": "toy", **fields}]
    return DataConfig.model_validate(
        {"folder": tmp_path / "data", "sources": sources, "on_error": on_error}
    )


def csv_file(tmp_path: Path, odd: bytes) -> Path:
    """40 good rows, and `odd` as the fourth line."""
    path = tmp_path / "raw.csv"
    lines = [b"question,reply"] + [f"what {i},that {i}".encode() for i in range(40)]
    path.write_bytes(b"\n".join([*lines[:3], odd, *lines[3:]]) + b"\n")
    return path


ROWS = {
    "not UTF-8": (
        b"what \xff,x",
        r"raw\.csv:4: not UTF-8 at byte 5 of the line; .* cp1252 .* can, or",
    ),
    "too many cells": (b"a,b,c", r"raw\.csv:4: the row has 3 cells, but the header has 2"),
    "too few cells": (b"a", r"raw\.csv:4: the row has 1 cells, but the header has 2"),
    "text after a quote": (b'"a" b,c', r"raw\.csv:4: not CSV \(.*\); check the quotes"),
    "no answer": (b"a,", r"raw\.csv:4: positives is empty"),
    "no question": (b" ,b", r"raw\.csv:4: query is missing or empty"),
}


@pytest.mark.parametrize(("odd", "message"), ROWS.values(), ids=ROWS)
def test_bad_row(tmp_path: Path, odd: bytes, message: str) -> None:
    path = csv_file(tmp_path, odd)
    with pytest.raises(DataError, match=rf"{message}.*set data\.on_error=skip"):
        prepare(sourced(tmp_path, path, columns=PAIRS), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["raw.csv"]
    made = prepare(sourced(tmp_path, path, columns=PAIRS, on_error="skip"), 0)
    assert made["dropped_records"]["bad_record"]["count"] == 1
    assert made["sources"][0]["records_read"] == 41
    assert made["sources"][0]["records_kept"] == 40


def unclosed(tmp_path: Path) -> DataConfig:
    return sourced(tmp_path, csv_file(tmp_path, b'"never closed,x'), columns=PAIRS)


def wrong_column(tmp_path: Path) -> DataConfig:
    path = csv_file(tmp_path, b"a,b")
    columns = {**PAIRS, "query": "questoin"}
    return sourced(tmp_path, path, columns=columns, on_error="skip")  # skipping all is no cure


def empty(tmp_path: Path) -> DataConfig:
    (tmp_path / "raw.csv").write_text("question,reply\n")
    return sourced(tmp_path, tmp_path / "raw.csv", columns=PAIRS)


def empty_folder(tmp_path: Path) -> DataConfig:
    (tmp_path / "raw").mkdir()
    return sourced(tmp_path, tmp_path / "raw", format="text")


def twice_in_header(tmp_path: Path) -> DataConfig:
    (tmp_path / "raw.csv").write_text("a,b,a\n1,2,3\n")
    return sourced(tmp_path, tmp_path / "raw.csv")


def corrupt_parquet(tmp_path: Path) -> DataConfig:
    path = write_table(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-100])
    return sourced(tmp_path, path, columns=PAIRS)


def corrupt_arrow(tmp_path: Path) -> DataConfig:
    path = write_table(tmp_path, "arrow")
    path.write_bytes(b"nothing")
    return sourced(tmp_path, path, columns=PAIRS)


def ids(tmp_path: Path) -> DataConfig:
    return recipe(tmp_path, [pair(0), pair(1), pair(0, query="other")])


def unreachable(tmp_path: Path) -> DataConfig:
    return sourced(tmp_path, "http://127.0.0.1:9/x.csv", columns=PAIRS)


def bad_hash(tmp_path: Path) -> DataConfig:
    return sourced(tmp_path, "https://example.org/x.csv#sha256=12")


def no_binary(tmp_path: Path) -> DataConfig:
    (tmp_path / "raw.jsonl").write_bytes(bytes(range(256)))
    return sourced(tmp_path, tmp_path / "raw.jsonl")


CASES: list[tuple[Callable[[Path], DataConfig], type[LbrError], str]] = [
    (unclosed, DataError, r"raw\.csv:4-42: not CSV \(unexpected end of data\)"),
    (
        wrong_column,
        DataError,
        r"raw\.csv:2: no column 'questoin'; did you mean 'question'\? it has",
    ),
    (empty, DataError, r"raw\.csv: contains no records; check data\.sources"),
    (empty_folder, DataError, r"raw: holds no file that ends in \.txt or \.md"),
    (twice_in_header, DataError, r"raw\.csv:1: the header names 'a' twice"),
    (corrupt_parquet, DataError, r"raw\.parquet: not readable as parquet after row 0"),
    (corrupt_arrow, DataError, r"raw\.arrow: not readable as arrow after row 0"),
    (ids, DataError, r"raw\.jsonl:3: id 'r0' is already used at .*raw\.jsonl:1"),
    (
        unreachable,
        EnvironmentProblem,
        r"^http://127\.0\.0\.1:9/x\.csv: cannot be read \(.*refused\); check the network",
    ),
    (bad_hash, ConfigError, r"is not https://HOST/FILE or that with #sha256"),
    (no_binary, DataError, r"raw\.jsonl:1: not JSON|raw\.jsonl:1: not UTF-8"),
]


@pytest.mark.parametrize(("make", "error", "message"), CASES, ids=[c[0].__name__ for c in CASES])
def test_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], DataConfig],
    error: type[LbrError],
    message: str,
) -> None:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lbr_ds.system.download.RETRY_WAITS", ())
    data = make(tmp_path)
    with pytest.raises(error, match=message) as raised:
        prepare(data, 0)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".data.*"))


def test_a_record_of_10_mb(tmp_path: Path) -> None:
    raws = [*map(pair, range(20)), pair(20, positives=["x y " * 2_500_000])]
    dropped = prepare(recipe(tmp_path, raws), 0)["dropped_records"]
    assert dropped["too_long"]["count"] == 1
    assert dropped["too_long"]["examples"][0].startswith("r20: 9999999 characters: x y")


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_ds.corpora.formats.lines.MAX_LINE", 1 << 20)
    raws = [pair(0), pair(1, query="x" * (5 << 20)), *map(pair, range(2, 30))]
    with pytest.raises(DataError, match=r"raw\.jsonl:2: longer than 1 MiB"):
        prepare(recipe(tmp_path, raws), 0)
    made = prepare(recipe(tmp_path, raws, on_error="skip"), 0)
    assert made["sources"][0]["records_kept"] == 29


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_full_disk_under_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB's own error when its file may not grow, and nothing is left behind."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        data = recipe(tmp_path, map(pair, range(2000)), folder=place / "data")
        with pytest.raises(EnvironmentProblem, match="no space is left on the disk; free"):
            prepare(data, 0)
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def run_cli(tmp_path: Path, source: dict[str, Any]) -> tuple[int, str, Path]:
    """`lbr-ds prepare` on a recipe that names that source: code, stderr, data folder."""
    raw = yaml.safe_load(load("demo").dump())
    raw["data"].update(folder=str(tmp_path / "data"), sources=[source], min_chars=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "lbr_ds", "prepare", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr, tmp_path / "data"


def test_choices_by_a_recipe_alone(tmp_path: Path) -> None:
    rows = "".join(f"Which is {i}?,no {i},yes {i},B\n" for i in range(30))
    (tmp_path / "quiz.csv").write_text("question,A,B,label\n" + rows)
    source: dict[str, Any] = {"path": str(tmp_path / "quiz.csv"), "shape": "choices"}
    source["columns"] = {"query": "question", "options": ["A", "B"], "answer": "label"}
    code, error, folder = run_cli(tmp_path, source)
    assert (code, "error" in error) == (0, False)
    records = [record for split in read_all(folder).values() for record in split]
    assert {(r.query, *r.positives) for r in records} == {
        (f"Which is {i}?", f"yes {i}") for i in range(30)
    }
    (tmp_path / "quiz.csv").write_text(LETTERS.format("E"))
    code, error, _ = run_cli(tmp_path, source)
    assert code == 3
    assert "quiz.csv:2: answer 'E' read as letter is none of the options A, B" in " ".join(
        error.split()
    )
    source["columns"] = {"query": "question", "option": ["A"]}
    code, error, _ = run_cli(tmp_path, source)
    assert code == 2
    assert "data.sources.0.columns.option; did you mean 'options'" in " ".join(error.split())


def test_beir_by_a_recipe_alone(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    write_raw(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(20)])
    write_raw(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"say {i}"} for i in range(20)])
    for name, numbers in (("train", range(12)), ("test", range(12, 20))):
        lines = [f"q{i}\td{i}\t1\n" for i in numbers]
        (folder / "qrels" / f"{name}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(lines)
        )
    code, error, made = run_cli(tmp_path, {"path": str(folder), "license": "CC0"})
    assert (code, "error" in error) == (0, False)
    records = [record for split in read_all(made).values() for record in split]
    assert {(r.id, r.query, *r.positives) for r in records} == {
        (f"q{i}", f"ask {i}", f"say {i}") for i in range(20)
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz"])
def test_a_damaged_file_among_others(tmp_path: Path, kind: str) -> None:
    """Its rest is named and counted as one invalid row; all other rows are kept."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(5):
        rows = [{"question": f"what {part} {i}", "reply": f"that {part} {i}"} for i in range(40)]
        write_part(folder / f"part-{part}.{kind}", rows)
    (damaged,) = folder.glob(f"part-2.{kind}")
    damaged.write_bytes(damaged.read_bytes()[:-60])
    where = rf"part-2\.{kind}: .*; the rest of this file is lost, so restore it"
    with pytest.raises(DataError, match=rf"{where}.*, or set data\.on_error=skip"):
        prepare(sourced(tmp_path, folder, columns=PAIRS), 0)
    made = prepare(sourced(tmp_path, folder, columns=PAIRS, on_error="skip"), 0)
    bad = made["dropped_records"]["bad_record"]
    assert bad["count"] == 1
    assert damaged.name in bad["examples"][0]
    kept = {r.query for part in read_all(tmp_path / "data").values() for r in part}
    assert kept >= {f"what {part} {i}" for part in (0, 1, 3, 4) for i in range(40)}
    assert made["sources"][0]["records_kept"] == len(kept)
    assert made["sources"][0]["records_read"] == len(kept) + 1


def write_part(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow.parquet

    if path.name.endswith("jsonl.gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
        return
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
