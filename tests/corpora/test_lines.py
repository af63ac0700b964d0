"""Text in any encoding, by the recipe's word alone; other text and other files are named."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig, SourceConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.sources import find
from lbr_ds.errors import ConfigError, DataError
from tests.corpora.test_formats import read, write_table

SENTENCES = {  # by encoding: what people write in it
    "gb18030": "患者女, 三十五岁, 主诉头痛三天, 伴有恶心呕吐。糖尿病的诊断标准是什么?",
    "big5": "糖尿病的診斷標準是什麼?高血壓病人能吃什麼水果?",
    "shift_jis": "糖尿病の診断基準は何ですか。患者は三日間の頭痛を訴えた。",
    "euc_jp": "糖尿病の診断基準は何ですか。患者は三日間の頭痛を訴えた。",
    "cp949": "당뇨병의 진단 기준은 무엇입니까? 환자는 두통을 호소했습니다.",
    "cp1252": "L'élève a mangé des crêpes à la fête où il était déjà allé.",
    "cp1251": "Каковы критерии диагностики диабета? Пациент жалуется на головную боль.",
    "cp1253": "Ποια είναι τα συμπτώματα της πνευμονίας και πόσο διαρκεί;",
    "cp1256": "ما هي معايير تشخيص مرض السكري وكم تستمر المعالجة؟",
}
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"]
ENCODINGS = [*SENTENCES, *WIDE]


def pairs(encoding: str) -> list[dict[str, str]]:
    text = SENTENCES.get(encoding, SENTENCES["gb18030"])
    return [{"query": f"{n}. {text}", "positives": f"{text} {n}"} for n in range(20)]


def as_jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)


def as_array(rows: list[dict[str, str]]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def as_csv(rows: list[dict[str, str]]) -> str:
    return "query,positives\n" + "".join(f'"{r["query"]}","{r["positives"]}"\n' for r in rows)


def as_tsv(rows: list[dict[str, str]]) -> str:
    return "query\tpositives\n" + "".join(f"{r['query']}\t{r['positives']}\n" for r in rows)


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "jsonl": as_jsonl,
    "json": as_array,
    "csv": as_csv,
    "tsv": as_tsv,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_in_any_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    raw = WRITERS[kind](pairs(encoding)).encode(encoding)
    columns = {"query": "query", "positives": "positives"}
    for name, content in ((f"raw.{kind}", raw), (f"raw.{kind}.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        found = read(tmp_path / name, encoding=encoding, columns=columns)
        assert [(r.query, *r.positives) for r in found] == [(*r.values(),) for r in pairs(encoding)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e != "utf-8-sig"])
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_an_encoding_that_the_recipe_does_not_name(
    tmp_path: Path, kind: str, encoding: str, on_error: str
) -> None:
    """The line names it, and setting what the line says gives the pairs."""
    path = tmp_path / f"raw.{kind}"
    path.write_bytes(WRITERS[kind](pairs(encoding)).encode(encoding))
    source: dict[str, Any] = {"path": str(path), "name": "toy"}
    source["columns"] = {"query": "query", "positives": "positives"}
    data = {"folder": tmp_path / "data", "sources": [source], "on_error": on_error}
    with pytest.raises(DataError, match=r"add `encoding: ") as raised:
        prepare(DataConfig.model_validate(data), 0)
    line = str(raised.value)
    assert "on_error" not in line
    assert len(line) < 400
    named = line.split("`encoding: ")[1].split("`")[0]
    found = read(path, encoding=named, columns=source["columns"])
    assert [(r.query, *r.positives) for r in found] == [(*r.values(),) for r in pairs(encoding)]


def test_one_odd_line_is_one_bad_row(tmp_path: Path) -> None:
    """It says what the line reads as; the others are read, also those that share its quotes."""
    path = tmp_path / "raw.csv"
    rows = [f'"ask {n}\nmore","say {n}"\n'.encode() for n in range(30)]
    rows[3] = '"ask 3\ncafé","say 3"\n'.encode("cp1252")
    path.write_bytes(b"query,positives\n" + b"".join(rows))
    found = read(path, columns={"query": "query"})
    assert [r.query for r in found if not isinstance(r, DataError)] == [
        f"ask {n}\nmore" for n in range(30) if n != 3
    ]
    assert str(found[3]) == (
        f"{path}:9: not UTF-8 at byte 3 of the line; it can be decoded as cp1252 "
        '(\'café","say 3"\'): in the recipe, add `encoding: cp1252` to this entry of '
        "data.sources, provided that the whole file can"
    )


def test_words_that_are_no_encoding(tmp_path: Path) -> None:
    for word in ("utf-9", "rot13", "base64", "undefined"):
        with pytest.raises(ValueError, match="is not a text encoding; use utf-8, utf-16, gb18030"):
            SourceConfig(path="x", encoding=word)
    path = write_table(tmp_path, "parquet")
    with pytest.raises(ConfigError, match="encoding=cp1252: format parquet has its own"):
        find(SourceConfig(path=str(path), encoding="cp1252"))


def tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        file.addfile(tarfile.TarInfo("x"))
    return made.getvalue()


def archive() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("x", "y")
    return made.getvalue()


FOREIGN: dict[bytes, str] = {
    b"PAR1\x15\x04": "is a Parquet file; add `format: parquet` to this entry of data.sources",
    b"ARROW1\0\0": "is an Arrow file; add `format: arrow` to this entry of data.sources",
    archive(): "is a zip archive (or .xlsx, .docx, .npz); unpack it, or save a sheet as CSV",
    tar(): "is a tar archive; unpack it",
    b"BZh91AY": "is bzip2 data; decompress it; only gzip is read directly",
    b"%PDF-1.7\n": "is a PDF document; extract its text first",
    b"SQLite format 3\0": "is an SQLite database; export its table as CSV",
    b"\x80\x04\x95": "is a pickle, which could run code when it is opened; save it as JSON lines",
    b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer; fetch the file itself",
    b"\n <!DOCTYPE html>\n<p>": "is an HTML page, perhaps of an error or a login; fetch the file",
    b"<HTML><body>": "is an HTML page, perhaps of an error or a login; fetch the file itself",
    b'<?xml version="1.0"?>': "is an XML file; convert it to JSON lines",
    b"a,b\rc,d\r": "its lines end in a carriage return alone, as on old Macs; convert them",
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "text", "obo"])
@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    for raw in (content, gzip.compress(content)):
        (tmp_path / "raw").write_bytes(raw)
        with pytest.raises(DataError) as raised:
            read(tmp_path / "raw", format=kind)
        assert str(raised.value).startswith(f"{tmp_path / 'raw'}: {FOREIGN[content]}")


def test_parquet_and_arrow_name_what_they_got(tmp_path: Path) -> None:
    for kind in ("parquet", "arrow"):
        (tmp_path / "raw").write_bytes(b"<html>404")
        with pytest.raises(DataError, match=rf"raw: not readable as {kind} .*it is an HTML page"):
            read(tmp_path / "raw", format=kind)
    path = write_table(tmp_path, "parquet")
    with pytest.raises(DataError, match=r"it is a Parquet file; add `format: parquet`"):
        read(path, format="arrow")


ODD: dict[str, tuple[Any, str]] = {
    "a date after 9999": (lambda pa: pa.array([0, 2**62, 5], pa.timestamp("us")), "out of range"),
    "a day after 9999": (lambda pa: pa.array([0, 2**31 - 1, 5], pa.date32()), "magnitude"),
    "a duration": (lambda pa: pa.array([0, 2**62, 5], pa.duration("ms")), "large"),
    "no UTF-8": (
        lambda pa: pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string()),
        "codec can't decode byte 0xff",
    ),
    "inside a list": (
        lambda pa: pa.array([[0], [1, 2**62], None], pa.list_(pa.timestamp("us"))),
        "out of range",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_value_that_python_cannot_hold_is_one_bad_row(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    values, reason = ODD[name]
    table = pyarrow.table({"query": ["a", "b", "c"], "at": values(pyarrow)})
    path = tmp_path / "raw.parquet"
    pyarrow.parquet.write_table(table, path)
    before, bad, after = read(path, columns={"query": "query", "positives": "query"})
    assert [(r.query, r.id) for r in (before, after)] == [("a", "toy-1"), ("c", "toy-3")]
    line = str(bad)
    assert line.startswith(f"{path}: row 2: column 'at' holds no usable value (")
    assert reason in line


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path may have 107 bytes only
        listening.bind("socket")
        os.chdir(here)
        kinds = {
            str(tmp_path / "pipe"): "a pipe",
            str(tmp_path / "socket"): "a socket",
            "/dev/zero": "a device",
        }
        for path, kind in kinds.items():
            with pytest.raises(DataError, match=f"^{path}: is {kind}; data.sources.path must be"):
                find(SourceConfig(path=path))


def test_odd_ends_of_files(tmp_path: Path) -> None:
    """Nothing is lost silently: a file is read to its end, or said to be damaged."""
    path = tmp_path / "raw.jsonl.gz"
    whole = gzip.compress(b'{"query": "a", "positives": ["b"]}\n')
    for damaged in (whole + b"garbage", whole[:-9], whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read to its end"):
            read(path)
    path.write_bytes(whole + whole + b"\0\0")  # members in a row, and padding, as tar has it
    assert len(read(path)) == 2
    path.write_bytes(b"")
    assert read(path) == []
    for mark in (b"", codecs.BOM_UTF8):
        path.write_bytes(mark + b'{"query": "a", "positives": ["b"]}\r\n\r\n{"query": "c"}')
        good, bad = read(path)
        assert (good.query, good.positives) == ("a", ["b"])
        assert str(bad) == f"{path}:3: positives is empty; give at least one non-empty answer"


def test_odd_tables(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    columns = {"query": "q", "positives": "a"}
    path.write_bytes(codecs.BOM_UTF8 + b'"q","a"\r\n"x ""y"" z","b\r\nc"\r\n\r\nn\0l,d\r\n')
    assert [(r.query, *r.positives) for r in read(path, columns=columns)] == [
        ('x "y" z', "b\r\nc"),
        ("n\0l", "d"),
    ]
    path.write_text("q,a,q\n1,2,3\n")
    with pytest.raises(DataError, match=r"raw\.csv:1: the header names 'q' twice; rename one"):
        read(path, columns=columns)
    path.write_text("q,a\n")
    assert read(path, columns=columns) == []


def test_a_cell_beyond_the_limit_is_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbr_ds.corpora.formats.lines.MAX_LINE", 1000)
    monkeypatch.setattr("lbr_ds.corpora.formats.delimited.MAX_LINE", 1500)
    path = tmp_path / "raw.csv"
    long, lines = "x" * 1100, "y\n" * 1000
    path.write_text(f'q,a\nb,c\n{long},d\ne,f\n"{lines}",g\nh,i\n')
    found = read(path, columns={"query": "q", "positives": "a"})
    assert [r.query for r in found if not isinstance(r, DataError)] == ["b", "e"]
    first, *rest = [str(r) for r in found if isinstance(r, DataError)]
    assert first == f"{path}:3: longer than 0 MiB"
    assert rest[0].startswith(f"{path}:5-")
    assert "field larger than field limit" in rest[0]
    assert f"{path}:1005-1006: not CSV (unexpected end of data)" in rest[-1]  # it holds h
