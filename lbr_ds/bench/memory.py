"""A prepared folder -> the peak memory of preparing its records once and many times over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from lbr_ds.config import SPLITS
from lbr_ds.errors import LbrError
from lbr_ds.records import Record
from lbr_ds.shards import read_split

# The peak of all children is kept by the kernel; a process of its own has no others.
_PROBE = """
import resource, subprocess, sys
command = [sys.executable, "-m", "lbr_ds", "prepare", *sys.argv[1:]]
done = subprocess.run(command, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.stderr.buffer.write(done.stderr)
sys.exit(done.returncode)
"""


def peak_memory_ratio(data: Path, times: int) -> tuple[float, dict[str, float]]:
    """Peak memory on `times` copies of the records, all texts distinct, over that on one.

    Returns the ratio and {"records", "small_mib", "large_mib"}. Raises LbrError when a prepare
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        peaks = [_peak(data, Path(folder) / str(copies), copies) for copies in (1, times)]
    records = sum(1 for split in SPLITS for _ in read_split(data, split))
    return peaks[1] / peaks[0], {
        "records": records, "small_mib": peaks[0], "large_mib": peaks[1],
    }  # fmt: skip


def _peak(data: Path, folder: Path, copies: int) -> float:
    """MiB of `lbr-ds prepare` on so many copies."""
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for number in range(copies):
            for split in SPLITS:
                for record in read_split(data, split):
                    file.write(_copy(record, number).to_json() + "\n")
    words = ["demo", f"data.folder={folder / 'data'}",
             f"data.sources={json.dumps([{'path': str(corpus), 'name': 'copies'}])}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LbrError(f"prepare of {copies} copies failed: {reason}")
    return int(done.stdout) / 1024  # Linux counts in KiB


def _copy(record: Record, number: int) -> Record:
    """The same record with an id, a group and texts of its own."""

    def own(text: str) -> str:
        return f"{text} {number}" if number and text else text

    return replace(
        record, id=own(record.id), group=own(record.group), query=own(record.query),
        text=own(record.text), positives=[own(text) for text in record.positives],
        negatives=[own(text) for text in record.negatives],
    )  # fmt: skip
