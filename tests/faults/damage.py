"""Damaged shards in a small run: strict names the place, skip counts exactly and continues."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_ds.errors import DataError
from tests.faults.injected import Outcome, Scene
from tests.tiny import edit_manifest

_SHARD = "gl/00001.tar"
_STEPS = 25  # more than an epoch: every record is drawn at least once
Damage = Callable[[Path], set[str]]  # damages a tar, returns the ids of the lost records


def data_faults(scene: Scene) -> list[Outcome]:
    """Each kind of damage to one shard, under `strict` and under `skip`."""
    clean = scene.train("clean", _STEPS)
    drawn = _drawn(scene.folder / "clean")
    data = scene.recipe.parent / "data"
    found = [scene.outcome("no damage (control)", clean, clean.codes == [0, 0])]
    for kind, damage, words in (
        ("truncated tar", truncate, ("truncated",)),
        ("flipped bits", flip, ("altered", "at byte")),
        ("missing shard", remove, ()),
        ("member out of order", swap, ("altered", "at byte")),
        ("broken JSON", break_json, ("not JSON", "at byte")),
    ):
        folder = scene.folder / "data" / kind.replace(" ", "-")
        shutil.copytree(data, folder)
        lost = damage(folder / _SHARD)
        name = str(folder / _SHARD)
        for rule in ("strict", "skip"):
            fault = f"{kind}, {rule}"
            ended = scene.train(
                fault.replace(", ", "-").replace(" ", "-"),
                _STEPS,
                f"data.folder={folder}",
                f"data.on_error={rule}",
            )
            if rule == "strict":
                right = set(ended.codes) == {DataError.exit_code}
                found.append(scene.outcome(fault, ended, right, name, *words))
                continue
            wanted = sum(sample in lost for sample in drawn)
            right = ended.codes == [0, 0] and _skipped(ended.metrics()) == (wanted, wanted)
            found.append(scene.outcome(fault, ended, right and wanted > 0, "skipped: ", name))
    return found[1:] if found[0].named else found


def _drawn(notes: Path) -> list[str]:
    """The ids of all samples that the ranks drew."""
    lines = [line for path in notes.glob("samples-*.jsonl") for line in path.open()]
    return [sample for line in lines for sample in json.loads(line)[1].values()]


def _skipped(metrics: list[dict[str, float]]) -> tuple[float, float]:
    """Samples skipped: the steps' counts added up, and the count kept over the stage."""
    return sum(line["skipped"] for line in metrics), metrics[-1]["skipped_samples"]


def _members(tar: Path) -> list[tuple[tarfile.TarInfo, bytes, str]]:
    """Each record: its header, its bytes, its id."""
    with tarfile.open(tar) as opened:
        files = [(info, opened.extractfile(info)) for info in opened if info.isfile()]
        pairs = [(info, file.read()) for info, file in files if file is not None]
    return [
        (info, data, json.loads(data)["id"]) for info, data in pairs if info.name.endswith(".json")
    ]


def truncate(tar: Path) -> set[str]:
    """Cut off the last third."""
    length = tar.stat().st_size * 2 // 3
    lost = {i for info, data, i in _members(tar) if info.offset_data + len(data) > length}
    os.truncate(tar, length)
    return lost


def flip(tar: Path) -> set[str]:
    """Flip two bits of one record, so that it is JSON still."""
    info, data, record = _members(tar)[5]
    place = data.index(b"positives") - 10
    raw = bytearray(tar.read_bytes())
    raw[info.offset_data + place] ^= 0x01
    raw[info.offset_data + place + 1] ^= 0x01
    tar.write_bytes(raw)
    return {record}


def remove(tar: Path) -> set[str]:
    """Delete the shard."""
    lost = {record for _, _, record in _members(tar)}
    tar.unlink()
    return lost


def swap(tar: Path) -> set[str]:
    """Swap two neighbouring records with their headers."""
    (a, _, i), (b, y, j) = _members(tar)[10:12]
    end = b.offset_data + -(-len(y) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    raw = tar.read_bytes()
    first, second = raw[a.offset : b.offset], raw[b.offset : end]
    assert len(first) == len(second)
    tar.write_bytes(raw[: a.offset] + second + first + raw[end:])
    return {i, j}


def break_json(tar: Path) -> set[str]:
    """Make one record invalid JSON, with a manifest and index that agree, as if written so."""
    members = _members(tar)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for number, (info, data, _) in enumerate(members):
            body = data if number != 7 else data[:-1] + b","
            opened.addfile(info, io.BytesIO(body))
    tar.with_suffix(".idx").unlink(missing_ok=True)
    raw = tar.read_bytes()
    facts = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    def list_anew(manifest: dict[str, Any]) -> None:
        for shard in manifest["splits"]["gl"]["shards"]:
            if shard["file"] == _SHARD:
                shard |= facts

    edit_manifest(tar.parent.parent, list_anew)
    return {members[7][2]}
