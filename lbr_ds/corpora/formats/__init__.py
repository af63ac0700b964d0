"""The formats of raw corpora that can be read: one file each, all with the same interface.

`interface.py` says how to add one.
"""

from __future__ import annotations

from lbr_ds.corpora.formats import (
    beir,
    columnar,
    delimited,
    icd10cm,
    jsonl,
    obo,
    python_functions,
    text,
)
from lbr_ds.corpora.formats.interface import Format

FORMATS: dict[str, Format] = {
    "jsonl": jsonl.JSONL,
    "csv": delimited.CSV,
    "tsv": delimited.TSV,
    "parquet": columnar.PARQUET,
    "arrow": columnar.ARROW,
    "text": text.TEXT,
    "beir": beir.BEIR,
    "python": python_functions.PYTHON,
    "obo": obo.OBO,
    "icd10cm": icd10cm.ICD10CM,
    "hub": columnar.HUB,
}
