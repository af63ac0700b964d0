"""The queries of a split with their positives and negatives, on disk, for a teacher.

    make_pairs(folder, records)
    pairs = Pairs(folder)

Two texts are the same if their `text_key` is, by which the loaders find a teacher's vectors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.mining.distinct import Numbers, hashes, keep_distinct
from lbr_ds.mining.stored import Lists, StoredTexts, TextWriter, load_array
from lbr_ds.records import Record
from lbr_ds.shards.teacher import text_key

KEYS = "keys.npy"
_QUERIES, _POSITIVES, _PAIRS_OF = "query_of.npy", "positives.npy", "pairs_of.npy"


class Pairs:
    """R records with a query, their distinct queries and passages.

    Attributes:
        queries: The queries, with their instructions.
        passages: The passages, with their instructions.
        query_of: For each of the R records the number of its query.
        passages_of: For each of them its passages, positives first.
        positives: For each of them the number of its positives.
        pairs_of: For each record of the split which of the R records it is, or -1.
        keys: `text_key` of the queries, then of the passages.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `make_pairs` wrote. Raises DataError when a file is missing."""
        self.folder = folder
        self.queries = StoredTexts(folder / "queries")
        self.passages = StoredTexts(folder / "passages")
        self._bare = [StoredTexts(folder / name, bare=True) for name in ("queries", "passages")]
        self.query_of = load_array(folder / _QUERIES)
        self.positives = load_array(folder / _POSITIVES)
        self.pairs_of = load_array(folder / _PAIRS_OF)
        self.passages_of = Lists.load(folder / "passages_of")
        self.keys = load_array(folder / KEYS)

    def __len__(self) -> int:
        return len(self.query_of)

    @property
    def digest(self) -> str:
        """A hash of all pairs in order."""
        digest = hashlib.sha256(f"{self.queries.digest} {self.passages.digest}".encode())
        for part in (self.query_of, self.passages_of.items, self.passages_of.ends):
            digest.update(part.tobytes())
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """The number of pairs of a query and a passage."""
        return len(self.passages_of.items)

    def bare(self, first: int, last: int) -> Iterator[tuple[str, str]]:
        """Yield the pairs from number `first` to before `last` without instructions."""
        queries, passages = self._bare
        owners = np.searchsorted(self.passages_of.ends, np.arange(first, last), "right")
        for owner, passage in zip(owners.tolist(), self.passages_of.items[first:last], strict=True):
            yield queries[int(self.query_of[owner])], passages[int(passage)]


def make_pairs(folder: Path, records: Iterable[Record]) -> None:
    """Write the files of the pairs into an empty folder; 8 bytes of memory for each text."""
    queries, passages = array("Q"), array("Q")
    positives, counts, pairs_of = array("q"), array("q"), array("q")
    with TextWriter(folder / "asked") as asked, TextWriter(folder / "every") as every:
        for record in records:
            pairs_of.append(len(queries) if record.query else -1)
            if not record.query:
                continue
            text = record.instructed_query()
            asked.append(text)
            queries.append(text_key(text, "query"))
            for passage in (*record.positives, *record.negatives):
                text = record.instructed_passage(passage)
                every.append(text)
                passages.append(text_key(text, "document"))
            positives.append(len(record.positives))
            counts.append(len(record.positives) + len(record.negatives))
    keys = []
    for name, whole, part in (("queries", "asked", queries), ("passages", "every", passages)):
        numbers = Numbers(hashes(part))
        keep_distinct(folder, whole, name, numbers.places)
        keys.append(hashes(part)[numbers.places].astype(np.int64))
        if name == "queries":
            _save(folder / _QUERIES, numbers.of(hashes(part)))
        else:
            ends = np.cumsum(np.asarray(counts, np.int64))
            Lists(numbers.of(hashes(part)), ends).save(folder / "passages_of")
    _save(folder / KEYS, np.concatenate(keys))
    _save(folder / _POSITIVES, np.asarray(positives, np.int64))
    _save(folder / _PAIRS_OF, np.asarray(pairs_of, np.int64))


def _save(path: Path, numbers: NDArray[np.int64]) -> None:
    np.save(path, numbers, allow_pickle=False)
