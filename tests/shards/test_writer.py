"""Writing shards: the bytes of webdataset's writer, by any number of processes, resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from webdataset import TarWriter

from lbr_ds.records import Record
from lbr_ds.shards import ShardFile, index, writer
from lbr_ds.system import process_pool
from tests.shards.toy import make_records


def written(folder: Path, records: Sequence[Record], *, resume: bool = False) -> list[ShardFile]:
    return writer.write_split(
        folder, "gl", records, seed=5, records_per_shard=16, resume=resume, progress=no_more
    )


def no_more(part: str, done: int, total: int | None) -> None:
    assert total is not None
    assert done <= total


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "gl").iterdir()}


def test_the_bytes_of_webdatasets_writer(tmp_path: Path) -> None:
    """Members of 0 to 1023 bytes beyond a block, and one longer than tarfile's copy buffer."""
    records = [Record(id=f"{n}", source="s", text="x" * (1 + n)) for n in range(1100)]
    records.append(Record(id="long", source="s", text="\u00e9" * 70_000))
    made, sha256 = writer._write_tar(tmp_path / "ours.tar", 7, records)
    with (tmp_path / "theirs.tar").open("wb") as file:
        theirs = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
        for key, record in enumerate(records, 7):
            theirs.write({"__key__": f"{key:09d}", "json": record.to_json().encode()})
        theirs.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert sha256 == writer.file_sha256(tmp_path / "theirs.tar")
    with (tmp_path / "theirs.tar").open("rb") as file:
        read = index.make(file.fileno(), "theirs.tar")
    assert (made.spans == read.spans).all()
    assert (made.checksums == read.checksums).all()


@pytest.mark.slow
def test_same_bytes_by_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(103)
    alone = written(tmp_path / "alone", records)
    monkeypatch.setattr(writer, "_RECORDS_ALONE", 0)
    for number in (1, 2, 3):
        monkeypatch.setattr(process_pool, "cores", lambda number=number: number)
        assert written(tmp_path / f"by{number}", records) == alone
        assert content(tmp_path / f"by{number}") == content(tmp_path / "alone")


def test_resumed_after_the_shards_that_are_complete(tmp_path: Path) -> None:
    """Of five, one is kept; one has no index, one other bytes, two are missing."""
    records = make_records(80)
    whole = written(tmp_path / "whole", records)
    written(tmp_path / "cut", records)
    folder = tmp_path / "cut" / "gl"
    (folder / "00001.idx").unlink()
    (folder / "00001.tar").write_bytes(b"half of a shard")
    (folder / "00002.tar").write_bytes(b"never reached the disk")
    for number in (3, 4):
        (folder / f"0000{number}.tar").unlink()
        (folder / f"0000{number}.idx").unlink()
    kept = (folder / "00000.tar").stat()
    with pytest.raises(FileExistsError):
        written(tmp_path / "cut", records)
    assert written(tmp_path / "cut", records, resume=True) == whole
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert (folder / "00000.tar").stat().st_mtime_ns == kept.st_mtime_ns
