"""Divide components into gl, cl and eval (protocol random; see `knowledge.py` for the other)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lbr_ds.config import SPLITS, SplitConfig
from lbr_ds.corpora.curate.groups import largest, most_shared
from lbr_ds.corpora.curate.tally import EXAMPLES, Tally
from lbr_ds.corpora.store import Store
from lbr_ds.errors import DataError

_FILLED = ("eval", "cl", "gl")  # in this order, so that a small corpus still has an eval split
# Of each component: the records and pairs to train on, and the records that only evaluate.
_ALL = "SELECT component, size, pairs, 0 FROM components"
_COUNTED = """
    SELECT component, sum(NOT judges)::INTEGER, sum(pair AND NOT judges)::INTEGER,
        sum(judges)::INTEGER
    FROM components JOIN members USING (component) JOIN records USING (seq)
    GROUP BY component, draw"""


def divide(store: Store, sizes: SplitConfig, dropped: Tally) -> None:
    """Put each component, in random order, into the first of eval, cl, gl that has room.

    In a corpus with pairs, plain passages go to gl only, since nothing can ask for them; a passage
    in one component with a pair of eval or cl is dropped.

    With sources that only evaluate (role eval), eval is made of their records alone. Its size is a
    count of these, or a share of the records to train on; of a component that eval takes the other
    records are dropped, and of any other component the records that only evaluate.

    Raises:
        DataError: A split cannot be filled.
    """
    pairs, total = _totals(store)
    judging = store.number("SELECT count(*) FROM records WHERE judges")
    pairs -= store.number("SELECT count(*) FROM records WHERE judges AND pair")
    room = _rooms(pairs, total - judging, sizes)
    counted = _COUNTED if judging else _ALL
    components, records, own_pairs, judges = store.arrays(f"{counted} ORDER BY draw")
    wanted = {"eval": judges if judging else own_pairs, "cl": own_pairs, "gl": records}
    if not pairs:
        wanted |= dict.fromkeys(("eval", "cl") if not judging else ("cl",), records)
    got = share_out(store, components, {name: (wanted[name], room[name]) for name in _FILLED})
    check_filled(store, sizes, {name: got[name] for name in SPLITS})
    _count(store, dropped, pairs, judging)
    kept = ["(split = 'gl' OR pair)"] * (pairs > 0) + ["judges = (split = 'eval')"] * (judging > 0)
    only = f" WHERE {' AND '.join(kept)}" if kept else ""
    store.db.execute(
        "INSERT INTO placed SELECT seq, component, split FROM members JOIN shares USING (component)"
        f" JOIN records USING (seq){only}"
    )
    store.db.execute("DROP TABLE shares")


def share_out(
    store: Store,
    components: NDArray[np.int32],
    splits: Mapping[str, tuple[NDArray[np.int32], float]],
) -> dict[str, int]:
    """Put each component, in the order given, into the first split that has room.

    The result is in the temporary table `shares`.

    Args:
        store: The store.
        components: The components.
        splits: For each split the sizes that they have there (0: they do not go there), and how
            much it takes.

    Returns:
        The sizes of the splits.
    """
    store.db.execute("CREATE TEMP TABLE shares (component INTEGER, split VARCHAR)")
    left, got = np.arange(len(components)), {}
    for name, (sizes, room) in splits.items():
        taken = _filled(sizes[left], room)
        got[name] = int(sizes[left[taken]].sum())
        own = components[left[taken]]
        store.insert("shares", component=own, split=pa.repeat(pa.scalar(name), len(own)))
        left = left[~taken]
    return got


def _filled(sizes: NDArray[np.int32], room: float) -> NDArray[np.bool_]:
    """Return which of the sizes are taken, in their order, each if it still fits."""
    taken = np.zeros(len(sizes), bool)
    left = np.flatnonzero((sizes > 0) & (sizes <= room))
    while len(left):  # what does not fit now will not fit later
        ends = np.cumsum(sizes[left], dtype=np.int64)
        fit = int(np.searchsorted(ends, room, "right"))
        taken[left[:fit]] = True
        room -= int(ends[fit - 1])
        left = left[fit:]
        left = left[sizes[left] <= room]
    return taken


def _totals(store: Store) -> tuple[int, int]:
    """Return the number of pairs, and of records including passages."""
    pairs, total = store.rows("SELECT sum(pairs), sum(size) FROM components")[0]
    return pairs, total


def _rooms(pairs: int, total: int, sizes: SplitConfig) -> dict[str, float]:
    """Return how many records each split may take."""
    if not sizes.are_shares:
        return {name: getattr(sizes, name) for name in SPLITS}
    room = {name: max(1.0, round(getattr(sizes, name) * (pairs or total))) for name in SPLITS}
    if sizes.gl + sizes.cl + sizes.eval > 1 - 1e-9:
        room["gl"] = math.inf  # including what is too large for the others
    elif pairs:
        room["gl"] += total - pairs
    return room


def _count(store: Store, dropped: Tally, pairs: int, judging: int) -> None:
    """Count the records that are in no split: of components without room, or of the wrong kind."""
    left = "FROM components LEFT JOIN shares USING (component) JOIN members USING (component)"
    rules = {"beyond_the_sizes": "split IS NULL"}
    mixed = ("cl",) if judging else ("cl", "eval")
    rules |= {f"passage_in_{n}": f"split = '{n}' AND NOT pair" for n in mixed if pairs}
    if judging:
        rules["linked_to_eval"] = "split = 'eval' AND NOT judges"
        rules["linked_to_training"] = "split != 'eval' AND judges"
    for rule, condition in rules.items():
        count_dropped(store, dropped, rule, f"{left} JOIN records USING (seq) WHERE {condition}")


def count_dropped(store: Store, dropped: Tally, rule: str, part: str) -> None:
    """Count the records that `part` (FROM ... WHERE ...) selects as dropped by `rule`."""
    number = store.number(f"SELECT count(*) {part}")
    rows = store.rows(f"SELECT id, seq {part} ORDER BY id LIMIT {EXAMPLES}")
    records = [(name, store.body(seq)) for name, seq in rows]
    examples = [f"{name}: {record.query or record.text}" for name, record in records]
    dropped.add_some(rule, examples, number)


def check_filled(store: Store, sizes: SplitConfig, got: dict[str, int]) -> None:
    """Raise DataError for a split that is empty or has less than its count; got: sizes by split."""
    for name in got:
        requested = getattr(sizes, name)
        if got[name] and (sizes.are_shares or got[name] == requested):
            continue
        _, total = _totals(store)
        count = store.number("SELECT count(*) FROM components")
        number, label, size = largest(store)
        text, shared = most_shared(store, number)
        raise DataError(
            f"data.splits.{name}={requested:g} cannot be filled (got {got[name]}): after cleaning "
            f"there are {total} records in {count} set(s) of linked records that must stay "
            f"whole; the largest has {size} ({label}), and {shared} of them contain {text[:40]!r}; "
            "lower this size, add sources, or remove the text that they share"
        )
