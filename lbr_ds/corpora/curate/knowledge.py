"""The knowledge protocol: components -> what stage 1 states, what stage 2 trains on, what is asked.

An entity is what the recipe's `group` names, the same in all sources. A **fact** is a record or a
passage that states something of it; a **pair** is a question that stage 2 may train on and
evaluation may ask. Entities are drawn by seed, together with all that shares a text with them:

| entities                     | their facts | their pairs | so evaluation asks for             |
|------------------------------|-------------|-------------|------------------------------------|
| A, as many as `splits.cl`    | gl          | cl          |                                    |
| B, as many as `splits.eval`  | gl          | eval        | what only stage 1 can have taught  |
| C, `splits.control`          | left out    | control     | what was taught nowhere            |
| without pairs                | gl          |             |                                    |

What B gains beyond C was learnt as a fact; what both gain alike is style, or a leak. Sizes count
pairs. A pair whose entity has no fact could be told from no side and is left out.

One source may serve as both (`role: both`): of an entity's records the first, by seed and id, is
its fact and the others are its pairs; an entity of one record is a fact alone.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

from lbr_ds.config import CONTROL, SplitConfig
from lbr_ds.corpora.curate.splits import check_filled, tell_dropped
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import POSITIVE, QUERY, Store
from lbr_ds.errors import DataError

# Whether the questions of a source of this role are pairs; None: `cast` decides.
IS_PAIR = {"pair": True, "fact": False, "both": None}
_FILLED = (CONTROL, "eval", "cl")  # in this order, so that a small corpus still has both judges


def cast(store: Store, seed: int, dropped: Tally) -> None:
    """Decide which records of role both are facts, and leave out pairs without a fact.

    Independent of the order in which records were read. Raises DataError when no pair is left.
    """
    store.db.create_function("drawn", 1, lambda name: _draw(seed, name), deterministic=True)
    store.db.execute(
        "CREATE TEMP TABLE later AS SELECT seq FROM (SELECT seq, row_number() OVER"
        " (PARTITION BY own_group ORDER BY drawn(id)) AS place FROM records"
        "  WHERE pair IS NULL AND own_group != '') WHERE place > 1"
    )
    store.db.execute("UPDATE records SET pair = seq IN (SELECT seq FROM later) WHERE pair IS NULL")
    store.db.execute(
        "CREATE TEMP TABLE untold AS SELECT seq FROM records WHERE pair AND own_group NOT IN"
        " (SELECT own_group FROM records WHERE NOT pair AND own_group != '')"
    )
    found = "FROM records WHERE seq IN (SELECT seq FROM untold)"
    tell_dropped(store, dropped, "pair_without_fact", found)
    for table in ("uses", "records"):
        store.db.execute(f"DELETE FROM {table} WHERE seq IN (SELECT seq FROM untold)")
    store.db.execute("DROP TABLE later")
    store.db.execute("DROP TABLE untold")
    if not store.number("SELECT EXISTS (SELECT 1 FROM records WHERE pair)"):
        raise DataError(
            "data.protocol=knowledge: no pair is left whose entity has a fact; name the column of "
            "the entity in columns.group of each source, the same ids in facts and pairs"
        )


def _draw(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()


def divide_entities(store: Store, sizes: SplitConfig, dropped: Tally) -> None:
    """Put each component into the first of control, eval, cl that has room for its pairs, in the
    order of their draws. Raises DataError when a split cannot be filled."""
    pairs = store.number("SELECT sum(pairs) FROM components")
    asked = {name: getattr(sizes, name) for name in _FILLED}
    room = dict(asked)
    if sizes.are_shares:
        room = {name: max(1.0, round(share * pairs)) for name, share in asked.items()}
        if sum(asked.values()) > 1 - 1e-9:
            room["cl"] = math.inf  # also what is too large for the others
    got = dict.fromkeys(_FILLED, 0)
    store.db.execute("CREATE TEMP TABLE shares (component INTEGER PRIMARY KEY, split TEXT)")
    drawn = store.db.execute("SELECT component, pairs FROM components ORDER BY draw")
    for component, size in drawn:
        name = "gl" if not size else next((n for n in _FILLED if size <= room[n]), None)
        if name is None:
            continue
        if size:
            room[name] -= size
            got[name] += size
        store.db.execute("INSERT INTO shares VALUES (?, ?)", (component, name))
    check_filled(store, sizes, got)
    part = "FROM members LEFT JOIN shares USING (component) JOIN records USING (seq) WHERE"
    tell_dropped(store, dropped, "beyond_the_sizes", f"{part} split IS NULL")
    tell_dropped(store, dropped, "fact_of_control", f"{part} split = '{CONTROL}' AND NOT pair")
    store.db.execute(
        "INSERT INTO placed SELECT seq, component, CASE WHEN pair THEN split ELSE 'gl' END"
        f" FROM members JOIN shares USING (component) JOIN records USING (seq)"
        f" WHERE pair OR split != '{CONTROL}'"
    )
    store.db.execute("DROP TABLE shares")


def entities_table(store: Store) -> dict[str, int]:
    """How many entities each split asks for, and of how many gl holds facts; of those, how many
    have no pair at all."""
    asked = {
        name: store.number(
            "SELECT count(DISTINCT own_group) FROM placed JOIN records USING (seq)"
            " WHERE split = ? AND pair",
            name,
        )
        for name in ("cl", "eval", CONTROL)
    }
    told = "FROM placed JOIN records USING (seq) WHERE NOT pair AND own_group != ''"
    paired = "(SELECT own_group FROM placed JOIN records USING (seq) WHERE pair)"
    return {
        **asked,
        "gl": store.number(f"SELECT count(DISTINCT own_group) {told}"),
        "gl_facts_only": store.number(
            f"SELECT count(DISTINCT own_group) {told} AND own_group NOT IN {paired}"
        ),
    }


def told_table(store: Store) -> dict[str, Any]:
    """How many of eval's queries and answers stand in gl too, among the facts of their own entity.

    {"queries", "near_queries", "passages", "near_passages"}: equal after normalisation, and with
    near duplicates. That is the protocol's point and no leak; `leaks.py` proves where they stand.
    """
    part = (
        "SELECT count(DISTINCT {what}) FROM placed JOIN uses USING (seq) JOIN families USING (num)"
        " WHERE split = 'eval' AND role = {role} AND {what} IN (SELECT {what} FROM placed"
        " JOIN uses USING (seq) JOIN families USING (num) WHERE split = 'gl')"
    )
    return {
        f"{prefix}{name}": store.number(part.format(what=what, role=role))
        for prefix, what in (("", "num"), ("near_", "family"))
        for name, role in (("queries", QUERY), ("passages", POSITIVE))
    }
