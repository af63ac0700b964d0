"""A source in pieces gives the rows of the source: the same places, ids, records and errors."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import interface, lines
from lbr_ds.corpora.sources import Corpus, find
from lbr_ds.errors import DataError

WHOLE = 1 << 30


def found(path: Path, **fields: Any) -> Corpus:
    return find(SourceConfig.model_validate({"path": str(path), "name": "toy", **fields}))


def plain(outcomes: Any) -> list[tuple[str, str]]:
    """Outcomes by what can be compared: the record as JSON, or the error."""
    return [
        (where, str(one) if isinstance(one, DataError) else one.to_json())
        for where, one in outcomes
    ]


def in_pieces(corpus: Corpus) -> tuple[int, list[tuple[str, str]]]:
    """The number of pieces, and their outcomes: read backwards, by a copy of the corpus."""
    _ = corpus.form
    copies = [pickle.loads(pickle.dumps((corpus, piece))) for piece in corpus.pieces()]
    read = {piece.number: plain(copy.read(piece)) for copy, piece in reversed(copies)}
    return len(copies), [one for number in sorted(read) for one in read[number]]


def odd_lines() -> bytes:
    """Lines of 20 to 300 bytes, some of them blank, broken or in another encoding."""
    made = [b"\xef\xbb\xbf"]
    for number in range(60):
        row = json.dumps({"text": f"text {number} " + "\u00e9\u4e2d" * number}, ensure_ascii=False)
        made.append(row.encode() + (b"\r\n" if number % 7 == 1 else b"\n"))
        made.append({3: b"\n", 11: b"{broken\n", 17: b"   \n\n"}.get(number % 20, b""))
    return b"".join(made) + b'{"text": "the last line has no end"}'


@pytest.mark.parametrize("size", [1, 64, 100, 1000, 1 << 20])
@pytest.mark.parametrize("longest", [90, 1 << 26])
def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, longest: int) -> None:
    """Also with lines that are too long and cover several pieces."""
    path = tmp_path / "raw.jsonl"
    path.write_bytes(odd_lines())
    monkeypatch.setattr(lines, "MAX_LINE", longest)
    raws = odd_lines().decode("utf-8-sig").split("\n")
    given = {f"toy-{n}": json.loads(raw)["text"] for n, raw in enumerate(raws, 1) if "text" in raw}
    short = {f"toy-{n}" for n, raw in enumerate(raws, 1) if len(raw.encode()) < longest - 3}
    monkeypatch.setattr(interface, "PIECE_BYTES", WHOLE)
    whole = plain(found(path).read())
    records = {
        json.loads(text)["id"]: json.loads(text)["text"] for _, text in whole if text[0] == "{"
    }
    assert records == {name: text for name, text in given.items() if name in short}
    monkeypatch.setattr(interface, "PIECE_BYTES", size)
    count, read = in_pieces(found(path))
    assert read == whole == plain(found(path).read())
    assert count == len(raws) if size == 1 else count == 1 if size == 1 << 20 else count > 5


def test_pieces_cover_a_file_and_end_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(odd_lines())
    monkeypatch.setattr(interface, "PIECE_BYTES", 100)
    raw, pieces = odd_lines(), list(found(path).pieces())
    assert b"".join(raw[piece.begin : piece.end] for piece in pieces) == raw
    assert [piece.rows for piece in pieces] == [raw[: p.begin].count(b"\n") for p in pieces]
    assert all(raw[piece.begin : piece.end].endswith(b"\n") for piece in pieces[:-1])
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert sum(piece.length for piece in pieces) == len(raw) == found(path).size


def test_a_folder_of_several_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zipped, an array, UTF-16 text, an empty file and a damaged one are one piece each."""
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = [{"text": f"text {number}"} for number in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(b"")
    (folder / "b.jsonl").write_bytes(text)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "d.json").write_text(json.dumps(rows, indent=1))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(text)[:-30])
    (folder / "f.jsonl").write_bytes(text)
    monkeypatch.setattr(interface, "PIECE_BYTES", WHOLE)
    whole = plain(found(folder).read())
    assert sum(text[0] == "{" for _, text in whole) >= 4 * 40
    assert [where for where, text in whole if text[0] != "{"] == [str(folder / "e.jsonl.gz")]
    monkeypatch.setattr(interface, "PIECE_BYTES", 200)
    count, read = in_pieces(found(folder))
    assert read == whole
    assert count == 3 + 2 * len(list(found(folder / "b.jsonl").pieces()))


def test_text_of_two_bytes_is_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_text('{"text": "\u0a0a"}\n' * 20, encoding="utf-16")
    monkeypatch.setattr(interface, "PIECE_BYTES", 50)
    count, read = in_pieces(found(path, encoding="utf-16"))
    assert (count, len(read)) == (1, 20)


def test_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a damaged row group the rest is lost, and all others are read."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "parts"
    folder.mkdir()
    for name in "abc":
        rows = [{"text": f"{name} {number} " + "x" * number} for number in range(100)]
        table = pyarrow.Table.from_pylist(rows)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=9, **options)
    raw = (folder / "b.parquet").read_bytes()
    group = pyarrow.parquet.read_metadata(folder / "b.parquet").row_group(5).column(0)
    start = group.data_page_offset
    bad = (
        raw[:start]
        + bytes(group.total_compressed_size)
        + raw[start:][group.total_compressed_size :]
    )
    (folder / "b.parquet").write_bytes(bad)
    (folder / "c.parquet").write_bytes((folder / "c.parquet").read_bytes()[:-50])
    monkeypatch.setattr(interface, "PIECE_BYTES", 1)
    count, read = in_pieces(found(folder))
    assert count == 12 + 12 + 1
    wanted = [
        *((f"a.parquet: row {n}", f"toy-a-{n}") for n in range(1, 101)),
        *((f"b.parquet: row {n}", f"toy-b-{n}") for n in (*range(1, 46), *range(55, 101))),
    ]
    records = [(where, json.loads(text)) for where, text in read if text[0] == "{"]
    assert [(Path(where).name, one["id"]) for where, one in records] == wanted
    lost = [(Path(where).name, text) for where, text in read if text[0] != "{"]
    assert [name for name, _ in lost] == ["b.parquet", "c.parquet"]
    assert "not readable as parquet after row 45" in lost[0][1]
    assert "not readable as parquet after row 0" in lost[1][1]
    monkeypatch.setattr(interface, "PIECE_BYTES", 700)
    few, same = in_pieces(found(folder / "a.parquet"))
    assert 1 < few < 12
    assert [where for where, _ in same] == [where for where, _ in read[:100]]


def test_the_first_rows_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_records` counts from the first; a missing column stops at the first row only."""
    path = tmp_path / "raw.jsonl"
    path.write_bytes(odd_lines())
    monkeypatch.setattr(interface, "PIECE_BYTES", 200)
    whole = plain(found(path).read())
    for limit in (1, 7, 1000):
        assert in_pieces(found(path, max_records=limit)) == (1, whole[:limit])
    corpus = found(path, columns={"text": "body"}, shape="passages")
    first, second, *_ = corpus.pieces()
    with pytest.raises(DataError, match="no column 'body'"):
        list(corpus.read(first))
    faults = plain(corpus.read(second))
    assert faults
    assert all("no column 'body'" in text or "not JSON" in text for _, text in faults)
