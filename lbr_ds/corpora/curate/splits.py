"""Components -> gl, cl and eval, in the store's `placed`; see `knowledge.py` for the other way."""

from __future__ import annotations

import math

from lbr_ds.config import SPLITS, SplitConfig
from lbr_ds.corpora.curate.groups import largest, most_shared
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import Store
from lbr_ds.errors import DataError

_FILLED = ("eval", "cl", "gl")  # in this order, so that a small corpus still has a judge


def divide(store: Store, sizes: SplitConfig, dropped: Tally) -> None:
    """Put each component into the first of eval, cl, gl that has room; shuffled by seed.

    Plain passages cannot be asked for, so beside pairs they go to gl only; a passage in one
    component with a pair of eval or cl is dropped. Raises DataError when a split cannot be filled.
    """
    pairs, total = _totals(store)
    room = _rooms(pairs, total, sizes)
    store.db.execute("CREATE TEMP TABLE shares (component INTEGER PRIMARY KEY, split TEXT)")
    got = dict.fromkeys(SPLITS, 0)
    drawn = store.db.execute("SELECT component, size, pairs FROM components ORDER BY draw")
    for component, records, own_pairs in drawn:
        for name in _FILLED:
            size = records if name == "gl" or not pairs else own_pairs
            if 0 < size <= room[name]:
                room[name] -= size
                got[name] += size
                store.db.execute("INSERT INTO shares VALUES (?, ?)", (component, name))
                break
    check_filled(store, sizes, got)
    _count(store, dropped, pairs)
    only_pairs = " WHERE split = 'gl' OR pair" if pairs else ""
    store.db.execute(
        "INSERT INTO placed SELECT seq, component, split FROM members JOIN shares USING (component)"
        f" JOIN records USING (seq){only_pairs}"
    )
    store.db.execute("DROP TABLE shares")


def _totals(store: Store) -> tuple[int, int]:
    """How many pairs, and how many records, passages included."""
    found: tuple[int, int] = store.db.execute(
        "SELECT sum(pairs), sum(size) FROM components"
    ).fetchone()
    return found


def _rooms(pairs: int, total: int, sizes: SplitConfig) -> dict[str, float]:
    """How many records each split may take."""
    if not sizes.are_shares:
        return {name: getattr(sizes, name) for name in SPLITS}
    room = {name: max(1.0, round(getattr(sizes, name) * (pairs or total))) for name in SPLITS}
    if sizes.gl + sizes.cl + sizes.eval > 1 - 1e-9:
        room["gl"] = math.inf  # also what is too large for the others
    elif pairs:
        room["gl"] += total - pairs
    return room


def _count(store: Store, dropped: Tally, pairs: int) -> None:
    """Count records of components that found no room, and passages that may not go with pairs."""
    left = "FROM components LEFT JOIN shares USING (component) JOIN members USING (component)"
    rules = {"beyond_the_sizes": "split IS NULL"}
    rules |= {f"passage_in_{n}": f"split = '{n}' AND NOT pair" for n in ("cl", "eval") if pairs}
    for rule, condition in rules.items():
        tell_dropped(store, dropped, rule, f"{left} JOIN records USING (seq) WHERE {condition}")


def tell_dropped(store: Store, dropped: Tally, rule: str, part: str) -> None:
    """Count the records that `part` (FROM ... WHERE ...) selects as left out by `rule`."""
    number = store.number(f"SELECT count(*) {part}")
    query = (
        "SELECT id, (SELECT min(text) FROM uses JOIN texts USING (num)"
        f" WHERE uses.seq = records.seq AND place = 0 AND role IN (0, 2))"
        f" {part} ORDER BY id LIMIT 3"
    )
    rows = store.db.execute(query).fetchall()
    for place, (name, text) in enumerate(rows):
        # The last example stands for all that are not told.
        dropped.add(rule, f"{name}: {text}", 1 if place < len(rows) - 1 else number - place)


def check_filled(store: Store, sizes: SplitConfig, got: dict[str, int]) -> None:
    """Raise DataError for a split that is empty, or short of its count; got: by split."""
    for name in got:
        asked = getattr(sizes, name)
        if got[name] and (sizes.are_shares or got[name] == asked):
            continue
        _, total = _totals(store)
        count = store.number("SELECT count(*) FROM components")
        number, label, size = largest(store)
        text, shared = most_shared(store, number)
        raise DataError(
            f"data.splits.{name}={asked:g} cannot be filled (got {got[name]}): after cleaning "
            f"there are {total} records in {count} groups that must stay whole, the largest of "
            f"{size} ({label}), {text[:40]!r} in {shared} of them; "
            "ask for less, add sources, or drop what ties them"
        )
