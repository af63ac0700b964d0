"""A small prepared folder and an encoder of words, made on the fly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.config import RunConfig
from lbr_ds.corpora.curate.segmentation import words
from lbr_ds.mining.pool import Pool, make_pool
from lbr_ds.records import Record
from tests.tiny import prepared_run, records


class Words:
    """A text's vector is the sum of its words' drawn vectors: alike texts have alike vectors."""

    def __init__(self, name: str = "words", width: int = 24, stop_after: int = -1) -> None:
        self.name = self.fingerprint = name
        self.width, self.stop_after, self.texts = width, stop_after, 0

    def encode(self, texts: list[str], role: str) -> NDArray[np.float32]:
        """(N, width); stop_after: raise when so many calls were answered."""
        if self.stop_after == 0:
            raise KeyboardInterrupt
        self.stop_after -= 1
        self.texts += len(texts)
        sums = np.stack(
            [sum((self._word(w) for w in words(t)), np.zeros(self.width)) for t in texts]
        )
        return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)

    def _word(self, word: str) -> NDArray[np.float64]:
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {word}".encode()).digest()[:8], "big")
        return np.random.default_rng(seed).normal(size=self.width)


def pool_of(
    folder: Path,
    targets: Iterable[Record],
    others: Iterable[Record] = (),
    held_out: Iterable[Record] = (),
) -> Pool:
    """The pool of some records, its files in a new folder."""
    folder.mkdir(parents=True)
    make_pool(folder, targets, others, held_out)
    return Pool(folder)


def make_run(folder: Path, count: int = 150, **mining: Any) -> RunConfig:
    """The recipe of a prepared folder of `count` records in groups of three."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps(r) + "\n" for r in records(count, group_every=3)))
    sources = [{"path": str(raw), "name": "toy"}]
    return prepared_run(folder, sources, {"gl": 0.3, "cl": 0.5, "eval": 0.2}, mining=mining)


def with_mining(run: RunConfig, **mining: Any) -> RunConfig:
    """The same run with other mining settings."""
    changed = {**run.mining.model_dump(), **mining}
    return run.model_copy(update={"mining": type(run.mining).model_validate(changed)})


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`; an index is a cache and has its own tests."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".idx"
    }
