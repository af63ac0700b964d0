"""Drop records whose ids are used before, and exact duplicates; number the texts of the others.

Of several equal records the first in reading order is kept. Texts are numbered in the order of
their first use. One process does this for all parts together, with SQL.
"""

from __future__ import annotations

from typing import NamedTuple

from lbr_ds.corpora.curate.tally import EXAMPLES, Tally
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import ROLE_BIT, SEQ_BIT, USE


class Repeated(NamedTuple):
    """Records whose ids are used before.

    Attributes:
        records: How many there are.
        first: Of the first ones the id, where it was read, and where it was used before.
    """

    records: int
    first: list[tuple[str, str, str]]


def repeated_ids(store: Store) -> Repeated:
    """Find the records whose ids earlier records have, into the temporary table `repeated`."""
    store.db.execute("""
        CREATE TEMP TABLE repeated AS SELECT seq, first FROM read_rows JOIN
            (SELECT id, min(seq) AS first FROM read_rows WHERE id IS NOT NULL
             GROUP BY id HAVING count(*) > 1) USING (id)
        WHERE seq > first""")
    examples = store.rows(
        """
        SELECT again.id, again.place, before.place
        FROM (FROM repeated ORDER BY seq LIMIT ?) AS shown
            JOIN read_rows AS again USING (seq) JOIN read_rows AS before ON before.seq = first
        ORDER BY again.seq""",
        EXAMPLES,
    )
    return Repeated(store.number("SELECT count(*) FROM repeated"), examples)


def drop_exact_duplicates(store: Store, dropped: Tally, removed: Tally) -> None:
    """Fill `records`, `uses` and `texts` with what stays, and count what cleaning left out.

    Args:
        store: The store, with the table of `repeated_ids`.
        dropped: Counts records.
        removed: Counts texts.
    """
    once = "seq NOT IN (SELECT seq FROM repeated)"
    rows = store.rows(
        f"""
        SELECT of_text, rule, count(*), arg_min(example, (seq, number), ?)
        FROM (SELECT seq, unnest(events, recursive := true),
                  generate_subscripts(events, 1) AS number
              FROM read_rows WHERE {once})
        GROUP BY of_text, rule""",
        EXAMPLES,
    )
    for of_text, rule, count, examples in rows:
        (removed if of_text else dropped).add_some(rule, examples, count)
    store.db.execute(f"""
        CREATE TEMP TABLE twins AS SELECT seq FROM read_rows JOIN
            (SELECT hi, lo, min(seq) AS first FROM read_rows WHERE hi IS NOT NULL AND {once}
             GROUP BY hi, lo HAVING count(*) > 1) USING (hi, lo)
        WHERE seq > first AND {once}""")
    first = [store.body(seq) for (seq,) in store.rows("FROM twins ORDER BY seq LIMIT ?", EXAMPLES)]
    examples = [f"{record.id}: {record.query or record.text}" for record in first]
    dropped.add_some("duplicate", examples, store.number("SELECT count(*) FROM twins"))
    stays = f"hi IS NOT NULL AND {once} AND seq NOT IN (FROM twins)"
    store.db.execute(f"""
        INSERT INTO records
        SELECT seq, id, source, own_group, instruction, document_instruction, pair, judges
        FROM read_rows WHERE {stays} ORDER BY seq""")
    _number_texts(store, stays)
    store.db.execute("DROP TABLE repeated")
    store.db.execute("DROP TABLE twins")


def _number_texts(store: Store, stays: str) -> None:
    """Fill `texts` and `uses`; stays: which rows."""
    used = f"(SELECT seq, unnest(uses, recursive := true) FROM read_rows WHERE {stays})"
    store.db.execute(f"""
        INSERT INTO texts SELECT row_number() OVER (ORDER BY first) - 1, hi, lo,
            first >> {SEQ_BIT}, (first >> {ROLE_BIT}) & 15, first & {(1 << ROLE_BIT) - 1}, signature
        FROM (SELECT hi, lo, min({USE}) AS first, arg_min(signature, seq) AS signature
              FROM {used} GROUP BY hi, lo)
        ORDER BY first""")
    store.db.execute(f"""
        INSERT INTO uses SELECT seq, role, place, num, chars
        FROM {used} JOIN texts USING (hi, lo) ORDER BY seq, role, place""")
