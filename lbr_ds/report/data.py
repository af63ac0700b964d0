"""A prepared data folder -> the counts that a reader wants: splits, sources, what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbr_ds.report.reading import read_json

USES = {"gl": "stage 1, learn", "cl": "stage 2, represent", "eval": "held out"}


def read_data(folder: Path | str) -> dict[str, Any]:
    """The folder's curation.json and manifest.json, made short; {} for neither or a URL.

    {"splits": [{"name", "use", "records", "groups", "query_chars", "passage_chars"}],
    "sources": [{"name", "license", "read", "kept"}], "left_out": [{"what", "rule", "count"}],
    "leaks": {pair of splits: texts in both}}; lengths are medians.
    """
    if isinstance(folder, str):
        return {}
    read = {}
    for name in ("manifest", "curation"):
        path = folder / f"{name}.json"
        read[name] = read_json(path) if path.exists() else {}
    counted = read["curation"].get("splits") or read["manifest"].get("splits") or {}
    if not counted:
        return {}
    sources = read["curation"].get("sources") or read["manifest"].get("sources") or []
    return {
        "folder": str(folder),
        "splits": [_split(name, counts) for name, counts in counted.items()],
        "sources": [
            {
                "name": source.get("name"),
                "license": source.get("license"),
                "read": source.get("records_read"),
                "kept": source.get("records_kept"),
            }
            for source in sources
        ],
        "left_out": [
            {"what": what, "rule": rule, "count": tally.get("count")}
            for what in ("records", "texts")
            for rule, tally in (read["curation"].get(f"dropped_{what}") or {}).items()
        ],
        "leaks": read["curation"].get("leaks") or {},
    }


def _split(name: str, counts: dict[str, Any]) -> dict[str, Any]:
    lengths = counts.get("characters") or {}
    return {
        "name": name,
        "use": USES.get(name, ""),
        "records": counts.get("records"),
        "groups": counts.get("components"),
        "query_chars": (lengths.get("query") or {}).get("p50"),
        "passage_chars": (lengths.get("positives") or lengths.get("text") or {}).get("p50"),
    }
