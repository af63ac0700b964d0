"""A real training below `lbr-ds reproduce`: its end reaches all, and TERM saves first."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from lbr_ds.runs import checkpoints
from tests.processes.test_children import ends
from tests.ranks import start_cli
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.suites


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["reproduce", "launcher"])
def test_no_rank_outlives_what_started_it(
    victim: str, number: signal.Signals, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    words = ["reproduce", "table3", str(recipe), "--nproc", "2"]
    endless = ["stage1.num_steps=100000", "every.save=100000"]
    first = start_cli(*words, *endless, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (found := [p for p in tmp_path.rglob("metrics.jsonl") if p.stat().st_size]):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    (launcher,) = psutil.Process(first.pid).children()
    (first if victim == "reproduce" else launcher).send_signal(number)
    code = first.wait(timeout=60)
    assert ends(first.pid)
    if number == signal.SIGTERM:
        assert code == 85
        assert len(checkpoints(found[0].parent)) == 1
    else:
        assert code == (-signal.SIGKILL if victim == "reproduce" else 128 + signal.SIGKILL)
