"""Keep every text of eval, and every near duplicate of one, out of gl and cl, and verify this.

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
import pyarrow as pa
from numpy.typing import NDArray

from lbr_ds.config import CONTROL, SPLITS
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.curate.tally import EXAMPLES, Tally
from lbr_ds.corpora.parts import KEY_BYTES, halves
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import NEGATIVE, POSITIVE, distinct
from lbr_ds.errors import DataError
from lbr_ds.shards import Manifest, read_records
from lbr_ds.system.process_pool import map_in_order
from lbr_ds.system.progress import Progress, no_progress

TRAINED = tuple(name for name in SPLITS if name != "eval")
JUDGED = ("eval", CONTROL)
_RECORDS_ALONE = 1 << 13  # records read by this process before others are started


def remove_leaking_negatives(store: Store, removed: Tally) -> None:
    """Remove negatives that are an answer of their own group, or that leak between splits.

    A negative leaks if a split for training would share it with eval or control, or the other way
    round. Between splits near duplicates count as equal. Within a group they do not: the source
    says that they are wrong, and a single word may be the reason.
    """
    if not store.number("SELECT EXISTS (SELECT 1 FROM uses WHERE role = ?)", NEGATIVE):
        return
    store.db.execute(f"""
        CREATE TEMP TABLE negatives AS
        SELECT seq, role, place, num, family, grp, split IN {JUDGED} AS judged FROM uses
            JOIN families USING (num) JOIN placed USING (seq) JOIN members USING (seq)
        WHERE role = {NEGATIVE};
        CREATE TEMP TABLE answers AS
        SELECT DISTINCT grp, num FROM uses JOIN placed USING (seq) JOIN members USING (seq)
        WHERE role = {POSITIVE} AND num IN (SELECT num FROM negatives);
        CREATE TEMP TABLE linked AS
        SELECT DISTINCT family, split IN {JUDGED} AS judged FROM uses
            JOIN families USING (num) JOIN placed USING (seq)
        WHERE role < {NEGATIVE} AND family IN (SELECT family FROM negatives)""")
    for rule, condition in (
        ("negative_is_a_positive", "(grp, num) IN (FROM answers)"),
        (
            "negative_is_in_other_split",
            "judged AND family IN (SELECT family FROM linked WHERE NOT judged)",
        ),
        (
            "negative_is_in_other_split",
            "NOT judged AND family IN (SELECT family FROM linked WHERE judged"
            " UNION ALL SELECT family FROM negatives WHERE judged)",
        ),
    ):
        rows = store.rows(
            "SELECT id, num FROM negatives JOIN records USING (seq)"
            f" WHERE {condition} ORDER BY id, place LIMIT {EXAMPLES}"
        )
        examples = [f"{name}: {store.text(number)}" for name, number in rows]
        removed.add_some(rule, examples, _remove(store, condition))
    store.db.execute("DELETE FROM uses WHERE (seq, role, place) IN (FROM removed)")
    for table in ("negatives", "answers", "linked"):
        store.db.execute(f"DROP TABLE {table}")


def _remove(store: Store, condition: str) -> int:
    """Move what fulfils a condition from `negatives` to `removed`; return how many these are."""
    before = store.number("SELECT count(*) FROM removed")
    store.db.execute(f"""
        INSERT INTO removed SELECT seq, role, place FROM negatives WHERE {condition};
        DELETE FROM negatives WHERE (seq, role, place) IN (FROM removed)""")
    return store.number("SELECT count(*) FROM removed") - before


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
        name: {k for seen in read_keys(folder, name) for k in seen.each()}
        for name in dict.fromkeys(judged for judged, _ in pairs)
    }
    shared_keys: dict[tuple[str, str], set[bytes]] = {pair: set() for pair in pairs}
    for name in TRAINED:
        for seen in read_keys(folder, name):
            for judge, trained in pairs:
                if trained == name:
                    shared_keys[judge, name].update(k for k in seen.each() if k in judged[judge])
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
    store.db.execute("CREATE TEMP TABLE shown (split INTEGER, hi UBIGINT, lo UBIGINT)")
    store.db.execute("CREATE TEMP TABLE owners (split INTEGER, owner VARCHAR)")
    manifest = Manifest.load(folder)
    splits = list(manifest.splits)
    for number, name in enumerate(splits):
        done, total = 0, manifest.records(name)
        for seen in read_keys(folder, name):
            hi, lo = halves(seen.keys)
            store.insert("shown", split=np.full(len(hi), number), hi=hi, lo=lo)
            if CONTROL in splits:
                of = np.full(len(seen.groups), number)
                store.insert("owners", split=of, owner=pa.array(seen.groups, pa.string()))
            done += seen.records
            progress(f"prove {name}", done, total)
    texts = _shown_texts(store, folder, splits)
    shared = _shared(store, texts)
    _refuse(folder, shared)
    for table in ("shown", "owners"):
        store.db.execute(f"DROP TABLE {table}")
    trained = np.any([texts[name] for name in TRAINED if name in texts], axis=0)
    numbers, hi = store.arrays("SELECT num, hi FROM texts")
    return Proof(shared, distinct(hi[trained[numbers]]))


def _shown_texts(store: Store, folder: Path, splits: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Return for each split whether its shards contain the text with a number."""
    texts = np.zeros((len(splits), store.texts), bool)
    missing = np.zeros(len(splits), np.int64)
    query = "SELECT split, coalesce(num, -1) FROM shown LEFT JOIN texts USING (hi, lo)"
    for batch in store.batches(query):
        numbers, nums = (column.to_numpy() for column in batch.columns)
        texts[numbers, nums] = True
        missing += np.bincount(numbers[nums < 0], minlength=len(splits))
    for name, count in zip(splits, missing.tolist(), strict=True):
        if count:
            raise DataError(
                f"{folder}: {name} contains {count} text(s) of no record; report this bug"
            )
    return dict(zip(splits, texts, strict=True))


def _shared(store: Store, texts: dict[str, NDArray[np.bool_]]) -> dict[str, int]:
    """Count the texts, and the families of near duplicates, that two splits have in common.

    Under the knowledge protocol also those of eval in gl that more than one component has, and the
    groups in two splits.

    Args:
        store: The store.
        texts: For each split whether it has the text with a number.
    """
    pairs = _kept_apart(texts)
    family = store.families()
    families = {name: np.zeros(len(family), bool) for name in texts}
    for name, has in texts.items():
        families[name][family[has]] = True
    shared = {}
    for prefix, what, shown in (("", "num", texts), ("near_", "family", families)):
        for judged, trained in pairs:
            shared[f"{prefix}{judged}_{trained}"] = int((shown[judged] & shown[trained]).sum())
        if CONTROL in texts:
            (others,) = store.arrays(
                f"SELECT {what} FROM placed JOIN uses USING (seq) JOIN families USING (num)"
                f" WHERE split IN ('eval', 'gl') GROUP BY {what}"
                " HAVING count(DISTINCT component) > 1"
            )
            shared[f"{prefix}eval_gl"] = int((shown["eval"] & shown["gl"])[others].sum())
    if CONTROL in texts:
        owners = "SELECT owner FROM owners WHERE split = ?"
        both = f"SELECT count(*) FROM ({owners} INTERSECT {owners})"
        numbers = {name: number for number, name in enumerate(texts)}
        for judged, trained in pairs:
            count = store.number(both, numbers[judged], numbers[trained])
            shared[f"group_{judged}_{trained}"] = count
    return shared


def _refuse(folder: Path, shared: dict[str, int]) -> None:
    if any(shared.values()):
        raise DataError(f"{folder}: eval shares texts with training ({shared}); report this bug")


class _Shard(NamedTuple):
    """One shard, with a manifest of nothing else."""

    manifest: Manifest
    split: str


class Seen(NamedTuple):
    """The keys of the texts of a shard, joined, the groups of its records, and their number."""

    keys: bytes
    groups: list[str]
    records: int

    def each(self) -> Iterator[bytes]:
        """Yield the keys."""
        for place in range(0, len(self.keys), KEY_BYTES):
            yield self.keys[place : place + KEY_BYTES]

    def hashes(self) -> NDArray[np.uint64]:
        """Return the first 8 bytes of the keys."""
        return halves(self.keys)[0]


def read_keys(folder: Path, split: str) -> Iterator[Seen]:
    """Yield what each shard of a split contains."""
    manifest = Manifest.load(folder)
    shards = manifest.shards(split)
    alone = 1 + _RECORDS_ALONE // max((shard.records for shard in shards), default=1)
    jobs = (_Shard(replace(manifest, splits={split: [shard]}), split) for shard in shards)
    return map_in_order(_seen, jobs, alone, phase=f"prove {split}")


def _seen(shard: _Shard) -> Seen:
    records = list(read_records(shard.manifest, shard.split))
    texts = (text for record in records for text in record.texts())
    return Seen(b"".join(map(key, texts)), [r.group for r in records if r.group], len(records))
