"""Assign records to components, which stay in one split, and to groups of no mutual negatives.

A component is transitive: two records that share a group of the source, or a query, positive or
passage (equal after normalisation, or near duplicates), are in one component, and so is whatever
shares something with either of them.

A component may be half of a corpus that was made from templates, and a group of that size would
leave hardly any negatives. So groups are not transitive without limit. The records of one group of
the source are always one group, and so are those of equal queries. The records of a cluster of
texts (`clusters.py`) are joined too, the rarest texts first, as long as the group has at most
`MAX_GROUP_SHARE` of the records. Texts that more records have, as "This condition is inherited in
an autosomal recessive pattern", join nothing.

The result does not depend on the order in which records were read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import closing
from hashlib import blake2b
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.clusters import cluster_families
from lbr_ds.corpora.curate.near_duplicates import Comparison, Forest, families
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import NEGATIVE, PASSAGE, POSITIVE, QUERY, Store, Texts
from lbr_ds.records import Record
from lbr_ds.system.progress import Progress

# A shared text joins records into a group of at most this share of all, or of this many records.
MAX_GROUP_SHARE, MAX_SMALL_GROUP = 0.02, 64
SAME_RECORD = 0.9  # Jaccard index of the word pairs from which on two records are duplicates


def find_families(store: Store, threshold: float, progress: Progress) -> None:
    """Fill `families`: the family of near duplicates of each text, and its cluster in it."""
    with closing(Texts(store.path)) as texts:
        comparison = Comparison(store.signatures_path, threshold, texts)
        forest = families(comparison, store.texts, progress)
        leaders = array("i", range(store.texts))
        done = 0
        for pairs in cluster_families(comparison, _families(store, forest)):
            for number, leader in pairs:
                leaders[number] = leader
            done += len(pairs)
            progress("cluster near duplicates", done, None)
    # Not earlier: while other processes read the file, nothing may be written to it.
    rows = ((number, forest.root(number), leader) for number, leader in enumerate(leaders))
    store.db.executemany("INSERT INTO families VALUES (?, ?, ?)", rows)


def _families(store: Store, forest: Forest) -> Iterator[NDArray[np.int64]]:
    """Yield the texts of each family of two or more, ordered by key."""
    store.db.execute("CREATE TEMP TABLE near (num INTEGER PRIMARY KEY, family INTEGER)")
    for number in range(store.texts):
        root = forest.root(number)
        if root != number:
            both = ((number, root), (root, root))
            store.db.executemany("INSERT OR IGNORE INTO near VALUES (?, ?)", both)
    rows = store.db.execute(
        "SELECT family, num FROM near JOIN texts USING (num) ORDER BY family, key"
    )
    for _, members in groupby(rows, key=lambda row: row[0]):
        yield np.array([number for _, number in members])
    store.db.execute("DROP TABLE near")


def drop_near_duplicates(store: Store, dropped: Tally) -> None:
    """Drop records that repeat another one with hardly a word changed.

    Among records whose texts belong to the same families, in the order of their ids, a record is
    dropped if its word pairs have a Jaccard index of `SAME_RECORD` with one that stays. A fact does
    not duplicate a pair, nor a record that only evaluates one to train on.
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
            runs = shingles(" ".join([record.query, *record.positives, record.text]))
            if any(jaccard(runs, other) >= SAME_RECORD for other in stay):
                gone.append(seq)
                dropped.add("near_duplicate", f"{record.id}: {record.query or record.text}")
            else:
                stay.append(runs)
    for seq in gone:
        store.db.execute("DELETE FROM uses WHERE seq = ?", (seq,))
        store.db.execute("DELETE FROM records WHERE seq = ?", (seq,))
    store.db.execute("DROP TABLE twins")


def _identities(store: Store) -> Iterator[tuple[bytes, str, int]]:
    """Yield (hash of the families of query, answers and passage; id; seq) of each record."""
    rows = store.db.execute(
        "SELECT seq, id, pair, judges, role, family FROM uses JOIN families USING (num)"
        " JOIN records USING (seq) WHERE role != ? ORDER BY seq, role, family",
        (NEGATIVE,),
    )
    for (seq, name, pair, judges), parts in groupby(rows, key=lambda row: row[:4]):
        uses = [(role, family) for *_, role, family in parts]
        text = ",".join(f"{role}:{family}" for role, family in uses)
        text += ":fact" * (pair == 0 and uses[0][0] == QUERY) + ":eval" * judges
        yield blake2b(text.encode(), digest_size=16).digest(), name, seq


def group_records(store: Store, seed: int) -> None:
    """Fill `members`, `components` and `groups`.

    Uses 12 bytes of memory per record and 4 per text, and holds the records of one text.
    """
    first = store.texts  # records are numbered after the texts
    total = store.number("SELECT max(seq) FROM records") + 1
    forest = Forest(first + total)
    links = "SELECT seq, family FROM uses JOIN families USING (num) WHERE role != ?"
    for seq, family in store.db.execute(links, (NEGATIVE,)):
        forest.unite(first + seq, family)
    for seqs in _by_group(store):
        for seq in seqs:
            forest.unite(first + seqs[0], first + seq)
    groups = _groups(store, total)
    every = (seq for (seq,) in store.db.execute("SELECT seq FROM records ORDER BY seq"))
    members = ((seq, forest.root(first + seq), groups.root(seq)) for seq in every)
    store.db.executemany("INSERT INTO members VALUES (?, ?, ?)", members)
    store.db.execute(
        "INSERT INTO groups SELECT grp, coalesce(min(nullif(own_group, '')), 'record:' || min(id))"
        " FROM members JOIN records USING (seq) GROUP BY grp"
    )
    components = store.db.execute(
        "SELECT component, min(nullif(own_group, '')), min(id), count(*), sum(pair)"
        " FROM members JOIN records USING (seq) GROUP BY component"
    )
    rows = (_component(seed, *row) for row in components)
    store.db.executemany("INSERT INTO components VALUES (?, ?, ?, ?, ?)", rows)


def _by_group(store: Store) -> Iterator[list[int]]:
    """Yield the records of each group of the source."""
    grouped = store.db.execute(
        "SELECT own_group, seq FROM records WHERE own_group != '' ORDER BY own_group"
    )
    for _, rows in groupby(grouped, key=lambda row: row[0]):
        yield [seq for _, seq in rows]


def _groups(store: Store, total: int) -> Forest:
    """Return the records' groups."""
    forest, sizes = Forest(total), array("i", [1]) * total
    queries = store.db.execute("SELECT num, seq FROM uses WHERE role = ? ORDER BY num", (QUERY,))
    by_query = ([seq for _, seq in rows] for _, rows in groupby(queries, key=lambda row: row[0]))
    for seqs in chain(_by_group(store), by_query):
        _join(forest, sizes, {forest.root(seq) for seq in seqs})
    most = max(MAX_SMALL_GROUP, int(MAX_GROUP_SHARE * store.number("SELECT count(*) FROM records")))
    for seqs in _ties(store):
        roots = {forest.root(seq) for seq in seqs}
        if sum(sizes[root] for root in roots) <= most:
            _join(forest, sizes, roots)
    return forest


def _join(forest: Forest, sizes: array[int], roots: set[int]) -> None:
    """Join the sets of `roots`."""
    whole = sum(sizes[root] for root in roots)
    low = min(roots)
    for root in roots:
        forest.unite(low, root)
    sizes[low] = whole


def _ties(store: Store) -> Iterator[list[int]]:
    """Yield the records of each cluster of texts that two or more have, the smallest first."""
    store.db.execute("CREATE INDEX IF NOT EXISTS families_cluster ON families (cluster)")
    store.db.execute(
        "CREATE TEMP TABLE tied AS SELECT cluster, count(DISTINCT seq) AS number FROM uses"
        " JOIN families USING (num) WHERE role != ? GROUP BY cluster HAVING number > 1",
        (NEGATIVE,),
    )
    rows = store.db.execute(
        "SELECT DISTINCT number, key, tied.cluster, seq FROM tied"
        " JOIN texts ON texts.num = tied.cluster"
        " JOIN families ON families.cluster = tied.cluster JOIN uses ON uses.num = families.num"
        " WHERE role != ? ORDER BY number, key, seq",
        (NEGATIVE,),
    )
    for _, cluster in groupby(rows, key=lambda row: row[:3]):
        yield [seq for *_, seq in cluster]
    store.db.execute("DROP TABLE tied")


def _component(
    seed: int, component: int, group: str | None, first: str, size: int, pairs: int
) -> tuple[int, str, bytes, int, int]:
    label = group or f"record:{first}"
    # A random number that does not depend on other components.
    draw = blake2b(f"{seed}:{label}".encode(), digest_size=16).digest()
    return component, label, draw, size, pairs


def largest(store: Store) -> tuple[int, str, int]:
    """Return number, label and size of the component with the most records."""
    query = "SELECT component, label, size FROM components ORDER BY size DESC, label LIMIT 1"
    number, label, size = store.db.execute(query).fetchone()
    return number, label, size


def most_shared(store: Store, component: int) -> tuple[str, int]:
    """Return the text that most records of a component share, and by how many.

    It explains why a large component is large. Near duplicates count as the text.
    """
    text, number = store.db.execute(
        "SELECT min(text), number FROM texts JOIN families USING (num) JOIN"
        " (SELECT family, count(DISTINCT seq) AS number FROM members JOIN uses USING (seq)"
        "  JOIN families USING (num) WHERE component = ? AND role IN (?, ?, ?)"
        "  GROUP BY family ORDER BY number DESC, family LIMIT 1) AS most"
        " ON most.family = families.family",
        (component, QUERY, POSITIVE, PASSAGE),
    ).fetchone()
    return text, number
