"""A training locks the data that it reads, so that no verb replaces it meanwhile.

Each rank holds a shared lock on the first shard of its splits. It works in read-only folders and
ends with the process. `prepare` and `mine` refuse to replace splits that are locked. Hosts that do
not see each other's locks rely on the fingerprint, which `training/feed.py` compares: a training
whose data was replaced ends with one line, and its checkpoints are intact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lbr_ds.errors import DataError, EnvironmentProblem
from lbr_ds.shards.manifest import Manifest
from lbr_ds.system.locks import has_readers, read_lock


@contextlib.contextmanager
def in_use(manifest: Manifest, *splits: str) -> Iterator[None]:
    """Lock splits of a local folder until the block ends. Data behind a URL needs no lock."""
    with contextlib.ExitStack() as locks:
        for split in splits if manifest.remote is None else ():
            if shards := manifest.splits.get(split):
                locks.enter_context(read_lock(manifest.folder / shards[0].file))
        yield


def refuse_in_use(folder: Path, splits: Iterable[str] | None = None) -> None:
    """Check that no training reads the splits that are to be replaced.

    Args:
        folder: A prepared folder, or one that does not exist yet.
        splits: All splits by default.

    Raises:
        EnvironmentProblem: A training reads one of them.
    """
    try:
        manifest = Manifest.load(folder)
    except DataError:
        return  # not prepared, or damaged: to be made anew
    for split in manifest.splits if splits is None else splits:
        shards = manifest.splits.get(split)
        if shards and has_readers(folder / shards[0].file):
            raise EnvironmentProblem(
                f"{folder} is in use: a training reads its split {split!r}; wait until it has "
                "ended, or write to another folder with data.folder=..."
            )
