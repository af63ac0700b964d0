"""Shards as files: plain WebDataset, reproducible, and every damage named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, Step, index, read_split, steps, verify
from tests.shards.toy import make_folder, make_records


def index_of(tar: Path) -> NDArray[np.int64]:
    with tar.open("rb") as file:
        return index.index_of(tar, file.fileno(), str(tar))


def scan(tar: Path) -> NDArray[np.int64]:
    with tar.open("rb") as file:
        return index.scan(file.fileno(), str(tar))


def by_id(record: Record) -> str:
    return record.id


def test_written_equals_read(shared_prepared: Path) -> None:
    found = sorted(read_split(shared_prepared, "gl"), key=by_id)
    assert found == sorted(make_records(103), key=by_id)
    assert found != list(read_split(shared_prepared, "gl"))  # shuffled


def test_plain_webdataset_reads_the_shards(shared_prepared: Path) -> None:
    from webdataset import WebDataset

    tars = [str(shared_prepared / s.file) for s in Manifest.load(shared_prepared).shards("gl")]
    found = list(WebDataset(tars, shardshuffle=False))
    records = [Record.from_dict(json.loads(one["json"]), one["__key__"]) for one in found]
    assert records == list(read_split(shared_prepared, "gl"))
    assert [one["__key__"] for one in found] == [f"{i:09d}" for i in range(103)]


def test_same_records_same_bytes(shared_prepared: Path, tmp_path: Path) -> None:
    again = make_folder(tmp_path / "again", 103, 40)
    for path in sorted(shared_prepared.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(shared_prepared)).read_bytes()


def test_members_carry_nothing_of_the_machine(shared_prepared: Path) -> None:
    with tarfile.open(shared_prepared / "gl" / "00000.tar") as tar:
        for member in tar:
            owner = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert owner == (0, 0, 0, "", "", 0o644)


def test_scan_equals_tarfile(tmp_path: Path) -> None:
    """Also on a tar of other hands: folders, long names, pax headers, other members."""
    path = tmp_path / "a.tar"
    (tmp_path / "x.json").write_text("{}" * 700)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "x.json", "a.json")
        tar.add(tmp_path / "x.json", "a.txt")
        tar.add(tmp_path / "x.json", "\u00e9/b.json")
        tar.add(tmp_path, "folder.json", recursive=False)
    with tarfile.open(path) as tar:
        wanted = [(m.offset_data, m.size) for m in tar if m.isfile() and m.name.endswith(".json")]
    assert scan(path).tolist() == [list(span) for span in wanted]


def test_index_is_rebuilt_when_missing_stale_or_damaged(prepared: Path) -> None:
    tar = prepared / "gl" / "00000.tar"
    kept = tar.with_suffix(".idx")
    right, raw = index_of(tar), kept.read_bytes()
    assert np.array_equal(right, scan(tar))
    for damage in (None, b"", b"short", raw[:-1], raw[:24] + b"\xff" * (len(raw) - 24)):
        kept.unlink() if damage is None else kept.write_bytes(damage)
        assert np.array_equal(index_of(tar), right)
        assert kept.read_bytes() == raw
    # A newer tar of the same length with the records elsewhere in it.
    shutil.copy(prepared / "gl" / "00001.tar", tar)
    tar.write_bytes(tar.read_bytes())
    later = kept.stat().st_mtime + 5
    os.utime(tar, (later, later))
    assert np.array_equal(index_of(tar), scan(prepared / "gl" / "00001.tar"))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest.json; run `lbr-ds prepare`"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest"),
        ('{"version": 0}', "version 0, not 1"),
        ('{"version": 1}', "not a manifest"),
    ],
)
def test_bad_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest.json: {message}.*lbr-ds prepare"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("file", ["../gl/00000.tar", "/etc/passwd", "pipe:ls", "gl/00000.tar\n"])
def test_manifest_names_only_its_own_shards(prepared: Path, file: str) -> None:
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["gl"]["shards"][0]["file"] = file
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"manifest.json: not a shard"):
        Manifest.load(prepared)


def stream(folder: Path, on_error: str = "strict") -> list[Step]:
    pipe = steps(folder, "gl", seed=0, samples_per_step=4, rank=0, world=1, stop=26,
                 on_error=on_error)  # type: ignore[arg-type]  # fmt: skip
    return list(pipe)


@pytest.mark.parametrize("read", [stream, lambda f: list(read_split(f, "gl")), verify])
def test_missing_and_truncated_shards(prepared: Path, read) -> None:  # type: ignore[no-untyped-def]
    tar = prepared / "gl" / "00001.tar"
    raw = tar.read_bytes()
    tar.write_bytes(raw[:-700])
    expected = rf"00001.tar: truncated, {len(raw) - 700} bytes and not the manifest's {len(raw)}; "
    with pytest.raises(DataError, match=expected + "copy the file again or run"):
        read(prepared)
    tar.unlink()
    with pytest.raises(DataError, match=r"00001.tar: .*(missing; run|cannot open)"):
        read(prepared)


def test_shard_lost_while_reading_ends_the_run_in_both_modes(prepared: Path) -> None:
    for on_error in ("strict", "skip"):
        pipe = steps(prepared, "gl", seed=0, samples_per_step=4, rank=0, world=1, stop=26,
                     on_error=on_error)  # fmt: skip
        (prepared / "gl" / "00002.tar").rename(prepared / "gone")
        with pytest.raises(DataError, match=r"00002.tar: cannot open this shard"):
            list(pipe)
        (prepared / "gone").rename(prepared / "gl" / "00002.tar")


def test_wrong_number_of_records(prepared: Path) -> None:
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["gl"]["shards"][0]["records"] = 39
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="holds 40 records and not the manifest's 39"):
        list(read_split(prepared, "gl"))


def test_verify_finds_one_flipped_bit(prepared: Path) -> None:
    assert verify(prepared).records("gl") == 103
    flip(prepared / "gl" / "00002.tar", 600)
    with pytest.raises(DataError, match=r"00002.tar: altered, sha256 .* copy the file again"):
        verify(prepared)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def spoil(folder: Path, record: int) -> str:
    """Break the JSON of one record of shard 1; returns its id."""
    tar = folder / "gl" / "00001.tar"
    offset, size = index_of(tar)[record].tolist()
    name: str = json.loads(tar.read_bytes()[offset : offset + size])["id"]
    flip(tar, offset)
    return name


def test_strict_names_shard_and_offset(prepared: Path) -> None:
    spoil(prepared, 7)
    offset = int(index_of(prepared / "gl" / "00001.tar")[7][0])
    where = rf"00001.tar: record 7 at byte {offset}: not JSON"
    with pytest.raises(DataError, match=where):
        list(read_split(prepared, "gl"))
    with pytest.raises(DataError, match=where + r".*prepare.*data.on_error=skip"):
        stream(prepared)


def test_skip_takes_the_next_of_the_block_and_counts(prepared: Path) -> None:
    whole = stream(prepared)
    bad = {spoil(prepared, 7), spoil(prepared, 8)}
    turns = [[step.samples[lane].record.id for step in whole] for lane in range(4)]
    turns[0].pop()  # 103 records, 4 lanes: the first has 25 of them, the others 26
    total = 0
    for step in stream(prepared, "skip")[:25]:
        skipped = 0
        for lane, sample in enumerate(step.samples):
            turn = step.index
            while turns[lane][turn] in bad:
                turn, skipped = (turn + 1) % len(turns[lane]), skipped + 1
            assert (sample.lane, sample.epoch) == (lane, 0)
            assert sample.record.id == turns[lane][turn]
        assert step.skipped == skipped
        total += skipped
    assert total >= 2


def test_skip_with_nothing_readable(prepared: Path) -> None:
    for number in range(3):
        tar = prepared / "gl" / f"{number:05d}.tar"
        for offset, _ in index_of(tar).tolist():
            flip(tar, offset)
    with pytest.raises(DataError, match=r"not JSON.*so are all 25 records of its block"):
        stream(prepared, "skip")


def test_no_torch_at_import() -> None:
    code = "import sys, lbr_ds.shards, lbr_ds.corpora.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
