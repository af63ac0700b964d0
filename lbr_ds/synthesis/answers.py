"""The answers of a language model on disk: each is written once, as one line of JSON.

They are stored in `DATA.synthesis/KEY/answers-RANK.jsonl`, beside DATA, where KEY hashes the prompt
and the model: answers are never used for another prompt or model. A line belongs to a passage by
the hash of its text. A killed command leaves at most one incomplete line, which is removed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lbr_ds.synthesis.prompts import encodable

log = logging.getLogger(__name__)


class Answers:
    """The answers in a folder; one rank appends to a file of its own.

    Use it as a context manager where answers are added.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, str] = {}
        self._file = -1
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._known.update(_lines(path))

    def __contains__(self, passage: str) -> bool:
        return passage in self._known

    def __len__(self) -> int:
        return len(self._known)

    def get(self, passage: str) -> str | None:
        """Return the answer for the passage with this hash; None if there is none."""
        return self._known.get(passage)

    def __enter__(self) -> Answers:
        path = self.folder / f"answers-{self.rank}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, _whole(path))
        return self

    def add(self, passage: str, answer: str) -> None:
        """Append an answer, unless the passage has one; see `encodable` for what is replaced."""
        if passage in self._known:
            return
        answer = encodable(answer)
        line = json.dumps({"passage": passage, "answer": answer}, ensure_ascii=False) + "\n"
        raw = line.encode()
        while raw:
            raw = raw[os.write(self._file, raw) :]
        self._known[passage] = answer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _whole(path: Path) -> int:
    """Return how many bytes of a file are whole lines."""
    return path.read_bytes().rfind(b"\n") + 1


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (passage, answer) of each whole line; damaged ones are asked again."""
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(raw)
            yield str(line["passage"]), str(line["answer"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s, line %d: damaged; this passage is asked again", path, number)
