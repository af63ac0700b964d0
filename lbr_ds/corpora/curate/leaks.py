"""No text of eval in gl or cl, equal or nearly: negatives that would carry one over are removed,
then all is proved from the shards as written.

Queries, positives and passages cannot cross, since components stay whole (`unite.py`). Negatives
are texts of others, so they can.

Under protocol knowledge (`knowledge.py`) the same holds of control; and of eval but for gl, which
states the facts of eval's entities: a text of eval may stand there in its own component alone. Nor
do eval and control share a group with cl, nor control with gl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lbr_ds.config import CONTROL, SPLITS
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.process_pool import map_in_order
from lbr_ds.corpora.store import NEGATIVE, POSITIVE, Store
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from lbr_ds.system.progress import Progress, no_progress

TRAINED = tuple(name for name in SPLITS if name != "eval")
JUDGED = ("eval", CONTROL)
_CHUNK = 256
_IS_JUDGED = f"split IN {JUDGED}"
_FAMILIES = "FROM placed JOIN members USING (seq) JOIN uses USING (seq) JOIN families USING (num)"


def part_negatives(store: Store, removed: Tally) -> None:
    """Take out negatives that are an answer of their own group, that a trained split would share
    with eval (or control), or eval with a trained split.

    Near duplicates count as equal between splits. Within a group they do not: the source says that
    they are wrong, and one word may be what is.
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


def _kept_apart(splits: Iterable[str]) -> list[tuple[str, str]]:
    """(judged, trained) splits that may have no text in common at all."""
    judged = [name for name in JUDGED if name in splits]
    told = {("eval", "gl")} if CONTROL in judged else set()
    return [(j, t) for j in judged for t in TRAINED if (j, t) not in told]


def prove(folder: Path) -> dict[str, int]:
    """Count the normalised texts that eval shares with gl and with cl, from the shards as written.

    Returns {"eval_gl": 0, "eval_cl": 0}, under protocol knowledge {"eval_cl": 0, "control_gl": 0,
    "control_cl": 0}; raises DataError when a count is not 0. Holds the keys of the judged splits in
    memory, and knows nothing of near duplicates; see `prove_near`.
    """
    pairs = _kept_apart(Manifest.load(folder).splits)
    judged = {
        name: {k for seen in _of_split(folder, name) for k in seen.keys}
        for name in dict.fromkeys(judged for judged, _ in pairs)
    }
    found: dict[tuple[str, str], set[bytes]] = {pair: set() for pair in pairs}
    for name in TRAINED:
        for seen in _of_split(folder, name):
            for judge, trained in pairs:
                if trained == name:
                    found[judge, name].update(k for k in seen.keys if k in judged[judge])
    shared = {f"{judge}_{trained}": len(texts) for (judge, trained), texts in found.items()}
    _refuse(folder, shared)
    return shared


def prove_near(folder: Path, store: Store, progress: Progress = no_progress) -> dict[str, int]:
    """Count the texts that eval shares with gl and with cl, equal or nearly, as `prove` does.

    Returns {"eval_gl": 0, "eval_cl": 0, "near_eval_gl": 0, "near_eval_cl": 0}: equal after
    normalisation, and families of near duplicates. Under protocol knowledge also those of control,
    `group_*` for groups in both, and as eval_gl the texts in both that more than one component has.
    Raises DataError when a count is not 0.
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
    for name in splits:
        done, total = 0, manifest.records(name)
        for seen in _of_split(folder, name):
            for known in seen.keys:
                number = store.num_of(known)
                if number is None:
                    raise DataError(f"{folder}: {name} holds a text of no record; report this bug")
                store.db.execute("INSERT OR IGNORE INTO shown VALUES (?, ?)", (name, number))
            owners = ((name, owner) for owner in seen.groups)
            store.db.executemany("INSERT OR IGNORE INTO owners VALUES (?, ?)", owners)
            done += _CHUNK
            progress(f"prove {name}", min(done, total), total)
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
    return shared


def _in_both(what: str, table: str) -> str:
    """A query for what two splits have."""
    return " INTERSECT ".join([f"SELECT {what} FROM {table} WHERE split = ?"] * 2)


def _of_other_entities(store: Store, kinds: dict[str, tuple[str, str]]) -> dict[str, int]:
    """How many texts of eval stand in gl, and not in one component alone."""
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


class _Seen(NamedTuple):
    """The keys of the texts of some records, and their groups."""

    keys: list[bytes]
    groups: list[str]


def _of_split(folder: Path, split: str) -> Iterator[_Seen]:
    """`_CHUNK` records at a time."""
    return map_in_order(_seen, _chunks(folder, split))


def _chunks(folder: Path, split: str) -> Iterator[list[Record]]:
    records = read_split(folder, split)
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _seen(records: list[Record]) -> _Seen:
    texts = [text for record in records for text in record.texts()]
    return _Seen(list(map(key, texts)), [r.group for r in records if r.group])
