"""Write `curation.json`: what was read, what was dropped and why, and what each split contains."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from lbr_ds.config import SplitConfig
from lbr_ds.corpora.collect import Collected
from lbr_ds.corpora.curate.groups import largest, most_shared
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.curate.tally import Tally
from lbr_ds.corpora.store import NEGATIVE, PASSAGE, POSITIVE, QUERY, Store, Texts
from lbr_ds.instructions import MAX_ROWS, Instructions, Used
from lbr_ds.records import Record

log = logging.getLogger(__name__)
_SAMPLES, _SAMPLE_CHARS = 4, 300
_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_KINDS = {"query": QUERY, "positives": POSITIVE, "negatives": NEGATIVE, "text": PASSAGE}
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
    part = "json_extract(body, '$.{}')"
    source, text, query, document = map(
        part.format, ("source", "text", "instruction", "document_instruction")
    )
    counts = "".join(", sum(split = ?)" for _ in splits)
    rows = store.db.execute(
        f"SELECT {source}, CASE WHEN {text} IS NULL THEN coalesce({query}, '') END,"
        f" coalesce({document}, ''){counts} FROM records JOIN placed USING (seq)"
        " GROUP BY 1, 2, 3 ORDER BY count(*) DESC, min(seq) LIMIT ?",
        (*splits, MAX_ROWS),
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
    looked = store.db.execute(
        "SELECT num, family FROM families JOIN texts USING (num) WHERE family IN"
        " (SELECT family FROM families GROUP BY family HAVING count(*) > 1)"
        " AND num IN (SELECT num FROM uses WHERE role != ?) ORDER BY key LIMIT ?",
        (NEGATIVE, _SAMPLED_TEXTS),
    ).fetchall()
    counts = {"looked_at": 0, "share_a_group": 0}
    with closing(Texts(store.path)) as texts:
        for number, family in looked:
            own, others = shingles(texts(number)), _groups_by_text(store, family)
            groups = others.pop(number)
            for other, their_groups in others.items():
                if jaccard(own, shingles(texts(other))) >= threshold:
                    counts["looked_at"] += 1
                    counts["share_a_group"] += groups == their_groups and len(groups) == 1
    return counts


def _groups_by_text(store: Store, family: int) -> dict[int, set[int]]:
    """Return, for each text of a family, the groups of the records that have it."""
    groups: dict[int, set[int]] = defaultdict(set)
    rows = store.db.execute(
        "SELECT num, grp FROM families JOIN uses USING (num) JOIN members USING (seq)"
        " WHERE family = ? AND role != ?",
        (family, NEGATIVE),
    )
    for number, group in rows:
        groups[number].add(group)
    return groups


def dropped_table(records: Tally, texts: Tally) -> dict[str, Any]:
    """Return dropped records and removed texts by rule, each with up to three examples."""
    return {"dropped_records": records.to_dict(), "dropped_texts": texts.to_dict()}


def split_table(
    store: Store, name: str, records: Sequence[Record], sizes: SplitConfig
) -> dict[str, Any]:
    """Return sizes, sources, lengths in characters and four samples of a split."""
    by_source = store.db.execute(
        "SELECT json_extract(body, '$.source'), count(*) FROM placed JOIN records USING (seq)"
        " WHERE split = ? GROUP BY 1",
        (name,),
    )
    counted = "SELECT count(DISTINCT component) FROM placed WHERE split = ?"
    lengths = {kind: _lengths(store, name, role) for kind, role in _KINDS.items()}
    return {
        "requested": getattr(sizes, name) or None,  # None: gl of protocol knowledge
        "records": len(records),
        "components": store.number(counted, name),
        "groups": store.number(
            "SELECT count(DISTINCT grp) FROM placed JOIN members USING (seq) WHERE split = ?", name
        ),
        "by_source": dict(sorted(by_source)),
        "characters": {kind: quantiles for kind, quantiles in lengths.items() if quantiles},
        "samples": [_sample(record) for record in records[:_SAMPLES]],
    }


def _lengths(store: Store, split: str, role: int) -> dict[str, int]:
    """Return quantiles of the length of one kind of text in a split."""
    part = "FROM uses JOIN placed USING (seq) WHERE split = ? AND role = ?"
    count = store.number(f"SELECT count(*) {part}", split, role)
    if not count:
        return {}
    places = {round(q * (count - 1)) for q in _QUANTILES.values()}
    ordered = store.db.execute(f"SELECT chars {part} ORDER BY chars", (split, role))
    at = {place: chars for place, (chars,) in enumerate(ordered) if place in places}
    return {name: at[round(q * (count - 1))] for name, q in _QUANTILES.items()}


def _sample(record: Record) -> dict[str, Any]:
    """Return a record with long texts cut and at most three of a list."""
    plain: dict[str, Any] = {}
    for name, value in asdict(record).items():
        cut = [value] if isinstance(value, str) else value[:3]
        cut = [one[:_SAMPLE_CHARS] if isinstance(one, str) else one for one in cut]
        if value:
            plain[name] = cut[0] if isinstance(value, str) else cut
    return plain
