"""Shards as files: plain WebDataset, reproducible, and every damage named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, Sample, Step, index, read_split, steps, verify
from lbr_ds.shards.reader import Tars
from tests.shards.toy import make_folder, make_records
from tests.tiny import edit_manifest


def sha256_of(tar: Path) -> str:
    """As the manifest beside the tar's folder says."""
    shards = Manifest.load(tar.parent.parent).shards(tar.parent.name)
    return next(s.sha256 for s in shards if s.file.endswith(tar.name))


def index_of(tar: Path) -> index.Index:
    with tar.open("rb") as file:
        return index.index_of(tar, file.fileno(), str(tar), sha256_of(tar))


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


def test_index_is_rebuilt_when_missing_foreign_or_damaged(prepared: Path) -> None:
    tar = prepared / "gl" / "00000.tar"
    kept = tar.with_suffix(".idx")
    right, raw = index_of(tar), kept.read_bytes()
    assert np.array_equal(right.spans, scan(tar))
    sums = [zlib.crc32(tar.read_bytes()[a : a + n]) for a, n in right.spans.tolist()]
    assert right.checksums.tolist() == sums
    foreign = (prepared / "gl" / "00001.idx").read_bytes()
    for damage in (None, b"", b"short", raw[:-1], raw[:56] + b"\xff" * (len(raw) - 56), foreign):
        kept.unlink() if damage is None else kept.write_bytes(damage)
        found = index_of(tar)
        assert np.array_equal(found.spans, right.spans)
        assert found.checksums.tolist() == sums
        assert kept.read_bytes() == raw
    # No index is made from a tar that is not the manifest's, nor is one of before trusted blindly.
    kept.unlink()
    shutil.copy(prepared / "gl" / "00001.tar", tar)
    with pytest.raises(DataError, match=r"00000.tar: altered: its sha256 .* no .idx file"):
        index_of(tar)
    assert not kept.exists()


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest.json; run `lbr-ds prepare`"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest"),
        ('{"version": 0}', "version 0, not 3"),
        ('{"version": 3}', r"not a manifest \(program: Field required\)"),
        ('{"version": 1' + "0" * 5000 + "}", "not JSON"),
    ],
)
def test_bad_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest.json: {message}.*lbr-ds prepare"):
        Manifest.load(tmp_path)


GL = ("splits", "gl")
FIRST = (*GL, "shards", 0)
EDITS: list[tuple[tuple[str | int, ...], Any]] = [
    (("splits",), []),
    (GL, None),
    (GL, []),
    ((*GL, "shards"), []),
    ((*GL, "shards"), {}),
    ((*GL, "records"), 102),
    ((*GL, "records"), "103"),
    (FIRST, {}),
    (FIRST, "gl/00000.tar"),
    ((*FIRST, "file"), 3),
    ((*FIRST, "file"), "gl/00001.tar"),
    ((*FIRST, "records"), True),
    ((*FIRST, "records"), 40.0),
    ((*FIRST, "records"), -1),
    ((*FIRST, "bytes"), "9"),
    ((*FIRST, "sha256"), None),
    (("seed",), None),
    (("sources",), {}),
    (("sources",), [3]),
    (("fingerprint",), 3),
    (("program",), []),
    (("version",), "2"),
    (("instructions",), []),
    (("instructions",), {"rows": 3}),
    (("splits", "../x"), {"records": 0, "shards": []}),
]


# These could be another manifest's: only its own hash tells.
POSSIBLE: list[tuple[tuple[str | int, ...], Any]] = [
    (("splits",), {}),
    ((*FIRST, "bytes"), 2**70),
    ((*FIRST, "sha256"), "0" * 64),
    (("seed",), 6),
    (("sha256",), "0" * 64),
    (("fingerprint",), ""),
]


def edited(raw: Any, place: tuple[str | int, ...], value: Any) -> None:
    for name in place[:-1]:
        raw = raw[name]
    raw[place[-1]] = value


@pytest.mark.parametrize(("place", "value"), EDITS + POSSIBLE, ids=str)
def test_an_edited_manifest_is_one_line(
    prepared: Path, place: tuple[str | int, ...], value: Any
) -> None:
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    edited(raw, place, value)
    path.write_text(json.dumps(raw))
    if (place, value) in EDITS:
        edit_manifest(prepared, lambda raw: None)  # even when its own hash fits
    with pytest.raises(DataError, match=r"manifest\.json: .*prepare` again$") as caught:
        Manifest.load(prepared)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_left_the_manifest_is_missed(prepared: Path, number: int) -> None:
    """Even when the count of records was corrected."""
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    split = raw["splits"]["gl"]
    gone = split["shards"].pop(number)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="split gl has 103 records and its shards"):
        Manifest.load(prepared)
    split["records"] -= gone["records"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="has been changed since it was written"):
        Manifest.load(prepared)


@pytest.mark.parametrize("file", ["../gl/00000.tar", "/etc/passwd", "pipe:ls", "gl/00000.tar\n"])
def test_manifest_names_only_its_own_shards(prepared: Path, file: str) -> None:
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["gl"]["shards"][0]["file"] = file
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"manifest.json: not a shard"):
        Manifest.load(prepared)


def stream(folder: Path, on_error: str = "strict") -> list[Step]:
    pipe = steps(
        folder, "gl", seed=0, samples_per_step=4, rank=0, world=1, stop=26, on_error=on_error
    )  # type: ignore[arg-type]
    return list(pipe)


@pytest.mark.parametrize("read", [stream, lambda f: list(read_split(f, "gl")), verify])
def test_missing_and_truncated_shards(prepared: Path, read) -> None:  # type: ignore[no-untyped-def]
    tar = prepared / "gl" / "00001.tar"
    raw = tar.read_bytes()
    tar.write_bytes(raw[:-700])
    expected = rf"00001.tar: truncated: {len(raw) - 700} bytes, but the manifest lists {len(raw)}; "
    with pytest.raises(DataError, match=expected + "copy the file again or run"):
        read(prepared)
    tar.unlink()
    with pytest.raises(DataError, match=r"00001.tar: .*(missing; run|cannot open)"):
        read(prepared)


def test_shard_lost_while_reading_ends_a_strict_run(prepared: Path) -> None:
    pipe = steps(prepared, "gl", seed=0, samples_per_step=4, rank=0, world=1, stop=26)
    (prepared / "gl" / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"00002.tar: cannot open this shard .*on_error=skip"):
        list(pipe)


def test_wrong_number_of_records(prepared: Path) -> None:

    def change(raw: dict[str, Any]) -> None:
        raw["splits"]["gl"]["shards"][0]["records"] = 39
        raw["splits"]["gl"]["records"] = 102

    edit_manifest(prepared, change)
    with pytest.raises(DataError, match="contains 40 records, but the manifest lists 39"):
        list(read_split(prepared, "gl"))


def test_verify_finds_one_flipped_bit(prepared: Path) -> None:
    assert verify(prepared).records("gl") == 103
    flip(prepared / "gl" / "00002.tar", 600)
    with pytest.raises(DataError, match=r"00002.tar: altered: its sha256 .* copy the file again"):
        verify(prepared)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def ids_of(folder: Path, rows: range, shard: int = 1) -> set[str]:
    """The ids of these records of a shard."""
    tar = folder / "gl" / f"{shard:05d}.tar"
    raw = tar.read_bytes()
    spans = index_of(tar).spans[rows.start : rows.stop].tolist()
    return {json.loads(raw[offset : offset + size])["id"] for offset, size in spans}


def offset_of(folder: Path, row: int) -> int:
    return int(index_of(folder / "gl" / "00001.tar").spans[row][0])


# Each damages shard 1 (40 records) and returns the ids that cannot be read any more, and the words
# of a strict run.


def flip_in_a_text(folder: Path) -> tuple[set[str], str]:
    """Still JSON: only the checksum shows it."""
    bad, offset = ids_of(folder, range(7, 8)), offset_of(folder, 7)
    tar = folder / "gl" / "00001.tar"
    flip(tar, tar.read_bytes().index(b"what", offset))
    return bad, f"00001.tar: record 7 at byte {offset}: altered"


def break_json(folder: Path) -> tuple[set[str], str]:
    """Broken before the manifest was written, as a tar of other hands may be."""
    bad, offset = ids_of(folder, range(7, 8)), offset_of(folder, 7)
    tar = folder / "gl" / "00001.tar"
    flip(tar, offset)
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    edit_manifest(folder, lambda raw: raw["splits"]["gl"]["shards"][1].update(sha256=digest))
    return bad, f"00001.tar: record 7 at byte {offset}: not JSON"


def swap_members(folder: Path) -> tuple[set[str], str]:
    """Two members of one length change places: out of order, and every byte of them sound."""
    tar = folder / "gl" / "00001.tar"
    spans, raw = index_of(tar).spans.tolist(), bytearray(tar.read_bytes())
    first, second = next((a, b) for b in range(40) for a in range(b) if spans[a][1] == spans[b][1])
    blocks = [slice(spans[i][0] - 512, spans[i][0] + spans[i][1]) for i in (first, second)]
    bad = ids_of(folder, range(first, first + 1)) | ids_of(folder, range(second, second + 1))
    raw[blocks[0]], raw[blocks[1]] = raw[blocks[1]], raw[blocks[0]]
    tar.write_bytes(raw)
    return bad, "00001.tar: record "


def cut_tar(folder: Path) -> tuple[set[str], str]:
    bad = ids_of(folder, range(30, 40))
    tar = folder / "gl" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: offset_of(folder, 30) + 5])
    return bad, "00001.tar: truncated"


def cut_tar_without_index(folder: Path) -> tuple[set[str], str]:
    bad = ids_of(folder, range(40))
    cut_tar(folder)
    (folder / "gl" / "00001.idx").unlink()
    return bad, "00001.tar: truncated"


def remove_tar(folder: Path) -> tuple[set[str], str]:
    bad = ids_of(folder, range(40))
    (folder / "gl" / "00001.tar").unlink()
    return bad, "00001.tar: the manifest names this shard and it is missing"


DAMAGES = [flip_in_a_text, break_json, swap_members, cut_tar, cut_tar_without_index, remove_tar]


@pytest.mark.parametrize("damage", DAMAGES)
def test_strict_names_the_place_and_skip_counts_exactly(
    prepared: Path, damage: Callable[[Path], tuple[set[str], str]]
) -> None:
    whole = stream(prepared)
    bad, words = damage(prepared)
    with pytest.raises(DataError, match=re.escape(words)):
        stream(prepared)
    ranks = [
        list(
            steps(
                prepared,
                "gl",
                seed=0,
                samples_per_step=4,
                rank=rank,
                world=2,
                stop=26,
                on_error="skip",
            )
        )
        for rank in range(2)
    ]
    found = stream(prepared, "skip")
    for step, own, *parts in zip(whole, found, *ranks, strict=True):
        turns = [(s.lane, s.epoch, s.record.id) for s in step.samples]
        seen = [(s.lane, s.epoch, s.record.id) for s in own.samples]
        assert own.skipped == sum(name in bad for *_, name in turns)
        for turn, got in zip(turns, seen, strict=True):
            assert got[:2] == turn[:2]
            assert got[2] not in bad
            assert got == turn or turn[2] in bad  # nobody else's sample changes
        # Ranks find the same stand-ins.
        assert sorted((s for part in parts for s in part.samples), key=by_lane) == own.samples
        assert sum(part.skipped for part in parts) == own.skipped
    everything = {s.record.id for step in whole for s in step.samples}
    assert bad <= everything
    assert sum(step.skipped for step in found) >= len(bad)


def by_lane(sample: Sample) -> int:
    return sample.lane


def test_samples_carry_their_place(prepared: Path) -> None:
    tars = Tars(Manifest.load(prepared), "gl")
    for step in stream(prepared):
        for sample in step.samples:
            raw = json.loads(tars.read(sample.shard, sample.row))
            assert raw["id"] == sample.record.id


def test_skip_with_nothing_readable(prepared: Path) -> None:
    for number in range(3):
        (prepared / "gl" / f"{number:05d}.tar").unlink()
    with pytest.raises(DataError, match=r"cannot open.*no replacement for it can be read"):
        stream(prepared, "skip")


def test_no_torch_at_import() -> None:
    code = "import sys, lbr_ds.shards, lbr_ds.corpora.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
