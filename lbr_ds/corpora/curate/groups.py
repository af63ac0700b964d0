"""Assign records to components, which stay in one split, and to groups without mutual negatives.

A component is transitive: two records that share a group of the source, or a query, positive or
passage (equal after normalisation, or near duplicates), are in one component, and so is whatever
shares something with either of them.

A component may be half of a corpus that was made from templates, and a group of that size would
leave hardly any negatives. So groups are not transitive without limit. The records of one group of
the source are always one group, and so are those of equal queries. The records of a cluster of
texts (`clusters.py`) are joined too, the rarest texts first, as long as the group has at most
`MAX_GROUP_SHARE` of the records. A text that more records have, such as "This condition is
inherited in an autosomal recessive pattern", does not join records.

The result does not depend on the order in which records were read.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.clusters import cluster_families
from lbr_ds.corpora.curate.near_duplicates import Comparison, Forest, families
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import NEGATIVE, PASSAGE, POSITIVE, QUERY, Texts, distinct
from lbr_ds.system.progress import Progress

# A shared text joins records into a group of at most this share of all, or of this many records.
MAX_GROUP_SHARE, MAX_SMALL_GROUP = 0.02, 64
_LOW = 0xFFFFFFFF  # the second of two numbers in one of 64 bits
SAME_RECORD = 0.9  # Jaccard index of the word pairs from which on two records are duplicates


def find_families(store: Store, threshold: float, progress: Progress) -> None:
    """Fill `families`: the family of near duplicates of each text, and its cluster in it."""
    with closing(Texts(store.files)) as texts:
        comparison = Comparison(store.files.signatures, threshold, texts)
        every = np.arange(store.texts, dtype=np.int32)
        roots = families(comparison, len(every), progress).roots(every)
        leaders, done = every.copy(), 0
        for pairs in cluster_families(comparison, _families(store, roots)):
            numbers, own = np.array(pairs, np.int32).T
            leaders[numbers] = own
            done += len(pairs)
            progress("cluster near duplicates", done, None)
    store.insert("families", num=every, family=roots, cluster=leaders)


def _families(store: Store, roots: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Yield the texts of each family of two or more, ordered by key; roots: of each text."""
    near = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1)
    store.db.execute("CREATE TEMP TABLE near (num INTEGER, family INTEGER)")
    store.insert("near", num=near, family=roots[near])
    found, numbers = store.arrays(
        "SELECT family, num FROM near JOIN texts USING (num) ORDER BY family, hi, lo"
    )
    store.db.execute("DROP TABLE near")
    starts = np.flatnonzero(np.diff(found, prepend=-1))
    yield from np.split(numbers.astype(np.int64), starts[1:]) if len(starts) else ()


def drop_near_duplicates(store: Store, dropped: Tally) -> None:
    """Drop records that repeat another one with hardly a word changed.

    Among records whose texts belong to the same families, in the order of their ids, a record is
    dropped if its word pairs have a Jaccard index of `SAME_RECORD` with one that stays. A fact does
    not duplicate a pair, nor a record that only evaluates one to train on.
    """
    gone = []
    for seqs in _twins(store):
        stay: list[set[str]] = []
        for seq in seqs.tolist():
            record = store.body(seq)
            runs = shingles(" ".join([record.query, *record.positives, record.text]))
            if any(jaccard(runs, other) >= SAME_RECORD for other in stay):
                gone.append(seq)
                dropped.add("near_duplicate", f"{record.id}: {record.query or record.text}")
            else:
                stay.append(runs)
    store.delete_records(gone)


def _twins(store: Store) -> list[NDArray[np.int32]]:
    """Return the records whose texts are of the same families, by id; the smallest first.

    Records are grouped by two sums of 64-bit hashes of the families and roles of their texts.
    """
    seqs, families = store.links("family")
    starts = np.flatnonzero(np.diff(seqs, prepend=-1))
    shared = np.bincount(families)[families] > 1  # else no record repeats this one
    store.db.execute("CREATE TEMP TABLE maybe (seq INTEGER)")
    store.insert("maybe", seq=seqs[starts[np.logical_and.reduceat(shared, starts)]])
    numbers, found = store.arrays(
        """
        WITH described AS (
            SELECT seq, sum(hash(role, family)) AS one, sum(hash(family, role)) AS other
            FROM maybe JOIN uses USING (seq) JOIN families USING (num) WHERE role < ? GROUP BY seq
        ), repeated AS (
            SELECT seq, id, min(id) OVER same AS first, count(*) OVER same AS size
            FROM described JOIN records USING (seq)
            WINDOW same AS (PARTITION BY one, other, judges, pair IS FALSE)
        )
        SELECT rank() OVER (ORDER BY first), seq FROM repeated WHERE size > 1 ORDER BY first, id""",
        NEGATIVE,
    )
    store.db.execute("DROP TABLE maybe")
    return np.split(found, np.flatnonzero(np.diff(numbers)) + 1) if len(found) else []


def group_records(store: Store, seed: int) -> None:
    """Fill `members`, `components` and `groups`.

    Uses some 25 bytes of memory per use of a text, and 8 per text and record.
    """
    (every,) = store.arrays("SELECT seq FROM records")
    same = store.arrays("""
        SELECT seq, first FROM records JOIN
            (SELECT own_group, min(seq) AS first FROM records WHERE own_group != ''
             GROUP BY own_group) USING (own_group)""")
    components, texts = Forest(store.texts + store.total), np.int32(store.texts)
    seqs, families = store.links("family")
    components.unite_all(texts + seqs, families)
    components.unite_all(*(texts + seqs for seqs in same))
    store.insert(
        "members",
        seq=every,
        component=components.roots(texts + every),
        grp=_groups(store, every, same).roots(every),
    )
    del components
    store.db.execute(f"INSERT INTO groups SELECT grp, label FROM ({_labelled('grp')})")
    store.define("drawn", draws(seed))
    store.db.execute(
        "INSERT INTO components SELECT component, label, drawn(label), size, pairs"
        f" FROM ({_labelled('component')})"
    )


def _labelled(what: str) -> str:
    """Return the query for the groups or components with their labels, sizes and pairs.

    what: "grp" or "component". Most have one record, and need no aggregate of strings.
    """
    sized = f"(SELECT {what}, count(*) AS size FROM members GROUP BY {what})"
    of_size = f"FROM {sized} JOIN members USING ({what}) JOIN records USING (seq) WHERE size"
    return f"""
        SELECT {what}, coalesce(nullif(own_group, ''), 'record:' || id) AS label,
            1 AS size, pair::INTEGER AS pairs {of_size} = 1
        UNION ALL
        SELECT {what}, coalesce(min(nullif(own_group, '')), 'record:' || min(id)),
            count(*), sum(pair) {of_size} > 1 GROUP BY {what}"""


def draws(seed: int) -> Callable[[str], bytes]:
    """Return a function from a name to a random number that does not depend on other names."""
    begun = blake2b(f"{seed}:".encode(), digest_size=16)

    def draw(name: str) -> bytes:
        own = begun.copy()  # faster than a new one
        own.update(name.encode())
        return own.digest()

    return draw


def _groups(store: Store, every: NDArray[np.int32], same: tuple[NDArray[np.int32], ...]) -> Forest:
    """Return the records' groups.

    Args:
        store: The store.
        every: All records.
        same: Pairs of records that have one group of the source.
    """
    forest = Forest(store.total)
    forest.unite_all(*same)
    seqs, queries = store.arrays("SELECT seq, num FROM uses WHERE role = ?", QUERY)
    _unite_same(forest, seqs, queries, store.texts)
    most = max(MAX_SMALL_GROUP, int(MAX_GROUP_SHARE * len(every)))
    sizes = np.bincount(forest.roots(every), minlength=store.total)
    contested = _ties(store, forest, every, sizes, most)
    plain = array("i", sizes.astype(np.int32).tobytes())
    for roots in contested:
        own = {forest.root(root) for root in roots}
        if (whole := sum(plain[root] for root in own)) <= most:
            low = min(own)
            for root in own:
                forest.unite(low, root)
            plain[low] = whole
    return forest


def _unite_same(forest: Forest, nodes: NDArray[Any], keys: NDArray[Any], count: int) -> None:
    """Join the nodes that have the same key; keys are below `count`."""
    one = np.zeros(count, np.int32)
    one[keys] = nodes
    forest.unite_all(nodes, one[keys])


def _ties(
    store: Store, forest: Forest, every: NDArray[np.int32], sizes: NDArray[np.int64], most: int
) -> Iterator[list[int]]:
    """Yield the groups of each cluster of texts that several have, the rarest texts first.

    Those that make no group of more than `most` records, whatever the order, are joined at once.

    Args:
        store: The store.
        forest: The groups so far.
        every: All records.
        sizes: How many records the group of each root has.
        most: How many a group may have.
    """
    seqs, clusters = store.links("cluster")
    several = np.bincount(clusters)[clusters] > 1
    links = distinct((clusters[several].astype(np.int64) << 32) + seqs[several])
    rarity = np.bincount(links >> 32)
    links = distinct((links >> 32 << 32) + forest.roots(links & _LOW))
    clusters, roots = (links >> 32), links & _LOW
    possible = (np.bincount(clusters) > 1) & (np.bincount(clusters, sizes[roots]) <= most)
    clusters, roots = clusters[possible[clusters]], roots[possible[clusters]]
    joined = forest.copy()
    _unite_same(joined, roots, clusters, len(rarity))
    wholes = np.bincount(joined.roots(every), minlength=len(sizes))
    free = wholes[joined.roots(roots)] <= most
    _unite_same(forest, roots[free], clusters[free], len(rarity))
    clusters, roots = clusters[~free], roots[~free]
    starts = np.flatnonzero(np.diff(clusters, prepend=-1, append=-1))
    nums = clusters[starts[:-1]]
    store.db.execute("CREATE TEMP TABLE ties (place INTEGER, num INTEGER, size INTEGER)")
    store.insert("ties", place=np.arange(len(nums)), num=nums, size=rarity[nums])
    (order,) = store.arrays("SELECT place FROM ties JOIN texts USING (num) ORDER BY size, hi, lo")
    store.db.execute("DROP TABLE ties")
    for place in order.tolist():
        yield roots[starts[place] : starts[place + 1]].tolist()


def largest(store: Store) -> tuple[int, str, int]:
    """Return number, label and size of the component with the most records."""
    query = "SELECT component, label, size FROM components ORDER BY size DESC, label LIMIT 1"
    number, label, size = store.rows(query)[0]
    return number, label, size


def most_shared(store: Store, component: int) -> tuple[str, int]:
    """Return the text that most records of a component share, and by how many.

    It explains why a large component is large. Near duplicates count as the text.
    """
    [(family, number)] = store.rows(
        """
        SELECT family, count(DISTINCT seq) AS number
        FROM members JOIN uses USING (seq) JOIN families USING (num)
        WHERE component = ? AND role IN (?, ?, ?)
        GROUP BY family ORDER BY number DESC, family LIMIT 1""",
        component,
        QUERY,
        POSITIVE,
        PASSAGE,
    )
    numbers = store.rows("SELECT num FROM families WHERE family = ?", family)
    return min(store.text(number) for (number,) in numbers), number
