"""Interrupted, resumed, shared by processes: the bytes are the same, and memory stays."""

from __future__ import annotations

import os
import random
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate import leaks
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import process_pool
from lbr_ds.system.atomic import atomic_folder
from tests.benchmarks import prepare_memory
from tests.benchmarks.prepare_memory import peak_memory_ratio, write_corpus
from tests.corpora.test_groups import templated
from tests.corpora.test_near_duplicates import leaky
from tests.corpora.test_prepare import everything
from tests.corpora.toy import recipe
from tests.kills.crash import run

pytestmark = pytest.mark.slow


def corpus(tmp_path: Path, name: str, records: int = 3000) -> DataConfig:
    if not (tmp_path / "raw.jsonl").exists():
        write_corpus(tmp_path / "raw.jsonl", records)
    sources = [{"path": str(tmp_path / "raw.jsonl")}]
    return DataConfig.model_validate({"folder": tmp_path / name, "sources": sources})


def test_same_bytes_by_one_process_and_by_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, cleaned, compared and clustered by helpers; templates make large buckets."""
    raws = [*leaky(800)[0], *({**raw, "id": f"t{raw['id']}"} for raw in templated(300))]
    monkeypatch.setattr("lbr_ds.corpora.reading._ROWS", 64)
    monkeypatch.setattr("lbr_ds.corpora.curate.clusters._TEXTS_PER_JOB", 64)
    for number in (1, 3):
        monkeypatch.setattr(process_pool, "cores", lambda number=number: number)
        made = prepare(recipe(tmp_path, raws, folder=tmp_path / f"by{number}"), 0)
    assert everything(tmp_path / "by1") == everything(tmp_path / "by3")
    assert made["components"]["largest"] == 900
    assert made["components"]["near_duplicate_texts"] == 299 + 200


STOPS = [  # where it is interrupted, at which call
    ("lbr_ds.corpora.store.Store.add_part", 25),
    ("lbr_ds.corpora.collect.drop_exact_duplicates", 1),
    ("lbr_ds.corpora.store.Store.gather_texts", 1),
    ("lbr_ds.corpora.prepare.find_families", 1),
    ("lbr_ds.corpora.prepare.group_records", 1),
    ("lbr_ds.corpora.curate.leaks.remove_leaking_negatives", 1),
    ("lbr_ds.corpora.store.Store.write_labels", 1),
    ("lbr_ds.corpora.prepare.write_split", 2),
    ("lbr_ds.corpora.curate.leaks.prove_no_leaks", 1),
]


@pytest.mark.parametrize(("place", "call"), STOPS, ids=[name for name, _ in STOPS])
def test_interrupted_and_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int
) -> None:
    """Ctrl-C anywhere, then again: the bytes of a run that was never stopped."""
    raws, _ = leaky(300)
    draw = random.Random(0)
    for raw in raws:
        raw["negatives"] = draw.choice(raws)["positives"]
    data = recipe(tmp_path, raws)
    monkeypatch.setattr("lbr_ds.corpora.reading._ROWS", 16)
    with monkeypatch.context() as patch:
        real: Any = locate(place)
        calls = 0

        def stopped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(place, stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, 0)
    (work,) = tmp_path.glob(".data.*")
    read: list[int] = []

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "read toy":
            read.append(done)

    made = prepare(data, 0, progress)
    assert not work.exists()
    whole = recipe(tmp_path, raws, folder=tmp_path / "whole")
    assert prepare(whole, 0) == made
    assert everything(tmp_path / "whole") == everything(tmp_path / "data")
    # What was read before the stop was not read again.
    assert read == [] if call == 1 or "write" in place else read[0] > 300


def test_work_of_other_settings_is_removed(tmp_path: Path) -> None:
    data = corpus(tmp_path, "data", 50)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "data", key="0123456789abcdef"):
        raise KeyboardInterrupt
    (stale,) = tmp_path.glob(".data.*")
    foreign = tmp_path / ".data.notes"
    foreign.mkdir()
    prepare(data, 0)
    assert not stale.exists()
    assert foreign.exists()


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(tmp_path, "data", 50)
    real = leaks.prove_no_leaks

    def second() -> None:
        with pytest.raises(
            EnvironmentProblem, match=rf"data is in use by .*process {os.getppid()}"
        ):
            prepare(data, 0)

    def meanwhile(*args: Any) -> dict[str, int]:
        run(second)
        return real(*args)

    monkeypatch.setattr(leaks, "prove_no_leaks", meanwhile)
    prepare(data, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw.jsonl"]


def test_memory_does_not_grow(capsys: pytest.CaptureFixture[str]) -> None:
    """A small multiple here; the bench measures 20 times."""
    ratio, figures = peak_memory_ratio(**prepare_memory.QUICK)
    assert ratio <= 1.15, figures
    assert figures["small_mib"] > 50
