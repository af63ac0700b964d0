"""Records -> components that must stay whole, in the store.

Records that share a group or any query, positive or passage, equal after normalisation or a near
duplicate, are one component. It lands in one split, and its records get one group: none is ever a
negative of another. Independent of the order in which records were read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby

from lbr_ds.corpora.near import BANDS, Forest, families, likeness, pairs_of_words
from lbr_ds.corpora.reading import Progress, Tally
from lbr_ds.corpora.store import NEGATIVE, PASSAGE, POSITIVE, QUERY, Store
from lbr_ds.records import Record

SAME = 0.9  # records alike in so many of their word pairs are one record twice


def find_families(store: Store, threshold: float, progress: Progress | None) -> None:
    """Give each text its family: itself and its near duplicates."""

    def told(band: int) -> None:
        if progress:
            progress("near duplicates", band, BANDS)

    forest = families(store.signatures_path, store.texts, threshold, store.text, told)
    pairs = ((number, forest.root(number)) for number in range(store.texts))
    store.db.executemany("INSERT INTO families VALUES (?, ?)", pairs)


def drop_twins(store: Store, dropped: Tally) -> None:
    """Leave out records that are another one again, with hardly a word changed.

    Of those whose texts are of the same families, in the order of their ids, each goes whose word
    pairs are alike in `SAME` with one that stays.
    """
    store.db.execute("CREATE TEMP TABLE twins (identity BLOB, id TEXT, seq INTEGER)")
    store.db.executemany("INSERT INTO twins VALUES (?, ?, ?)", _identities(store))
    query = (
        "SELECT identity, seq, body FROM twins JOIN records USING (seq) WHERE identity IN"
        " (SELECT identity FROM twins GROUP BY identity HAVING count(*) > 1)"
        " ORDER BY identity, twins.id"
    )
    gone = []
    for _, rows in groupby(store.db.execute(query), key=lambda row: row[0]):
        stay: list[set[str]] = []
        for _, seq, body in rows:
            record = Record(**json.loads(body))
            words = pairs_of_words(" ".join([record.query, *record.positives, record.text]))
            if any(likeness(words, other) >= SAME for other in stay):
                gone.append(seq)
                dropped.add("near_duplicate", f"{record.id}: {record.query or record.text}")
            else:
                stay.append(words)
    for seq in gone:
        store.db.execute("DELETE FROM uses WHERE seq = ?", (seq,))
        store.db.execute("DELETE FROM records WHERE seq = ?", (seq,))
    store.db.execute("DROP TABLE twins")


def _identities(store: Store) -> Iterator[tuple[bytes, str, int]]:
    """(hash of the families of its query, answers and passage, id, seq) of each record."""
    rows = store.db.execute(
        "SELECT seq, id, role, family FROM uses JOIN families USING (num) JOIN records USING (seq)"
        " WHERE role != ? ORDER BY seq, role, family", (NEGATIVE,),
    )  # fmt: skip
    for (seq, name), parts in groupby(rows, key=lambda row: (row[0], row[1])):
        text = ",".join(f"{role}:{family}" for _, _, role, family in parts)
        yield blake2b(text.encode(), digest_size=16).digest(), name, seq


def unite(store: Store, seed: int) -> None:
    """Fill `members` and `components`. Holds four bytes a record and a text in memory."""
    first = store.texts  # records are numbered after the texts
    total = store.number("SELECT max(seq) FROM records") + 1
    forest = Forest(first + total)
    links = "SELECT seq, family FROM uses JOIN families USING (num) WHERE role != ?"
    for seq, family in store.db.execute(links, (NEGATIVE,)):
        forest.unite(first + seq, family)
    grouped = store.db.execute(
        "SELECT own_group, seq FROM records WHERE own_group != '' ORDER BY own_group"
    )
    for _, rows in groupby(grouped, key=lambda row: row[0]):
        one, *others = (seq for _, seq in rows)
        for other in others:
            forest.unite(first + one, first + other)
    seqs = (seq for (seq,) in store.db.execute("SELECT seq FROM records ORDER BY seq"))
    members = ((seq, forest.root(first + seq)) for seq in seqs)
    store.db.executemany("INSERT INTO members VALUES (?, ?)", members)
    found = store.db.execute(
        "SELECT component, min(nullif(own_group, '')), min(id), count(*), sum(pair)"
        " FROM members JOIN records USING (seq) GROUP BY component"
    )
    rows = (_component(seed, *row) for row in found)
    store.db.executemany("INSERT INTO components VALUES (?, ?, ?, ?, ?)", rows)


def _component(
    seed: int, component: int, group: str | None, first: str, size: int, pairs: int
) -> tuple[int, str, bytes, int, int]:
    label = group or f"record:{first}"
    # A random number of the component's own: other components do not move it.
    draw = blake2b(f"{seed}:{label}".encode(), digest_size=16).digest()
    return component, label, draw, size, pairs


def largest(store: Store) -> tuple[int, str, int]:
    """The component of the most records: number, label, size."""
    query = "SELECT component, label, size FROM components ORDER BY size DESC, label LIMIT 1"
    number, label, size = store.db.execute(query).fetchone()
    return number, label, size


def most_shared(store: Store, component: int) -> tuple[str, int]:
    """The text that most records of a component have, and how many: why a large one is large.

    Near duplicates of it count as the text.
    """
    text, number = store.db.execute(
        "SELECT min(text), number FROM texts JOIN families USING (num) JOIN"
        " (SELECT family, count(DISTINCT seq) AS number FROM members JOIN uses USING (seq)"
        "  JOIN families USING (num) WHERE component = ? AND role IN (?, ?, ?)"
        "  GROUP BY family ORDER BY number DESC, family LIMIT 1) AS most"
        " ON most.family = families.family", (component, QUERY, POSITIVE, PASSAGE),
    ).fetchone()  # fmt: skip
    return text, number
