"""Keep every text of eval, and every near duplicate of one, out of gl and cl, and prove it.

Queries, positives and passages cannot leak, since components stay in one split (`groups.py`).
Negatives are texts of other records, so they can: those that would leak are removed. Then the
texts are counted from the shards as written.

Under the knowledge protocol (`knowledge.py`) the same holds for control. It also holds for eval
except in gl, which states the facts of eval's entities: a text of eval may occur in gl, but only in
its own component. eval and control share no group with cl, and control shares none with gl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.config import CONTROL, SPLITS
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import NEGATIVE, POSITIVE, Store
from lbr_ds.errors import DataError
from lbr_ds.shards import Manifest, read_records
from lbr_ds.system.process_pool import map_in_order
from lbr_ds.system.progress import Progress, no_progress

TRAINED = tuple(name for name in SPLITS if name != "eval")
JUDGED = ("eval", CONTROL)
_RECORDS_ALONE = 1 << 13  # records read by this process before others are started
_IS_JUDGED = f"split IN {JUDGED}"
_FAMILIES = "FROM placed JOIN members USING (seq) JOIN uses USING (seq) JOIN families USING (num)"


def remove_leaking_negatives(store: Store, removed: Tally) -> None:
    """Remove negatives that are an answer of their own group, or that leak between splits.

    A negative leaks if a split for training would share it with eval or control, or the other way
    round. Between splits near duplicates count as equal. Within a group they do not: the source
    says that they are wrong, and a single word may be the reason.
    """
    if not store.number("SELECT EXISTS (SELECT 1 FROM uses WHERE role = ?)", NEGATIVE):
        return
    with_negatives = "(SELECT grp FROM members JOIN uses USING (seq) WHERE role = 3)"
    _ban(
        store,
        removed,
        "negative_is_a_positive",
        "1",
        f"SELECT DISTINCT grp, num {_FAMILIES} WHERE role = {POSITIVE} AND grp IN {with_negatives}",
        "banned.grp = members.grp AND banned.text = uses.num",
    )
    for split, others in (
        (_IS_JUDGED, f"NOT {_IS_JUDGED} AND role != {NEGATIVE}"),
        (f"NOT {_IS_JUDGED}", _IS_JUDGED),
    ):
        _ban(
            store,
            removed,
            "negative_is_in_other_split",
            split,
            f"SELECT DISTINCT 0 AS grp, family {_FAMILIES} WHERE {others}",
            "banned.text = families.family",
        )


def _ban(store: Store, removed: Tally, rule: str, placed: str, texts: str, condition: str) -> None:
    """Delete the negatives of records `placed` so for which `condition` holds with a text."""
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


def _kept_apart(splits: Iterable[str]) -> list[tuple[str, str]]:
    """Return the (judged, trained) splits that may have no text in common at all."""
    judged = [name for name in JUDGED if name in splits]
    allowed = {("eval", "gl")} if CONTROL in judged else set()
    return [(j, t) for j in judged for t in TRAINED if (j, t) not in allowed]


def prove_no_equal_texts(folder: Path) -> dict[str, int]:
    """Count the equal texts that eval shares with gl and with cl, from the shards as written.

    Holds the keys of the judged splits in memory. Near duplicates are counted by `prove_no_leaks`.

    Returns:
        {"eval_gl": 0, "eval_cl": 0}; under the knowledge protocol {"eval_cl": 0, "control_gl": 0,
        "control_cl": 0}.

    Raises:
        DataError: A count is not 0.
    """
    pairs = _kept_apart(Manifest.load(folder).splits)
    judged = {
        name: {k for seen in read_keys(folder, name) for k in seen.keys}
        for name in dict.fromkeys(judged for judged, _ in pairs)
    }
    shared_keys: dict[tuple[str, str], set[bytes]] = {pair: set() for pair in pairs}
    for name in TRAINED:
        for seen in read_keys(folder, name):
            for judge, trained in pairs:
                if trained == name:
                    shared_keys[judge, name].update(k for k in seen.keys if k in judged[judge])
    shared = {f"{judge}_{trained}": len(texts) for (judge, trained), texts in shared_keys.items()}
    _refuse(folder, shared)
    return shared


class Proof(NamedTuple):
    """What `prove_no_leaks` counts, and the first 8 bytes of the keys of the training texts."""

    shared: dict[str, int]
    trained: NDArray[np.uint64]


def prove_no_leaks(folder: Path, store: Store, progress: Progress = no_progress) -> Proof:
    """Count the equal texts and the near duplicates that eval shares with gl and with cl.

    They are counted from the shards as written.

    Returns:
        `shared` is {"eval_gl": 0, "eval_cl": 0, "near_eval_gl": 0, "near_eval_cl": 0}: texts equal
        after normalisation, and families of near duplicates. Under the knowledge protocol also the
        counts of control and, as `group_*`, of groups in both; `eval_gl` then counts the texts in
        both that more than one component has.

    Raises:
        DataError: A count is not 0.
    """
    store.db.execute(
        "CREATE TEMP TABLE shown (split TEXT, num INTEGER, PRIMARY KEY (split, num)) WITHOUT ROWID"
    )
    store.db.execute(
        "CREATE TEMP TABLE owners (split TEXT, owner TEXT, PRIMARY KEY (split, owner))"
        " WITHOUT ROWID"
    )
    manifest = Manifest.load(folder)
    splits = manifest.splits
    trained = [np.empty(0, np.uint64)]
    for name in splits:
        done, total = 0, manifest.records(name)
        for seen in read_keys(folder, name):
            numbers = store.nums_of(list(dict.fromkeys(seen.keys)))
            if missing := sum(known not in numbers for known in seen.keys):
                raise DataError(
                    f"{folder}: {name} contains {missing} text(s) of no record; report this bug"
                )
            shown = ((name, number) for number in numbers.values())
            owners = ((name, owner) for owner in seen.groups if CONTROL in splits)
            with store.step():
                store.db.executemany("INSERT OR IGNORE INTO shown VALUES (?, ?)", shown)
                store.db.executemany("INSERT OR IGNORE INTO owners VALUES (?, ?)", owners)
            if name in TRAINED:
                trained.append(np.unique(seen.hashes()))
            done += seen.records
            progress(f"prove {name}", done, total)
    pairs = _kept_apart(splits)
    kinds = {"": ("num", "shown"), "near_": ("family", "shown JOIN families USING (num)")}
    if CONTROL in splits:
        kinds["group_"] = ("owner", "owners")
    shared = {
        f"{prefix}{judged}_{trained}": store.number(
            f"SELECT count(*) FROM ({_in_both(*kind)})", judged, trained
        )
        for prefix, kind in kinds.items()
        for judged, trained in pairs
    }
    if CONTROL in splits:
        shared |= _of_other_entities(store, kinds)
    _refuse(folder, shared)
    store.db.execute("DROP TABLE shown")
    store.db.execute("DROP TABLE owners")
    return Proof(shared, np.unique(np.concatenate(trained)))


def _in_both(what: str, table: str) -> str:
    """Return a query for what two splits have in common."""
    return " INTERSECT ".join([f"SELECT {what} FROM {table} WHERE split = ?"] * 2)


def _of_other_entities(store: Store, kinds: dict[str, tuple[str, str]]) -> dict[str, int]:
    """Count the texts of eval in gl that more than one component has."""
    owners = (
        "SELECT {what} FROM placed JOIN uses USING (seq) JOIN families USING (num)"
        " WHERE split IN ('eval', 'gl') GROUP BY {what} HAVING count(DISTINCT component) > 1"
    )
    return {
        f"{prefix}eval_gl": store.number(
            f"SELECT count(*) FROM ({_in_both(what, table)} INTERSECT {owners.format(what=what)})",
            "eval",
            "gl",
        )
        for prefix, (what, table) in kinds.items()
        if prefix != "group_"
    }


def _refuse(folder: Path, shared: dict[str, int]) -> None:
    if any(shared.values()):
        raise DataError(f"{folder}: eval shares texts with training ({shared}); report this bug")


class _Shard(NamedTuple):
    """One shard, with a manifest of nothing else."""

    manifest: Manifest
    split: str


class Seen(NamedTuple):
    """The keys of the texts of a shard, the groups of its records, and their number."""

    keys: list[bytes]
    groups: list[str]
    records: int

    def hashes(self) -> NDArray[np.uint64]:
        """Return the first 8 bytes of the keys."""
        whole = np.frombuffer(b"".join(self.keys), ">u8").astype(np.uint64)
        return whole[::2]


def read_keys(folder: Path, split: str) -> Iterator[Seen]:
    """Yield what each shard of a split contains."""
    manifest = Manifest.load(folder)
    shards = manifest.shards(split)
    alone = 1 + _RECORDS_ALONE // max((shard.records for shard in shards), default=1)
    jobs = (_Shard(replace(manifest, splits={split: [shard]}), split) for shard in shards)
    return map_in_order(_seen, jobs, alone)


def _seen(shard: _Shard) -> Seen:
    records = list(read_records(shard.manifest, shard.split))
    texts = (text for record in records for text in record.texts())
    return Seen(list(map(key, texts)), [r.group for r in records if r.group], len(records))
