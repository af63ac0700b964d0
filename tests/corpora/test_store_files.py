"""Numbered values equal a list's; what was not committed is cut off."""

from __future__ import annotations

import pickle
from pathlib import Path

from lbr_ds.corpora.store_files import ValueReader, Values


def test_values_are_a_list(tmp_path: Path) -> None:
    every = [b"one", b"", b"three" * 1000, b"4"]
    values = Values(tmp_path / "bodies", 0)
    values.add(every[:1])
    values.add([])
    values.add(every[1:])
    values.flush()
    read = ValueReader(tmp_path / "bodies")
    for reader in (read, pickle.loads(pickle.dumps(read))):
        assert [reader(number) for number in range(4)] == every
        reader.close()
    values.close()
    cut = Values(tmp_path / "bodies", 2)
    cut.add([b"later"])
    cut.close()
    Values(tmp_path / "bodies").close()  # all count
    assert [read(number) for number in range(3)] == [b"one", b"", b"later"]
    read.close()
    assert (tmp_path / "bodies").read_bytes() == b"onelater"
