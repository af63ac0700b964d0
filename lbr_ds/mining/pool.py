"""The distinct passages of cl (and gl), the queries, and what is excluded for each query, on disk.

    make_pool(folder, targets, others, held_out)
    pool = Pool(folder)

One rank makes the files and every rank reads them. While they are made, memory holds the hashes of
the texts, about 100 bytes for each of them, but not the texts. Two texts are the same if the first
8 bytes of their `segmentation.key` are, as in `trained.u64`.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.errors import DataError
from lbr_ds.mining.distinct import Numbers, hashes, keep_distinct
from lbr_ds.mining.stored import CURE, Lists, StoredTexts, TextWriter, load_array
from lbr_ds.records import Record
from lbr_ds.system.progress import Progress, no_progress
from lbr_ds.system.yaml_json import read_json

META, _QUERY_OF, _GROUP_OF = "pool.json", "query_of.npy", "group_of.npy"
_EVERY = 4096  # records between two reports of progress


class Pool:
    """P passages that differ when normalised, and Q queries.

    Attributes:
        passages: The bare texts, which every rule compares.
        instructed: The passages as a model trained on the data encodes them: with the document
            instruction of the first record that holds them.
        queries: The bare queries of the records that get negatives.
        asked: The queries as a model trained on the data encodes them.
        ids: The ids of their records.
        query_of: For each of the records that get negatives the number of its query, or -1.
        positives: For each query the passages that answer it, in the order of the record.
        held_out: The number of passages left out because eval has them.
        digest: Identifies positives and excluded passages.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `make_pool` wrote. Raises DataError when it is not complete."""
        self.folder = folder
        self.passages = StoredTexts(folder / "passages", bare=True)
        self.instructed = StoredTexts(folder / "passages")
        self.queries = StoredTexts(folder / "queries", bare=True)
        self.asked = StoredTexts(folder / "queries")
        self.ids = StoredTexts(folder / "ids")
        self.query_of = load_array(folder / _QUERY_OF)
        self._group_of = load_array(folder / _GROUP_OF)
        self.positives = Lists.load(folder / "positives")
        self._own = Lists.load(folder / "own")
        self._groups = Lists.load(folder / "groups")
        meta = read_json(folder / META, "the pool of `mine`", DataError, CURE)
        self.held_out, self.digest = int(meta["held_out"]), str(meta["digest"])

    def banned(self, query: int) -> NDArray[np.int64]:
        """Return the sorted numbers of the passages that are never this query's negatives.

        These are the passages of its group (its positives among them), the query's own text, and
        the negatives that the record came with.
        """
        own, group = self._own[query], int(self._group_of[query])
        return np.unique(own if group < 0 else np.concatenate([own, self._groups[group]]))


class _Listed:
    """The hashes of the texts of some records, in 8 bytes each."""

    def __init__(self) -> None:
        self.texts, self.groups, self.answers = array("Q"), array("Q"), array("B")
        self.positives, self.positives_of = array("Q"), array("q")
        self.own, self.own_of = array("Q"), array("q")
        self.group_of, self.query_of = array("Q"), array("q")

    def add(self, record: Record, every: TextWriter) -> None:
        """Add the passages of a record, and write them to `every`."""
        group, answers = _group(record), {record.text, *record.positives}
        for text in dict.fromkeys([record.text, *record.positives, *record.negatives]):
            if text:
                every.append(record.instructed_passage(text))
                self.texts.append(_hash(text))
                self.groups.append(group)
                self.answers.append(text in answers)

    def add_query(self, record: Record) -> None:
        """Add what the query of a target needs."""
        number = len(self.group_of)
        self.query_of.append(number if record.query else -1)
        if not record.query:
            return
        self.group_of.append(_group(record))
        for text in dict.fromkeys(map(_hash, record.positives)):
            self.positives.append(text)
            self.positives_of.append(number)
        for text in map(_hash, (record.query, *record.negatives)):
            self.own.append(text)
            self.own_of.append(number)


def make_pool(
    folder: Path,
    targets: Iterable[Record],
    others: Iterable[Record],
    held_out: Iterable[Record],
    progress: Progress = no_progress,
    total: int = 0,
) -> None:
    """Write the files of a pool into `folder`.

    Args:
        folder: An empty folder.
        targets: The records that get negatives.
        others: Records with further passages.
        held_out: Records whose texts are no candidates.
        progress: Called with the records that have been read.
        total: The number of targets and others.
    """
    kept_out = np.unique(
        np.fromiter((_hash(text) for record in held_out for text in record.texts()), np.uint64)
    )
    listed, done = _Listed(), 0
    with (
        TextWriter(folder / "every") as every,
        TextWriter(folder / "queries") as queries,
        TextWriter(folder / "ids") as ids,
    ):
        for is_target, records in ((True, targets), (False, others)):
            for record in records:
                listed.add(record, every)
                if is_target:
                    listed.add_query(record)
                if is_target and record.query:
                    queries.append(record.instructed_query())
                    ids.append(record.id)
                done += 1
                if done % _EVERY == 0 or done == total:
                    progress("read passages", done, total)
    texts = hashes(listed.texts)
    kept = ~np.isin(texts, kept_out)
    numbers = Numbers(texts, kept)
    left_out = len(np.unique(texts[~kept]))
    del texts, kept
    digest = _save_lists(folder, listed, numbers)
    del listed
    keep_distinct(folder, "every", "passages", numbers.places)
    meta = {"held_out": left_out, "digest": digest}
    (folder / META).write_text(json.dumps(meta), encoding="ascii")


def _save_lists(folder: Path, listed: _Listed, numbers: Numbers) -> str:
    """Write positives, given negatives and groups by their numbers; return a hash of them."""
    count = len(listed.group_of)
    answers = np.frombuffer(listed.answers, np.uint8).astype(bool)
    groups, owner = np.unique(hashes(listed.groups)[answers], return_inverse=True)
    members = numbers.of(hashes(listed.texts)[answers])
    order = np.lexsort((members, owner))
    group_of = np.searchsorted(groups, hashes(listed.group_of))
    if len(groups):
        known = groups[group_of.clip(max=len(groups) - 1)] == hashes(listed.group_of)
        group_of[~known] = -1
    made = {
        "positives": Lists.of(
            numbers.of(hashes(listed.positives)), np.asarray(listed.positives_of), count
        ),
        "own": Lists.of(numbers.of(hashes(listed.own)), np.asarray(listed.own_of), count),
        "groups": Lists.of(members[order], owner[order], len(groups)),
    }
    digest = hashlib.sha256()
    for name, lists in made.items():
        lists.save(folder / name)
        digest.update(lists.items.tobytes() + lists.ends.tobytes())
    digest.update(group_of.tobytes())
    np.save(folder / _GROUP_OF, group_of)
    np.save(folder / _QUERY_OF, np.asarray(listed.query_of))
    return digest.hexdigest()


def _hash(text: str) -> int:
    return int.from_bytes(key(text)[:8], "big")


def _group(record: Record) -> int:
    """Return a hash of a record's group; a record without one is a group of its own."""
    name = f"group {record.group}" if record.group else f"record {record.id}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
