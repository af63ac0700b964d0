"""`curation.json`: what went in, what was left out and why, and what each split holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from lbr_ds.config import SplitConfig
from lbr_ds.corpora.cleaning import Cleaner
from lbr_ds.corpora.collect import Collected
from lbr_ds.corpora.splits import Component
from lbr_ds.records import Record

_SAMPLES, _SAMPLE_CHARS = 3, 300
_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def sources_table(sources: list[dict[str, Any]], collected: Collected) -> list[dict[str, Any]]:
    """Each source's provenance with the records read from it and kept after cleaning."""
    return [
        {**source, "records_read": read, "records_kept": kept}
        for source, read, kept in zip(sources, collected.read, collected.kept, strict=True)
    ]


def components_table(components: list[Component]) -> dict[str, Any]:
    """How many components the cleaned records make, the largest, and what ties it together."""
    largest = max(components, key=lambda component: len(component.records))
    text, shared = largest.most_shared()
    return {
        "count": len(components),
        "largest": len(largest.records),
        "most_shared": text[:_SAMPLE_CHARS],
        "shared_by": shared,
    }


def dropped_table(cleaner: Cleaner) -> dict[str, Any]:
    """Records and single texts left out, by rule, each with up to three examples."""
    return {"dropped_records": cleaner.records.plain(), "dropped_texts": cleaner.texts.plain()}


def splits_table(
    splits: dict[str, list[Record]], components: dict[str, list[Component]], sizes: SplitConfig
) -> dict[str, Any]:
    """Sizes, sources, lengths in characters and three samples of each split."""
    return {
        name: {
            "asked": getattr(sizes, name),
            "records": len(records),
            "components": len(components[name]),
            "by_source": dict(sorted(Counter(record.source for record in records).items())),
            "characters": _lengths(records),
            "samples": [_sample(record) for record in records[:_SAMPLES]],
        }
        for name, records in splits.items()
    }


def _lengths(records: list[Record]) -> dict[str, dict[str, int]]:
    """Quantiles of the length of each kind of text that occurs."""
    kinds = {
        "query": [len(record.query) for record in records if record.query],
        "positives": [len(text) for record in records for text in record.positives],
        "negatives": [len(text) for record in records for text in record.negatives],
        "text": [len(record.text) for record in records if record.text],
    }
    return {kind: _quantiles(sorted(lengths)) for kind, lengths in kinds.items() if lengths}


def _quantiles(lengths: list[int]) -> dict[str, int]:
    return {name: lengths[round(q * (len(lengths) - 1))] for name, q in _QUANTILES.items()}


def _sample(record: Record) -> dict[str, Any]:
    """A record to look at: long texts cut, at most three of a list."""
    plain: dict[str, Any] = {}
    for name, value in asdict(record).items():
        if isinstance(value, str) and value:
            plain[name] = value[:_SAMPLE_CHARS]
        elif value:
            plain[name] = [text[:_SAMPLE_CHARS] for text in value[:3]]
    return plain
