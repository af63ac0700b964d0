"""Divide components by the knowledge protocol: does stage 1 teach facts that stage 2 can use?

An entity is what the recipe's `group` names, the same in all sources. A **fact** is a record or a
passage that states something about it; a **pair** is a question for stage 2 and for evaluation.
Entities are drawn by seed, together with everything that shares a text with them:

| entities                     | their facts | their pairs | evaluation therefore asks for      |
|------------------------------|-------------|-------------|------------------------------------|
| A, as many as `splits.cl`    | gl          | cl          |                                    |
| B, as many as `splits.eval`  | gl          | eval        | what only stage 1 can have taught  |
| C, `splits.control`          | dropped     | control     | what was taught nowhere            |
| without pairs                | gl          |             |                                    |

If the gain on B exceeds the gain on C, the difference is knowledge; a gain on both is style, or a
leak. Sizes count pairs. A pair whose entity has no fact is dropped.

One source may serve as both (`role: both`): the first of an entity's records, by seed and id, is
its fact and the others are its pairs; the record of an entity with only one is a fact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lbr_ds.config import CONTROL, SplitConfig
from lbr_ds.corpora.curate.groups import draws
from lbr_ds.corpora.curate.splits import check_filled, count_dropped, share_out
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import POSITIVE, QUERY
from lbr_ds.errors import DataError

_FILLED = (CONTROL, "eval", "cl")  # in this order, so that a small corpus still has both judges


def choose_facts(store: Store, seed: int, dropped: Tally) -> None:
    """Decide which records of role `both` are facts, and drop pairs without a fact.

    The result does not depend on the order in which records were read.

    Raises:
        DataError: No pair is left.
    """
    store.define("drawn", draws(seed))
    store.db.execute(
        "CREATE TEMP TABLE later AS SELECT seq FROM (SELECT seq, row_number() OVER"
        " (PARTITION BY own_group ORDER BY drawn(id)) AS place FROM records"
        "  WHERE pair IS NULL AND own_group != '') WHERE place > 1"
    )
    store.db.execute("UPDATE records SET pair = seq IN (SELECT seq FROM later) WHERE pair IS NULL")
    store.db.execute(
        "CREATE TEMP TABLE factless AS SELECT seq FROM records WHERE pair AND own_group NOT IN"
        " (SELECT own_group FROM records WHERE NOT pair AND own_group != '')"
    )
    part = "FROM records WHERE seq IN (SELECT seq FROM factless)"
    count_dropped(store, dropped, "pair_without_fact", part)
    store.delete_records(*store.arrays("FROM factless"))
    store.db.execute("DROP TABLE later")
    store.db.execute("DROP TABLE factless")
    if not store.number("SELECT EXISTS (SELECT 1 FROM records WHERE pair)"):
        raise DataError(
            "data.protocol=knowledge: no pair is left whose entity has a fact; name the column of "
            "the entity in columns.group of each source, with equal values in facts and pairs"
        )


def divide_entities(store: Store, sizes: SplitConfig, dropped: Tally) -> None:
    """Put each component, in random order, into the first of control, eval, cl with room.

    Raises:
        DataError: A split cannot be filled.
    """
    pairs = store.number("SELECT sum(pairs) FROM components")
    requested = {name: getattr(sizes, name) for name in _FILLED}
    room = dict(requested)
    if sizes.are_shares:
        room = {name: max(1.0, round(share * pairs)) for name, share in requested.items()}
        if sum(requested.values()) > 1 - 1e-9:
            room["cl"] = math.inf  # including what is too large for the others
    components, own = store.arrays("SELECT component, pairs FROM components ORDER BY draw")
    splits = {name: (own, room[name]) for name in _FILLED}
    got = share_out(store, components, {**splits, "gl": ((own == 0).astype(np.int32), math.inf)})
    del got["gl"]
    check_filled(store, sizes, got)
    part = "FROM members LEFT JOIN shares USING (component) JOIN records USING (seq) WHERE"
    count_dropped(store, dropped, "beyond_the_sizes", f"{part} split IS NULL")
    count_dropped(store, dropped, "fact_of_control", f"{part} split = '{CONTROL}' AND NOT pair")
    store.db.execute(
        "INSERT INTO placed SELECT seq, component, CASE WHEN pair THEN split ELSE 'gl' END"
        f" FROM members JOIN shares USING (component) JOIN records USING (seq)"
        f" WHERE pair OR split != '{CONTROL}'"
    )
    store.db.execute("DROP TABLE shares")


def entities_table(store: Store) -> dict[str, int]:
    """Count the entities that each split asks for, and those with facts in gl."""
    asked_for = {
        name: store.number(
            "SELECT count(DISTINCT own_group) FROM placed JOIN records USING (seq)"
            " WHERE split = ? AND pair",
            name,
        )
        for name in ("cl", "eval", CONTROL)
    }
    stated = "FROM placed JOIN records USING (seq) WHERE NOT pair AND own_group != ''"
    paired = "(SELECT own_group FROM placed JOIN records USING (seq) WHERE pair)"
    return {
        **asked_for,
        "gl": store.number(f"SELECT count(DISTINCT own_group) {stated}"),
        "gl_facts_only": store.number(
            f"SELECT count(DISTINCT own_group) {stated} AND own_group NOT IN {paired}"
        ),
    }


def eval_texts_in_gl(store: Store) -> dict[str, Any]:
    """Count eval's queries and answers that occur in gl, among the facts of their own entity.

    This is the purpose of the protocol, not a leak; `leaks.py` proves where they occur.

    Returns:
        {"queries", "near_queries", "passages", "near_passages"}: equal after normalisation, and
        including near duplicates.
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
