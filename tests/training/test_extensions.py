"""A lock that a killed compiler left behind ends, one that is in use is waited for."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from lbr_ds.training.deepspeed.extensions import wait_for_compiler


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps it: below a folder for its version, or not."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "cpu_adam" / "lock"


def test_a_lock_without_an_owner_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 301, time.time() - 301))
    other = lock.parents[1] / "utils" / "lock"
    other.parent.mkdir()
    other.touch()
    with caplog.at_level(logging.WARNING):
        wait_for_compiler("cpu_adam")
    assert FileBaton(str(lock)).try_acquire()  # torch would compile now, and not wait
    assert other.exists()
    assert f"{lock}: 301 s old, so its owner was killed; removed" in caplog.text


def test_a_young_lock_is_waited_for(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    ended = threading.Event()

    def release() -> None:
        ended.set()
        baton.release()

    threading.Timer(0.5, release).start()
    with caplog.at_level(logging.INFO):
        wait_for_compiler("cpu_adam", seconds=60)
    assert ended.is_set()
    assert "another process is compiling, or was killed; waiting" in caplog.text
    assert "removed" not in caplog.text


def test_no_lock_no_wait(lock: Path) -> None:
    wait_for_compiler("cpu_adam", seconds=1e9)
    assert not lock.exists()
