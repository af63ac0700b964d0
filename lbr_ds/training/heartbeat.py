"""Heartbeats: what a rank publishes about itself, for the other ranks and for a launcher."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Heartbeat(NamedTuple):
    """What a rank publishes about itself.

    Attributes:
        number: Rises with every heartbeat.
        marks: Rises with the rank's progress.
        step: Optimizer step, from 1.
        doing: What the rank does in it.
        waits: Whether it waits for other ranks, in a collective.
        host: Its node.
        moved: Bytes that it has read and written, see `Watch._moved`.
    """

    number: int
    marks: int
    step: int
    doing: str
    waits: bool
    host: str
    moved: int

    def __str__(self) -> str:
        return f"on {self.host}, last seen in step {self.step} ({self.doing})"


def last_heartbeat(store: Any, rank: int) -> str:
    """Describe a rank's last heartbeat, for a launcher; "" when it never sent one."""
    return str(Heartbeat(*json.loads(store.get(str(rank))))) if store.check([str(rank)]) else ""


def report_failure(store: Any, code: int, line: str) -> None:
    """Report, for a launcher, a rank that died silently; the others then exit with `code`."""
    store.compare_set("failure", "", json.dumps([code, line, -1]))
