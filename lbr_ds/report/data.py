"""Read the counts of a prepared data folder: splits, sources, what was dropped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lbr_ds.config import STAGES
from lbr_ds.errors import DataError, EnvironmentProblem
from lbr_ds.report.reading import read_json
from lbr_ds.shards.remote import Remote
from lbr_ds.system.urls import CACHE_GIB, public_url

log = logging.getLogger(__name__)

USES = {
    **{stage.split: stage.title for stage in STAGES.values()},
    "eval": "held out",
    "control": "control: in no training split",
}


def read_data(folder: Path | str) -> dict[str, Any]:
    """Summarise the folder's curation.json and manifest.json; {} if it has neither.

    A URL is asked once, with the tries that shards get; what cannot be reached is {} too.

    {"splits": [{"name", "use", "records", "groups", "by_source": {source: records},
    "query_chars", "passage_chars"}],
    "sources": [{"name", "license", "read", "kept"}], "left_out": [{"what", "rule", "count"}],
    "leaks": {pair of splits: texts in both}, "synthesis": {"passages", "written", "kept", "model",
    "dropped": {reason: count}} or {}, "protocol"}; lengths are medians.
    """
    try:
        read = {name: _read(folder, f"{name}.json") for name in ("manifest", "curation")}
    except EnvironmentProblem as error:
        log.warning("%s", error)
        return {}
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
        "synthesis": _synthesis(folder, read["manifest"]),
        "protocol": f"{read['curation'].get('protocol', 'random')} split",
    }


def _read(folder: Path | str, name: str) -> dict[str, Any]:
    """One file of the folder; {} when it is not there."""
    if isinstance(folder, Path):
        return read_json(folder / name) if (folder / name).exists() else {}
    found = Remote(folder, CACHE_GIB).read(name)
    try:
        plain = json.loads(found) if found is not None else {}
    except ValueError:
        raise DataError(f"{public_url(folder)}/{name}: not JSON") from None
    return plain if isinstance(plain, dict) else {}


def _synthesis(folder: Path | str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what `lbr-ds synthesize` did; {} for data with queries of its sources alone."""
    if all(source.get("format") != "synthesize" for source in manifest.get("sources") or []):
        return {}
    audit = _read(folder, "synthesis.json")
    dropped = {reason: n for reason, n in (audit.get("dropped") or {}).items() if n}
    return {
        "passages": audit.get("passages"),
        "written": audit.get("queries_written"),
        "kept": audit.get("kept"),
        "model": (audit.get("settings") or {}).get("model") or "",
        "dropped": dropped,
    }


def _split(name: str, counts: dict[str, Any]) -> dict[str, Any]:
    lengths = counts.get("characters") or {}
    return {
        "name": name,
        "use": USES.get(name, ""),
        "records": counts.get("records"),
        "groups": counts.get("groups", counts.get("components")),
        "by_source": counts.get("by_source") or {},
        "query_chars": (lengths.get("query") or {}).get("p50"),
        "passage_chars": (lengths.get("positives") or lengths.get("text") or {}).get("p50"),
    }
