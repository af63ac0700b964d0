"""Progress in a file: few lines, the first one soon, with what is done, the rate and the rest."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import subprocess
import sys

import pytest

from lbr_ds.system.progress import FIRST_LINE, LINE_INTERVAL, ProgressLines, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_lines_by_a_fake_clock(caplog: pytest.LogCaptureFixture) -> None:
    """1,000 reports, one a tenth of a second, give a line at 5, 25, 45, 65 and 85 seconds."""
    clock, seen = Clock(), []
    progress = ProgressLines(clock)
    with caplog.at_level(logging.INFO, "lbr_ds"):
        for done in range(1, 1001):
            clock.now = 1000 + done / 10
            before = len(caplog.messages)
            progress("read icd10cm", 10 * done, 20_000 if done > 500 else None)
            seen += [clock.now - 1000] * (len(caplog.messages) - before)
    assert seen == [FIRST_LINE + number * LINE_INTERVAL for number in range(5)]
    assert caplog.messages[0] == "read icd10cm: 500, 100/s"
    assert caplog.messages[-1] == "read icd10cm: 8,500 of 20,000 (42 %), 100/s, 0:01:55 left"


def test_parts_share_the_interval(caplog: pytest.LogCaptureFixture) -> None:
    """A resumed part counts from where it was resumed; a part that just began has no rate yet."""
    clock = Clock()
    progress = ProgressLines(clock)
    with caplog.at_level(logging.INFO, "lbr_ds"):
        progress("a", 600, 1000)
        clock.now += 10
        progress("a", 605, 1000)
        progress("b", 1, 3)
        clock.now += LINE_INTERVAL
        progress("c", 1, 3)
        progress("b", 2, 3)
    assert caplog.messages == ["a: 605 of 1,000 (60 %), 0.5/s, 0:13:10 left", "c: 1 of 3 (33 %)"]


def test_nested_displays_are_one() -> None:
    with show_progress() as outer:
        with show_progress() as inner:
            assert inner is outer
        with show_progress() as inner:
            assert inner is outer
    with show_progress() as later:
        assert later is not outer


PROGRAM = """
from lbr_ds.system.progress import show_progress
with show_progress() as progress:
    progress("a part", 1, 3)
print("the end")
"""


def test_bar_on_a_terminal() -> None:
    """A real terminal gets a bar, which is gone at the end; a pipe gets nothing so soon."""
    piped = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert (piped.stdout, piped.stderr) == (b"the end\n", b"")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM], stderr=theirs, stdout=-3, env=environment, check=True
    )
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(ours, 1 << 16):
            drawn += part
    os.close(ours)
    assert b"a part" in drawn
    assert b"33%" in drawn
    assert drawn.endswith(b"\x1b[2K")  # the line is erased
