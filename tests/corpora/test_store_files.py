"""Numbered values equal a list's, in any process."""

from __future__ import annotations

import pickle
from pathlib import Path

from lbr_ds.corpora.store_files import ValueReader, Values


def test_values_are_a_list(tmp_path: Path) -> None:
    every = [b"one", b"", b"three" * 1000, b"4"]
    for _ in range(2):  # of an interrupted run nothing is left
        values = Values(tmp_path / "bodies")
        values.add(every[:1])
        values.add([])
        values.add(every[1:])
        values.close()
    read = ValueReader(tmp_path / "bodies")
    for reader in (read, pickle.loads(pickle.dumps(read))):
        assert [reader(number) for number in range(4)] == every
        reader.close()
    assert (tmp_path / "bodies").read_bytes() == b"".join(every)
