"""No text of eval in gl or cl, equal or nearly: negatives that would carry one over are removed,
then all is proved from the shards as written.

Queries, positives and passages cannot cross, since components stay whole (`unite.py`). Negatives
are texts of others, so they can.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lbr_ds.config import SPLITS
from lbr_ds.corpora.cleaning import key
from lbr_ds.corpora.crew import in_order
from lbr_ds.corpora.reading import Progress, Tally
from lbr_ds.corpora.store import NEGATIVE, POSITIVE, Store
from lbr_ds.errors import DataError
from lbr_ds.shards import read_split

TRAINED = tuple(name for name in SPLITS if name != "eval")
_CHUNK = 256
_FAMILIES = "FROM placed JOIN members USING (seq) JOIN uses USING (seq) JOIN families USING (num)"


def part_negatives(store: Store, removed: Tally) -> None:
    """Take out negatives that are an answer of their own group, that a trained split would share
    with eval, or eval with a trained split.

    Near duplicates count as equal between splits. Within a group they do not: the source says that
    they are wrong, and one word may be what is.
    """
    if not store.number("SELECT EXISTS (SELECT 1 FROM uses WHERE role = ?)", NEGATIVE):
        return
    with_negatives = "(SELECT grp FROM members JOIN uses USING (seq) WHERE role = 3)"
    _ban(
        store, removed, "negative_is_a_positive", "1",
        f"SELECT DISTINCT grp, num {_FAMILIES} WHERE role = {POSITIVE}"
        f" AND grp IN {with_negatives}",
        "banned.grp = members.grp AND banned.text = uses.num",
    )  # fmt: skip
    for split, others in (
        ("split = 'eval'", f"split != 'eval' AND role != {NEGATIVE}"),
        ("split != 'eval'", "split = 'eval'"),
    ):
        _ban(
            store, removed, "negative_is_in_other_split", split,
            f"SELECT DISTINCT 0 AS grp, family {_FAMILIES} WHERE {others}",
            "banned.text = families.family",
        )  # fmt: skip


def _ban(store: Store, removed: Tally, rule: str, placed: str, texts: str, condition: str) -> None:
    """Delete the negatives of the records `placed` so that meet one of `texts` on `condition`."""
    store.db.execute("CREATE TEMP TABLE banned (grp INTEGER, text INTEGER)")
    store.db.execute(f"INSERT INTO banned {texts}")
    store.db.execute("CREATE INDEX temp.banned_text ON banned (text)")
    store.db.execute(
        "CREATE TEMP TABLE gone AS SELECT uses.seq, uses.place, uses.num"
        f" {_FAMILIES} WHERE role = {NEGATIVE} AND {placed} AND EXISTS"
        f" (SELECT 1 FROM banned WHERE {condition})"
    )
    number = store.number("SELECT count(*) FROM gone")
    rows = store.db.execute(
        "SELECT id, text FROM gone JOIN records USING (seq) JOIN texts USING (num)"
        " ORDER BY id, place LIMIT 3"
    ).fetchall()
    for place, (name, text) in enumerate(rows):
        removed.add(rule, f"{name}: {text}", 1 if place < len(rows) - 1 else number - place)
    store.db.execute(
        "DELETE FROM uses WHERE role = ? AND (seq, place) IN (SELECT seq, place FROM gone)",
        (NEGATIVE,),
    )
    store.db.execute("DROP TABLE banned")
    store.db.execute("DROP TABLE gone")


def prove(folder: Path) -> dict[str, int]:
    """Count the normalised texts that eval shares with gl and with cl, from the shards as written.

    Returns {"eval_gl": 0, "eval_cl": 0}; raises DataError when a count is not 0. Holds the keys of
    eval in memory, and knows nothing of near duplicates; see `prove_near`.
    """
    judged = {k for keys in _of_split(folder, "eval") for k in keys}
    shared = {}
    for name in TRAINED:
        found = {k for keys in _of_split(folder, name) for k in keys if k in judged}
        shared[f"eval_{name}"] = len(found)
    _refuse(folder, shared)
    return shared


def prove_near(folder: Path, store: Store, progress: Progress | None = None) -> dict[str, int]:
    """Count the texts that eval shares with gl and with cl, equal or nearly, as `prove` does.

    Returns {"eval_gl": 0, "eval_cl": 0, "near_eval_gl": 0, "near_eval_cl": 0}: equal after
    normalisation, and families of near duplicates. Raises DataError when a count is not 0.
    """
    store.db.execute(
        "CREATE TEMP TABLE shown (split TEXT, num INTEGER, PRIMARY KEY (split, num)) WITHOUT ROWID"
    )
    for name in SPLITS:
        done = 0
        for keys in _of_split(folder, name):
            for known in keys:
                number = store.num_of(known)
                if number is None:
                    raise DataError(f"{folder}: {name} holds a text of no record; report this bug")
                store.db.execute("INSERT OR IGNORE INTO shown VALUES (?, ?)", (name, number))
            done += _CHUNK
            if progress:
                progress(f"prove {name}", done, None)
    shared = {
        f"{prefix}eval_{name}": store.number(
            f"SELECT count(*) FROM (SELECT {what} FROM shown {join} WHERE split = 'eval'"
            f" INTERSECT SELECT {what} FROM shown {join} WHERE split = ?)", name,
        )
        for prefix, what, join in (("", "num", ""),
                                   ("near_", "family", "JOIN families USING (num)"))
        for name in TRAINED
    }  # fmt: skip
    _refuse(folder, shared)
    store.db.execute("DROP TABLE shown")
    return shared


def _refuse(folder: Path, shared: dict[str, int]) -> None:
    if any(shared.values()):
        raise DataError(f"{folder}: eval shares texts with training ({shared}); report this bug")


def _of_split(folder: Path, split: str) -> Iterator[list[bytes]]:
    """The keys of `_CHUNK` records at a time."""
    return in_order(_keys, _chunks(folder, split))


def _chunks(folder: Path, split: str) -> Iterator[list[str]]:
    """The texts of `_CHUNK` records at a time."""
    records = read_split(folder, split)
    while chunk := list(islice(records, _CHUNK)):
        yield [text for record in chunk for text in record.texts()]


def _keys(texts: list[str]) -> list[bytes]:
    return list(map(key, texts))
