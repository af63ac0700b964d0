"""Write `curation.json`: what was read, what was dropped and why, and what each split contains."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lbr_ds.config import SplitConfig
from lbr_ds.corpora.collect import Collected
from lbr_ds.corpora.curate.groups import largest, most_shared
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import NEGATIVE, PASSAGE, POSITIVE, QUERY
from lbr_ds.instructions import MAX_ROWS, Instructions, Used
from lbr_ds.records import Record

log = logging.getLogger(__name__)
_SAMPLES, _SAMPLE_CHARS = 4, 300
_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_KINDS = {
    "query": QUERY,
    "positives": POSITIVE,
    "negatives": NEGATIVE,
    "text": PASSAGE,
}
_GIANT = 0.1  # a component with a larger share of the records is reported in the log
_SAMPLED_TEXTS = 32  # texts whose near duplicates are counted


def sources_table(sources: list[dict[str, Any]], collected: Collected) -> list[dict[str, Any]]:
    """Return each source's provenance with the records read and those kept after cleaning."""
    return [
        {**source, "records_read": read, "records_kept": kept}
        for source, read, kept in zip(sources, collected.read, collected.kept, strict=True)
    ]


def instructions(store: Store, splits: Sequence[str]) -> Instructions:
    """Return which source uses which instructions, the most frequent first."""
    counts = "".join(", sum(split = ?)" for _ in splits)
    rows = store.rows(
        f"SELECT source, instruction, document_instruction{counts}"
        " FROM records JOIN placed USING (seq)"
        " GROUP BY 1, 2, 3 ORDER BY count(*) DESC, min(seq) LIMIT ?",
        *splits,
        MAX_ROWS,
    )
    used = tuple(
        Used(row[0], row[1], row[2], {s: n for s, n in zip(splits, row[3:], strict=True) if n})
        for row in rows
    )
    placed = store.number("SELECT count(*) FROM placed WHERE split IS NOT NULL")
    return Instructions(used, placed - sum(sum(row.records.values()) for row in used))


def components_table(store: Store) -> dict[str, Any]:
    """Return the number of components, the largest, and what its records share.

    `tied_records` counts the records that are in a component with others.
    """
    number, label, size = largest(store)
    text, shared = most_shared(store, number)
    total = store.number("SELECT sum(size) FROM components")
    if size > max(_GIANT * total, 100):
        log.warning(
            "%d of %d records are linked (%s) and must stay in one split; %d of them contain %r",
            size,
            total,
            label,
            shared,
            text[:60],
        )
    return {
        "count": store.number("SELECT count(*) FROM components"),
        "largest": size,
        "most_shared": text[:_SAMPLE_CHARS],
        "shared_by": shared,
        "tied_records": store.number("SELECT sum(size) FROM components WHERE size > 1"),
        "near_duplicate_texts": store.number("SELECT count(*) FROM families WHERE num != family"),
    }


def groups_table(store: Store, threshold: float) -> dict[str, Any]:
    """Return the number of groups, the size of the largest, and how well they work.

    `near_pairs` counts, on a sample, the pairs of near duplicates whose records share a group.
    """
    sizes = "(SELECT count(*) AS size FROM members GROUP BY grp)"
    return {
        "count": store.number("SELECT count(*) FROM groups"),
        "largest": store.number(f"SELECT max(size) FROM {sizes}"),
        "near_pairs": _near_pairs(store, threshold),
    }


def _near_pairs(store: Store, threshold: float) -> dict[str, Any]:
    """Count pairs of near duplicates, and those whose records share a group: no negatives.

    It covers the `_SAMPLED_TEXTS` texts of the smallest keys and all their near duplicates.
    """
    looked = store.rows(
        """
        SELECT num, family FROM texts JOIN families USING (num)
            SEMI JOIN (SELECT family FROM families GROUP BY family HAVING count(*) > 1)
                USING (family)
            SEMI JOIN (SELECT num FROM uses WHERE role < ?) USING (num)
        ORDER BY hi, lo LIMIT ?""",
        NEGATIVE,
        _SAMPLED_TEXTS,
    )
    groups = _groups_by_text(store, [family for _, family in looked])
    counts = {"looked_at": 0, "share_a_group": 0}
    for number, family in looked:
        own, others = shingles(store.text(number)), groups[family]
        for other, theirs in others.items():
            if other != number and jaccard(own, shingles(store.text(other))) >= threshold:
                counts["looked_at"] += 1
                counts["share_a_group"] += others[number] == theirs and len(theirs) == 1
    return counts


def _groups_by_text(store: Store, families: list[int]) -> dict[int, dict[int, set[int]]]:
    """Return, for each text of these families, the groups of the records that have it."""
    groups: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    rows = store.rows(
        "SELECT DISTINCT family, num, grp FROM families JOIN uses USING (num) JOIN members"
        " USING (seq) WHERE list_contains(?, family) AND role < ?",
        families,
        NEGATIVE,
    )
    for family, number, group in rows:
        groups[family][number].add(group)
    return groups


def dropped_table(records: Tally, texts: Tally) -> dict[str, Any]:
    """Return dropped records and removed texts by rule, each with up to three examples."""
    return {"dropped_records": records.to_dict(), "dropped_texts": texts.to_dict()}


def split_tables(
    store: Store, splits: Mapping[str, Sequence[Record]], sizes: SplitConfig
) -> dict[str, Any]:
    """Return sizes, sources, lengths in characters and four samples of each split."""
    sources = store.rows(
        "SELECT split, source, count(*) FROM placed JOIN records USING (seq)"
        " GROUP BY ALL ORDER BY source"
    )
    lengths = store.rows(
        "SELECT split, role, chars, count(*) FROM placed JOIN uses USING (seq)"
        " GROUP BY ALL ORDER BY chars"
    )
    return {
        name: {
            "requested": getattr(sizes, name) or None,  # None: gl of protocol knowledge
            "records": len(records),
            "components": _distinct(store, "component FROM placed", name),
            "groups": _distinct(store, "grp FROM placed JOIN members USING (seq)", name),
            "by_source": {source: n for split, source, n in sources if split == name},
            "characters": {
                kind: quantiles
                for kind, role in _KINDS.items()
                if (quantiles := _quantiles(lengths, name, role))
            },
            "samples": [_sample(record) for record in records[:_SAMPLES]],
        }
        for name, records in splits.items()
    }


def _distinct(store: Store, part: str, split: str) -> int:
    """Return the number of different values that `part` (COLUMN FROM ...) selects in a split."""
    return store.number(f"SELECT count(*) FROM (SELECT DISTINCT {part} WHERE split = ?)", split)


def _quantiles(lengths: list[tuple[str, int, int, int]], name: str, role: int) -> dict[str, int]:
    """Return quantiles of the length of one kind of text in a split; lengths: see the query."""
    counts = [(chars, n) for split, of, chars, n in lengths if (split, of) == (name, role)]
    if not counts:
        return {}
    ends = np.cumsum([n for _, n in counts])
    places = {name: round(q * (int(ends[-1]) - 1)) for name, q in _QUANTILES.items()}
    return {
        name: counts[int(np.searchsorted(ends, place, "right"))][0]
        for name, place in places.items()
    }


def _sample(record: Record) -> dict[str, Any]:
    """Return a record with long texts cut and at most three of a list."""
    plain: dict[str, Any] = {}
    for name, value in asdict(record).items():
        cut = [value] if isinstance(value, str) else value[:3]
        cut = [one[:_SAMPLE_CHARS] if isinstance(one, str) else one for one in cut]
        if value:
            plain[name] = cut[0] if isinstance(value, str) else cut
    return plain
