"""Hashes of two datasets united block by block: the same as in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.corpora.curate import trained_texts
from lbr_ds.corpora.curate.trained_texts import TrainedTexts, load, merged, save


def drawn(seed: int, count: int, below: int) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(0, below, count).astype(np.uint64))


@pytest.mark.parametrize("most", [1, 3, 1000])
@pytest.mark.parametrize(("one", "other"), [(50, 70), (0, 9), (9, 0), (0, 0), (200, 5)])
def test_parts_together_are_the_union(one: int, other: int, most: int) -> None:
    first, second = drawn(one, one, 120), drawn(other + 1, other, 200)
    parts = list(merged(first, second, most))
    expected = np.union1d(first, second)
    assert np.array_equal(np.concatenate([np.empty(0, np.uint64), *parts]), expected)
    assert all(len(part) <= 2 * most for part in parts)


def test_mined_data_over_the_same_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_texts, "_PART", 7)
    plain = TrainedTexts("a" * 16, drawn(1, 90, 1000))
    mined = TrainedTexts(f"{'b' * 16}-{'a' * 16}", drawn(2, 60, 1000))
    folder = tmp_path / "new"
    save([plain, mined, replace(plain, fingerprint="c" * 16)], folder)
    first, second = load(folder)
    assert (first.fingerprint, second.fingerprint) == (mined.fingerprint, "c" * 16)
    assert np.array_equal(first.hashes, np.union1d(plain.hashes, mined.hashes))
    assert np.array_equal(second.hashes, plain.hashes)
    before = (folder / trained_texts.NAME).stat().st_ino
    save([mined, plain, second], folder)  # the block of the later fingerprint comes again
    assert [t.fingerprint for t in load(folder)] == [plain.fingerprint, "c" * 16]
    save(load(folder), folder)
    now = (folder / trained_texts.NAME).stat().st_ino
    save(load(folder), folder)
    assert now == (folder / trained_texts.NAME).stat().st_ino != before
    assert [path.name for path in folder.iterdir()] == [trained_texts.NAME]


def test_a_file_with_the_same_texts_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainedTexts("a" * 16, drawn(1, 90, 1000))
    data, run, other, copied = (tmp_path / name for name in ("data", "run", "other", "copied"))
    save([plain], data)
    save(load(data), run)
    save(load(run), run)
    assert (run / trained_texts.NAME).samefile(data / trained_texts.NAME)
    save([*load(data), replace(plain, fingerprint="c" * 16)], other)
    assert [texts.file for texts in load(other)] == [None, None]

    def fails(*_: object) -> None:
        raise OSError(18, "another file system")

    monkeypatch.setattr("os.link", fails)
    save(load(data), copied)
    assert not (copied / trained_texts.NAME).samefile(data / trained_texts.NAME)
    for folder in (run, copied):
        assert [path.name for path in folder.iterdir()] == [trained_texts.NAME]
        assert (folder / trained_texts.NAME).read_bytes() == (
            data / trained_texts.NAME
        ).read_bytes()
